"""silu_mul and its gradient at the decoder's MLP, bias + quick_gelu at the tower's."""

from collections.abc import Iterator

import torch

from bench.common import Case, Provider, Work, backward_work, candidates, compiled, rows_by_warps, upcast
from bench.shapes import FF, VF, decoder_rows, dtype_of, randn, tower_rows
from minivlm2vec_kernels import ops, torch_ops


def cases(device: torch.device, sweep: bool = False) -> Iterator[Case]:
    size = dtype_of(device).itemsize
    for rows in decoder_rows(device):
        moved = 3 * rows * FF * size
        yield case("silu_mul", rows, FF, moved, device, sweep, lambda rows=rows: (rows, 2 * FF))
        yield backward_case(rows, device, sweep)
    for rows in tower_rows(device):
        moved = (2 * rows + 1) * VF * size
        yield case("quick_gelu", rows, VF, moved, device, sweep, lambda rows=rows: (rows, VF))


def case(kernel, rows, features, moved, device, sweep, shape) -> Case:
    build = lambda: work(kernel, shape(), device, sweep)  # noqa: E731
    return Case(kernel, f"{rows} x {features}", dtype_of(device), 0, moved, build)


def work(kernel: str, shape: tuple[int, int], device: torch.device, sweep: bool) -> Work:
    x = randn(*shape, device=device)
    tensors = (x,) if kernel == "silu_mul" else (x, randn(shape[1], device=device))
    op, plain = getattr(ops, kernel), getattr(torch_ops, kernel)
    providers = {"torch": lambda: plain(*tensors)}
    if device.type == "cuda":
        providers["triton"] = lambda: op(*tensors, backend="triton")
        if sweep:
            providers |= with_candidates(kernel, providers["triton"])
        else:
            function = compiled(plain)
            providers["torch.compile"] = lambda: function(*tensors)
    return Work(providers, lambda: plain(*upcast(*tensors)))


def backward_case(rows: int, device: torch.device, sweep: bool) -> Case:
    dtype = dtype_of(device)
    moved = 5 * rows * FF * dtype.itemsize
    build = lambda: work_backward(randn(rows, 2 * FF, device=device), sweep)  # noqa: E731
    return Case("silu_mul_backward", f"{rows} x {FF}", dtype, 0, moved, build)


def work_backward(x: torch.Tensor, sweep: bool) -> Work:
    found = {"torch": torch_ops.silu_mul}
    if x.is_cuda:
        found["triton"] = lambda x: ops.silu_mul(x, backend="triton")
        found |= {} if sweep else {"torch.compile": compiled(torch_ops.silu_mul)}
    work = backward_work(found, (x,))
    if sweep:
        work.providers.update(with_candidates("silu_mul_backward", work.providers["triton"]))
    return work


def sweep(device: torch.device) -> Iterator[Case]:
    return cases(device, sweep=True)


def with_candidates(kernel: str, op: Provider) -> dict[str, Provider]:
    from minivlm2vec_kernels.activation_triton import SETTINGS

    return candidates(op, SETTINGS, kernel, rows_by_warps((1024, 2048, 4096), (2, 4, 8), "BF"))
