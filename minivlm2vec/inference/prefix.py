"""Texts of one pack that begin alike compute what they have in common once.

In causal attention a token's state depends on the tokens before it alone, so equal beginnings have equal states in
every layer, and the state is computed in one row for all of them. Each sequence's keys and values are gathered from
those rows; its queries are its own last rows. The vectors are the same, up to the order of sums.

In lexicographic order a text's longest common beginning with any text before it is the one with its neighbour, so
one pass over the sorted texts finds every distinct beginning in the pack, however they nest.

T tokens, R rows, B sequences.
"""

from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from minivlm2vec_kernels.tile_schedule import TileSchedule

from ..batch import PackedBatch, cumulative
from ..config import DecoderConfig
from ..decoder import Packing
from ..rope import rope_tables

# Below so many rows a matrix product takes as long as reading its weights, so that fewer rows save nothing: peak
# FLOP/s over bandwidth in bytes/s, for bf16. H100: 798e12 / 3.0e12 = 266; H200: 183. On a CPU, some tens at most.
WEIGHT_BOUND_ROWS = {"cuda": 256, "cpu": 16}  # by device type
SMALLEST_SHARE = 1 / 16  # of the time; below, sharing is left alone. See `pays`.
# A pack with shared rows is not replayed as a graph, and launching its 330 kernels one by one takes the host as long as
# a card needs for so many rows (330 x 19 us by bench/README.md's table of launches, at 10.3 us a row).
LAUNCH_BOUND_ROWS = {"cuda": 600, "cpu": 0}


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


@dataclass(frozen=True)
class SharedPacking(Packing):
    """The packing of a SharedBatch; cos and sin are [R, H / 2]."""

    cu_seqlens_q: Tensor = field(kw_only=True)  # [B + 1] int32
    max_seqlen_q: int = field(kw_only=True)
    key_index: Tensor = field(kw_only=True)  # [T]

    @classmethod
    def of(cls, batch: SharedBatch, config: DecoderConfig, dtype: torch.dtype) -> "SharedPacking":
        cos, sin = rope_tables(batch.position_ids, batch.cu_seqlens_q, config)  # who shares is short, see below
        return cls(
            batch.cu_seqlens, batch.max_seqlen, cos.to(dtype), sin.to(dtype),
            cu_seqlens_q=batch.cu_seqlens_q, max_seqlen_q=max(batch.row_lengths), key_index=batch.key_index,
            schedule=TileSchedule(batch.lengths, batch.row_lengths),
        )  # fmt: skip


def share_prefixes(
    batch: PackedBatch,
    longest: int,
    *,
    weight_bound_rows: int = 256,
    smallest_share: float = SMALLEST_SHARE,
    launch_bound_rows: int = 0,
    replayed: bool = False,
) -> PackedBatch:
    """A `SharedBatch` of the same sequences in the same order, or `batch` itself where that does not pay.

    batch: on the CPU.
    longest: sequences of more tokens take no part (`original_max_position_embeddings`: beyond it the rotations are
        others). Neither do sequences with images.
    weight_bound_rows, smallest_share, launch_bound_rows, replayed: see `pays`.
    """
    lengths, starts = batch.lengths, np.cumsum([0, *batch.lengths])
    with_images = set(np.searchsorted(starts, batch.image_index.numpy(), side="right") - 1)
    texts = [b for b, n in enumerate(lengths) if n <= longest and b not in with_images]
    ids = batch.input_ids.numpy()
    pairs, shared = _common_beginnings({b: ids[starts[b] : starts[b + 1]] for b in texts}, len(lengths))
    rows = len(ids) - sum(shared)
    if not pays(len(ids), rows, weight_bound_rows, smallest_share, launch_bound_rows, replayed):
        return batch
    return _shared(batch, starts, pairs, shared)


def pays(
    tokens: int,
    rows: int,
    weight_bound_rows: int,
    smallest_share: float,
    launch_bound_rows: int = 0,
    replayed: bool = False,
) -> bool:
    """Whether `rows` instead of `tokens` save at least `smallest_share` of the time.

    Time is that of the largest of rows, weight_bound_rows and launch_bound_rows; replayed: the batch of tokens would be
    a graph, which is not bound by launches. The gathers of keys and values that sharing adds move 8 D bytes a token and
    layer (24.6 KB at D = 3072: 8 ns at 3 TB/s), against 226 MFLOP (320 ns at 700 TFLOP/s): 3 % of the time. They are 2
    launches of 10 in a layer. Twice that is asked of a gain.
    """
    shared = max(rows, weight_bound_rows, launch_bound_rows)
    alone = max(tokens, weight_bound_rows, 0 if replayed else launch_bound_rows)
    return rows < tokens and alone - shared >= smallest_share * alone


def _common_beginnings(texts: dict[int, np.ndarray], count: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Pairs (text, the one before it) in lexicographic order, and for each of `count` sequences how many of its
    tokens it shares with the one before: never all, so that each has a row to be pooled."""
    order = sorted(texts, key=lambda b: texts[b].tolist())
    pairs, shared = list(zip(order[1:], order, strict=False)), [0] * count
    for b, before in pairs:
        shared[b] = min(_common(texts[b], texts[before]), len(texts[b]) - 1)
    return pairs, shared


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _shared(batch: PackedBatch, starts: np.ndarray, pairs: list[tuple[int, int]], shared: list[int]) -> SharedBatch:
    row_lengths = [n - s for n, s in zip(batch.lengths, shared, strict=True)]
    own = np.concatenate([np.arange(starts[b] + s, starts[b + 1]) for b, s in enumerate(shared)])  # [R] tokens
    key_index = np.empty(starts[-1], np.int64)
    key_index[own] = np.arange(len(own))
    for b, before in pairs:  # in order: what comes before is complete
        key_index[starts[b] : starts[b] + shared[b]] = key_index[starts[before] : starts[before] + shared[b]]
    same = {f.name: getattr(batch, f.name) for f in fields(PackedBatch) if f.init}
    changed = {
        "input_ids": batch.input_ids[own],
        "position_ids": batch.position_ids[own],
        "image_index": torch.from_numpy(key_index[batch.image_index.numpy()]),
    }
    return SharedBatch(
        **(same | changed),
        key_index=torch.from_numpy(key_index),
        cu_seqlens_q=cumulative(row_lengths),
        row_lengths=tuple(row_lengths),
    )
