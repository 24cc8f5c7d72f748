"""Labels for the images of a folder or a table of any size: vectors by `embed`, then labels by their cosines.

The vectors stay beside OUT, so a run goes on where it was interrupted, and other labels cost nothing but themselves.
"""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch

from ..atomic import open_replacing
from ..cosines import unit_rows
from ..embedder import Embedder
from ..errors import Option, OptionError
from ..prompts import Task
from ..tasks.classification import TOP, Classification, Classifier, classified, label_texts
from ..tasks.common import as_task, checked_top
from .embedding import Summary, embed
from .options import EmbedOptions, ModelSpec
from .progress import Progress
from .rows import IMAGE_COLUMNS, as_json
from .vectors import VectorFile, open_vectors

SUFFIXES = (".csv", ".jsonl")
VECTORS = ".vectors.npy"  # behind OUT
Result = tuple[str, Classification | None]  # an image's name; None where it has no vector


def classify(
    source: str | os.PathLike,
    out: str | os.PathLike,
    labels: Sequence[str],
    embedder: Embedder | None = None,
    options: EmbedOptions | None = None,
    progress: Progress | None = None,
    *,
    instruction: str | Task | None = "classify",
    template: str | Sequence[str] = "{}",
    top: int | None = TOP,
) -> Summary | None:
    """Writes a row for each image of `source`, in its order, into a .csv (image, label, score, probability) or a .jsonl
    (`Classification.as_dict`). A row whose image cannot be read has no label; OUT.vectors.npy.errors.jsonl says why.

    It may be interrupted at any moment: the same call goes on from OUT.vectors.npy.parts. OUT is written when all
    vectors are there; OUT.vectors.npy is kept, so that further labels need no image again.

    Arguments as of `embed` (instruction and task of `options` give way to `instruction`) and of `tasks.Classifier`.
    Returns and raises as `embed` does; errors of labels come before anything is computed.
    """
    out, task, options = Path(out), as_task(instruction), options or EmbedOptions()
    if out.suffix not in SUFFIXES:
        raise OptionError(Option("out"), f" {out} ends in {out.suffix!r}; it ends in {' or '.join(SUFFIXES)}")
    checked_top(top, len(label_texts(labels, template)), "labels", allowed=TOP)
    options = replace(options, instruction=task.query, task=None)
    if embedder is None:
        embedder = options.model.locate().load(device=options.model.device, show_progress=options.model.show_progress)
    elif options.model.name is None:
        options = replace(options, model=ModelSpec.of(embedder))
    classifier = Classifier(embedder, labels, instruction=task, template=template)
    summary = embed(source, out.with_name(out.name + VECTORS), embedder, options, progress)
    if summary is None:  # another process of torchrun writes
        return None
    vectors = open_vectors(summary.out)
    assert isinstance(vectors, VectorFile)
    with open_replacing(out, "w") as f:
        write = _write_csv if out.suffix == ".csv" else _write_jsonl
        write(f, _labelled(vectors, classifier, top))
    return summary


def _write_csv(f: TextIO, results: Iterable[Result]) -> None:
    rows = csv.writer(f, lineterminator="\n")
    rows.writerow(("image", "label", "score", "probability"))
    for name, found in results:
        rows.writerow((name, *(found.row() if found else ("", "", ""))))


def _write_jsonl(f: TextIO, results: Iterable[Result]) -> None:
    for name, found in results:
        f.write(as_json(found.as_dict() if found else {"image": name, "labels": []}) + "\n")


def _labelled(vectors: VectorFile, classifier: Classifier, top: int | None) -> Iterator[Result]:
    """Name and labels of each row; None where it has no vector."""
    for start, chunk in vectors.chunks():
        rows, numbers = chunk.float(), range(start, start + len(chunk))
        names = [_name(columns, n) for n, columns in sorted(vectors.rows(numbers).items())]
        there = torch.isfinite(rows).all(dim=1)
        found: Iterator[Classification] = iter(())
        if there.any():
            chosen = [name for name, good in zip(names, there.tolist(), strict=True) if good]
            unit = unit_rows(rows[there].numpy())
            found = iter(classified(unit, classifier.vectors, classifier.labels, chosen, top=top))
        for name, good in zip(names, there.tolist(), strict=True):
            yield name, next(found) if good else None


def _name(columns: dict[str, Any], number: int) -> str:
    """The image of a row as its source names it, else its number."""
    values = (columns.get(key) for key in IMAGE_COLUMNS)
    return next((value for value in values if isinstance(value, str)), f"row {number}")
