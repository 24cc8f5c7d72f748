"""What the demo asks: for names and classes of the bundled single pictures, and sets of mini-MMEB as they ship.

Each kind of question is asked under three conditions: about concepts and in styles that training has shown, about
such concepts in the style that it has not shown, and about concepts that it has not shown in that style.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from ...images import open_image, to_rgb
from ...mmeb.dataset import Dataset
from ...rows import Images, Pair, read_jsonl
from ..world.concepts import HELD_OUT_STYLE
from ..world.tasks import INSTRUCTIONS, PICTURE, own_part

CATALOGUES = {"seen": "pictures_seen.jsonl", "new": "pictures.jsonl"}  # of the single pictures


class Condition(NamedTuple):
    """What is asked about, and how it is drawn; "seen": shown in training."""

    concepts: str  # "seen" or "new"
    drawn: str  # of the single pictures; grids and scenes of a seen style are in all of those

    @property
    def style(self) -> str:
        return "new" if self.drawn == HELD_OUT_STYLE else "seen"


CONDITIONS = (Condition("seen", "twemoji"), Condition("seen", HELD_OUT_STYLE), Condition("new", HELD_OUT_STYLE))


@dataclass(frozen=True)
class Kind:
    """A kind of question. `instruction` is that of training; {} in it is the question's own part."""

    title: str
    instruction: str
    sets: tuple[str, ...] = ()  # those that ask it, in the order of CONDITIONS; none: asked about single pictures

    def own(self, text: str) -> str:
        """What a query's text says beside the instruction."""
        return own_part(self.instruction, text)


SEARCH = Kind("Text -> image", INSTRUCTIONS["Emoji-t2i"][0])
NAMING = Kind("Image -> text", INSTRUCTIONS["Emoji-i2t"][0])
SORTING = Kind("Image -> class", INSTRUCTIONS["Emoji-Subgroup"][0])
ASKING = Kind(
    "Image + question -> text", INSTRUCTIONS["VQA"][0], ("Seen-Grid-Where", "Seen-Fluent-Where", "Fluent-Where")
)
GROUNDING = Kind(
    "Image + name -> crop",
    INSTRUCTIONS["Scene-Isolate"][0],
    ("Seen-Scene-Isolate", "Seen-Fluent-Isolate", "Fluent-Isolate"),
)
KINDS = (SEARCH, NAMING, SORTING, ASKING, GROUNDING)


class Picture(NamedTuple):
    """A single emoji of a catalogue."""

    path: str
    label: str
    group: str
    drawn: str  # in which style
    concepts: str  # "seen" or "new", as in Condition


class Question(NamedTuple):
    query: Pair
    candidates: tuple[Pair, ...]
    right: frozenset[Pair]


@dataclass(frozen=True)
class QuestionSet:
    """Questions of one kind under one condition."""

    kind: Kind
    condition: Condition
    name: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class DemoData:
    """What is asked, which pictures are searched, and what each shows."""

    question_sets: tuple[QuestionSet, ...]
    collection: tuple[Pair, ...]  # what is searched
    names: dict[str, str]  # {path of a picture: name of what it shows}

    def pairs(self) -> list[Pair]:
        """Every different input, in order of appearance."""
        found = dict.fromkeys(self.collection)
        for one in self.question_sets:
            for question in one.questions:
                found |= dict.fromkeys((question.query, *question.candidates))
        return list(found)

    def name(self, pair: Pair) -> str:
        """What a table calls a candidate or a query without text of its own; no question names some of the crops."""
        return f"[{self.names.get(pair.image, 'another crop')}]" if pair.image else pair.text


def read_data(dataset: Dataset) -> DemoData:
    """Reads the catalogues and sets that the folder has. Raises ValueError where there is no picture to search."""
    pictures = list(_pictures(dataset))
    sets = tuple(one for kind in KINDS for one in _of_kind(kind, dataset, pictures) if one.questions)
    searches = (question for one in sets if one.kind is SEARCH for question in one.questions)
    collection = tuple(dict.fromkeys(pair for question in searches for pair in question.candidates))
    if not collection:
        raise ValueError(f"{dataset.root} lists no picture to search: {' and '.join(CATALOGUES.values())}")
    names = {one.path: one.label for one in pictures}
    for one in sets:
        names |= _crops_named_by(one)
    return DemoData(sets, collection, names)


def read_picture(images: Images, pair: Pair) -> Image.Image:
    """The picture of a query or a candidate, RGB."""
    return to_rgb(open_image(images.source(pair.image), name=pair.image), name=pair.image)


def shown(question_set: QuestionSet, number: int = 2) -> list[int]:
    """The questions that tables and page show: evenly spaced, whatever the answers."""
    total = len(question_set.questions)
    return [i * total // number for i in range(number)] if total > number else list(range(total))


def _of_kind(kind: Kind, dataset: Dataset, pictures: Sequence[Picture]) -> Iterator[QuestionSet]:
    """The questions under each condition, perhaps none."""
    for i, condition in enumerate(CONDITIONS):
        if kind.sets:
            yield QuestionSet(kind, condition, kind.sets[i], tuple(_rows(dataset, kind.sets[i])))
        else:
            name = f"{kind.title}: {condition.concepts}, {condition.drawn}"
            yield QuestionSet(kind, condition, name, about_pictures(kind, condition, pictures))


def about_pictures(kind: Kind, condition: Condition, pictures: Sequence[Picture]) -> tuple[Question, ...]:
    """Questions about the condition's pictures; the candidates are those of all pictures drawn in its style."""
    right: dict[Pair, set[Pair]] = {}
    drawn = [one for one in pictures if one.drawn == condition.drawn]
    for one in drawn:  # two pictures of one name are both right for it
        right.setdefault(_query(kind, one), set()).add(_candidate(kind, one))
    candidates = tuple(dict.fromkeys(_candidate(kind, one) for one in drawn))
    queries = dict.fromkeys(_query(kind, one) for one in drawn if one.concepts == condition.concepts)
    return tuple(Question(query, candidates, frozenset(right[query])) for query in queries)


def _query(kind: Kind, picture: Picture) -> Pair:
    return Pair(kind.instruction.format(picture.label), "" if kind is SEARCH else picture.path)


def _candidate(kind: Kind, picture: Picture) -> Pair:
    if kind is SEARCH:
        return Pair(PICTURE, picture.path)
    return Pair(picture.label if kind is NAMING else picture.group, "")


def _crops_named_by(question_set: QuestionSet) -> dict[str, str]:
    found = question_set.questions if question_set.kind is GROUNDING else ()
    return {pair.image: GROUNDING.own(question.query.text) for question in found for pair in question.right}


def _rows(dataset: Dataset, name: str) -> Iterator[Question]:
    """Those of a set; none where it is absent."""
    for row in dataset.rows(dataset.subsets[name]) if name in dataset.subsets else ():
        yield Question(row.query, row.targets, frozenset(row.targets[:1]))


def _pictures(dataset: Dataset) -> Iterator[Picture]:
    """Those of the catalogues that are there."""
    for concepts, file in CATALOGUES.items():
        path = dataset.root / file
        for row in read_jsonl(path) if path.is_file() else ():
            yield Picture(row["path"], row["label"], row["class"], row["style"], concepts)
