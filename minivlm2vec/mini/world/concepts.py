"""What there is to draw: concepts, their words, their drawings in three styles, and the split.

A concept is one thing that may be named and told apart by eye. Emoji that differ only in skin, gender or
direction, and emoji whose drawings are (nearly) equal in any style, are merged first, and one of them stands
for all: otherwise a "held-out" drawing would have been seen in training, or a wrong candidate would be right.
"""

import colorsys
import io
import json
import logging
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from . import sources
from .words import SUBGROUP_NAMES, is_countable

log = logging.getLogger(__name__)
STYLES = ("noto", "twemoji", "fluent")
SEEN_STYLES = STYLES[:2]
HELD_OUT_STYLE = STYLES[2]
HELD_OUT_SHARE = 0.25
THING_GROUPS = ("animals & nature", "food & drink", "travel & places", "activities", "objects")
NEAR_EQUAL = 10.0  # root mean square difference of 32 x 32 RGB pictures, 0..255


@dataclass(frozen=True)
class Concept:
    code: str  # code points without FE0F: "1F436"
    label: str  # "dog face"
    tags: tuple[str, ...]
    group: str  # 9 of them: "animals & nature"
    subgroup: str  # "mammal"
    colours: tuple[str, ...]  # main colour in each of STYLES, "" where there is none

    @property
    def phrase(self) -> str:
        """The label as a noun: "flag: Chad" -> "flag of Chad"."""
        return self.label.replace("flag: ", "flag of ")

    def colour(self, style: str) -> str:
        return self.colours[STYLES.index(style)]


@dataclass
class World:
    """Concepts of one split with their drawings: RGBA, 64 x 64, by (style, code)."""

    concepts: list[Concept]
    drawings: Mapping[tuple[str, str], Image.Image]
    styles: tuple[str, ...]
    target_style: str | None = None  # of the candidates, where it is not the query's
    things: list[Concept] = field(init=False)  # those with a plain countable name, for captions

    def __post_init__(self) -> None:
        self.things = [one for one in self.concepts if one.group in THING_GROUPS and is_countable(one.label)]

    def restyled(self, styles: tuple[str, ...] | None, target_style: str | None = None) -> "World":
        return World(self.concepts, self.drawings, styles or self.styles, target_style)

    def trimmed(self, size: int, seed: int) -> "World":
        """A sample of the concepts, half of them things, in their order."""
        rng = random.Random(f"{seed}/trim")
        things = set(rng.sample(self.things, min(size // 2, len(self.things))))
        others = [concept for concept in self.concepts if concept not in things]
        kept = things | set(rng.sample(others, size - len(things)))
        return World([concept for concept in self.concepts if concept in kept], self.drawings, self.styles)


def load_world(tarballs: dict[sources.Package, Path], seed: int) -> tuple[World, World]:
    """(training world, held-out world): disjoint concepts, split within each subgroup."""
    log.info("reading names")
    emoji = _read_names(tarballs[sources.EMOJIBASE])
    log.info("reading drawings")
    drawings = _read_drawings(tarballs)
    emoji = [one for one in emoji if all((style, one["code"]) in drawings for style in STYLES)]
    kept = _merge(emoji, drawings)
    concepts = [_concept(one, drawings) for one in kept]
    train, held_out = _split(concepts, seed)
    log.info(f"{len(emoji)} emoji, {len(concepts)} concepts: {len(train)} to train, {len(held_out)} held out")
    return World(train, drawings, SEEN_STYLES), World(held_out, drawings, SEEN_STYLES)


# --- reading ---------------------------------------------------------------------------------------------


def _read_names(tarball: Path) -> list[dict]:
    files = dict(sources.members(tarball, "package/en/", "s.json")) | dict(
        sources.members(tarball, "package/en/", "data.json")
    )
    messages = json.loads(files["messages.json"])
    groups = {one["order"]: one["message"] for one in messages["groups"]}
    subgroups = {one["order"]: (one["key"], one["message"]) for one in messages["subgroups"]}
    found = []
    for entry in json.loads(files["data.json"]):
        if "subgroup" not in entry or groups[entry["group"]] == "components":
            continue
        key, message = subgroups[entry["subgroup"]]
        found.append(
            {
                "code": entry["hexcode"].replace("-FE0F", ""),
                "label": entry["label"].replace("’", "'"),
                "tags": tuple(entry.get("tags", ())),
                "group": groups[entry["group"]],
                "subgroup": SUBGROUP_NAMES.get(key, message),
                "order": entry["order"],
            }
        )
    return sorted(found, key=lambda one: one["order"])


def _read_drawings(tarballs: dict[sources.Package, Path]) -> dict[tuple[str, str], Image.Image]:
    places = {
        "noto": (sources.NOTO, "package/img/google/64/", ".png"),
        "twemoji": (sources.TWEMOJI, "package/img/twitter/64/", ".png"),
        "fluent": (sources.FLUENT, "package/assets/", ".webp"),
    }
    drawings = {}
    for style, (package, prefix, suffix) in places.items():
        for name, content in sources.members(tarballs[package], prefix, suffix):
            code = name.removesuffix(suffix).upper().replace("-FE0F", "")
            if not _SKIN.search(code):
                drawings[style, code] = fitted(Image.open(io.BytesIO(content)).convert("RGBA"))
    return drawings


def fitted(image: Image.Image) -> Image.Image:
    """64 x 64 without the empty margin, which is wide in one style and narrow in another."""
    left, top, right, bottom = image.getchannel("A").getbbox() or (0, 0, *image.size)
    side = max(right - left, bottom - top)
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    return image.crop((x, y, x + side, y + side)).resize((64, 64), Image.Resampling.BOX)


# --- merging ---------------------------------------------------------------------------------------------

_SKIN = re.compile(r"1F3F[B-F]")
_GENDER = re.compile(r"-200D-264[02]")
_FACING_RIGHT = re.compile(r"-200D-27A1")
_MAN_OR_WOMAN = re.compile(r"\b1F46[89]\b")
# Unicode has no rule that relates these; the first stands for the rest.
_SAME_BUT_FOR_GENDER = (
    ("1F9D2", "1F466", "1F467"),  # child, boy, girl
    ("1F9D3", "1F474", "1F475"),  # older person, old man, old woman
    ("1F385", "1F936", "1F9D1-200D-1F384"),  # Santa Claus, Mrs. Claus, Mx Claus
    ("1FAC5", "1F934", "1F478"),  # person with crown, prince, princess
    ("1FAC4", "1FAC3", "1F930"),  # pregnant person, man, woman
    ("1F483", "1F57A"),  # woman dancing, man dancing
    ("1F6BB", "1F6B9", "1F6BA"),  # restroom signs
    ("1F9D1-200D-1F91D-200D-1F9D1", "1F46B", "1F46C", "1F46D"),  # two people holding hands
    ("1F48F", "1F9D1-200D-2764-200D-1F48B-200D-1F9D1"),  # kiss
    ("1F491", "1F9D1-200D-2764-200D-1F9D1"),  # couple with heart
)


def neutral(code: str) -> str:
    """The code of the same emoji without skin, gender or direction; families are all one."""
    code = _FACING_RIGHT.sub("", _GENDER.sub("", re.sub(f"-{_SKIN.pattern}", "", code)))
    code = _MAN_OR_WOMAN.sub("1F9D1", code)
    for same in _SAME_BUT_FOR_GENDER:
        if code in same:
            return same[0]
    members = set(code.split("-")) - {"200D"}
    return "1F46A" if len(members | _FAMILY) == len(_FAMILY) and "-" in code else code


_FAMILY = {"1F9D1", "1F9D2", "1F466", "1F467"}  # adult, child, boy, girl


def _merge(emoji: list[dict], drawings: dict) -> list[dict]:
    """One emoji of each class of equals, in the given order."""
    parent = list(range(len(emoji)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    def join(i: int, j: int) -> None:
        parent[max(root(i), root(j))] = min(root(i), root(j))

    first: dict[str, int] = {}
    for i, one in enumerate(emoji):
        join(i, first.setdefault(neutral(one["code"]), i))
    for i, j in _near_equal([one["code"] for one in emoji], drawings):
        join(i, j)
    classes = defaultdict(list)
    for i, one in enumerate(emoji):
        classes[root(i)].append(one)
    return [min(same, key=_stands_for_others) for same in classes.values()]


def _stands_for_others(one: dict) -> tuple[bool, int]:
    return neutral(one["code"]) != one["code"], one["order"]


def _near_equal(codes: list[str], drawings: dict) -> list[tuple[int, int]]:
    pairs: set[tuple[int, int]] = set()
    for style in STYLES:
        x = np.stack([_small_rgb(drawings[style, code]) for code in codes])
        for i in range(len(x)):
            rms = np.sqrt(((x[i + 1 :] - x[i]) ** 2).mean(axis=1))
            pairs.update((i, i + 1 + int(j)) for j in np.flatnonzero(rms < NEAR_EQUAL))
    return sorted(pairs)


def _small_rgb(image: Image.Image) -> np.ndarray:
    grey = Image.new("RGBA", image.size, (128, 128, 128, 255))  # so that white differs from nothing
    small = Image.alpha_composite(grey, image).convert("RGB").resize((32, 32), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(-1)


# --- colours ----------------------------------------------------------------------------------------------

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "gray", "white")


def _concept(one: dict, drawings: dict) -> Concept:
    colours = tuple(_main_colour(drawings[style, one["code"]]) for style in STYLES)
    return Concept(one["code"], one["label"], one["tags"], one["group"], one["subgroup"], colours)


def _main_colour(image: Image.Image) -> str:
    """Name of the colour that more than half of the opaque pixels have, or ""."""
    small = np.asarray(image.resize((16, 16), Image.Resampling.BOX)).reshape(-1, 4)
    opaque = [tuple(map(int, pixel[:3])) for pixel in small if pixel[3] > 200]
    counts = Counter(colour_name(*pixel) for pixel in opaque).most_common(1)
    return counts[0][0] if counts and counts[0][1] > len(opaque) / 2 else ""


def colour_name(red: int, green: int, blue: int) -> str:
    """One of COLOURS for an RGB value 0..255, by hue, saturation and value."""
    h, s, v = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    hue = h * 360
    if v < 0.25:
        return "black"
    if s < 0.15:
        return "white" if v > 0.85 else "gray"
    if 8 <= hue < 45 and v < 0.8:
        return "brown"
    if (hue >= 290 or hue < 12) and s < 0.62 and v > 0.75:
        return "pink"
    bounds = ((12, "red"), (40, "orange"), (68, "yellow"), (170, "green"), (255, "blue"), (315, "purple"))
    return next((name for bound, name in bounds if hue < bound), "pink" if hue < 340 else "red")


# --- split -----------------------------------------------------------------------------------------------


def _split(concepts: list[Concept], seed: int) -> tuple[list[Concept], list[Concept]]:
    """Within each subgroup of at least four, a quarter is held out; smaller ones are for training only."""
    by_subgroup = defaultdict(list)
    for concept in concepts:
        by_subgroup[concept.subgroup].append(concept)
    held_out: set[Concept] = set()
    for name, members in by_subgroup.items():
        order = random.Random(f"{seed}/split/{name}").sample(members, len(members))
        held_out.update(order[: round(len(members) * HELD_OUT_SHARE)] if len(members) >= 4 else ())
    return (
        [concept for concept in concepts if concept not in held_out],
        [concept for concept in concepts if concept in held_out],
    )
