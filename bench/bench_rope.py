"""rope on q and k, views of the decoder's qkv buffer."""

from collections.abc import Iterator

import torch

from bench.common import Case, Work, compiled, upcast
from bench.shapes import H, N, decoder_rows, dtype_of, randn
from minivlm2vec_kernels import ops, reference


def cases(device: torch.device) -> Iterator[Case]:
    for rows in decoder_rows(device):
        dtype = dtype_of(device)
        moved = rows * (4 * N * H * dtype.itemsize + 2 * (H // 2) * 4)  # q, k in and out; cos, sin float32
        yield Case("rope", f"{rows} x (32+32) x 96", dtype, 0, moved, lambda rows=rows: work(rows, device))


def work(rows: int, device: torch.device) -> Work:
    qkv = randn(rows, 3 * N * H, device=device)
    angles = torch.randn(rows, H // 2, device=device)
    q, k, _ = qkv.unflatten(1, (3, N, H)).unbind(1)
    tensors = (q, k, angles.cos(), angles.sin())
    providers = {"torch": lambda: reference.rope(*tensors)}
    if device.type == "cuda":
        own_q, own_k, _ = qkv.clone().unflatten(1, (3, N, H)).unbind(1)  # rotated further at every run
        function = compiled(reference.rope)
        providers["triton"] = lambda: ops.rope(own_q, own_k, *tensors[2:], backend="triton")
        providers["torch.compile"] = lambda: function(*tensors)
    cos, sin = (t.to(q.dtype) for t in tensors[2:])
    return Work(providers, lambda: reference.rope(*upcast(q, k, cos, sin)))
