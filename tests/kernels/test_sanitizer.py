"""Every kernel under NVIDIA's compute-sanitizer: no access out of bounds, no race, no read of unset memory."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from triton.runtime import KernelInterface

from tests.kernels import every_kernel

ROOT = Path(__file__).parents[2]
TOOLS = {
    "memcheck": ["--report-api-errors", "no"],  # torch asks the driver for functions that it need not have
    "racecheck": [],
    "initcheck": [],
}
SUMMARY = re.compile(
    r"^=+ (?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards? displayed)\b", re.MULTILINE
)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", TOOLS)
def test_gpu_no_kernel_is_reported(tool):
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not here; it comes with the CUDA toolkit")
    command = [
        sanitizer,
        "--tool",
        tool,
        *TOOLS[tool],
        "--error-exitcode",
        "99",
        sys.executable,
        "-m",
        every_kernel.__name__,
    ]
    # Without torch's cache of memory each tensor is an allocation of its own, whose end the tool knows.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and reports(done.stdout) == 0, done.stdout[-6000:]


def reports(output: str) -> int:
    """How many errors or hazards a tool's summary counts. Raises ValueError where it has none: then nothing was
    checked."""
    found = SUMMARY.findall(output)
    if not found:
        raise ValueError(f"compute-sanitizer gave no summary: {output[-2000:]}")
    return sum(int(errors or hazards) for errors, hazards in found)


@pytest.mark.parametrize(
    ("summary", "count"),
    [("ERROR SUMMARY: 0 errors", 0), ("ERROR SUMMARY: 1 error", 1), ("ERROR SUMMARY: 12 errors", 12),
     ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0),
     ("RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)", 3)],
)  # fmt: skip
def test_summaries(summary, count):
    assert reports(f"========= COMPUTE-SANITIZER\nrms_norm\n========= {summary}\n") == count


def test_no_summary_is_no_success():
    with pytest.raises(ValueError, match="no summary"):
        reports("========= Error: No attachable process found. compute-sanitizer timed-out.\n")


def test_every_kernel_is_launched(monkeypatch, capsys):
    """In the interpreter, or on the card, without the tool."""
    kernels, launched = {}, set()
    for path in (ROOT / "kernels/minivlm2vec_kernels").glob("*_triton.py"):
        for name, value in vars(importlib.import_module(f"minivlm2vec_kernels.{path.stem}")).items():
            if isinstance(value, KernelInterface) and name.endswith("_kernel"):
                kernels[name] = value
    assert len(kernels) >= 12
    for name, kernel in kernels.items():
        monkeypatch.setattr(kernel, "run", recording(kernel.run, name, launched))
    every_kernel.main()
    assert launched == kernels.keys()
    assert len(capsys.readouterr().out.splitlines()) >= 30


def recording(run, name: str, launched: set[str]):
    def call(*args, **kwargs):
        launched.add(name)
        return run(*args, **kwargs)

    return call
