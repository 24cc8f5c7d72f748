"""pool_last_token: so little work that the launch decides."""

from collections.abc import Iterator

import torch

from bench.common import Case, Work, candidates, compiled, upcast
from bench.shapes import D, dtype_of, randn
from minivlm2vec_kernels import ops, torch_ops

EPS = 1e-5


def cases(device: torch.device, sweep: bool = False) -> Iterator[Case]:
    for sequences, length in [(1, 30), (64, 30), (32, 777)] if device.type == "cuda" else [(4, 30)]:
        dtype = dtype_of(device)
        moved = D * (sequences * (dtype.itemsize + 4) + dtype.itemsize)
        build = lambda s=sequences, n=length: work(s, n, device, sweep)  # noqa: E731
        yield Case("pool_last_token", f"{sequences} of {length}", dtype, 0, moved, build)


def sweep(device: torch.device) -> Iterator[Case]:
    return cases(device, sweep=True)


def work(sequences: int, length: int, device: torch.device, sweep: bool) -> Work:
    x, weight = randn(sequences * length, D, device=device), randn(D, device=device)
    cu_seqlens = torch.arange(sequences + 1, device=device, dtype=torch.int32) * length
    providers = {"torch": lambda: torch_ops.pool_last_token(x, cu_seqlens, weight, EPS)}
    if device.type == "cuda":
        providers["triton"] = lambda: ops.pool_last_token(x, cu_seqlens, weight, EPS, backend="triton")
        if sweep:
            from minivlm2vec_kernels.pooling_triton import SETTINGS

            settings = {f"w{warps}": warps for warps in (1, 2, 4, 8, 16)}
            providers |= candidates(providers["triton"], SETTINGS, 8192, settings)
        else:
            function = compiled(torch_ops.pool_last_token)
            providers["torch.compile"] = lambda: function(x, cu_seqlens, weight, EPS)
    return Work(providers, lambda: torch_ops.pool_last_token(*upcast(x, cu_seqlens, weight), EPS))
