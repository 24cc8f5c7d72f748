"""The machine and its software, as far as they decide what is right and how fast. Nothing here names its owner."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from minivlm2vec_kernels import cards

from .privacy import anonymous
from .report import Fact

PACKAGES = ("triton", "safetensors", "tokenizers", "pillow", "numpy", "einops", "huggingface-hub")
FEATURES = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16",
            "asimd": "NEON", "sve": "SVE", "bf16": "bf16"}  # fmt: skip
VARIABLES = ("MINIVLM2VEC_", "TRITON_", "CUDA_", "PYTORCH_", "NVIDIA_TF32", "HIP_", "ROCR_", "HSA_", "OMP_", "MKL_",
             "TORCH", "CUBLAS")  # fmt: skip
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH")  # of a variable's name: its value is not shown
QUERY = {"driver_version": "driver {}", "clocks.sm": "{} MHz", "clocks.max.sm": "of at most {} MHz",
         "clocks.mem": "memory {} MHz", "power.limit": "power limit {} W", "temperature.gpu": "{} C"}  # fmt: skip
NOT_READ = "not read"
BF16_FROM, FP8_FROM = (8, 0), (8, 9)  # NVIDIA's compute capabilities


def facts(device: torch.device) -> Iterator[Fact]:
    """Versions, processor, device, driver and clocks, and variables that change how kernels are chosen or compiled.
    What cannot be read raises nothing: an examination goes on without it."""
    yield read("Python", lambda: f"{platform.python_version()} {platform.python_implementation()}, {platform.system()} "
                                 f"{platform.machine()}")  # fmt: skip
    yield read("torch", lambda: f"{torch.__version__} ({_build()})")
    for package in PACKAGES:
        yield read(package, partial(version_of, package))
    yield read("processor", lambda: f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    yield read("its features", features)
    yield read("its memory", main_memory)
    if device.type == "cuda":
        for name, value in CARD.items():
            yield read(name, partial(value, device))
    elif torch.cuda.is_available():
        yield Fact("device", f"{device}, by request")
    else:
        yield Fact("device", "Apple GPU" if device.type == "mps" else "the processor; torch finds no GPU")
    for name in sorted(os.environ):
        if name.startswith(VARIABLES):
            secret = SECRET.search(name.upper()) and os.environ[name]
            yield Fact(name, "set, not shown" if secret else anonymous(os.environ[name], 60) or '""')


def read(name: str, value: Callable[[], str]) -> Fact:
    """Drivers and libraries that do not match raise errors of their own, cuDNN's version for one."""
    try:
        return Fact(name, value())
    except Exception as e:
        return Fact(name, anonymous(f"{NOT_READ}: {type(e).__name__}: {e}", 200))


def _build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"


def version_of(package: str) -> str:
    try:
        return metadata.version(package) or NOT_READ  # None of one whose metadata is damaged
    except metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    found = _line_of_cpuinfo("model name") or platform.processor() or platform.machine()
    return found if found else NOT_READ


def features() -> str:
    """AVX-512, bf16 and the like, and the set of instructions that torch takes."""
    flags = set((_line_of_cpuinfo("flags") or _line_of_cpuinfo("Features")).split())
    named = [words for flag, words in FEATURES.items() if flag in flags]
    return f"{', '.join(named) if flags else NOT_READ}; torch takes {torch.backends.cpu.get_cpu_capability()}"


def _line_of_cpuinfo(name: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def main_memory() -> str:
    if not hasattr(os, "sysconf") or sys.platform == "darwin":
        return NOT_READ
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError):
        return NOT_READ


def _device(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}, one of {torch.cuda.device_count()}"


def _architecture(device: torch.device) -> str:
    p = torch.cuda.get_device_properties(device)
    kind = getattr(p, "gcnArchName", "AMD") if torch.version.hip else f"compute capability {p.major}.{p.minor}"
    shared = getattr(p, "shared_memory_per_block_optin", None)
    words = f"{kind}, {p.multi_processor_count} multiprocessors"
    return words + (f", {shared / 1024:.0f} KB of shared memory for a program" if shared else "")


def _memory(device: torch.device) -> str:
    free, total = torch.cuda.mem_get_info(device)
    return f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"


def _cudnn(device: torch.device) -> str:
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return str(version) if version else NOT_READ


def clocks(device: torch.device) -> str:
    """Driver, clocks, power limit and temperature at this moment: from nvidia-smi, else what torch can read."""
    program = shutil.which("nvidia-smi")
    if program:
        command = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits", *_which_card(device)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            values = [v.strip() for v in done.stdout.splitlines()[0].split(",")]
            known = [words.format(v) for words, v in zip(QUERY.values(), values, strict=True) if v[:1] not in ("[", "")]
            return ", ".join(known) or NOT_READ
        except (OSError, subprocess.SubprocessError, IndexError, ValueError):
            pass
    try:  # through pynvml or amdsmi, where one is installed
        return f"driver {NOT_READ}, {torch.cuda.clock_rate(device)} MHz, {torch.cuda.temperature(device)} C"
    except Exception:  # each of these packages raises its own
        return NOT_READ


CARD = {
    "device": _device,
    "architecture": _architecture,
    "its memory": _memory,
    "cuDNN": _cudnn,
    "driver, clocks": clocks,
}


def _which_card(device: torch.device) -> list[str]:
    """nvidia-smi counts cards that CUDA_VISIBLE_DEVICES hides."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return [] if uuid is None else ["-i", f"GPU-{uuid}"]


def capability(device: torch.device) -> tuple[int, int] | None:
    """NVIDIA's compute capability; None of another device, AMD's cards among them."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def refusal(device: torch.device) -> str:
    """Why no kernel can run on a CUDA device that is older than the oldest Triton knows; "" where they can."""
    if (own := capability(device)) is None or own >= cards.OLDEST:
        return ""
    return f"{cards.of_nvidia(own).name} is older than what Triton compiles for; torch's operators are examined instead"


def dtypes(device: torch.device) -> tuple[list[torch.dtype], dict[torch.dtype, str]]:
    """What the device computes in, and why not in the others."""
    all_of_them = [torch.float32, torch.float16, torch.bfloat16]
    if (own := capability(device)) is not None and own < BF16_FROM:
        why = f"this device has no bfloat16 (compute capability {own[0]}.{own[1]}, it begins with 8.0)"
        return all_of_them[:2], {torch.bfloat16: why}
    return all_of_them, {}


def computes(device: torch.device) -> str:
    """Empty where torch's own sums on the device are right; else what is wrong. Raises what torch raises."""
    numbers = torch.arange(1, 65, device=device)
    if (total := numbers.sum().item()) != 2080:
        return f"1 + 2 + … + 64 is {total} on {device}, it should be 2080"
    for dtype in dtypes(device)[0]:
        ones = torch.ones(64, 64, dtype=dtype, device=device)
        product = (ones @ ones).float().cpu()
        if not bool((product == 64).all()):
            name = str(dtype).removeprefix("torch.")
            return f"a product of ones in {name} is {product[0, 0].item():g} on {device}, it should be 64"
    return ""
