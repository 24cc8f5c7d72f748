"""PackedBatch: the one type between processor and model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Grid = tuple[int, int]
Batch = TypeVar("Batch", bound="PackedBatch")


@dataclass(frozen=True)
class PackedBatch:
    """B sequences laid end to end, T tokens in all, and the images that they show. No padding anywhere.

    Fields:
        input_ids: [T] int64. A place that an image token fills holds 0.
        position_ids: [T] int64, from 0 in every sequence.
        cu_seqlens: [B + 1] int32; sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1].
        lengths: the B lengths, on the host.
        crops: [sum h * w, S, S, 3] uint8, image after image, row-major.
        grids: (h, w) of each image: rows and columns of crops.
        image_index: [n] int64, where in 0 .. T - 1 image tokens stand.
        image_source: [n] int64, which token of the images (in the order of `grids`) stands there.
        max_seqlen: the greatest length, on the host.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    crops: Tensor
    grids: tuple[Grid, ...]
    image_index: Tensor
    image_source: Tensor
    max_seqlen: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_seqlen", max(self.lengths, default=0))

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def to(self: Batch, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self: Batch) -> Batch:
        """Page-locked copies, from which `to(device, non_blocking=True)` does not wait."""
        return self._map(Tensor.pin_memory)

    def _map(self: Batch, f: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {
            x.name: f(value) for x in fields(self) if isinstance(value := getattr(self, x.name), Tensor)
        }
        return replace(self, **tensors)


def num_image_tokens(grid: Grid, merged_per_side: int) -> int:
    """Tokens of an image: merged patches of the crops and the global view, one separator between them, and one
    at the end of each row. 757 for a (2, 2) grid with 12 merged patches per side."""
    h, w = grid
    m = merged_per_side
    return (h * w + 1) * m * m + 1 + (h + 1) * m


def cumulative(lengths: Sequence[int]) -> Tensor:
    """[B + 1] int32 of where each sequence begins, and where the last ends."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
