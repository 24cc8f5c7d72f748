"""What one run of `embed` has to do."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .options import Checkpoint, EmbedOptions
from .parts import Parts
from .rows import Columns
from .sources import Index, Listing, Part, Table


@dataclass(frozen=True)
class Job:
    """What is to be done. A context manager: it holds the lock on OUT.parts.

    Fields:
        source: as the caller named it; table: what is read, after spooling; index: what a pass over it told.
        columns: where a row keeps its text and images.
        settings: everything that the caller decides about the vectors and the file's form. A run goes on, and a file
            counts as finished, only under the same settings, but for those that change no vector: a run that goes on
            keeps its part_rows, and takes the vectors' column and batch_tokens as they are said now. What rounds
            otherwise and no more (the device, its number of threads, the kernels, torch's version) is no setting, so
            that a run can go on elsewhere: the parts say what they were computed with, see `computed_with`.
        stat: size and time of change of the table before it was read.
        listed: what was found in a folder.
        todo: numbers of the parts that are still to be computed; changed: how many of these had been finished, before
            they or their image files changed.
        complete: OUT is there and finished, made by this very job.
    """

    source: str
    table: Table
    index: Index
    columns: Columns
    out: Path
    parts: Parts
    options: EmbedOptions
    checkpoint: Checkpoint
    settings: dict[str, Any]
    stat: tuple[int, int]
    listed: Listing | None = None
    todo: tuple[int, ...] = ()
    changed: int = 0
    complete: bool = False
    held: ExitStack = field(default_factory=ExitStack, repr=False)

    @property
    def numbers(self) -> range:
        """Of all parts."""
        return range(-(-self.index.num_rows // self.options.part_rows))

    @property
    def dtype(self) -> np.dtype:
        return np.dtype({"float32": "<f4", "float16": "<f2"}[self.options.store])

    @property
    def run(self) -> str:
        """Digest of the source and of the settings that a run keeps when it goes on, by which it knows its parts."""
        kept = {name: value for name, value in self.settings.items() if name not in ("vector_column", "batch_tokens")}
        return hashlib.sha256(json.dumps([self.index.fingerprint, kept], sort_keys=True).encode()).hexdigest()

    def num_rows(self, numbers: Sequence[int]) -> int:
        """Of these parts."""
        size = self.options.part_rows
        return sum(min(size, self.index.num_rows - number * size) for number in numbers)

    def rows(self, numbers: Sequence[int]) -> Iterator[Part]:
        return self.table.parts(self.index, numbers, self.options.part_rows, self.columns.names())

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        if self.complete:
            self.parts.remove()
        self.held.close()
