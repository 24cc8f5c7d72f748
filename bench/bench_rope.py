"""rope and rope_ on q and k, views of the decoder's qkv buffer; and the gradient of rope."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.common import Case, Outputs, Provider, Work, backward_work, candidates, compiled, upcast
from bench.shapes import H, N, decoder_rows, dtype_of, randn
from minivlm2vec_kernels import ops, torch_ops


def cases(device: torch.device, sweep: bool = False) -> Iterator[Case]:
    for rows in decoder_rows(device):
        dtype = dtype_of(device)
        moved = rows * (4 * N * H * dtype.itemsize + 2 * (H // 2) * 4)  # q, k in and out; cos, sin float32
        name = f"{rows} x (32+32) x 96"
        for kernel in ("rope", "rope_"):
            if kernel == "rope" or not sweep:  # a candidate in place would turn what another has turned
                yield Case(kernel, name, dtype, 0, moved, lambda k=kernel, rows=rows: work(k, rows, device, sweep))
        if not sweep:
            yield Case("rope_backward", name, dtype, 0, moved, lambda rows=rows: work_backward(rows, device))


def sweep(device: torch.device) -> Iterator[Case]:
    return cases(device, sweep=True)


def inputs(rows: int, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """qkv, and views of it and rotations: q, k [rows, N, H], cos, sin [rows, H / 2] float32."""
    qkv = randn(rows, 3 * N * H, device=device)
    angles = torch.randn(rows, H // 2, device=device)
    q, k, _ = qkv.unflatten(1, (3, N, H)).unbind(1)
    return qkv, (q, k, angles.cos(), angles.sin())


def work(kernel: str, rows: int, device: torch.device, sweep: bool) -> Work:
    qkv, (q, k, cos, sin) = inputs(rows, device)
    op, plain = getattr(ops, kernel), getattr(torch_ops, kernel)
    own = iter([qkv.clone().unflatten(1, (3, N, H)).unbind(1)[:2] for _ in range(3)])  # rope_ turns them at every run
    providers: dict[str, Provider] = {"torch": partial(plain, *next(own), cos, sin)}
    if device.type == "cuda":
        providers["triton"] = partial(op, *next(own), cos, sin, backend="triton")
        if sweep:
            providers["triton"] = anew(providers["triton"])
            providers |= with_candidates(providers["triton"])
        else:
            providers["torch.compile"] = partial(compiled(plain), *next(own), cos, sin)
    return Work(providers, lambda: torch_ops.rope(*upcast(q, k, cos.to(q.dtype), sin.to(q.dtype))))


def anew(op: Provider) -> Provider:
    """The launcher remembers its settings: it forgets them before and after."""
    from minivlm2vec_kernels.rope_triton import settings

    def call() -> Outputs:
        settings.cache_clear()
        try:
            return op()
        finally:
            settings.cache_clear()

    return call


def with_candidates(op: Provider) -> dict[str, Provider]:
    from minivlm2vec_kernels.rope_triton import SETTINGS

    return candidates(op, SETTINGS, 16384, {f"w{warps}": warps for warps in (1, 2, 4, 8, 16)})


def work_backward(rows: int, device: torch.device) -> Work:
    _, (q, k, cos, sin) = inputs(rows, device)
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    found = {"torch": lambda q, k: torch_ops.rope(q, k, cos, sin)}
    if device.type == "cuda":
        found["triton"] = lambda q, k: ops.rope(q, k, cos, sin, backend="triton")
        found["torch.compile"] = compiled(found["torch"])
    return backward_work(found, (q, k))
