"""Sizes of VLM2Vec-Full that the benches share. On a CPU: few rows, same widths.

D decoder width, FF its MLP, N heads of H; V tower width, VF its MLP; a crop is 577 tower tokens.
"""

import torch

D, FF, N, H = 3072, 8192, 32, 96
V, VF, CROP = 1024, 4096, 577


def decoder_rows(device: torch.device) -> list[int]:
    """Packed tokens of 64 queries of 30, of a middling batch, and of 32 images at 4 crops."""
    return [1920, 8192, 24864] if device.type == "cuda" else [30]


def tower_rows(device: torch.device) -> list[int]:
    """One image, 8 images and 32 images at 4 crops and a global view."""
    return [CROP * crops for crops in ((5, 40, 160) if device.type == "cuda" else (1,))]


def gemm_rows(device: torch.device) -> list[int]:
    return [512, 1024, 1920, 4096, 8192, 16384, 24864] if device.type == "cuda" else [30]


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def randn(*size: int, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    """Random numbers: zeros would raise clocks and cost less power."""
    return (torch.randn(size, device=device) * scale).to(dtype_of(device))
