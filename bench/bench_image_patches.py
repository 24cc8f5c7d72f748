"""image_patches of uint8 crops, global views included."""

from collections.abc import Iterator

import torch

from bench.common import Case, Work, candidates, rows_by_warps
from bench.shapes import dtype_of
from minivlm2vec_kernels import ops, torch_ops

S, PATCH = 336, 14
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def cases(device: torch.device, sweep: bool = False) -> Iterator[Case]:
    batches = {"1 image 2x2": [(2, 2)], "32 images 2x2": [(2, 2)] * 32, "16 images 4x4": [(4, 4)] * 16}
    batches["32 images 1x3"] = [(1, 3)] * 32
    for name, grids in batches.items() if device.type == "cuda" else [("1 image 1x1", [(1, 1)])]:
        dtype, crops = dtype_of(device), sum(h * w for h, w in grids)
        moved = S * S * 3 * (crops + (crops + len(grids)) * dtype.itemsize)
        yield Case("image_patches", name, dtype, 0, moved, lambda grids=grids: work(grids, device, sweep))


def sweep(device: torch.device) -> Iterator[Case]:
    return cases(device, sweep=True)


def work(grids: list[tuple[int, int]], device: torch.device, sweep: bool) -> Work:
    crops = torch.randint(0, 256, (sum(h * w for h, w in grids), S, S, 3), dtype=torch.uint8, device=device)
    mean, std, dtype = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device), dtype_of(device)
    providers = {"torch": lambda: torch_ops.image_patches(crops, grids, mean, std, PATCH, dtype)}
    if device.type == "cuda":
        providers["triton"] = lambda: ops.image_patches(crops, grids, mean, std, PATCH, dtype, backend="triton")
        if sweep:
            from minivlm2vec_kernels.image_patches_triton import SETTINGS

            settings = rows_by_warps((256, 512, 1024, 2048), (2, 4, 8), "BO")
            providers |= candidates(providers["triton"], SETTINGS, "image_patches", settings)
    return Work(providers, lambda: torch_ops.image_patches(crops, grids, mean, std, PATCH, torch.float32))
