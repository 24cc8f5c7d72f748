"""What several test files share."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]


def close(name: str, ours: Tensor, expected: Tensor, atol: float) -> None:
    """Max abs error at most atol; the observed one is printed (pytest -s, or on failure)."""
    assert ours.shape == expected.shape, f"{name}: {list(ours.shape)} and {list(expected.shape)}"
    error = float((ours.float() - expected.float()).abs().max()) if ours.numel() else 0.0
    print(f"{name}: max abs error {error:.2g} (allowed {atol:.0e})")
    assert error <= atol, f"{name}: {error:.3g} > {atol:.0e}"


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fills every parameter with numbers that make each of them matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            z = torch.randn(p.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * z)
            elif p.ndim == 1:
                p.copy_(0.1 * z)
            else:
                p.copy_(z * p[0].numel() ** -0.5)
    return module


def copy_parameters(theirs: nn.Module, ours: nn.Module, rename: Callable[[str], tuple[str, int] | None]) -> None:
    """Copies by name; `rename` gives our name and which part of a fused matrix it is, or None to leave it out."""
    filled = set()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            target = rename(name)
            if target is None:
                continue
            parameter, part = ours.get_parameter(target[0]), target[1]
            rows = value.shape[0]
            parameter[part * rows : (part + 1) * rows].copy_(value)
            filled.add(target[0])
    missing = {n for n, _ in ours.named_parameters()} - filled
    assert not missing, missing


def compiling_environment() -> dict[str, str]:
    """For a process of its own that compiles kernels: TRITON_INTERPRET=1, set for the other tests, forbids that."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return env | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), env.get("PYTHONPATH", "")])}
