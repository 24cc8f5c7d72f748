"""What an evaluation gives, in memory and as files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import replacing, write_text
from ..errors import some
from ..extras import import_pyarrow
from ..rows import Pair, check_columns, read_rows
from . import report, score, subsets
from .dataset import Rows
from .score import Figures, Scored
from .subsets import Subset

# By a row's number: its query, its positive, how many candidates it has; and how it was scored.
Predictions = dict[int, tuple[tuple[Pair, Pair, int], Scored]]
RESULTS = "results.json"
PREDICTED = (
    "row", "qry_text", "qry_img_path", "tgt_text", "tgt_img_path", "pred", "rank", "rank_original", "scores",
)  # fmt: skip


@dataclass
class Results:
    """Figures by subset, in order; averages by meta-task, IND, OOD and all.

    Attributes:
        name: the model's.
        fingerprint: of the model with these options, see `encode.fingerprint`.
        options: of `encode`.
        dimension: of the vectors.
        notes: what a reader of the table must know: rows that were left out, vectors that carry no information.
    """

    name: str
    fingerprint: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    dimension: int | None = None
    figures: dict[str, Figures] = field(default_factory=dict)
    subsets: dict[str, Subset] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def averages(self) -> dict[str, Figures]:
        members = subsets.groups(self.subsets.values())
        return {group: score.average([self.figures[name] for name in names]) for group, names in members.items()}

    def table(self, form: str = "text") -> str:
        """ "text", "markdown" or "html"."""
        return report.render(self.name, self.subsets, self.figures, self.averages(), self.notes, form)

    def as_dict(self) -> dict[str, Any]:
        about = {
            name: {"meta_task": one.meta_task, "domain": one.domain, "averaged": one.averaged}
            for name, one in self.subsets.items()
        }
        return {
            "model": self.name,
            "fingerprint": self.fingerprint,
            "options": self.options,
            "dimension": self.dimension,
            "subsets": {name: about[name] | one.as_dict() for name, one in self.figures.items()},
            "averages": {group: one.as_dict() for group, one in self.averages().items()},
            "notes": self.notes,
        }


def read_results(out: Path) -> dict[str, Any]:
    """What `write_results` has written of `Results.as_dict`. Raises ValueError for a folder of other origin."""
    path = out / RESULTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        missing = {"model", "fingerprint", "options", "dimension", "subsets", "notes"} - found.keys()
    except FileNotFoundError:
        raise ValueError(f"{out} holds no results of `evaluate`: there is no {RESULTS}") from None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not what `evaluate` writes: {error}") from None
    if missing:
        raise ValueError(f"{path} does not say {some(sorted(missing))}: it was not written by this version")
    return found


def check_owner(results: Results, out: Path) -> None:
    """Raises ValueError where the folder holds results of another model, or of this one with other options."""
    if not (out / RESULTS).is_file():
        return
    there = read_results(out)
    if there["fingerprint"] != results.fingerprint:
        raise ValueError(
            f"{out} holds results of {_named(there)}, this is {_named(results.as_dict())}: choose another folder (a "
            "device or dtype that rounds otherwise counts as another model)"
        )


def _named(results: dict[str, Any]) -> str:
    options = "".join(f", {name} {value}" for name, value in results["options"].items())
    return f"{results['model']} (fingerprint {results['fingerprint'][:12]}{options})"


def write_results(results: Results, out: Path) -> None:
    """results.json, and the table in its three forms."""
    _write_json(out / RESULTS, results.as_dict(), indent=1)
    for form, suffix in (("text", "txt"), ("markdown", "md"), ("html", "html")):
        write_text(out / f"table.{suffix}", results.table(form))


def write_score(path: Path, scored: Sequence[Scored]) -> None:
    """The original's file: ties are the positive's."""
    correct = sum(one.predicted == 0 for one in scored)
    _write_json(path, {"acc": correct / len(scored), "num_correct": correct, "num_pred": len(scored)}, indent=4)


def write_predictions(path: Path, rows: Rows, scored: Sequence[Scored]) -> None:
    """One line per row: query, positive, prediction, ranks, and the scores of all candidates."""
    pyarrow = import_pyarrow("to write predictions", extra="mmeb")
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
    with replacing(path) as new:
        pyarrow.parquet.write_table(pyarrow.table(columns), new, compression="zstd")


def read_predictions(path: Path) -> Predictions:
    """What `write_predictions` has written. Raises ValueError for a file that cannot be read."""
    found: Predictions = {}
    for row in read_rows(path):
        check_columns(row, PREDICTED)
        query, positive = (Pair(row[f"{side}_text"], row[f"{side}_img_path"]) for side in ("qry", "tgt"))
        scored = Scored(np.array(row["scores"], np.float32), row["rank"], row["rank_original"], row["pred"])
        found[row["row"]] = ((query, positive, len(scored.scores)), scored)
    return found


def _write_json(path: Path, value: Any, indent: int) -> None:
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False))
