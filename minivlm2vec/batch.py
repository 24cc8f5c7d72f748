"""PackedBatch: the one type between processor and model."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

Grid = tuple[int, int]


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
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    crops: Tensor
    grids: tuple[Grid, ...]
    image_index: Tensor
    image_source: Tensor

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedBatch":
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """Page-locked copies, from which `to(device, non_blocking=True)` does not wait."""
        return self._map(Tensor.pin_memory)

    def _map(self, f) -> "PackedBatch":
        tensors = {x.name: getattr(self, x.name) for x in fields(self)}
        return replace(self, **{k: f(v) for k, v in tensors.items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class SharedBatch(PackedBatch):
    """A PackedBatch whose sequences' common beginnings are there once: R rows stand for T tokens, R < T.

    `lengths` and `cu_seqlens` are those of the whole sequences; `input_ids`, `position_ids` [R] and `image_index`
    are about rows. Right for causal attention alone, in which a token's state depends on what precedes it.

    Fields:
        key_index: [T] int64, the row that stands for each token: row key_index[t] holds what token t would.
        cu_seqlens_q: [B + 1] int32; rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] are sequence b's own, its last
            ones, at least one. Its other tokens' rows are those of other sequences.
        row_lengths: how many they are, on the host.
    """

    key_index: Tensor
    cu_seqlens_q: Tensor
    row_lengths: tuple[int, ...]


def num_image_tokens(grid: Grid, merged_per_side: int) -> int:
    """Tokens of an image: merged patches of the crops and the global view, one separator between them, and one
    at the end of each row. 757 for a (2, 2) grid with 12 merged patches per side."""
    h, w = grid
    m = merged_per_side
    return (h * w + 1) * m * m + 1 + (h + 1) * m


def cumulative(lengths: Sequence[int]) -> Tensor:
    """[B + 1] int32 of where each sequence begins, and where the last ends."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
