"""quantize_rows at the widths of the decoder's matrices."""

from collections.abc import Iterator

import torch

from bench.common import Case, Work, compiled
from bench.shapes import FF, D, decoder_rows, dtype_of, randn
from minivlm2vec_kernels import ops, torch_ops


def cases(device: torch.device) -> Iterator[Case]:
    for rows in decoder_rows(device):
        for width in (D, FF):
            dtype = dtype_of(device)
            size = rows * (width * (dtype.itemsize + 1) + 4)
            yield Case("quantize_rows", f"{rows} x {width}", dtype, 0, size, lambda r=rows, w=width: work(r, w, device))


def work(rows: int, width: int, device: torch.device) -> Work:
    x = randn(rows, width, device=device)
    providers = {"torch": lambda: torch_ops.quantize_rows(x)}
    if device.type == "cuda":
        function = compiled(torch_ops.quantize_rows)
        providers["triton"] = lambda: ops.quantize_rows(x, backend="triton")
        providers["torch.compile"] = lambda: function(x)
    return Work(providers, lambda: torch_ops.quantize_rows(x.float()))
