"""Products fused with an activation, against cuBLAS and a separate kernel; the plain ones of cuBLAS."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bench.common import Case, Work, compiled, upcast
from bench.shapes import FF, VF, D, V, dtype_of, gemm_rows, randn, tower_rows
from minivlm2vec_kernels import ops, torch_ops

PLAIN = {"decoder qkv": (3 * D, D), "decoder o": (D, D), "decoder down": (D, FF)}
PLAIN |= {"tower qkv": (3 * V, V), "tower out": (V, V), "tower fc2": (V, VF)}  # N, K


def cases(device: torch.device) -> Iterator[Case]:
    for rows in tower_rows(device):
        yield case("linear_quick_gelu", rows, VF, V, fc1, device)
    for rows in gemm_rows(device):
        yield case("linear_silu_mul", rows, 2 * FF, D, gate_up, device)
    for name, (n, k) in PLAIN.items():
        for rows in tower_rows(device) if name.startswith("tower") else gemm_rows(device):
            yield case(f"linear ({name})", rows, n, k, plain, device)


def sweep(device: torch.device) -> Iterator[Case]:
    for rows in tower_rows(device):
        yield case("linear_quick_gelu", rows, VF, V, fc1_candidates, device)
    for rows in gemm_rows(device):
        yield case("linear_silu_mul", rows, 2 * FF, D, gate_up_candidates, device)


def case(kernel: str, rows: int, n: int, k: int, work: Callable[..., Work], device: torch.device) -> Case:
    dtype = dtype_of(device)
    outputs = n // 2 if kernel == "linear_silu_mul" else n
    moved = (rows * k + n * k + rows * outputs) * dtype.itemsize
    build = lambda: work(rows, n, k, device)  # noqa: E731
    name = f"{rows} x {n} x {k}"
    return Case(kernel, name, dtype, 2 * rows * n * k, moved, build, memory_bound=False)


def fc1(rows: int, n: int, k: int, device: torch.device) -> Work:
    x, weight = randn(rows, k, device=device), randn(n, k, device=device, scale=k**-0.5)
    bias = randn(n, device=device)
    op = lambda **kw: ops.linear_quick_gelu(x, weight, bias, backend="triton", **kw)  # noqa: E731
    providers = {"torch": lambda: torch_ops.linear_quick_gelu(x, weight, bias)}
    if device.type == "cuda":
        function = compiled(torch_ops.linear_quick_gelu)
        providers["triton"] = lambda: op(fused=True)
        providers["cuBLAS + triton"] = lambda: op(fused=False)
        providers["torch.compile"] = lambda: function(x, weight, bias)
    return Work(providers, lambda: torch_ops.linear_quick_gelu(*upcast(x, weight, bias)))


def gate_up(rows: int, n: int, k: int, device: torch.device) -> Work:
    x, weight = randn(rows, k, device=device), randn(n, k, device=device, scale=k**-0.5)
    op = lambda **kw: ops.linear_silu_mul(x, weight, backend="triton", **kw)  # noqa: E731
    providers = {"torch": lambda: torch_ops.linear_silu_mul(x, weight)}
    if device.type == "cuda":
        function = compiled(torch_ops.linear_silu_mul)
        providers["triton"] = lambda: op(fused=True)
        providers["cuBLAS + triton"] = lambda: op(fused=False)
        providers["torch.compile"] = lambda: function(x, weight)
    return Work(providers, lambda: torch_ops.linear_silu_mul(*upcast(x, weight)))


def plain(rows: int, n: int, k: int, device: torch.device) -> Work:
    """cuBLAS alone: the bulk of the model, which the fused kernels are measured against."""
    x, weight = randn(rows, k, device=device), randn(n, k, device=device, scale=k**-0.5)
    return Work({"torch": lambda: F.linear(x, weight)}, lambda: F.linear(*upcast(x, weight)))


def fc1_candidates(rows: int, n: int, k: int, device: torch.device) -> Work:
    from minivlm2vec_kernels.linear_triton import run_quick_gelu

    x, weight = randn(rows, k, device=device), randn(n, k, device=device, scale=k**-0.5)
    bias, out = randn(n, device=device), torch.empty(rows, n, device=device, dtype=x.dtype)
    providers = {
        "torch": lambda: torch_ops.linear_quick_gelu(x, weight, bias),
        "cuBLAS + triton": lambda: ops.linear_quick_gelu(x, weight, bias, fused=False, backend="triton"),
    }
    providers |= tiles("quick_gelu", lambda *t: run_quick_gelu(x, weight, out, bias, *t), x, out)
    return Work(providers, lambda: torch_ops.linear_quick_gelu(*upcast(x, weight, bias)))


def gate_up_candidates(rows: int, n: int, k: int, device: torch.device) -> Work:
    from minivlm2vec_kernels.linear_triton import run_silu_mul

    x, weight = randn(rows, k, device=device), randn(n, k, device=device, scale=k**-0.5)
    out = torch.empty(rows, n // 2, device=device, dtype=x.dtype)
    providers = {
        "torch": lambda: torch_ops.linear_silu_mul(x, weight),
        "cuBLAS + triton": lambda: ops.linear_silu_mul(x, weight, fused=False, backend="triton"),
    }
    providers |= tiles("silu_mul", lambda *t: run_silu_mul(x, weight, out, *t), x, out)
    return Work(providers, lambda: torch_ops.linear_silu_mul(*upcast(x, weight)))


def tiles(kernel: str, run: Callable, x: torch.Tensor, out: torch.Tensor) -> dict:
    from minivlm2vec_kernels.linear_triton import CANDIDATES, can_use_tma

    def one(candidate, tma):
        def call():
            run(candidate, tma)
            return out

        return call

    paths = ["tma", "pointer"] if can_use_tma(x) else ["pointer"]
    return {
        f"{path} {t.BM}x{t.BN}x{t.BK} w{t.warps} s{t.stages} r{t.resident}": one(t, path == "tma")
        for path in paths
        for t in CANDIDATES[kernel, path]
    }
