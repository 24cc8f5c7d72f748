"""Sheets that show, while a model trains, which targets lie nearest to a few queries."""

import textwrap
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..images import open_image, to_rgb
from ..rows import Pair
from .data import Pictures, Row

CELL, GAP = 168, 6
RIGHT, WRONG, QUERY = (30, 140, 60), (190, 190, 190), (40, 80, 160)


Shown = tuple[Pair, Pictures]  # a pair, and where its picture is


def nearest_sheet(rows: Sequence[Row], encode: Callable[[Sequence[tuple[str, Pair, Pictures]]], Tensor]) -> Image.Image:
    """Up to eight queries of the rows, each with the five nearest of all their targets.

    encode(pairs, each with its row's name and where its picture is) -> unit vectors [n, D].
    """
    shown = rows[:8]
    targets = list({(p.text, p.image, r.images.place): (p, r.images) for r in rows for p in r.positives}.values())
    queries = [(row.name, row.query, row.images) for row in shown]
    vectors = encode([*queries, *(("a sampled target", *target) for target in targets)])
    scores, best = (vectors[: len(shown)] @ vectors[len(shown) :].T).topk(min(5, len(targets)))
    nearest = [
        [(*targets[j], score, targets[j][0] in row.positives) for j, score in zip(js, ss, strict=True)]
        for row, js, ss in zip(shown, best.tolist(), scores.tolist(), strict=True)
    ]
    return draw_sheet([(row.query, row.images) for row in shown], nearest)


def draw_sheet(
    queries: Sequence[Shown], nearest: Sequence[Sequence[tuple[Pair, Pictures, float, bool]]]
) -> Image.Image:
    """A line for each query: it, then its nearest targets with their similarity, framed green where they are right."""
    columns, side = 1 + max(map(len, nearest)), CELL + GAP
    sheet = Image.new("RGB", (columns * side + GAP, len(queries) * side + GAP), "white")
    for y, ((pair, images), found) in enumerate(zip(queries, nearest, strict=True)):
        cells = [_cell(pair, images, "", QUERY)]
        cells += [_cell(p, i, f"{score:.3f}", RIGHT if right else WRONG) for p, i, score, right in found]
        for x, cell in enumerate(cells):
            sheet.paste(cell, (GAP + x * side, GAP + y * side))
    return sheet


def _cell(pair: Pair, images: Pictures, score: str, colour: tuple[int, int, int]) -> Image.Image:
    cell = Image.new("RGB", (CELL, CELL), "white")
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(11)
    text = textwrap.wrap(pair.text.replace("<|image_1|>\n", "").strip(), 28)
    lines = text[: 3 if pair.image else 10]
    top = CELL - 6 - 13 * len(lines) if pair.image else 20
    if pair.image:
        image = to_rgb(open_image(images.source(pair.image)))
        scale = min((CELL - 16) / image.width, (top - 24) / image.height)
        picture = image.resize([max(1, round(side * scale)) for side in image.size])  # a line stays one pixel wide
        cell.paste(picture, ((CELL - picture.width) // 2, 20))
    draw.text((8, 5), score, fill="black", font=font)
    for i, line in enumerate(lines):
        draw.text((8, top + 13 * i), line, fill="black", font=font)
    draw.rectangle((0, 0, CELL - 1, CELL - 1), outline=colour, width=3)
    return cell
