"""PackedBatch: the one type between processor and model."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

try:
    from torch.utils import _pytree as pytree
except ImportError:  # no release has to keep it
    pytree = None  # type: ignore[assignment]

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
        host_cu_seqlens: cu_seqlens on the host, wherever the batch is, so that nothing waits for a device to read it.

    It is a pytree of its tensors (`grids` are its structure), so `torch.export` takes it. Where tensors have no values,
    as there, lengths are () and max_seqlen is T.
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
    host_cu_seqlens: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.__dict__.update(max_seqlen=max((0, *self.lengths)), host_cu_seqlens=cumulative(self.lengths))
        if not torch.compiler.is_compiling():
            for tensor in (self.input_ids, self.position_ids, self.cu_seqlens, self.host_cu_seqlens):
                tensor.__dict__["_dynamo_weak_dynamic_indices"] = {0}  # torch._dynamo.maybe_mark_dynamic(tensor, 0)

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
            x.name: f(value) for x in fields(self) if x.init and isinstance(value := getattr(self, x.name), Tensor)
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
    return torch.tensor([0, *lengths], device="cpu").cumsum(0).to(torch.int32)


_LEAVES = ("input_ids", "position_ids", "cu_seqlens", "crops", "image_index", "image_source", "host_cu_seqlens")


def _flatten(batch: PackedBatch) -> tuple[list[Any], tuple[Grid, ...]]:
    return [getattr(batch, name) for name in _LEAVES], batch.grids


def _flatten_with_keys(batch: PackedBatch) -> tuple[list[tuple[Any, Any]], tuple[Grid, ...]]:
    leaves, grids = _flatten(batch)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(_LEAVES, leaves, strict=True)], grids


def _unflatten(leaves: Iterable[Any], grids: tuple[Grid, ...]) -> PackedBatch:
    named = dict(zip(_LEAVES, leaves, strict=True))
    host = named["host_cu_seqlens"]
    if type(host) is Tensor:
        del named["host_cu_seqlens"]
        return PackedBatch(**named, grids=grids, lengths=tuple(host.diff().tolist()))
    batch = object.__new__(PackedBatch)  # of what a tracer, or a function that was mapped over it, has for tensors
    ids = named["input_ids"]
    batch.__dict__.update(named, grids=grids, lengths=(), max_seqlen=ids.shape[0] if isinstance(ids, Tensor) else 0)
    return batch


torch.serialization.add_safe_globals([PackedBatch])  # torch.export.load reads the example that a program was made with
if pytree is None:
    warnings.warn(f"torch {torch.__version__} has no torch.utils._pytree: torch.export takes no batch", stacklevel=2)
else:
    pytree.register_pytree_node(
        PackedBatch, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys,
        serialized_type_name="minivlm2vec.PackedBatch", to_dumpable_context=list,
        from_dumpable_context=lambda grids: tuple(map(tuple, grids)),
    )  # fmt: skip
