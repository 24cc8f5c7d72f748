"""Pictures: single emoji, grids and scenes. All RGB; sizes in pixels; every choice comes from the rng."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from .concepts import Concept, World

SINGLE = 64  # side of a picture of one emoji
CANVAS = 128  # side of a grid or scene
PLAIN = (222, 228, 236)  # no emoji has it as main colour, and white ones stand out from it
BACKGROUNDS = (PLAIN, (236, 226, 210), (214, 232, 216), (232, 218, 230), (216, 222, 206), (205, 218, 232))


@dataclass(frozen=True)
class Placed:
    """One emoji on a canvas: the square of side `size` with its corner at (left, top). `style`: where it is not
    the canvas's."""

    concept: Concept
    left: int
    top: int
    size: int
    style: str = ""

    @property
    def centre(self) -> tuple[float, float]:
        return self.left + self.size / 2, self.top + self.size / 2


@dataclass(frozen=True)
class Canvas:
    """What is drawn: enough to draw it again with one emoji changed."""

    style: str
    background: tuple[int, int, int]
    objects: tuple[Placed, ...]

    def draw(self, world: World) -> Image.Image:
        image = Image.new("RGB", (CANVAS, CANVAS), self.background)
        for one in self.objects:
            _paste(image, world.drawings[one.style or self.style, one.concept.code], one.left, one.top, one.size)
        return image

    def crop(self, drawn: Image.Image, index: int) -> Image.Image:
        """The part of the drawn picture that shows one object, with a margin of 2 pixels."""
        one = self.objects[index]
        right, bottom = one.left + one.size, one.top + one.size
        return drawn.crop((max(one.left - 2, 0), max(one.top - 2, 0), min(right + 2, CANVAS), min(bottom + 2, CANVAS)))

    def replaced(self, index: int, concept: Concept) -> "Canvas":
        return self._with(index, replace(self.objects[index], concept=concept))

    def restyled(self, index: int, style: str) -> "Canvas":
        return self._with(index, replace(self.objects[index], style=style))

    def _with(self, index: int, one: Placed) -> "Canvas":
        return replace(self, objects=(*self.objects[:index], one, *self.objects[index + 1 :]))


def single(world: World, style: str, concept: Concept) -> Image.Image:
    """The emoji alone, as large as fits."""
    image = Image.new("RGB", (SINGLE, SINGLE), PLAIN)
    _paste(image, world.drawings[style, concept.code], 3, 3, SINGLE - 6)
    return image


def grid(style: str, rng: random.Random, side: int, concepts: Sequence[Concept | None]) -> Canvas:
    """`side` x `side` cells, row by row; None leaves a cell empty."""
    cell = CANVAS // side
    size = cell * 13 // 16
    margin = (cell - size) // 2
    placed = [
        Placed(concept, i % side * cell + margin, i // side * cell + margin, size)
        for i, concept in enumerate(concepts)
        if concept is not None
    ]
    return Canvas(style, rng.choice(BACKGROUNDS), tuple(placed))


def scene(style: str, rng: random.Random, concepts: list[Concept]) -> Canvas:
    """Emoji of random sizes at random places that do not overlap."""
    placed: list[Placed] = []
    largest = 56 if len(concepts) <= 4 else 46
    while len(placed) < len(concepts):
        size = rng.randint(largest - 16, largest)
        left, top = rng.randint(2, CANVAS - size - 2), rng.randint(2, CANVAS - size - 2)
        if all(_apart(left, top, size, other) for other in placed):
            placed.append(Placed(concepts[len(placed)], left, top, size))
        elif rng.random() < 0.02:  # a dead end: begin again, a little smaller
            placed, largest = [], max(largest - 1, 34)
    return Canvas(style, rng.choice(BACKGROUNDS), tuple(placed))


def _apart(left: int, top: int, size: int, other: Placed) -> bool:
    return (
        left + size + 3 <= other.left
        or other.left + other.size + 3 <= left
        or top + size + 3 <= other.top
        or other.top + other.size + 3 <= top
    )


def _paste(image: Image.Image, drawing: Image.Image, left: int, top: int, size: int) -> None:
    drawing = drawing.resize((size, size), Image.Resampling.BOX)
    image.paste(drawing, (left, top), drawing)
