"""Rows of a run: those in MMEB's training format and their order, and what a source of other rows must have.

    <root>/<Set>/original*.parquet or *.jsonl, diverse_instruction*.parquet or *.jsonl
    columns qry, qry_image_path, pos_text, pos_image_path, and perhaps neg_text, neg_image_path

An empty path means no image. pos_* and neg_* may be lists: several positives, several hard negatives. A row whose
neg_text and neg_image_path are both empty has no hard negative.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..rows import MINI, Images, Pair, check_columns, make_pair, read_rows, row_files
from .config import DataConfig

COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
ALL, NONE = slice(None), slice(0)


class Pictures(Protocol):
    """Where a row's pictures are: `rows.Images`, or what a source of rows has in its place."""

    @property
    def place(self) -> Path:
        """Pictures of one name and one place are one picture."""

    def source(self, path: str, /) -> Any:
        """The picture as `Processor.plan` takes it: a path, bytes, a PIL image."""

    def check(self, path: str, /, *, thoroughly: bool = False) -> None:
        """Raises OSError or ValueError where it is missing; thoroughly: or cannot be decoded."""


@dataclass(frozen=True)
class Row:
    """One query with its targets. `name` is the set's and the row's number in the file, for messages."""

    name: str
    query: Pair
    positives: tuple[Pair, ...]
    negatives: tuple[Pair, ...]
    images: Pictures

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return (self.query, *self.positives, *self.negatives)


class RowSource(Protocol):
    """The rows of a run. `TrainingData` reads them from files; your own source, for rows that are made as they are
    needed or lie elsewhere, is named in the configuration:

        [data]
        source = "package.module:Name"

    Name is a class or function that is called as `Name(config, seed=seed)` with the run's `DataConfig`, where
    `config.options` holds the table [data.options], and returns an object with the methods below. Which rows `batch`
    gives may depend on the seed and its arguments alone: so a run goes on where it was, and every process sees its
    part of the same batch. `batch` is called from a thread of its own. --check prints the object's `str`.
    """

    def check(self, *, thoroughly: bool = False) -> None:
        """Raises ValueError naming what cannot be used; thoroughly: decodes every picture. May do nothing."""

    def batch(self, step: int, batch_size: int, part: slice = ALL) -> list[Row]:
        """The rows of a step, counted from 0, or a part of them (NONE: only checks that there are enough).
        Raises ValueError where there are too few."""

    def sample(self, n: int) -> list[Row]:
        """Up to n rows, the same at every call; for pictures of the progress."""


def open_data(config: DataConfig, *, seed: int = 0) -> RowSource:
    """The rows that the configuration names: files of `root`, or those of `source`. Raises ValueError where there is
    no such source, or it lacks a method."""
    if config.root is None and config.source is None:
        raise ValueError("data.root or data.source is needed, and not both")
    if config.source is None:
        return TrainingData(config, seed=seed)
    rows = _find_source(config.source)(config, seed=seed)
    lacking = [name for name in ("check", "batch", "sample") if not callable(getattr(rows, name, None))]
    if lacking:
        raise ValueError(f"data.source {config.source} gives a {type(rows).__name__}, which lacks {', '.join(lacking)}")
    return rows


def _find_source(name: str) -> Callable[..., RowSource]:
    """What "package.module:Name" stands for. The name is the user's own, from his TOML file; none comes from a
    checkpoint."""
    module, _, attribute = name.partition(":")
    if not module or not attribute or module.startswith("."):
        raise ValueError(f'data.source is {name!r}; it looks like "package.module:Name"')
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"data.source {name} cannot be imported: {e}") from e


class TrainingData:
    """All rows of the chosen sets, and the batches of a run.

    Which rows a step sees depends on the seed and the step alone, so that a run can go on anywhere.

    Args:
        config: see `DataConfig`.
        seed: of the choice and the order of rows.

    Raises ValueError naming up to 20 malformed rows, FileNotFoundError for a missing set or folder.
    """

    def __init__(self, config: DataConfig, *, seed: int = 0):
        self.config, self.seed = config, seed
        root = _root(config.root)
        names = config.sets or _find_sets(root, config.variant)
        self.rows: list[Row] = []
        self.sets: dict[str, range] = {}
        broken: list[str] = []
        for name in names:
            rows = self._read(root, name, broken)
            self.sets[name] = range(len(self.rows), len(self.rows) + len(rows))
            self.rows += rows
        _raise_if(broken)
        if not self.rows:
            raise ValueError(f"{root} holds no row of {config.variant!r}")

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return f"{len(self)} rows of {len(self.sets)} sets"

    def check(self, *, thoroughly: bool = False) -> None:
        """Raises ValueError naming the rows whose pictures are missing; thoroughly: or cannot be decoded."""
        broken = []
        for row in self.rows:
            try:
                for path in {pair.image for pair in row.pairs if pair.image}:
                    row.images.check(path, thoroughly=thoroughly)
            except (OSError, ValueError) as e:
                broken.append(f"{row.name}: {e}")
        _raise_if(broken)

    def batch(self, step: int, batch_size: int, part: slice = ALL) -> list[Row]:
        """The rows of a step, counted from 0, or a part of them. Raises ValueError where the data has fewer rows than
        a batch.

        An epoch shuffles every set, cuts it into blocks of `sub_batch` rows, and shuffles the blocks; what does not
        fill a block or the last batch comes in another epoch.
        """
        size = self.config.sub_batch
        per_batch = batch_size // size
        batches = sum(len(rows) // size for rows in self.sets.values()) // per_batch
        if batches == 0:
            sizes = ", ".join(f"{name} {len(rows)}" for name, rows in self.sets.items())
            raise ValueError(f"a batch of {batch_size} rows in blocks of {size} is more than the data has: {sizes}")
        epoch, place = divmod(step, batches)
        blocks = self._epoch(epoch)[place * per_batch : (place + 1) * per_batch]
        return [self.rows[i] for i in blocks.flatten()[part]]

    def sample(self, n: int) -> list[Row]:
        """Up to n rows, the same at every call."""
        chosen = np.random.default_rng([self.seed, 2]).permutation(len(self.rows))[:n]
        return [self.rows[i] for i in chosen]

    @lru_cache(maxsize=2)  # noqa: B019 (lives as long as the run)
    def _epoch(self, epoch: int) -> np.ndarray:  # [blocks, sub_batch]
        rng, size = np.random.default_rng([self.seed, 1, epoch]), self.config.sub_batch
        blocks = []
        for rows in self.sets.values():
            order = rng.permutation(np.arange(rows.start, rows.stop))
            blocks.append(order[: len(order) // size * size].reshape(-1, size))
        return rng.permutation(np.concatenate(blocks))

    def _read(self, root: Path, name: str, broken: list[str]) -> list[Row]:
        images = Images(self._images(root, name))
        raws = list(_read_files(root / name, self.config.variant))
        chosen: Sequence[int] = range(min(len(raws), self.config.rows_per_set))
        if self.config.row_choice == "random" and len(raws) > len(chosen):
            rng = np.random.default_rng([self.seed, 0, *name.encode()])
            chosen = sorted(rng.permutation(len(raws))[: len(chosen)])
        rows = []
        for i in chosen:
            try:
                rows.append(_row(f"{name}, row {i}", raws[i], images))
            except ValueError as e:
                broken.append(f"{name}, row {i}: {e}")
        return rows

    def _images(self, root: Path, name: str) -> Path:
        if self.config.images is not None:
            return Path(self.config.images).expanduser()
        places = (root / "images.zip", root / "images_zip" / f"{name}.zip", root)
        return next(p for p in places if p.exists())


def content_id(pair: Pair, images: Pictures) -> int:
    """A number that is the same for the same text and image; 63 bits, so that two others hardly ever share it."""
    data = json.dumps([pair.text, pair.image, str(images.place) if pair.image else ""]).encode()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big") >> 1


def _root(root: str | None) -> Path:
    path = MINI / "MMEB-train" if root == "mini" else Path(root or "").expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"data.root {path} is no folder")
    return path


def _find_sets(root: Path, variant: str) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and row_files(p, variant))


def _read_files(folder: Path, variant: str) -> Iterator[Any]:
    files = row_files(folder, variant)
    if not files:
        raise FileNotFoundError(f"{folder} holds no {variant}*.parquet and no {variant}*.jsonl")
    for path in files:
        yield from read_rows(path)


def _row(name: str, raw: Any, images: Images) -> Row:
    check_columns(raw, COLUMNS)
    if isinstance(raw["qry"], list):
        raise ValueError("qry is a list; a row has one query")
    (query,) = _pairs("query", raw["qry"], raw["qry_image_path"])
    positives = _pairs("positive", raw["pos_text"], raw["pos_image_path"])
    negatives = _pairs("negative", raw.get("neg_text"), raw.get("neg_image_path"), may_lack=True)
    if not positives:
        raise ValueError("there is no positive")
    if set(positives) & set(negatives):
        raise ValueError("a negative is the same as a positive")
    return Row(name, query, positives, negatives, images)


def _pairs(what: str, texts: Any, paths: Any, *, may_lack: bool = False) -> tuple[Pair, ...]:
    if isinstance(texts, list) != isinstance(paths, list) and texts is not None and paths is not None:
        raise ValueError(f"{what}: text and image path are both lists or both strings")
    texts, paths = (x if isinstance(x, list) else [x] for x in (texts, paths))
    if [None] in (texts, paths):  # a column that is absent or null
        texts, paths = (x * n if x == [None] else x for x, n in ((texts, len(paths)), (paths, len(texts))))
    if len(texts) != len(paths):
        raise ValueError(f"{what}: {len(texts)} texts but {len(paths)} image paths")
    given = [("" if text is None else text, path or "") for text, path in zip(texts, paths, strict=True)]
    kept = [one for one in given if one != ("", "") or not may_lack]
    return tuple(make_pair(text, path, f"the {what}") for text, path in kept)


def _raise_if(broken: Sequence[str]) -> None:
    if broken:
        more = f"\nand {len(broken) - 20} more" if len(broken) > 20 else ""
        raise ValueError(f"{len(broken)} rows cannot be used:\n" + "\n".join(broken[:20]) + more)
