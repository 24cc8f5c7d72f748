"""From vectors to figures: ranks, Precision@1 with both tie rules, MRR, recall, bootstrap intervals.

R rows, N distinct pairs, D width, M metrics, B bootstrap replicates.

The original evaluator takes numpy's argmax over a row's candidates, the positive first, so a tie goes to the
positive and a constant vector scores 100%. Here every figure counts ties against the positive; the original's
Precision@1 is given beside.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..cosines import cosines, unit_rows

NumberedRows = Sequence[tuple[int, Sequence[int] | np.ndarray]]  # (query, candidates), as indices of vectors
METRICS = ("precision@1", "precision@1_original", "mrr", "recall@5", "recall@10")
REPLICATES = 2000
COLLAPSED_VARIANCE = 1e-4  # of unit vectors, whose variance is at most 1; bf16 noise is well below
MANY_CANDIDATES = 100  # from here on, one answer to every query is no coincidence


class CollapsedEmbeddings(ValueError):
    """The vectors do not tell their inputs apart, so any score of them would be meaningless."""


@dataclass(frozen=True)
class Scored:
    """One row. Scores are cosines, float32, in the candidates' order."""

    scores: np.ndarray
    rank: int  # of the positive, from 1, ties counted against it
    rank_original: int  # ties counted for it
    predicted: int  # index of the first highest score, as the original predicts

    def metrics(self) -> tuple[float, ...]:
        """In the order of METRICS."""
        return (self.rank == 1, self.predicted == 0, 1 / self.rank, self.rank <= 5, self.rank <= 10)


def score_rows(vectors: np.ndarray, rows: NumberedRows, block: int = 256) -> list[Scored]:
    """Scores each row against its own candidates.

    vectors: [N, D]. rows: (query, candidates) as indices into vectors, the positive first. A candidate with the
    positive's own index is the same input listed again: no model can tell it from the positive, so it is not
    counted against it.

    Cosines are those of `cosines.cosines`, so equal vectors tie. ValueError for vectors that are not finite or zero.
    """
    unit = unit_rows(vectors)
    scored = []
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        used, places = np.unique(np.concatenate([np.asarray(targets) for _, targets in part]), return_inverse=True)
        found = cosines(unit[[query for query, _ in part]], unit[used])
        ends = np.cumsum([len(targets) for _, targets in part])
        for i, (_, targets) in enumerate(part):
            columns = places[ends[i] - len(targets) : ends[i]]
            scored.append(_scored(found[i, columns], np.asarray(targets)))
    return scored


def _scored(scores: np.ndarray, targets: np.ndarray) -> Scored:
    others = scores[targets != targets[0]]
    return Scored(
        scores=scores,
        rank=1 + int((others >= scores[0]).sum()),
        rank_original=1 + int((others > scores[0]).sum()),
        predicted=int(scores.argmax()),
    )


def variance(vectors: np.ndarray) -> float:
    """Total variance of the unit vectors, 0 (all the same) .. 1: one minus the squared length of their mean."""
    return float(1 - (unit_rows(vectors).mean(axis=0) ** 2).sum())


def check_collapse(vectors: np.ndarray, rows: NumberedRows, scored: Sequence[Scored], what: str) -> None:
    """Raises CollapsedEmbeddings where queries or candidates have (almost) one vector, or every query, among many
    candidates, gets the same answer (which makes hit@1 = 1/n)."""
    sides = {
        "queries": np.unique([query for query, _ in rows]),
        "candidates": np.unique(np.concatenate([np.asarray(targets) for _, targets in rows])),
    }
    for side, indices in sides.items():
        spread = variance(vectors[indices])
        if len(indices) > 1 and spread < COLLAPSED_VARIANCE:
            raise CollapsedEmbeddings(
                f"{what}: the vectors of {len(indices)} different {side} are nearly the same (variance {spread:.1e}, "
                f"below {COLLAPSED_VARIANCE}); the model has collapsed or its weights were not loaded"
            )
    answers = {int(targets[one.predicted]) for (_, targets), one in zip(rows, scored, strict=True)}
    fewest = min(len(targets) for _, targets in rows)
    if len(sides["queries"]) >= 20 and fewest >= MANY_CANDIDATES and len(answers) == 1:
        hits = sum(one.rank == 1 for one in scored)
        raise CollapsedEmbeddings(
            f"{what}: {len(rows)} queries all get the same answer among at least {fewest} candidates "
            f"(hit@1 = {hits}/{len(rows)}); the queries' vectors carry no information"
        )


# --- figures ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """Means of METRICS in percent with 95% intervals; `replicates` [B, M] lets averages have intervals too."""

    rows: int
    mean: np.ndarray  # [M]
    replicates: np.ndarray  # [B, M]

    def interval(self) -> np.ndarray:
        """[2, M]: 2.5th and 97.5th percentile of the replicates."""
        return np.percentile(self.replicates, [2.5, 97.5], axis=0)

    def as_dict(self) -> dict:
        low, high = self.interval()
        named = zip(METRICS, self.mean, low, high, strict=True)
        return {"rows": self.rows} | {
            name: {"mean": round(float(m), 4), "low": round(float(a), 4), "high": round(float(b), 4)}
            for name, m, a, b in named
        }


def figures(scored: Sequence[Scored], name: str, replicates: int = REPLICATES) -> Figures:
    """Means over the rows of a subset, with the bootstrap's."""
    return figures_of(percentages(scored), name, replicates)


def percentages(scored: Sequence[Scored]) -> np.ndarray:
    """[R, M]: METRICS of each row, in percent."""
    return 100 * np.array([one.metrics() for one in scored], dtype=np.float64)


def figures_of(values: np.ndarray, name: str, replicates: int = REPLICATES) -> Figures:
    """[R, M] -> means over the rows of a subset, with the bootstrap's."""
    return Figures(len(values), values.mean(axis=0), bootstrap(values, name, replicates))


def bootstrap(values: np.ndarray, name: str, replicates: int = REPLICATES) -> np.ndarray:
    """[R, M] -> [B, M]: means over rows drawn again with replacement. Seeded by the subset's name, so that whatever is
    measured of the same rows is drawn alike."""
    n = len(values)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    counts = rng.multinomial(n, np.full(n, 1 / n), size=replicates)
    return counts @ values / n


def average(parts: Sequence[Figures]) -> Figures:
    """Plain mean over subsets, as MMEB averages; the subsets' replicates are independent."""
    return Figures(
        sum(part.rows for part in parts),
        np.mean([part.mean for part in parts], axis=0),
        np.mean([part.replicates for part in parts], axis=0),
    )
