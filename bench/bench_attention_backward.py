"""Attention's gradient by q, k and v: the decoder's (causal, 32 heads of 96) and the tower's (full, 16 heads of 64).

Problems and providers are bench_attention's; the graphs are made outside the timing. FLOPs are those of five
products, 2.5 times forward's: what a pass computes again does not count. --sweep times other tiles of each pass.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.bench_attention import (
    CPU_PROBLEMS,
    GPU_PROBLEMS,
    Inputs,
    Problem,
    all_providers,
    make_inputs,
    moved_elements,
    table,
    useful_flops,
)
from bench.common import OURS, REFERENCE, Case, Provider, Work, backward_work, candidates
from bench.shapes import dtype_of


def cases(device: torch.device, sweep: bool = False) -> Iterator[Case]:
    suffix = f" {table()}" if sweep else ""
    for p in GPU_PROBLEMS if device.type == "cuda" else CPU_PROBLEMS:
        yield Case(
            kernel=f"attention_backward {'causal' if p.causal else 'full'} {p.head_dim}{suffix}",
            name=p.name,
            dtype=dtype_of(device),
            flops=2.5 * useful_flops(p),
            bytes=2 * moved_elements(p) * dtype_of(device).itemsize,  # q, k, v, out and the gradient of each
            build=partial(build, p, device, sweep),
            memory_bound=p.last_only,
        )


def sweep(device: torch.device) -> Iterator[Case]:
    yield from cases(device, sweep=True)


def build(p: Problem, device: torch.device, sweep: bool) -> Work:
    x = make_inputs(p, device)
    equal = len(set(p.lengths)) == 1
    names = [REFERENCE, OURS] if sweep else [n for n in all_providers(p, x) if equal or not n.startswith("SDPA")]
    work = backward_work({name: partial(by_name, name, p, x) for name in names}, (x.q, x.k, x.v))
    if sweep:
        work.providers.update(tile_providers(work.providers[OURS], p.head_dim))
    return work


def by_name(name: str, p: Problem, x: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One of bench_attention's providers as a function of q, k and v. SDPA's padding would become a part of the
    graph, so that it is asked only where lengths are equal and nothing is padded."""
    return all_providers(p, x._replace(q=q, k=k, v=v))[name]()


def tile_providers(ours: Provider, H: int) -> dict[str, Provider]:
    """Of the pass dq, and of dkv, every tile; on a small card of "both", which have one table there."""
    from minivlm2vec_kernels import attention_backward_triton as kernel

    shapes = [(32, 32, 4), (32, 64, 4), (32, 64, 8), (64, 32, 4), (64, 64, 4), (64, 64, 8), (32, 128, 8), (128, 32, 8)]
    tiles = [kernel.Tile(*shape, stages) for shape in shapes for stages in (1, 2, 3)]
    found: dict[str, Provider] = {}
    for pass_, rows in ({"both": kernel.SMALL_TILES} if table() == "small" else kernel.TILES).items():
        widest = next(widest for widest in rows if widest >= H)
        settings = {f"{pass_} {t.BM}x{t.BN} w{t.warps} s{t.stages}": t for t in tiles}
        found |= candidates(ours, rows, widest, settings)
    return found
