"""Training rows without files: drawn as they are needed, without end, each drawing a little different each time.

A set of mini-MMEB's files shows each thing once or twice; a model that is to know a cat in a style that it has never
seen must have seen many cats. Row i of a stream depends on the seed and on i alone.
"""

import copy
import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops

from .concepts import SEEN_STYLES, World
from .tasks import SETS, Item, Row

SIDE = 64  # of a drawing, pixels
GREY = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


@dataclass(frozen=True)
class Variation:
    """How much drawings are changed: each change is drawn at random, uniformly up to these bounds.

    Fields:
        turn: degrees, either way.
        shrink: the smallest size, of 1.
        squeeze: how much narrower or lower it may be, of 1.
        hue: degrees, either way.
        colour: the factor of saturation, contrast and brightness is 1 / (1 + colour) to 1 + colour.
        shade: how much darker one side is at most, of 1.
        blend: how often a drawing is a mixture of the styles of training.
    """

    turn: float = 10
    shrink: float = 0.8
    squeeze: float = 0.1
    hue: float = 10
    colour: float = 0.3
    shade: float = 0.3
    blend: float = 0.3

    def scaled(self, strength: float) -> "Variation":
        """Bounds `strength` times as wide, from 0, which changes nothing, to 3. Raises ValueError beyond."""
        if not 0 <= strength <= 3:
            raise ValueError(f"the strength of variation is {strength}; it lies between 0 and 3")
        shrink = max(0.1, 1 - strength * (1 - self.shrink))
        others = ("turn", "squeeze", "hue", "colour", "shade", "blend")
        return Variation(shrink=shrink, **{name: strength * getattr(self, name) for name in others})


class VariedDrawings(Mapping[tuple[str, str], Image.Image]):
    """The drawings of a world as one row shows them: varied, and the same whenever one is used again. A concept that a
    style lacks is drawn in a style that mini-MMEB has."""

    def __init__(self, world: World, variation: Variation, seed: str):
        self.world, self.variation, self.seed = world, variation, seed
        self.made: dict[tuple[str, str], Image.Image] = {}

    def __getitem__(self, key: tuple[str, str]) -> Image.Image:
        if key not in self.made:
            self.made[key] = self._draw(key, random.Random(f"{self.seed}/{key}"))
        return self.made[key]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.world.drawings)

    def __len__(self) -> int:
        return len(self.world.drawings)

    def _draw(self, key: tuple[str, str], rng: random.Random) -> Image.Image:
        style, code = key
        drawings = self.world.drawings
        if key not in drawings:
            style = rng.choice(SEEN_STYLES)
        image = drawings[style, code]
        others = [other for other in self.world.styles if other != style and (other, code) in drawings]
        if others and rng.random() < self.variation.blend:
            image = Image.blend(image, drawings[rng.choice(others), code], rng.random())
        return vary(image, self.variation, rng)


def vary(image: Image.Image, variation: Variation, rng: random.Random) -> Image.Image:
    """An RGBA drawing, turned, scaled, coloured and shaded at random. Same size."""
    image = image.transform(image.size, Image.Transform.AFFINE, _placing(variation, rng), Image.Resampling.BILINEAR)
    alpha = image.getchannel("A")
    colours = image.convert("RGB").convert("RGB", _colouring(variation, rng))
    if variation.shade:
        colours = ImageChops.multiply(colours, _shading(variation, rng))
    colours.putalpha(alpha)
    return colours


def rows(world: World, name: str, numbers: Sequence[int], variation: Variation | None, seed: str) -> list[Row]:
    """The rows of these numbers of an endless set; with paraphrased instructions in turn."""
    one, made = SETS[name], []
    for number in numbers:
        mine = f"{seed}/{name}/{number}"
        rng = random.Random(mine)
        seen = copy.copy(world)  # with its lists of concepts, which take longer to find than a row to draw
        if variation is not None:
            seen.drawings = VariedDrawings(world, variation, mine)
        if name == "Grid-Color":  # colours are known of these alone
            seen.styles = SEEN_STYLES
        made.append(one.row(seen, rng, rng.randrange(len(one.instructions))))
    return made


def picture_name(item: Item, fallback: str) -> str:
    """The same for pictures of the same meaning, so that none counts as a wrong answer for another."""
    if item.meaning is None:
        return fallback
    return hashlib.blake2b(repr(item.meaning).encode(), digest_size=8).hexdigest()


def _placing(v: Variation, rng: random.Random) -> tuple[float, ...]:
    """The affine map from places in the result to places in the drawing, both from the middle."""
    angle = math.radians(rng.uniform(-v.turn, v.turn))
    size = rng.uniform(v.shrink, 1)
    wide, high = (1 / (size * (1 - rng.uniform(0, v.squeeze))) for _ in "xy")
    room = (1 - size) / 2 * SIDE
    x, y = rng.uniform(-room, room), rng.uniform(-room, room)
    a, b = math.cos(angle) * wide, math.sin(angle) * wide
    d, e = -math.sin(angle) * high, math.cos(angle) * high
    half = SIDE / 2
    return a, b, half - a * (half + x) - b * (half + y), d, e, half - d * (half + x) - e * (half + y)


def _colouring(v: Variation, rng: random.Random) -> tuple[float, ...]:
    """3 x 4 matrix for `Image.convert`: hue is turned about the grey axis, then saturation, contrast, brightness."""
    hue = math.radians(rng.uniform(-v.hue, v.hue))
    saturation, contrast, brightness = (_factor(v.colour, rng) for _ in range(3))
    c, s = math.cos(hue), math.sin(hue)
    third, root = (1 - c) / 3, s / math.sqrt(3)
    turn = ((c + third, third - root, third + root), (third + root, c + third, third - root),
            (third - root, third + root, c + third))  # fmt: skip
    grey = tuple(sum(GREY[k] * turn[k][j] for k in range(3)) for j in range(3))
    gain = contrast * brightness
    out = []
    for i in range(3):
        out += [gain * (saturation * turn[i][j] + (1 - saturation) * grey[j]) for j in range(3)]
        out.append(brightness * 128 * (1 - contrast))
    return tuple(out)


def _factor(most: float, rng: random.Random) -> float:
    return (1 + most) ** rng.uniform(-1, 1)


def _shading(v: Variation, rng: random.Random) -> Image.Image:
    """A ramp of brightness in a random direction."""
    darkest = 1 - rng.uniform(0, v.shade)
    ramp = Image.linear_gradient("L").point([int(255 * (darkest + (1 - darkest) * i / 255)) for i in range(256)])
    ramp = ramp.resize((SIDE, SIDE)).rotate(rng.choice((0, 90, 180, 270)))
    return Image.merge("RGB", (ramp, ramp, ramp))
