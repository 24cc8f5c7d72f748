"""What the demo asks: sets of mini-MMEB as they ship with the package, and a search in its single pictures.

Everything is drawn in the style that no training picture has. Of the concepts, one half was seen in training (in
other styles), the other half never.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..mmeb.dataset import Dataset, Pair, read_jsonl
from ..mmeb.mini.tasks import INSTRUCTIONS, PICTURE

STYLE = "fluent"
CONCEPTS = ("seen", "held-out")
COLLECTIONS = {"seen": "pictures_seen.jsonl", "held-out": "pictures.jsonl"}


@dataclass(frozen=True)
class Kind:
    """A kind of question. `instruction` is that of training; {} in it is the question's own part."""

    title: str
    instruction: str
    sets: str  # the end of the names of its sets: "Where" of "Seen-Fluent-Where" and "Fluent-Where"

    def own(self, text: str) -> str:
        """What a query's text says beside the instruction."""
        head, _, tail = self.instruction.partition("{}")
        return text[len(head) : len(text) - len(tail)] if "{}" in self.instruction else ""


SEARCH = Kind("Text -> image", INSTRUCTIONS["Emoji-t2i"][0], "t2i")
NAMING = Kind("Image -> text", INSTRUCTIONS["Emoji-i2t"][0], "i2t")
GROUNDING = Kind("Image + name -> crop", INSTRUCTIONS["Scene-Isolate"][0], "Isolate")
KINDS = (
    SEARCH,
    NAMING,
    Kind("Image -> class", INSTRUCTIONS["Emoji-Subgroup"][0], "Subgroup"),
    Kind("Image + question -> text", INSTRUCTIONS["VQA"][0], "Where"),
    GROUNDING,
)


class Question(NamedTuple):
    query: Pair
    candidates: tuple[Pair, ...]
    right: frozenset[Pair]


@dataclass(frozen=True)
class Asked:
    """Questions of one kind about seen, or about held-out concepts."""

    kind: Kind
    concepts: str  # one of CONCEPTS
    name: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Material:
    """All that is asked, the pictures that are searched, and what single pictures show."""

    asked: tuple[Asked, ...]
    collection: tuple[Pair, ...]
    names: dict[str, str]  # {path of a picture: name of what it shows}

    def pairs(self) -> list[Pair]:
        """Every different input, in order of appearance."""
        found = dict.fromkeys(self.collection)
        for asked in self.asked:
            for question in asked.questions:
                found |= dict.fromkeys((question.query, *question.candidates))
        return list(found)

    def name(self, pair: Pair) -> str:
        """What a table calls a candidate or a query without text of its own."""
        return f"[{self.names.get(pair.image, Path(pair.image).stem)}]" if pair.image else pair.text


def read_material(dataset: Dataset) -> Material:
    """Reads what is there of it. Raises ValueError where there is no picture to search."""
    catalogue = {c: list(_pictures(dataset.root / file)) for c, file in COLLECTIONS.items()}
    collection = {row["path"]: row["label"] for rows in catalogue.values() for row in rows if row["style"] == STYLE}
    asked = tuple(one for kind in KINDS for c in CONCEPTS for one in _asked(kind, c, dataset, catalogue[c], collection))
    if not collection:
        raise ValueError(
            f"{dataset.root} lists no picture in the style {STYLE!r}: {' and '.join(COLLECTIONS.values())}"
        )
    names = {row["path"]: row["label"] for rows in catalogue.values() for row in rows}
    for one in asked:
        names |= _told_by(one)
    return Material(asked, tuple(Pair(PICTURE, path) for path in collection), names)


def shown(asked: Asked, number: int = 3) -> list[int]:
    """The questions that tables and page show: evenly spaced, whatever the answers."""
    total = len(asked.questions)
    return [i * total // number for i in range(number)] if total > number else list(range(total))


def _asked(
    kind: Kind, concepts: str, dataset: Dataset, rows: list[dict], collection: dict[str, str]
) -> Iterator[Asked]:
    if kind is SEARCH:
        labels = dict.fromkeys(row["label"] for row in rows)
        questions = [_search(label, collection) for label in labels]
        name = f"{len(collection)} pictures"
    else:
        name = f"{'Seen-' if concepts == 'seen' else ''}{STYLE.capitalize()}-{kind.sets}"
        questions = list(_rows(dataset, name)) if name in dataset.subsets else []
    if questions:
        yield Asked(kind, concepts, name, tuple(questions))


def _search(label: str, collection: dict[str, str]) -> Question:
    """A name, to be found among all the pictures."""
    candidates = {Pair(PICTURE, path): shows for path, shows in collection.items()}
    right = frozenset(pair for pair, shows in candidates.items() if shows == label)
    return Question(Pair(SEARCH.instruction.format(label), ""), tuple(candidates), right)


def _rows(dataset: Dataset, name: str) -> Iterator[Question]:
    for row in dataset.rows(dataset.subsets[name]):
        yield Question(row.query, row.targets, frozenset(row.targets[:1]))


def _told_by(asked: Asked) -> dict[str, str]:
    """Names of pictures, as questions and their right answers tell them."""
    if asked.kind is NAMING:
        return {question.query.image: pair.text for question in asked.questions for pair in question.right}
    if asked.kind is GROUNDING:
        return {pair.image: asked.kind.own(q.query.text) for q in asked.questions for pair in q.right}
    return {}


def _pictures(path: Path) -> Iterable[dict]:
    return read_jsonl(path) if path.is_file() else ()
