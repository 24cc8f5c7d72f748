"""Evaluating a model on MMEB, or on any data in its format.

    embedder = Embedder.from_pretrained("TIGER-Lab/VLM2Vec-Full")
    results = evaluate(embedder, HUB_NAME, "outputs/mmeb", EvaluateOptions(num_crops=4))
    print(results.table())

Files written to `out`:

    <Subset>_score.json      {"acc", "num_correct", "num_pred"}, as the original evaluator writes and counts it
    <Subset>_pred.parquet    per row: query, prediction, ranks, all scores
    results.json             every figure with its 95% interval
    table.txt .md .html      the table, beside the published rows
    vectors/                 what a later run takes up; may be deleted
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..distributed import Ranks
from ..errors import InputError, Option, OptionError, at_least_one
from ..extras import import_pyarrow
from ..rows import Images, Pair
from . import score
from .dataset import Dataset, Rows, open_dataset
from .encode import Encoder, VectorStore, fingerprint
from .progress import Progress
from .results import Results, check_owner, write_predictions, write_results, write_score
from .subsets import Subset


@dataclass(frozen=True)
class EvaluateOptions:
    """What is evaluated, and how.

    Fields:
        image_dir: folder or zip of the pictures; default the data's own images.zip.
        subsets, meta_tasks: names of those wanted; default all there are.
        num_crops, max_length: for `encode`. MMEB's scores were measured with 4 and 256; 256 tokens cut texts only,
            never an input with an image.
        batch_size: inputs per call of `encode`, and per file that an interrupted run keeps.
        limit: only the first rows of each subset.
        skip_damaged: leave out rows that cannot be read, and say so in the table, instead of stopping.
        allow_collapsed: go on, and say so in the table, where the vectors do not tell inputs apart.
        revision, local_files_only: of data on the Hub.
        name: of the model, for the table; default the encoder's.
    """

    image_dir: str | Path | None = None
    subsets: Collection[str] | None = None
    meta_tasks: Collection[str] | None = None
    num_crops: int | None = None
    max_length: int | None = 256
    batch_size: int = 256
    limit: int | None = None
    skip_damaged: bool = False
    allow_collapsed: bool = False
    revision: str | None = None
    local_files_only: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        at_least_one(batch_size=self.batch_size, limit=self.limit)

    def for_encode(self) -> dict[str, Any]:
        crops = {} if self.num_crops is None else {"num_crops": self.num_crops}
        return {"max_length": self.max_length} | crops


def evaluate(
    encoder: Encoder,
    data: str | Path,
    out: str | Path,
    options: EvaluateOptions | None = None,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Results:
    """Encodes, scores, and writes the files. Under torchrun every process calls this and gets the results.

    Args:
        encoder: an `Embedder`, or anything with its `encode` (see `encode.Encoder`).
        data: a folder in MMEB's format; a dataset's name on the Hub, such as `subsets.HUB_NAME`; or "mini", the small
            benchmark that ships with the package.
        out: folder for the files. A run that was cut off goes on there. It may hold no results of another model, nor of
            this one with other options.
        on_progress: is told whenever inputs have their vectors; counts of other processes are estimated.

    Raises ValueError naming subset and row for damaged data, and both models where `out` is another's;
    FileNotFoundError for a missing picture, `score.CollapsedEmbeddings`, and ImportError where pyarrow is missing.
    """
    import_pyarrow("to write predictions", extra="mmeb")  # before hours of work, not after
    options, out = options or EvaluateOptions(), Path(out)
    with Ranks() as ranks:
        dataset, chosen = _open(data, options)
        tables = [dataset.rows(one, limit=options.limit, skip_damaged=options.skip_damaged) for one in chosen]
        name = options.name or getattr(encoder, "name", "") or type(encoder).__name__
        results = Results(name, fingerprint(encoder, options.for_encode(), ranks), options.for_encode())
        check_owner(results, out)
        folder = out / "vectors" / results.fingerprint
        store = VectorStore(encoder, options.for_encode(), folder, options.batch_size, ranks)
        for number, rows in enumerate(tables, 1):
            tell = _telling(on_progress, rows, number, len(tables))
            try:
                vectors = store.vectors(rows.subset.name, rows.pairs, dataset.images, tell)
            except InputError as error:
                raise _naming_row(error, rows, dataset.images) from error
            _score_subset(results, rows, vectors, options, out if ranks.first else None)
        ranks.barrier()
    return results


def _open(data: str | Path, options: EvaluateOptions) -> tuple[Dataset, list[Subset]]:
    return open_dataset(
        data,
        image_dir=options.image_dir,
        names=options.subsets,
        meta_tasks=options.meta_tasks,
        revision=options.revision,
        local_files_only=options.local_files_only,
    )


def _telling(on_progress: Callable[[Progress], None], rows: Rows, number: int, subsets: int) -> Callable[[int], None]:
    return lambda done: on_progress(Progress(rows.subset.name, number, subsets, done, len(rows.pairs)))


def _naming_row(error: InputError, rows: Rows, images: Images) -> ValueError:
    """The error of one of the rows' inputs, with the first row that has it."""
    if error.index is None:
        return ValueError(f"{rows.subset.name}: {error.reason}")
    pair = rows.pairs[error.index]
    row = next(row.index for row in rows if pair in (row.query, *row.targets))
    said = f"{rows.subset.name}, row {row}: {pair.image or 'text ' + repr(pair.text[:80])}: {error.reason}"
    hint = (" (", Option("skip_damaged"), " leaves such rows out)") if _damaged(pair, images) else ()
    return OptionError(said, *hint)


def _damaged(pair: Pair, images: Images) -> bool:
    """Whether it is among what `Dataset.rows` leaves out with skip_damaged."""
    try:
        if pair.image:
            images.check(pair.image, thoroughly=True)
    except (OSError, ValueError):
        return True
    return False


def _score_subset(
    results: Results, rows: Rows, vectors: np.ndarray, options: EvaluateOptions, out: Path | None
) -> None:
    """Adds a subset's figures and notes to the results; writes its files to `out`, if there is one."""
    name = rows.subset.name
    scored = score.score_rows(vectors, rows.numbered)
    try:
        score.check_collapse(vectors, rows.numbered, scored, name)
    except score.CollapsedEmbeddings as error:
        if not options.allow_collapsed:
            raise
        results.notes.append(f"COLLAPSED: {error}")
    results.notes += _notes(rows)
    results.subsets[name], results.dimension = rows.subset, vectors.shape[1]
    results.figures[name] = score.figures(scored, name)
    if out is not None:
        write_results(results, out)  # first: it says whose the other files are
        write_score(out / f"{name}_score.json", scored)
        write_predictions(out / f"{name}_pred.parquet", rows, scored)


def _notes(rows: Rows) -> list[str]:
    name, damaged, notes = rows.subset.name, rows.damaged, []
    if damaged:
        notes.append(f"{name}: damaged rows left out: {len(damaged)}; the first: {damaged[0]}")
    if rows.cut:
        notes.append(f"{name}: only the first {len(rows) + len(damaged)} rows were asked for; there are more")
    again = sum(int((targets == targets[0]).sum() > 1) for _, targets in rows.numbered)
    if again:
        notes.append(f"{name}: rows that list the positive again among the candidates, not counted as wrong: {again}")
    return notes
