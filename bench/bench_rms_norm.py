"""rms_norm and add_rms_norm at the decoder's width."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.common import Case, Work, compiled, entry, upcast
from bench.shapes import D, decoder_rows, dtype_of, randn
from minivlm2vec_kernels import ops, reference

EPS = 1e-5


def cases(device: torch.device) -> Iterator[Case]:
    for rows in decoder_rows(device):
        yield case("rms_norm", rows, device)
        yield case("add_rms_norm", rows, device)


def case(kernel: str, rows: int, device: torch.device, sweep: bool = False) -> Case:
    dtype = dtype_of(device)
    passes = 2 if kernel == "rms_norm" else 4  # over the rows
    build = lambda: work(kernel, rows, device, sweep)  # noqa: E731
    return Case(kernel, f"{rows} x {D}", dtype, 0, (passes * rows + 1) * D * dtype.itemsize, build)


def work(kernel: str, rows: int, device: torch.device, sweep: bool) -> Work:
    x, residual, weight = (randn(n, D, device=device) for n in (rows, rows, 1))
    tensors = (x, weight[0]) if kernel == "rms_norm" else (x, residual, weight[0])
    op, plain = getattr(ops, kernel), getattr(reference, kernel)
    providers = {"torch": lambda: plain(*tensors, EPS)}
    if device.type == "cuda":
        providers["triton"] = lambda: op(*tensors, EPS, backend="triton")
        providers |= candidates(providers["triton"]) if sweep else baselines(kernel, plain, tensors)
    return Work(providers, lambda: plain(*upcast(*tensors), EPS))


def baselines(kernel, plain, tensors) -> dict:
    function = compiled(plain)
    found = {"torch.compile": lambda: function(*tensors, EPS)}
    if kernel == "rms_norm":
        found["F.rms_norm"] = lambda: F.rms_norm(tensors[0], (D,), tensors[1], EPS)
    return found


def sweep(device: torch.device) -> Iterator[Case]:
    for rows in decoder_rows(device):
        yield case("add_rms_norm", rows, device, sweep=True)


def candidates(op) -> dict:
    from minivlm2vec_kernels import rms_norm_triton

    def with_settings(setting):
        def call():
            with entry(rms_norm_triton.SETTINGS, 4096, setting):
                return op()

        return call

    settings = [(BM, warps) for BM in (1, 2, 4) for warps in (2, 4, 8, 16)]
    return {f"BM{BM} w{warps}": with_settings((BM, warps)) for BM, warps in settings}
