"""Compile every kernel ahead of time for each capability of `cards.py` and read what came out. Needs no GPU.

    python -m tests.kernels.aot                    compare all specs with tests/kernels/aot/table.json
    python -m tests.kernels.aot --write            compile all specs and write the table for this Triton version
    python -m tests.kernels.aot --only attention   only kernels whose name contains the word

A kernel file `x_triton.py` registers its compile specs in `tests/kernels/aot/specs/x.py`: a function `specs()` that
returns a list of `Spec`. Modules there are found by themselves. Kernels must not be under TRITON_INTERPRET=1.

What is read per (Triton version, kernel, config, arch):
    registers   per thread (cuobjdump --dump-resource-usage)
    shared      bytes per block (Triton's metadata)
    spills      local-memory instructions in the SASS (LDL, STL); must be 0
    blocks      that fit on a multiprocessor at a time; must not fall, nor below what a spec promises on sm_90
    built       instructions of the PTX that write descriptors; must be 0
    chained     products chained through a loop-carried accumulator; must be 0 on sm_100 (see `chained.py`)
    ahead       whole iterations between a descriptor's load and its wait, the least of all loops; see `ahead.py`
    wgmma       HGMMA instructions in the SASS; where a spec promises them, their count on sm_90 must not fall
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.kernels.aot import ahead, cards
from tests.kernels.aot.chained import chained_dots

TABLE = Path(__file__).with_name("table.json")
ARCHS = tuple(cards.LIMITS)
LOCAL = re.compile(r"\b(?:LDL|STL)\b")  # instructions that read or write local memory
DTYPES = ("bf16", "fp32")  # float16 is compiled as bfloat16 is; `every_card` tries it


@dataclass(frozen=True)
class Spec:
    """One kernel with one set of constants, as its launcher would compile it.

    `types` holds Triton's type names of the run-time arguments ("*bf16", "i32", "i64", "fp32"). Pointers and
    integers count as divisible by 16 (aligned tensors, and strides of real models) unless in `unaligned`.
    """

    kernel: str  # "attention_triton.attention_kernel", inside minivlm2vec_kernels
    config: str  # free text, unique within the kernel
    types: dict[str, str | tuple[str, ...]]
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 2
    unaligned: frozenset[str] = frozenset()
    archs: tuple[int, ...] = ARCHS
    wgmma: bool = False  # must use wgmma on sm_90
    blocks: int = 1  # that must fit on a multiprocessor of sm_90
    ahead: int = 0  # iterations that loads through descriptors must be ahead of their waits on sm_90
    quick: bool = False  # part of the default tests; the others only of this command
    options: dict[str, object] = field(default_factory=dict)  # further compiler options, such as maxnreg

    def key(self, arch: int | str) -> str:
        return f"{self.kernel}[{self.config}] {arch if isinstance(arch, str) else f'sm_{arch}'}"


Measured = dict[str, int]


def width_of(block: int) -> int:
    """A width that takes this block of a table of rows: the decoder's, or the block's own."""
    return 3072 if block == 4096 else block


def in_dtype(spec: Spec, dtype: str) -> Spec:
    """A spec that is written in bfloat16 (or, of attention, in float32 already), in another dtype."""
    if dtype == "bf16":
        return spec

    def other(x: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return x.replace("bf16", dtype) if isinstance(x, str) else x

    types = {name: other(x) for name, x in spec.types.items()}
    config = f"{dtype} {spec.config.removeprefix('bf16 ').removeprefix('fp32 ')}"
    return replace(spec, types=types, config=config, quick=False, wgmma=spec.wgmma and dtype == "fp16")


def all_specs(only: str = "", quick: bool = False) -> list[Spec]:
    modules = sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).with_name("specs"))]))
    specs = [s for m in modules for s in importlib.import_module(f"{__name__}.specs.{m}").specs()]
    keys = [s.key(0) for s in specs]
    assert len(set(keys)) == len(keys), f"two specs of one name: {sorted(k for k in keys if keys.count(k) > 1)}"
    return [s for s in specs if only in s.kernel and (s.quick or not quick)]


def measure(spec: Spec, arch: int) -> Measured:
    """Compiles `spec` for `arch` and reads the cubin."""
    compiled = compile_kernel(spec, arch)
    ptx = compiled.asm["ptx"]
    usage, sass = (dump(compiled.asm["cubin"], what) for what in ("--dump-resource-usage", "--dump-sass"))
    registers, shared = int(re.search(r"\bREG:(\d+)", usage).group(1)), compiled.metadata.shared
    return {
        "registers": registers,
        "shared": shared,
        "blocks": cards.LIMITS[arch].blocks(registers, shared, spec.num_warps),
        "built": len(re.findall(r"^\s*(?:@\S+\s+)?tensormap\.", ptx, re.M)),
        "ahead": ahead.least(ptx),
        "chained": len(chained_dots(compiled.asm["ttir"])),
        "spills": len(LOCAL.findall(sass)),
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
    }


def compile_kernel(spec: Spec, arch: int | str):
    """arch: of NVIDIA 90, of AMD "gfx942"."""
    import triton
    from triton.backends.compiler import GPUTarget

    if isinstance(arch, str):
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    else:
        target = GPUTarget("cuda", arch, 32)

    module, name = spec.kernel.split(".")
    kernel = getattr(importlib.import_module(f"minivlm2vec_kernels.{module}"), name)
    given = spec.types.keys() | spec.constants.keys()
    if given != set(kernel.arg_names):
        raise ValueError(f"{spec.key(arch)}: arguments differ from the kernel's: {given ^ set(kernel.arg_names)}")
    signature = {a: spec.types.get(a, "constexpr") for a in kernel.arg_names}
    aligned = [i for i, a in enumerate(kernel.arg_names) if _may_align(signature[a]) and a not in spec.unaligned]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=dict(spec.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True, **spec.options}
    return triton.compile(source, target=target, options=options)


def _may_align(type_name: str | tuple[str, ...]) -> bool:
    return type_name[0] == "*" or type_name in ("i32", "i64")


def spills(cubin: bytes) -> int:
    """Instructions that read or write local memory."""
    return len(LOCAL.findall(dump(cubin, "--dump-sass")))


def dump(cubin: bytes, what: str) -> str:
    """Text of cuobjdump, which Triton's wheel ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], check=True, capture_output=True, text=True).stdout


Said = Callable[[str, Measured, int, int], object]


def measure_all(specs: list[Spec], said: Said | None = None) -> dict[str, Measured]:
    """Measures specs x archs; the compiler spends its time outside the GIL, so threads help. `said` is called with
    each key and what was measured, how many that makes, and how many there are."""
    jobs = [(s, arch) for s in specs for arch in s.archs]
    found = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for (spec, arch), measured in zip(jobs, pool.map(lambda job: measure(*job), jobs), strict=True):
            found[spec.key(arch)] = measured
            if said:
                said(spec.key(arch), measured, len(found), len(jobs))
    return found


def problems(specs: list[Spec], measured: dict[str, Measured], table: dict[str, Measured]) -> list[str]:
    """What is wrong with `measured`: spills, missing wgmma, fewer blocks a multiprocessor than in the table.
    Empty if all is well."""
    found = []
    for spec in specs:
        for arch in spec.archs:
            key = spec.key(arch)
            found += [f"{key}: {p}" for p in _problems(spec, arch, measured[key], table.get(key))]
    return found


def _problems(spec: Spec, arch: int, now: Measured, before: Measured | None) -> list[str]:
    found = []
    if now["spills"]:
        found.append(f"{now['spills']} spill instructions")
    if spec.wgmma and arch == 90 and not now["wgmma"]:
        found.append("no wgmma")
    if arch == 90 and now["blocks"] < spec.blocks:
        found.append(f"{now['blocks']} blocks a multiprocessor, {spec.blocks} promised")
    if arch == 90 and now["ahead"] < spec.ahead:
        found.append(f"loads are {now['ahead']} iterations ahead of their waits, {spec.ahead} promised")
    if now["built"]:
        found.append(f"descriptors are made in every program: {now['built']} instructions")
    if arch // 10 == 10 and now["chained"]:
        found.append("dots are chained through a loop-carried accumulator (Triton #10821)")
    if now["blocks"] < 1:
        found.append(f"does not fit: {now['shared']} bytes of shared memory")
    if before is None:
        return found
    if now["wgmma"] < before["wgmma"]:
        found.append(f"wgmma fell from {before['wgmma']} to {now['wgmma']}")
    blocks = cards.LIMITS[arch].blocks(before["registers"], before["shared"], spec.num_warps)
    if now["blocks"] < blocks:
        found.append(f"blocks a multiprocessor fell from {blocks} to {now['blocks']}")
    if now["ahead"] < before.get("ahead", 0):
        found.append(f"loads came closer to their waits, from {before['ahead']} iterations to {now['ahead']}")
    return found


def triton_version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def read_table() -> dict[str, dict[str, Measured]]:
    """{Triton version: {key: measured}}."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write_table(measured: dict[str, Measured], only: str) -> None:
    """Replaces this Triton version's entries (those matching `only`) and leaves other versions alone."""
    table = read_table()
    kept = {k: v for k, v in table.get(triton_version(), {}).items() if only not in k.split("[")[0]}
    table[triton_version()] = kept | measured
    blocks = []
    for version in sorted(table):
        rows = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(table[version].items())]
        blocks.append(f'  "{version}": {{\n' + ",\n".join(rows) + "\n  }")
    TABLE.write_text("{\n" + ",\n".join(blocks) + "\n}\n")  # one line an entry: readable in a diff
