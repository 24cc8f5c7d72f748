"""Two evaluations compared row by row.

    print(compare("outputs/before", "outputs/after").table())

Rows that are hard for one model are mostly hard for another. Each replicate of a paired bootstrap draws the same rows
for both, so the interval of their difference is narrower than the two models' own intervals suggest (Koehn,
"Statistical Significance Tests for Machine Translation Evaluation", 2004).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import some
from . import report, score, subsets
from .results import Predictions, read_predictions, read_results
from .score import METRICS, Figures
from .subsets import Subset

Three = tuple[Figures, Figures, Figures]  # of A, of B, and of B - A


@dataclass(frozen=True)
class Comparison:
    """Figures of A, of B, and of B - A in percentage points, over the rows that both have.

    Fields:
        names: the models'.
        figures: by subset. The replicates of all three are of the same rows drawn.
        subsets: what they are, in the same order.
        notes: what a reader must know: rows and subsets that only one has, options that differ, the two results' notes.
    """

    names: tuple[str, str]
    figures: dict[str, Three] = field(default_factory=dict)
    subsets: dict[str, Subset] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def averages(self) -> dict[str, Three]:
        """By meta-task, IND, OOD and all: plain means over subsets."""
        members = subsets.groups(self.subsets.values())
        return {group: _average([self.figures[name] for name in names]) for group, names in members.items()}

    def table(self, form: str = "text") -> str:
        """ "text", "markdown" or "html"."""
        return report.render_differences(self.names, self.subsets, self.figures, self.averages(), self.notes, form)

    def as_dict(self) -> dict[str, Any]:
        return {
            "models": list(self.names),
            "subsets": {name: _as_dict(three) for name, three in self.figures.items()},
            "averages": {group: _as_dict(three) for group, three in self.averages().items()},
            "notes": self.notes,
        }


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Compares what `evaluate` has written to two folders, subset by subset and meta-task by meta-task.

    Raises ValueError for folders without results, with no subset in common, or of different data.
    """
    folders = Path(a), Path(b)
    both = [read_results(folder) for folder in folders]
    common = [name for name in both[0]["subsets"] if name in both[1]["subsets"]]
    if not common:
        there = (f"{folder} has {some(list(r['subsets']))}" for folder, r in zip(folders, both, strict=True))
        raise ValueError(f"no subset is in both: {', '.join(there)}")
    found = Comparison((both[0]["model"], both[1]["model"]), notes=_notes(both, common))
    for name in common:
        about = both[0]["subsets"][name]
        found.subsets[name] = Subset(name, about["meta_task"], about["domain"], about["averaged"])
        rows_a, rows_b = (_rows(f, name, r["subsets"][name]["rows"]) for f, r in zip(folders, both, strict=True))
        numbers = _common_rows(name, rows_a, rows_b)
        if len(numbers) < max(len(rows_a), len(rows_b)):
            counts = f"A has {len(rows_a)}, B {len(rows_b)}"
            found.notes.append(f"{name}: compared are the {len(numbers)} rows that both have; {counts}")
        of_a, of_b = (score.percentages([rows[n][1] for n in numbers]) for rows in (rows_a, rows_b))
        found.figures[name] = _three(of_a, of_b, name)
    return found


def _rows(folder: Path, name: str, count: int) -> Predictions:
    path = folder / f"{name}_pred.parquet"
    rows = read_predictions(path)
    if len(rows) != count:
        raise ValueError(f"{path} has {len(rows)} rows and results.json says {count}: the evaluation was cut off; run "
                         "it again")  # fmt: skip
    return rows


def _common_rows(name: str, a: Predictions, b: Predictions) -> list[int]:
    """Numbers of the rows that both have, which must ask the same."""
    numbers = [n for n in a if n in b]
    differing = [n for n in numbers if a[n][0] != b[n][0]]
    if differing or not numbers:
        what = f"row {differing[0]} is another one" if differing else "there is no row that is in both"
        raise ValueError(f"{name}: {what}; the two evaluations are of different data")
    return numbers


def _notes(both: list[dict[str, Any]], common: list[str]) -> list[str]:
    notes = []
    for letter, results in zip("AB", both, strict=True):
        alone = [name for name in results["subsets"] if name not in common]
        notes += [f"only {letter} has {some(alone)}"] if alone else []
        notes += [f"{letter}: {note}" for note in results["notes"]]
    a, b = (results["options"] | {"dimension": results["dimension"]} for results in both)
    differ = [f"{key} {a.get(key)} and {b.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return notes + ([f"options differ between A and B: {', '.join(differ)}"] if differ else [])


def _three(of_a: np.ndarray, of_b: np.ndarray, name: str) -> Three:
    of = score.figures_of
    return of(of_a, name), of(of_b, name), of(of_b - of_a, name)


def _average(parts: list[Three]) -> Three:
    a, b, difference = zip(*parts, strict=True)
    return score.average(a), score.average(b), score.average(difference)


def _as_dict(three: Three) -> dict[str, Any]:
    a, b, difference = three
    columns = (a.mean, b.mean, difference.mean, *difference.interval())
    rounded = np.stack(columns).round(4).T.tolist()
    named = [dict(zip(("a", "b", "difference", "low", "high"), row, strict=True)) for row in rounded]
    return {"rows": a.rows} | dict(zip(METRICS, named, strict=True))
