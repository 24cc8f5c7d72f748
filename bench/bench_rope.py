"""rope on q and k, views of the decoder's qkv buffer; and its gradient."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.common import Case, Work, backward_work, compiled, upcast
from bench.shapes import H, N, decoder_rows, dtype_of, randn
from minivlm2vec_kernels import ops, reference


def cases(device: torch.device) -> Iterator[Case]:
    for rows in decoder_rows(device):
        dtype = dtype_of(device)
        moved = rows * (4 * N * H * dtype.itemsize + 2 * (H // 2) * 4)  # q, k in and out; cos, sin float32
        name = f"{rows} x (32+32) x 96"
        yield Case("rope", name, dtype, 0, moved, lambda rows=rows: work(rows, device))
        yield Case("rope_backward", name, dtype, 0, moved, lambda rows=rows: work_backward(rows, device))


def inputs(rows: int, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """qkv, and views of it and rotations: q, k [rows, N, H], cos, sin [rows, H / 2] float32."""
    qkv = randn(rows, 3 * N * H, device=device)
    angles = torch.randn(rows, H // 2, device=device)
    q, k, _ = qkv.unflatten(1, (3, N, H)).unbind(1)
    return qkv, (q, k, angles.cos(), angles.sin())


def work(rows: int, device: torch.device) -> Work:
    qkv, tensors = inputs(rows, device)
    q, k, *_ = tensors
    providers = {"torch": lambda: reference.rope(*tensors)}
    if device.type == "cuda":
        own_q, own_k, _ = qkv.clone().unflatten(1, (3, N, H)).unbind(1)  # rotated further at every run
        function = compiled(reference.rope)
        providers["triton"] = lambda: ops.rope(own_q, own_k, *tensors[2:], backend="triton")
        providers["torch.compile"] = lambda: function(*tensors)
    cos, sin = (t.to(q.dtype) for t in tensors[2:])
    return Work(providers, lambda: reference.rope(*upcast(q, k, cos, sin)))


def work_backward(rows: int, device: torch.device) -> Work:
    _, (q, k, cos, sin) = inputs(rows, device)
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    found = {"torch": lambda q, k: reference.rope(q, k, cos, sin)}
    if device.type == "cuda":
        found["triton"] = lambda q, k: ops.rope(q, k, cos, sin, backend="triton")
        found["torch.compile"] = compiled(found["torch"])
    return backward_work(found, (q, k))
