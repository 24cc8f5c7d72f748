"""Rows -> what the model and the loss take."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..processor import Loaded, Processor
from ..rows import Pair, as_input
from .data import Pictures, Row, content_id
from .loss import Targets


@dataclass(frozen=True)
class Prepared:
    """One process' share of a batch: rows, their inputs (queries, then targets), and what the targets are."""

    rows: list[Row]
    inputs: list[Loaded]
    about: Targets

    @property
    def row_of(self) -> list[int]:
        """The row of each input."""
        return [*range(len(self.rows)), *self.about.owner.tolist()]


class RowLoader:
    """Reads and cuts rows' images, and tokenises their texts. All methods raise ValueError naming the row at fault.

    Args:
        max_length: tokens that are kept of a text without images.
        hard_negatives: whether those that rows have are used.
    """

    def __init__(self, processor: Processor, *, max_length: int, hard_negatives: bool):
        self.processor, self.max_length, self.hard_negatives = processor, max_length, hard_negatives

    def prepare(self, rows: Sequence[Row], pool: ThreadPoolExecutor | None = None) -> Prepared:
        """pool: threads in which images are read; default this one."""
        numbered = [(i, pair, True) for i, row in enumerate(rows) for pair in row.positives]
        if self.hard_negatives:
            numbered += [(i, pair, False) for i, row in enumerate(rows) for pair in row.negatives]
        pairs = [(row, row.query) for row in rows] + [(rows[i], pair) for i, pair, _ in numbered]
        inputs = list((pool.map if pool else map)(lambda one: self.load(one[0].name, one[1], one[0].images), pairs))
        about = Targets(
            owner=torch.tensor([i for i, _, _ in numbered]),
            positive=torch.tensor([positive for _, _, positive in numbered]),
            content=torch.tensor([content_id(pair, rows[i].images) for i, pair, _ in numbered]),
        )
        return Prepared(list(rows), inputs, about)

    def load(self, name: str, pair: Pair, images: Pictures) -> Loaded:
        """One pair; `name` is its row's, for messages."""
        try:
            return self.processor.load(self.processor.plan(as_input(pair, images), max_length=self.max_length))
        except (ValueError, OSError) as e:
            raise ValueError(f"{name}: {e}") from e
