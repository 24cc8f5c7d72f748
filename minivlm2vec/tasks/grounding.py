"""Grounding: an image and a description against parts of the image.

With boxes, they are compared. Without, windows of several sizes and shapes are laid over the image (`boxes.windows`)
and embedded; the best ones that do not overlap much are moved and resized a little, twice, and non-maximum
suppression picks what is returned.

Shapes: N boxes, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..cosines import cosines
from ..errors import InputError
from ..images import image_name, open_image, to_rgb
from ..prompts import Task
from .boxes import SMALLEST, Box, around, checked_boxes, suppressed, windows
from .common import Encoder, as_task, check_has_text, checked_top, encode, shown

TOP = 5
REFINED = 3  # windows that are moved and resized in a round
ROUNDS = ((0.25, 1.25), (0.12, 1.12))  # by how much of their sides they are moved, by what they are resized
OVERLAP = 0.5  # intersection over union, the most between two results
PIXELS = 32 * 1024 * 1024  # of crops in memory at a time
Window = tuple[int, int, int, int]  # a box of whole pixels
COLOURS = ("#e6194b", "#0a7d2c", "#4363d8", "#c25e00", "#911eb4")


@dataclass(frozen=True)
class ScoredBox:
    """A part of an image: its box in pixels (left, top, right, bottom), its cosine, and for given boxes its index in
    the list."""

    box: Box
    score: float
    index: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"box": list(self.box), "score": self.score, "index": self.index}


@dataclass(frozen=True)
class Grounding:
    """Parts of an image, the nearest to a text first.

    Fields:
        image: what the image is called.
        text: what was looked for.
        boxes: the nearest parts. Where boxes were given, all of them in order of their scores.
        size: (width, height) of the image in pixels.
        crops: how many parts of the image were embedded.
        picture: the image itself, RGB, for `draw`.
    """

    image: str
    text: str
    boxes: tuple[ScoredBox, ...]
    size: tuple[int, int]
    crops: int
    picture: Image.Image = field(repr=False, compare=False)

    @property
    def box(self) -> Box:
        return self.boxes[0].box

    @property
    def score(self) -> float:
        return self.boxes[0].score

    def rank_of(self, index: int) -> int:
        """The rank of a given box, from 1, ties counted against it, as the MMEB evaluator counts. Raises ValueError for
        an index that is not among the boxes."""
        mine = [one for one in self.boxes if one.index == index]
        if not mine:
            raise ValueError(f"box {index} is not among the {len(self.boxes)} of this result")
        same = [one for one in self.boxes if one.box == mine[0].box]
        return 1 + sum(one.score >= mine[0].score for one in self.boxes if one not in same)

    def draw(self, number: int = 1) -> Image.Image:
        """A copy of the image with the first `number` boxes, each with its score where there is room."""
        checked_top(number, number, "boxes")
        picture = self.picture.copy()
        pen, width = ImageDraw.Draw(picture), max(1, round(min(self.size) / 100))
        for i, one in reversed(list(enumerate(self.boxes[:number]))):
            left, top, right, bottom = (round(x) for x in one.box)
            colour = COLOURS[i % len(COLOURS)]
            pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=width)
            if min(self.size) >= 200:
                _label(pen, f"{one.score:.2f}", left, top, colour, max(10, round(min(self.size) / 40)))
        return picture

    def as_dict(self) -> dict[str, Any]:
        return {"image": self.image, "text": self.text, "boxes": [one.as_dict() for one in self.boxes],
                "size": list(self.size), "crops": self.crops}  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{shown(self.image)}: {shown(self.text)} ({self.crops} crops embedded)"]
        lines += [f"  {one.score:7.4f}  ({', '.join(f'{x:g}' for x in one.box)})" for one in self.boxes]
        return "\n".join(lines)


def ground(
    embedder: Encoder,
    image: Any,
    text: str,
    *,
    boxes: Sequence[Sequence[float]] | None = None,
    instruction: str | Task | None = "ground",
    top: int | None = None,
    **options: Any,
) -> Grounding:
    """The part of an image that a text describes.

    Args:
        embedder: an `Embedder`, or anything with its `encode`.
        image: a path, a PIL image, an array, bytes, or a data URI.
        text: the name of an object ("ground"), words that refer to it ("refer"), or a question whose answer it is
            ("point").
        boxes: the parts to choose from, each (left, top, right, bottom) in pixels, within the image; a part has the
            pixels that its box touches. Default: windows of several sizes and shapes, the best of them refined.
        instruction: "ground", "refer" or "point", another task of `prompts.TASKS`, a `prompts.Task` of one's own, None.
        top: the nearest parts that the result has; default all boxes that were given, or 5 of the windows, which
            overlap each other by an IoU of at most 0.5.
        options: of `Embedder.encode` (num_crops, batch_tokens, …).

    Raises InputError naming the text or the box at fault or an image that is too small for windows (16 pixels a side;
    given boxes may be smaller), before anything is computed.
    """
    task = as_task(instruction)
    if not isinstance(text, str):
        raise InputError(f"a text is needed, got {type(text).__name__}", name="text")
    check_has_text(text, task.query, "text")
    checked_top(top, top or 1, "boxes")
    name = image_name(image)
    opened = open_image(image, name=name)
    if boxes is None:
        _check_large_enough(opened.size, name)
    picture = to_rgb(opened, name=name)
    given = None if boxes is None else checked_boxes(boxes, *picture.size)
    if given is not None:
        checked_top(top, len(given), "boxes")
    query = encode(embedder, [{"image": picture, "text": text}], task.query, options, lambda _: f"image ({name})")
    parts = _Parts(embedder, picture, query, task.document, options)
    found = _search(parts, TOP if top is None else top) if given is None else _compare(parts, given, top)
    return Grounding(name, text, found, picture.size, len(parts.known), picture)


class _Parts:
    """Scores of parts of a picture; each is embedded once."""

    def __init__(
        self, embedder: Encoder, picture: Image.Image, query: np.ndarray, prompt: str, options: Mapping[str, Any]
    ):
        self.embedder, self.picture, self.query, self.prompt, self.options = embedder, picture, query, prompt, options
        self.known: dict[Window, float] = {}

    def scores(self, boxes: np.ndarray) -> np.ndarray:
        """[N] float32 of whole boxes [N, 4]."""
        keys: list[Window] = [tuple(box) for box in boxes.tolist()]
        new = [key for key in dict.fromkeys(keys) if key not in self.known]
        for some in _packed(new):
            crops = [self.picture.crop(key) for key in some]
            vectors = encode(self.embedder, crops, self.prompt, self.options, "crop {}".format)
            self.known.update(zip(some, cosines(self.query, vectors)[0].tolist(), strict=True))
        return np.array([self.known[key] for key in keys], dtype=np.float32)

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [N, 4] int64 and scores [N] of everything that was embedded."""
        return np.array(list(self.known), dtype=np.int64), np.array(list(self.known.values()), dtype=np.float32)


def _search(parts: _Parts, top: int) -> tuple[ScoredBox, ...]:
    width, height = parts.picture.size
    parts.scores(windows(width, height))
    for move, size in ROUNDS:
        boxes, scores = parts.all()
        best = boxes[suppressed(boxes, scores, OVERLAP, REFINED)]
        parts.scores(around(best, width, height, move, size))
    boxes, scores = parts.all()
    kept = suppressed(boxes, scores, OVERLAP, top)
    return tuple(ScoredBox(tuple(boxes[i].tolist()), float(scores[i])) for i in kept)


def _compare(parts: _Parts, given: np.ndarray, top: int | None) -> tuple[ScoredBox, ...]:
    whole = np.concatenate([np.floor(given[:, :2]), np.ceil(given[:, 2:])], axis=1).astype(np.int64)
    scores = parts.scores(whole)
    order = np.argsort(-scores, kind="stable")[:top].tolist()
    return tuple(ScoredBox(tuple(given[i].tolist()), float(scores[i]), i) for i in order)


def _packed(boxes: list[Window]) -> Iterator[list[Window]]:
    """Runs of boxes that have together at most PIXELS, or one that has more."""
    run: list[Window] = []
    room = PIXELS
    for box in boxes:
        pixels = (box[2] - box[0]) * (box[3] - box[1])
        if run and pixels > room:
            yield run
            run, room = [], PIXELS
        run.append(box)
        room -= pixels
    if run:
        yield run


def _check_large_enough(size: tuple[int, int], name: str) -> None:
    if min(size) < SMALLEST:
        raise InputError(
            f"the image is smaller than a crop: it has {size[0]} x {size[1]} pixels, and to look for something in it "
            f"{SMALLEST} x {SMALLEST} are needed. boxes=[…] may be smaller", name=name
        )  # fmt: skip


def _label(pen: ImageDraw.ImageDraw, text: str, left: int, top: int, colour: str, size: int) -> None:
    place = (left, max(0, top - size - 4))
    box = pen.textbbox(place, text, font_size=size)
    pen.rectangle((box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2), fill=colour)
    pen.text(place, text, fill="white", font_size=size)
