"""The model's answers, how many are right, and how long they took.

C candidates of a question, D width of a vector.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...embedder import Embedder
from ...mmeb.score import METRICS, Scored, figures, unit_rows
from ...rows import Images, Pair, as_input
from .questions import SEARCH, DemoData, Question, QuestionSet

TIMED_QUERIES = 9


@dataclass(frozen=True)
class Answer:
    """A question's candidates, nearest first; where a right one and a wrong one are equally near, the wrong first."""

    question: Question
    candidates: tuple[Pair, ...]
    scores: tuple[float, ...]  # cosines
    rank: int  # of the first right one, from 1

    def is_right(self, place: int) -> bool:
        return self.candidates[place] in self.question.right


@dataclass(frozen=True)
class Result:
    """The answers to one set of questions, and the percentage of questions whose nearest candidate is right, with its
    95% bootstrap interval."""

    question_set: QuestionSet
    answers: tuple[Answer, ...]
    precision: float
    low: float
    high: float

    @property
    def chance(self) -> float:
        """Percentage that is right when answers are chosen at random."""
        questions = self.question_set.questions
        shares = (sum(c in q.right for c in q.candidates) / len(q.candidates) for q in questions)
        return 100 * sum(shares) / len(questions)

    @property
    def candidates(self) -> str:
        """How many a question has to choose from."""
        counts = {len(question.candidates) for question in self.question_set.questions}
        return str(*counts) if len(counts) == 1 else f"{min(counts)}-{max(counts)}"


@dataclass(frozen=True)
class Times:
    """In seconds."""

    load: float | None  # None: not known
    pictures: int
    embed_pictures: float
    others: int
    embed_others: float
    query: float  # one text query: embedded and compared with every picture


def answer_all(
    embedder: Embedder,
    data: DemoData,
    images: Images,
    *,
    load_seconds: float | None = None,
    show_progress: bool = False,
) -> tuple[list[Result], Times]:
    """Embeds every different input once and answers every question."""
    pairs = data.pairs()
    n = len(data.collection)  # they come first
    inputs = [as_input(pair, images) for pair in pairs]
    pictures, embed_pictures = _timed_encode(embedder, inputs[:n], show_progress)
    others, embed_others = _timed_encode(embedder, inputs[n:], show_progress)
    vectors = unit_rows(np.concatenate([pictures, others]))
    number = {pair: i for i, pair in enumerate(pairs)}
    results = [_result(one, vectors, number) for one in data.question_sets]
    query = _time_of_a_query(embedder, data, vectors[:n])
    return results, Times(load_seconds, n, embed_pictures, len(pairs) - n, embed_others, query)


def _result(question_set: QuestionSet, vectors: np.ndarray, number: dict[Pair, int]) -> Result:
    answered = [answer(question, vectors, number) for question in question_set.questions]
    counted = figures([scored for _, scored in answered], question_set.name)
    p1 = METRICS.index("precision@1")
    low, high = counted.interval()[:, p1]
    return Result(question_set, tuple(one for one, _ in answered), float(counted.mean[p1]), float(low), float(high))


def answer(question: Question, vectors: np.ndarray, number: dict[Pair, int]) -> tuple[Answer, Scored]:
    """Ranks a question's candidates by cosine. vectors: float64 [N, D] of length 1; number: rows of them."""
    rows = [number[pair] for pair in question.candidates]
    scores = (vectors[rows] @ vectors[number[question.query]]).astype(np.float32)  # [C]
    right = np.array([pair in question.right for pair in question.candidates])
    best = scores[right].max()
    rank = 1 + int((scores[~right] >= best).sum())
    order = np.lexsort((right, -scores))
    ranked = Answer(question, tuple(question.candidates[i] for i in order), tuple(scores[order].tolist()), rank)
    return ranked, Scored(scores, rank, 1 + int((scores[~right] > best).sum()), int(scores.argmax()))


def _timed_encode(embedder: Embedder, inputs: Sequence, show_progress: bool) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    vectors = np.asarray(embedder.encode(inputs, show_progress=show_progress))
    return vectors, time.perf_counter() - start


def _time_of_a_query(embedder: Embedder, data: DemoData, pictures: np.ndarray) -> float:
    """Median of a few."""
    texts = [q.query.text for one in data.question_sets if one.kind is SEARCH for q in one.questions]
    pictures = pictures.astype(np.float32)
    times = []
    for text in texts[:TIMED_QUERIES]:
        start = time.perf_counter()
        (embedder.encode([text]) @ pictures.T).argmax()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
