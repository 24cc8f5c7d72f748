"""merge_crops of the tower's features, a view that leaves the class token out."""

from collections.abc import Iterator

import torch

from bench.common import Case, Work, candidates, compiled, rows_by_warps, upcast
from bench.shapes import CROP, V, dtype_of, randn
from minivlm2vec_kernels import ops, torch_ops

P = 24
MIXED = [(2, 2), (1, 3), (2, 1), (1, 1), (4, 1), (1, 2), (3, 1), (1, 4)]


def cases(device: torch.device, sweep: bool = False) -> Iterator[Case]:
    batches = {"1 image 2x2": [(2, 2)], "32 images 2x2": [(2, 2)] * 32, "32 images mixed": MIXED * 4}
    for name, grids in batches.items() if device.type == "cuda" else [("1 image 1x1", [(1, 1)])]:
        yield case(name, grids, device, sweep)


def sweep(device: torch.device) -> Iterator[Case]:
    return cases(device, sweep=True)


def case(name: str, grids: list[tuple[int, int]], device: torch.device, sweep: bool) -> Case:
    dtype, m = dtype_of(device), P // 2
    merged = sum((h * w + 1) * m * m for h, w in grids)
    separators = sum((h + 1) * m + 1 for h, w in grids)
    moved = (2 * merged + separators + 2) * 4 * V * dtype.itemsize
    return Case("merge_crops", name, dtype, 0, moved, lambda: work(grids, device, sweep))


def work(grids: list[tuple[int, int]], device: torch.device, sweep: bool) -> Work:
    crops = sum(1 + h * w for h, w in grids)
    features = randn(crops, CROP, V, device=device)[:, 1:]
    sub_GN, glb_GN = randn(1, 1, 1, 4 * V, device=device), randn(1, 1, 4 * V, device=device)
    providers = {"torch": lambda: torch_ops.merge_crops(features, grids, sub_GN, glb_GN)}
    if device.type == "cuda":
        function = compiled(torch_ops.merge_crops)
        providers["triton"] = lambda: ops.merge_crops(features, grids, sub_GN, glb_GN, backend="triton")
        if sweep:
            from minivlm2vec_kernels.merge_crops_triton import SETTINGS

            settings = rows_by_warps((1, 2, 4, 8), (2, 4, 8), "BR")
            providers |= candidates(providers["triton"], SETTINGS, 4096, settings)
        elif len(set(grids)) == 1:  # unrolled over many different images it takes minutes to compile
            providers["torch.compile"] = lambda: function(features, grids, sub_GN, glb_GN)

    def exact():
        wide, sub, glb = upcast(features, sub_GN, glb_GN)
        return torch_ops.merge_crops(wide, grids, sub, glb)

    return Work(providers, exact)
