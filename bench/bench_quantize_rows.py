"""quantize_rows at the widths of the decoder's matrices; with the norm before it in one kernel, and in two."""

from collections.abc import Iterator

import torch

from bench.common import Case, Work, candidates, compiled, rows_by_warps
from bench.shapes import FF, D, decoder_rows, dtype_of, randn
from minivlm2vec_kernels import ops, torch_ops

EPS = 1e-5


def cases(device: torch.device) -> Iterator[Case]:
    for rows in decoder_rows(device):
        for width in (D, FF):
            yield case(rows, width, device)
        dtype = dtype_of(device)
        size = rows * (D * (dtype.itemsize + 1) + 4) + D * dtype.itemsize
        yield Case("rms_norm_quantize", f"{rows} x {D}", dtype, 0, size, lambda r=rows: norm_work(r, D, device))


def sweep(device: torch.device) -> Iterator[Case]:
    """At the MLP's width; the decoder's is in rms_norm's sweep."""
    for rows in decoder_rows(device):
        yield case(rows, FF, device, sweep=True)


def case(rows: int, width: int, device: torch.device, sweep: bool = False) -> Case:
    dtype = dtype_of(device)
    size = rows * (width * (dtype.itemsize + 1) + 4)
    return Case("quantize_rows", f"{rows} x {width}", dtype, 0, size, lambda: work(rows, width, device, sweep))


def work(rows: int, width: int, device: torch.device, sweep: bool) -> Work:
    x = randn(rows, width, device=device)
    providers = {"torch": lambda: torch_ops.quantize_rows(x)}
    if device.type == "cuda":
        providers["triton"] = lambda: ops.quantize_rows(x, backend="triton")
        if sweep:
            from minivlm2vec_kernels.launch import ROW_SETTINGS

            settings = rows_by_warps((1, 2), (2, 4, 8, 16))
            providers |= candidates(providers["triton"], ROW_SETTINGS, 8192, settings)
        else:
            function = compiled(torch_ops.quantize_rows)
            providers["torch.compile"] = lambda: function(x)
    return Work(providers, lambda: torch_ops.quantize_rows(x.float()))


def norm_work(rows: int, width: int, device: torch.device) -> Work:
    x, weight = randn(rows, width, device=device), randn(width, device=device)
    providers = {"torch": lambda: torch_ops.rms_norm_quantize(x, weight, EPS)}
    if device.type == "cuda":
        function = compiled(torch_ops.rms_norm_quantize)
        providers["triton"] = lambda: ops.rms_norm_quantize(x, weight, EPS, backend="triton")
        providers["two kernels"] = lambda: ops.quantize_rows(
            ops.rms_norm(x, weight, EPS, backend="triton"), backend="triton"
        )
        providers["torch.compile"] = lambda: function(x, weight, EPS)
    return Work(providers, lambda: torch_ops.rms_norm_quantize(x.float(), weight.float(), EPS))
