"""rms_norm and add_rms_norm at the decoder's width, and their gradients."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.common import Case, Provider, Work, backward_work, candidates, compiled, rows_by_warps, upcast
from bench.shapes import D, decoder_rows, dtype_of, randn
from minivlm2vec_kernels import ops, torch_ops

EPS = 1e-5


def cases(device: torch.device) -> Iterator[Case]:
    for rows in decoder_rows(device):
        yield case("rms_norm", rows, device)
        yield case("add_rms_norm", rows, device)
        yield backward_case("rms_norm", rows, device)
        yield backward_case("add_rms_norm", rows, device)


def case(kernel: str, rows: int, device: torch.device, sweep: bool = False) -> Case:
    dtype = dtype_of(device)
    passes = 2 if kernel == "rms_norm" else 4  # over the rows
    build = lambda: work(kernel, rows, device, sweep)  # noqa: E731
    return Case(kernel, f"{rows} x {D}", dtype, 0, (passes * rows + 1) * D * dtype.itemsize, build)


def work(kernel: str, rows: int, device: torch.device, sweep: bool) -> Work:
    x, residual, weight = (randn(n, D, device=device) for n in (rows, rows, 1))
    tensors = (x, weight[0]) if kernel == "rms_norm" else (x, residual, weight[0])
    op, plain = getattr(ops, kernel), getattr(torch_ops, kernel)
    providers = {"torch": lambda: plain(*tensors, EPS)}
    if device.type == "cuda":
        providers["triton"] = lambda: op(*tensors, EPS, backend="triton")
        providers |= with_candidates(providers["triton"]) if sweep else baselines(kernel, plain, tensors)
    return Work(providers, lambda: plain(*upcast(*tensors), EPS))


def baselines(kernel, plain, tensors) -> dict:
    function = compiled(plain)
    found = {"torch.compile": lambda: function(*tensors, EPS)}
    if kernel == "rms_norm":
        found["F.rms_norm"] = lambda: F.rms_norm(tensors[0], (D,), tensors[1], EPS)
    return found


def backward_case(kernel: str, rows: int, device: torch.device, sweep: bool = False) -> Case:
    dtype = dtype_of(device)
    passes = 3 if kernel == "rms_norm" else 4  # the output's gradient(s) and what was normalised in, one gradient out
    build = lambda: work_backward(kernel, rows, device, sweep)  # noqa: E731
    return Case(f"{kernel}_backward", f"{rows} x {D}", dtype, 0, (passes * rows + 2) * D * dtype.itemsize, build)


def work_backward(kernel: str, rows: int, device: torch.device, sweep: bool) -> Work:
    x, residual, weight = (randn(n, D, device=device) for n in (rows, rows, 1))
    tensors = (x, weight[0]) if kernel == "rms_norm" else (x, residual, weight[0])
    op, plain = getattr(ops, kernel), getattr(torch_ops, kernel)
    found = {"torch": lambda *tensors: plain(*tensors, EPS)}
    if device.type == "cuda":
        found["triton"] = lambda *tensors: op(*tensors, EPS, backend="triton")
        found |= {} if sweep else {"torch.compile": compiled(found["torch"])}
        if kernel == "rms_norm":
            found["F.rms_norm"] = lambda x, weight: F.rms_norm(x, (D,), weight, EPS)
    work = backward_work(found, tensors)
    if sweep:
        work.providers.update(with_candidates(work.providers["triton"], backward=True))
    return work


def sweep(device: torch.device) -> Iterator[Case]:
    for rows in decoder_rows(device):
        yield case("add_rms_norm", rows, device, sweep=True)
        yield backward_case("add_rms_norm", rows, device, sweep=True)


def with_candidates(op: Provider, backward: bool = False) -> dict[str, Provider]:
    from minivlm2vec_kernels.launch import ROW_SETTINGS
    from minivlm2vec_kernels.rms_norm_triton import BACKWARD_SETTINGS

    table = BACKWARD_SETTINGS if backward else ROW_SETTINGS
    return candidates(op, table, 4096, rows_by_warps((1, 2, 4), (2, 4, 8, 16)))
