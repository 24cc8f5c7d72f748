"""layer_norm, add_layer_norm and layer_norm_shift_ at the tower's width."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.common import Case, Provider, Work, candidates, compiled, rows_by_warps, upcast
from bench.shapes import V, dtype_of, randn, tower_rows
from minivlm2vec_kernels import ops, torch_ops

EPS = 1e-5


def cases(device: torch.device) -> Iterator[Case]:
    for rows in tower_rows(device):
        yield case("layer_norm", rows, device)
        yield case("layer_norm_shift_", rows, device)
        yield case("add_layer_norm", rows, device)


PASSES = {"layer_norm": 2, "layer_norm_shift_": 3, "add_layer_norm": 4}  # over the rows


def case(kernel: str, rows: int, device: torch.device, sweep: bool = False) -> Case:
    dtype = dtype_of(device)
    build = lambda: work(kernel, rows, device, sweep)  # noqa: E731
    return Case(kernel, f"{rows} x {V}", dtype, 0, (PASSES[kernel] * rows + 2) * V * dtype.itemsize, build)


def work(kernel: str, rows: int, device: torch.device, sweep: bool) -> Work:
    x, residual, weight, bias = (randn(n, V, device=device) for n in (rows, rows, 1, 1))
    between = {"layer_norm": (), "layer_norm_shift_": (bias[0],), "add_layer_norm": (residual,)}[kernel]
    tensors = (x, *between, weight[0], bias[0])
    op, plain = getattr(ops, kernel), getattr(torch_ops, kernel)
    own = iter([(x.clone(), *tensors[1:]) for _ in range(3)])  # layer_norm_shift_ writes over x
    providers: dict[str, Provider] = {"torch": partial(plain, *next(own), EPS)}
    if device.type == "cuda":
        providers["triton"] = partial(op, *next(own), EPS, backend="triton")
        if sweep:
            providers |= with_candidates(providers["triton"])
        else:
            function = compiled(plain)
            providers["torch.compile"] = partial(function, *next(own), EPS)
    return Work(providers, lambda: plain(*upcast(*tensors), EPS))


def sweep(device: torch.device) -> Iterator[Case]:
    for rows in tower_rows(device):
        yield case("add_layer_norm", rows, device, sweep=True)


def with_candidates(op: Provider) -> dict[str, Provider]:
    from minivlm2vec_kernels.launch import ROW_SETTINGS

    return candidates(op, ROW_SETTINGS, 1024, rows_by_warps((1, 2, 4, 8), (1, 2, 4, 8)))
