"""Evaluating a model on MMEB, or on any data in its format.

    results = evaluate(Embedder.from_pretrained("TIGER-Lab/VLM2Vec-Full"), out="outputs/mmeb", num_crops=4)
    print(results.table())

Files written to `out`:

    <Subset>_score.json      {"acc", "num_correct", "num_pred"}, as the original evaluator writes and counts it
    <Subset>_pred.parquet    per row: query, prediction, ranks, all scores
    results.json             every figure with its 95% interval
    table.txt .md .html      the table, beside the published rows
    vectors/                 what a later run takes up; may be deleted
"""

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.utils import tqdm

from minivlm2vec.mmeb import report, score, subsets
from minivlm2vec.mmeb.dataset import HUB_NAME, Dataset, Rows, import_pyarrow, open_dataset
from minivlm2vec.mmeb.encode import Encoder, Group, Store, fingerprint
from minivlm2vec.mmeb.score import Figures, Scored
from minivlm2vec.mmeb.subsets import Subset


@dataclass
class Results:
    """Figures by subset, in order; averages by meta-task, IND, OOD and all."""

    name: str
    figures: dict[str, Figures] = field(default_factory=dict)
    subsets: dict[str, Subset] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def averages(self) -> dict[str, Figures]:
        members = subsets.groups(self.subsets.values())
        return {group: score.average([self.figures[name] for name in names]) for group, names in members.items()}

    def table(self, form: str = "text") -> str:
        """ "text", "markdown" or "html"."""
        return report.render(self.name, self.subsets, self.figures, self.averages(), self.notes, form)

    def as_dict(self) -> dict:
        about = {name: {"meta_task": one.meta_task, "domain": one.domain} for name, one in self.subsets.items()}
        return {
            "model": self.name,
            "subsets": {name: about[name] | one.as_dict() for name, one in self.figures.items()},
            "averages": {group: one.as_dict() for group, one in self.averages().items()},
            "notes": self.notes,
        }


def evaluate(
    encoder: Encoder,
    data: str | Path = HUB_NAME,
    *,
    out: str | Path,
    image_dir: str | Path | None = None,
    names: Collection[str] | None = None,
    meta_tasks: Collection[str] | None = None,
    num_crops: int | None = None,
    max_length: int | None = 256,
    batch_size: int = 256,
    limit: int | None = None,
    skip_damaged: bool = False,
    allow_collapsed: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    name: str = "",
    show_progress: bool = False,
) -> Results | None:
    """Encodes, scores and writes. Under torchrun every process calls this; all but rank 0 get None.

    Args:
        encoder: an `Embedder`, or anything with its `encode` (see `encode.Encoder`).
        data: a folder in MMEB's format, or a dataset's name on the Hub.
        image_dir: folder or zip of the pictures; default the data's own images.zip.
        names, meta_tasks: which subsets; default all there are.
        num_crops, max_length: for `encode`. MMEB's scores were measured with 4 and 256; 256 tokens cut texts
            only, never an input with an image.
        batch_size: inputs per call of `encode`, and per file that an interrupted run keeps.
        limit: only the first rows of each subset.
        skip_damaged: leave out rows that cannot be read, and say so in the table, instead of stopping.
        allow_collapsed: go on, and say so in the table, where the vectors do not tell inputs apart.
        name: of the model, for the table.

    Raises ValueError naming subset and row for damaged data, FileNotFoundError for a missing picture, and
    score.CollapsedEmbeddings.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size and limit are at least 1, got {batch_size} and {limit}")
    out = Path(out)
    import_pyarrow()  # before hours of work, not after
    where = {"image_dir": image_dir, "names": names, "meta_tasks": meta_tasks}
    group = join_group()
    dataset, chosen = open_dataset(data, **where, revision=revision, local_files_only=local_files_only)
    read = [dataset.rows(one, limit=limit, skip_damaged=skip_damaged) for one in chosen]
    options = {"max_length": max_length} | ({} if num_crops is None else {"num_crops": num_crops})
    folder = out / "vectors" / fingerprint(encoder, options, group)
    store = Store(encoder, options, folder, batch_size, group)
    results = Results(name or getattr(encoder, "name", "") or type(encoder).__name__)
    for number, rows in enumerate(read, 1):
        label = f"{rows.subset.name} [{number}/{len(read)}]"
        quiet = not show_progress or group.rank > 0
        with tqdm(total=len(rows.pairs), desc=label, unit="input", disable=quiet) as bar:
            vectors = store.vectors(rows.subset.name, rows.pairs, dataset.images, lambda n: bar.update(n * group.size))
        if vectors is not None:
            _score_subset(results, rows, vectors, out, allow_collapsed, limit)
    if group.rank == 0:
        write_results(results, out)
    group.barrier()
    return results if group.rank == 0 else None


def join_group() -> Group:
    """The processes that torchrun has started, through gloo (only waiting is shared, so any device will do)."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Group()
    from datetime import timedelta

    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    waiting = timedelta(hours=24)  # one may encode long after another is done
    return Group(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=waiting))


def _score_subset(
    results: Results,
    rows: Rows,
    vectors: np.ndarray,
    out: Path,
    allow_collapsed: bool,
    limit: int | None,
) -> None:
    name = rows.subset.name
    scored = score.score_rows(vectors, rows.numbered)
    try:
        score.check_collapse(vectors, rows.numbered, scored, name)
    except score.CollapsedEmbeddings as error:
        if not allow_collapsed:
            raise
        results.notes.append(f"COLLAPSED: {error}")
    if rows.damaged:
        results.notes.append(f"{name}: {len(rows.damaged)} damaged rows left out; the first: {rows.damaged[0]}")
    if limit is not None:
        results.notes.append(f"{name}: only the first {limit} rows were asked for")
    again = sum(int((targets == targets[0]).sum() > 1) for _, targets in rows.numbered)
    if again:
        results.notes.append(f"{name}: {again} rows list the positive again among the candidates; not counted as wrong")
    results.subsets[name] = rows.subset
    results.figures[name] = score.figures(scored, name)
    write_score(out / f"{name}_score.json", scored)
    write_predictions(out / f"{name}_pred.parquet", rows, scored)


# --- files -----------------------------------------------------------------------------------------------


def write_score(path: Path, scored: Sequence[Scored]) -> None:
    """The original's file: ties are the positive's."""
    correct = sum(one.predicted == 0 for one in scored)
    _write_json(path, {"acc": correct / len(scored), "num_correct": correct, "num_pred": len(scored)}, indent=4)


def write_predictions(path: Path, rows: Rows, scored: Sequence[Scored]) -> None:
    """One line per row: query, positive, prediction, ranks, and the scores of all candidates."""
    pyarrow = import_pyarrow()
    queries = [rows.pairs[query] for query, _ in rows.numbered]
    positives = [rows.pairs[targets[0]] for _, targets in rows.numbered]
    answers = [rows.pairs[targets[one.predicted]] for (_, targets), one in zip(rows.numbered, scored, strict=True)]
    columns: dict[str, Any] = {
        "row": rows.indices,
        "qry_text": [pair.text for pair in queries],
        "qry_img_path": [pair.image for pair in queries],
        "tgt_text": [pair.text for pair in positives],
        "tgt_img_path": [pair.image for pair in positives],
        "pred": [one.predicted for one in scored],
        "pred_text": [pair.text for pair in answers],
        "pred_img_path": [pair.image for pair in answers],
        "rank": [one.rank for one in scored],
        "rank_original": [one.rank_original for one in scored],
        "scores": pyarrow.array([one.scores for one in scored], pyarrow.list_(pyarrow.float32())),
    }
    beside = path.with_suffix(".tmp")
    pyarrow.parquet.write_table(pyarrow.table(columns), beside, compression="zstd")
    os.replace(beside, path)


def write_results(results: Results, out: Path) -> None:
    _write_json(out / "results.json", results.as_dict(), indent=1)
    for form, suffix in (("text", "txt"), ("markdown", "md"), ("html", "html")):
        _write(out / f"table.{suffix}", results.table(form))


def _write_json(path: Path, value: Any, indent: int) -> None:
    _write(path, json.dumps(value, indent=indent, ensure_ascii=False))


def _write(path: Path, text: str) -> None:
    """In one step, so that a kill leaves the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


__all__ = ["Dataset", "Results", "evaluate"]
