"""Which tiles of queries a pack of sequences has, for kernels that run one program a tile.

Without a schedule, attention launches as many programs for each sequence as the longest one has tiles, and those beyond
a sequence's end stop at once. A schedule names the tiles that there are, those of the longest sequence first, so that
no long one begins when all else is done.
"""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor


class TileSchedule:
    """The tiles of B sequences, made on the host from lengths that are known there, and copied to a device once for all
    the layers that share them.

    lengths_k: keys of each sequence. lengths_q: queries of each, where they are others. They must be those of the
    cu_seqlens that attention is called with: others give wrong numbers. A schedule serves one stream.

    Raises ValueError for lengths that are no whole numbers of at least 0, or are 2^31 and more together.
    """

    def __init__(self, lengths_k: Sequence[int], lengths_q: Sequence[int] | None = None):
        self.lengths_k = _checked(lengths_k, "keys")
        self.lengths_q = self.lengths_k if lengths_q is None else _checked(lengths_q, "queries")
        if len(self.lengths_q) != len(self.lengths_k):
            raise ValueError(f"{len(self.lengths_k)} sequences of keys but {len(self.lengths_q)} of queries")
        self.keys, self.queries = sum(self.lengths_k), sum(self.lengths_q)
        self.most_keys, self.most_queries = max(self.lengths_k, default=0), max(self.lengths_q, default=0)
        self._kept: dict[tuple[int, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.lengths_k)

    def check(self, queries: int, keys: int, sequences: int, max_seqlen_q: int, max_seqlen_k: int) -> None:
        """Raises ValueError where attention is called with fewer tokens, other sequences or shorter ones."""
        if len(self) != sequences:
            raise ValueError(f"schedule is of {len(self)} sequences, cu_seqlens of {sequences}")
        if self.queries > queries or self.keys > keys:
            raise ValueError(
                f"schedule is of {self.queries} queries and {self.keys} keys, q has {queries} and k {keys}"
            )
        if self.most_queries > max_seqlen_q or self.most_keys > max_seqlen_k:
            raise ValueError(
                f"schedule has sequences of {self.most_queries} queries and {self.most_keys} keys, "
                f"max_seqlen is {max_seqlen_q} and {max_seqlen_k}"
            )

    def tiles(self, BM: int, device: torch.device) -> Tensor:
        """[W, 5] int32 on `device`, a row for each tile of BM queries: where its sequence's queries begin and how many
        they are, the same of the keys, and which of the sequence's tiles it is. Waits for no device."""
        key = BM, device
        if key not in self._kept:
            made = self._tiles(BM)
            pinned = made.pin_memory() if device.type == "cuda" and len(made) else made
            self._kept[key] = pinned.to(device, non_blocking=True)
        return self._kept[key]

    def _tiles(self, BM: int) -> Tensor:
        Lq, Lk = (torch.tensor(lengths, dtype=torch.int64) for lengths in (self.lengths_q, self.lengths_k))
        order = Lk.argsort(descending=True, stable=True)
        count = (Lq[order] + BM - 1) // BM
        sequence = order.repeat_interleave(count)
        tile = torch.arange(len(sequence)) - _starts(count).repeat_interleave(count)
        entries = [_starts(Lq)[sequence], Lq[sequence], _starts(Lk)[sequence], Lk[sequence], tile]
        return torch.stack(entries, dim=1).to(torch.int32)


def _checked(lengths: Sequence[int], what: str) -> tuple[int, ...]:
    try:
        found = tuple(map(operator.index, lengths))
    except TypeError:
        raise ValueError(f"lengths of {what} must be whole numbers, got {list(lengths)!r}"[:200]) from None
    if min(found, default=0) < 0 or sum(found) >= 2**31:
        raise ValueError(f"lengths of {what} must be from 0 on and below 2^31 together, got {list(found)!r}"[:200])
    return found


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths
