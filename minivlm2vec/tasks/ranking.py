"""Retrieval: any query against any candidates, text, image or both on either side.

Shapes: C candidates, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import numpy as np

from ..cosines import cosines
from ..errors import InputError, Option, OptionError
from ..prompts import TEXT, Task
from .common import Encoder, as_task, check_has_text, checked_top, encode, has_image, name_of, shown, text_of


@dataclass(frozen=True)
class Hit:
    """A candidate: its place among the hits (from 1), its index in the list that was given (from 0), its cosine, what
    it is called."""

    rank: int
    index: int
    score: float
    name: str

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Ranking:
    """A query's candidates, the nearest first; equal ones in the order of the list.

    Fields:
        query: what the query is called.
        hits: the nearest candidates.
        of: how many candidates there were.
        right: index of the candidate that is known to be right, where one was named.
        right_rank: its rank, from 1, ties counted against it, as the MMEB evaluator counts; a candidate that is the
            same input again is not counted against it.
    """

    query: str
    hits: tuple[Hit, ...]
    of: int
    right: int | None = None
    right_rank: int | None = None

    def as_dict(self) -> dict[str, Any]:
        about = {"query": self.query, "hits": [one.as_dict() for one in self.hits], "of": self.of}
        return about | ({} if self.right is None else {"right": self.right, "right_rank": self.right_rank})

    def __str__(self) -> str:
        lines = [f"{shown(self.query)}: {len(self.hits)} of {self.of}"]
        lines += [f"{hit.rank:3d}  {hit.score:7.4f}  {shown(hit.name)}" for hit in self.hits]
        if self.right is not None:
            lines.append(f"candidate {self.right} has rank {self.right_rank}")
        return "\n".join(lines)


def rank(
    embedder: Encoder,
    query: Any,
    candidates: Sequence[Any],
    *,
    instruction: str | Task | None = "t2i",
    top: int | None = None,
    right: int | None = None,
    **options: Any,
) -> Ranking:
    """The candidates by their nearness to the query.

    Args:
        embedder: an `Embedder`, or anything with its `encode`.
        query: a text, a PIL image, or a dict of "text" and "image" or "images", as `Embedder.encode` takes it.
        candidates: a list of such; at least one. The same input given twice is computed once.
        instruction: a task of `prompts.TASKS` ("t2i", "i2t", "i2i", "wikipedia", …), a `prompts.Task` of one's own, or
            None for none. What it says of an image is not put in front of a candidate that has none.
        top: the nearest candidates that the result has; default all.
        right: index of the candidate that is known to be right: the result has its rank.
        options: of `Embedder.encode` (num_crops, max_length, batch_tokens, …).

    Raises InputError naming query or candidate, OptionError for `top` and `right`, before anything is computed.
    """
    task, items = as_task(instruction), checked_candidates(candidates)
    checked_top(top, len(items), "candidates")
    right = checked_right(right, len(items))
    check_input(query, "query")
    check_has_text(query, task.query, "query")
    keys = [_key(item) for item in items]
    first: dict[Any, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    different = [(i, items[i]) for i in first.values()]
    rows = {key: row for row, key in enumerate(first)}
    asked = encode(embedder, [query], task.query, options, lambda _: "query")
    found = candidate_vectors(embedder, different, task, options)[[rows[key] for key in keys]]
    same = None if right is None else np.array([key == keys[right] for key in keys])
    return ranked(asked[0], found, name_of(query), list(map(name_of, items)), top=top, right=right, same=same)


def ranked(
    query_vector: np.ndarray,
    candidate_vectors: np.ndarray,
    query: str,
    names: Sequence[str],
    *,
    top: int | None = None,
    right: int | None = None,
    same: np.ndarray | None = None,
) -> Ranking:
    """The ranking of vectors [D] and [C, D] of length 1, for those who compute vectors themselves. same: bool [C],
    which candidates are the same input as the right one; default itself alone."""
    scores = cosines(query_vector[None], candidate_vectors)[0]
    order = np.argsort(-scores, kind="stable")[:top].tolist()
    hits = tuple(Hit(n, i, float(scores[i]), names[i]) for n, i in enumerate(order, 1))
    if right is None:
        return Ranking(query, hits, len(names))
    others = np.arange(len(names)) != right if same is None else ~same
    return Ranking(query, hits, len(names), right, 1 + int((scores[others] >= scores[right]).sum()))


def candidate_vectors(
    embedder: Encoder, different: Sequence[tuple[int, Any]], task: Task, options: Mapping[str, Any]
) -> np.ndarray:
    """[C, D] of (index in the list, input) pairs. Those with an image go into one call with the instruction, the others
    into a second, where it says nothing of a text."""
    items = [item for _, item in different]
    around_text = TEXT in task.document
    groups = [[i for i, item in enumerate(items) if (has_image(item) or around_text) is told] for told in (True, False)]
    parts: list[tuple[list[int], np.ndarray]] = []
    for group, prompt in zip(groups, (task.document, TEXT), strict=True):
        if group:
            inputs, names = [items[i] for i in group], [f"candidate {different[i][0]}" for i in group]
            parts.append((group, encode(embedder, inputs, prompt, options, names.__getitem__)))
    vectors = np.empty((len(items), parts[0][1].shape[1]))
    for group, part in parts:
        vectors[group] = part
    return vectors


def checked_candidates(candidates: Any) -> list[Any]:
    if isinstance(candidates, (str, bytes, Mapping)) or not hasattr(candidates, "__iter__"):
        raise InputError(f"a list of inputs is needed, got one {type(candidates).__name__}", name="candidates")
    found = list(candidates)
    if not found:
        raise InputError("none is given; 1 is needed at least, got 0", name="candidates")
    for i, item in enumerate(found):
        check_input(item, f"candidate {i}")
    return found


def check_input(item: Any, name: str) -> None:
    """Raises InputError for an input without text and image."""
    if not has_image(item) and not text_of(item).strip():
        raise InputError(f"is empty: {text_of(item)!r}", name=name)


def checked_right(right: int | None, number: int) -> int | None:
    if right is None:
        return None
    if isinstance(right, bool) or not hasattr(right, "__index__"):
        raise OptionError(Option("right"), f" is {right!r}; the index of a candidate is needed")
    index = right.__index__()
    if not 0 <= index < number:
        raise OptionError(Option("right"), f" is {index}; the {number} candidates have the numbers 0 to {number - 1}")
    return index


def _key(item: Any) -> Any:
    """What is equal where two inputs are the same: texts, paths and bytes by value, other images by identity."""
    if isinstance(item, str):
        return "text", item
    if isinstance(item, Mapping):
        sources = item.get("images") or [item.get("image")]
        return "input", item.get("text"), tuple(map(_source_key, sources))
    return _source_key(item)


def _source_key(source: Any) -> Any:
    if isinstance(source, (str, PathLike)):
        return "path", fspath(source)
    return ("bytes", source) if isinstance(source, bytes) else ("object", id(source))
