"""MMEB's evaluation sets: which subsets lie where, and their rows.

A row is one query and its own candidates, the positive first.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..rows import MINI, Images, Pair, check_columns, make_pair, read_rows, row_files
from . import subsets
from .subsets import HUB_NAME, Subset

COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


@dataclass(frozen=True)
class Row:
    index: int  # in the file
    query: Pair
    targets: tuple[Pair, ...]  # the positive first


@dataclass
class Rows:
    """The rows of a subset, as indices into its distinct pairs: a thousand rows of a thousand candidates name few
    different ones."""

    subset: Subset
    pairs: list[Pair] = field(default_factory=list)  # distinct, in order of appearance
    numbered: list[tuple[int, np.ndarray]] = field(default_factory=list)  # (query, candidates [n] int32)
    indices: list[int] = field(default_factory=list)  # of the rows in the file
    damaged: list[str] = field(default_factory=list)  # what is wrong with the rows that were left out
    cut: bool = False  # there are more, which a limit left out
    _known: dict[Pair, int] = field(default_factory=dict, repr=False)

    def add(self, row: Row) -> None:
        query, *targets = (self._number(pair) for pair in (row.query, *row.targets))
        self.numbered.append((query, np.array(targets, dtype=np.int32)))
        self.indices.append(row.index)

    def __len__(self) -> int:
        return len(self.numbered)

    def __iter__(self) -> Iterator[Row]:
        for index, (query, targets) in zip(self.indices, self.numbered, strict=True):
            yield Row(index, self.pairs[query], tuple(self.pairs[i] for i in targets))

    def _number(self, pair: Pair) -> int:
        number = self._known.setdefault(pair, len(self.pairs))
        if number == len(self.pairs):
            self.pairs.append(pair)
        return number


class Dataset:
    """A folder of subsets and where their pictures are.

    Args:
        root: folder with <Subset>/test*.parquet or <Subset>/test*.jsonl, and perhaps subsets.json.
        image_dir: folder or zip; default root/images.zip, else root.
    """

    def __init__(self, root: Path, image_dir: Path | None = None):
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is no folder")
        self.root = root
        self.subsets = _find_subsets(root)
        if not self.subsets:
            raise FileNotFoundError(f"{root} holds no <Subset>/test*.parquet and no <Subset>/test*.jsonl")
        zipped = root / "images.zip"
        self.images = Images(image_dir or (zipped if zipped.exists() else root))

    def rows(self, subset: Subset, *, limit: int | None = None, skip_damaged: bool = False) -> Rows:
        """The rows of one subset, each checked.

        skip_damaged: leave out rows that are malformed or whose pictures are missing or unreadable, and say which.
        Otherwise the first such row raises ValueError (FileNotFoundError for a picture), naming subset and row;
        whether a picture that is there can be read shows when it is encoded.
        """
        found = Rows(subset)
        for index, raw in enumerate(_read(self.root / subset.name)):
            if index == limit:
                found.cut = True
                break
            try:
                row = _row(raw, index)
                self._check_images(row, thoroughly=skip_damaged)
            except (ValueError, OSError) as error:
                message = f"{subset.name}, row {index}: {error}"
                if not skip_damaged:
                    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
                    raise kind(message) from None
                found.damaged.append(message)
            else:
                found.add(row)
        if not len(found):
            raise ValueError(f"{subset.name} has no usable row; damaged: {len(found.damaged)}")
        return found

    def _check_images(self, row: Row, *, thoroughly: bool) -> None:
        for pair in {row.query, *row.targets}:
            if pair.image:
                self.images.check(pair.image, thoroughly=thoroughly)


def open_dataset(
    data: str | Path = HUB_NAME,
    *,
    image_dir: str | Path | None = None,
    names: Collection[str] | None = None,
    meta_tasks: Collection[str] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> tuple[Dataset, list[Subset]]:
    """A local folder, or the parts of a dataset on the Hub that are needed; and the chosen subsets.

    The string "mini" is the small benchmark that ships with the package; a folder of that name is "./mini", or a Path.
    """
    path = MINI / "MMEB-eval" if data == "mini" else Path(data)
    if not path.is_dir():
        if str(data) != HUB_NAME and str(data).count("/") != 1:
            raise FileNotFoundError(f"{data} is neither a folder nor a dataset's name on the Hub")
        path = _download(str(data), image_dir is None, names, meta_tasks, revision, local_files_only)
    dataset = Dataset(path, Path(image_dir) if image_dir is not None else None)
    return dataset, subsets.choose(dataset.subsets, names, meta_tasks)


def _download(
    name: str,
    with_images: bool,
    names: Collection[str] | None,
    meta_tasks: Collection[str] | None,
    revision: str | None,
    local_files_only: bool,
) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*/test*.parquet", "*/test*.jsonl", "subsets.json"]
    if name == HUB_NAME:  # the subsets are known, so only those asked for are fetched
        chosen = subsets.choose(subsets.MMEB, names, meta_tasks)
        patterns = [f"{one.name}/test*" for one in chosen]
    if with_images:
        patterns.append("images.zip")
    return Path(
        snapshot_download(
            name,
            repo_type="dataset",
            revision=revision,
            allow_patterns=patterns,
            local_files_only=local_files_only,
        )
    )


def _find_subsets(root: Path) -> dict[str, Subset]:
    """In the order of MMEB's own table, then of subsets.json, then by name."""
    about_path = root / "subsets.json"
    about = json.loads(about_path.read_text(encoding="utf-8")) if about_path.exists() else {}
    present = {one.name for one in root.iterdir() if one.is_dir() and row_files(one, "test")}
    order = [name for name in dict.fromkeys((*subsets.MMEB, *about, *sorted(present))) if name in present]
    return {name: _subset(name, about.get(name)) for name in order}


def _subset(name: str, about: dict | None) -> Subset:
    if about is not None:
        task = about.get("meta_task", "other")
        task = task if task in subsets.META_TASKS else "other"
        return Subset(name, task, about.get("domain", ""), about.get("averaged", True))
    return subsets.MMEB.get(name, Subset(name, "other", ""))


def _read(folder: Path) -> Iterator[Any]:
    for path in row_files(folder, "test"):
        yield from read_rows(path)


def _row(raw: Any, index: int) -> Row:
    check_columns(raw, COLUMNS)
    texts, paths = raw["tgt_text"], raw["tgt_img_path"]
    for name, values in (("tgt_text", texts), ("tgt_img_path", paths)):
        if not isinstance(values, list):
            raise ValueError(f"{name} is a list, got {type(values).__name__}")
    if len(texts) != len(paths):
        raise ValueError(f"tgt_text has {len(texts)} entries, tgt_img_path {len(paths)}")
    if not texts:
        raise ValueError("there are no candidates")
    query = make_pair(raw["qry_text"], raw["qry_img_path"], "query")
    targets = tuple(
        make_pair(text, path, f"candidate {i}") for i, (text, path) in enumerate(zip(texts, paths, strict=True))
    )
    return Row(index, query, targets)
