"""Boxes in pixels: checks, overlap, suppression, and the windows over an image in which something is looked for.

A box is (left, top, right, bottom), right and bottom exclusive, as in `PIL.Image.crop`. Shapes: N, A, B boxes [., 4].
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError

Box = tuple[float, float, float, float]
SCALES = (0.25, 0.35, 0.5, 0.7, 1.0)  # a window's side over the geometric mean of the image's sides
RATIOS = (1.0, 1.6, 1 / 1.6)  # width over height
STEP = 0.5  # of a window's side, the most between two neighbours
SMALLEST = 16  # pixels of a side of an image that windows are laid over


def checked_boxes(boxes: Any, width: int, height: int) -> np.ndarray:
    """[N, 4] float64. Raises InputError naming the first box that is none of four finite numbers, has no area, or
    reaches out of the image of `width` x `height` pixels."""
    if isinstance(boxes, (str, bytes, Mapping)) or not hasattr(boxes, "__iter__"):
        raise InputError(f"a list of boxes is needed, got one {type(boxes).__name__}", name="boxes")
    found = list(boxes)
    if not found:
        raise InputError("none is given; 1 is needed at least, got 0", name="boxes")
    return np.array([_checked_box(box, i, width, height) for i, box in enumerate(found)])


def _checked_box(box: Any, index: int, width: int, height: int) -> tuple[float, ...]:
    name = f"box {index}"
    try:
        numbers = tuple(float(x) for x in box)
    except (TypeError, ValueError):
        raise InputError(f"four numbers left, top, right, bottom are needed, got {box!r}", name=name) from None
    if isinstance(box, str) or len(numbers) != 4:
        raise InputError(f"four numbers left, top, right, bottom are needed, got {len(numbers)}: {box!r}", name=name)
    said = "(" + ", ".join(f"{x:g}" for x in numbers) + ")"
    left, top, right, bottom = numbers
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"{said} has a number that is not finite", name=name)
    for low, high, names in ((left, right, ("right", "left")), (top, bottom, ("bottom", "top"))):
        if high <= low:
            raise InputError(f"{said} has no area: {names[0]} is {high:g}, {names[1]} {low:g}", name=name)
    if left < 0 or top < 0 or right > width or bottom > height:
        raise InputError(f"{said} reaches out of the image, which has {width} x {height} pixels", name=name)
    return numbers


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union [A, B] of boxes [A, 4] and [B, 4]."""
    a, b = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = sides.clip(0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b)]
    return shared / (areas[0] + areas[1] - shared)


def suppressed(boxes: np.ndarray, scores: np.ndarray, threshold: float, most: int | None = None) -> list[int]:
    """Non-maximum suppression: indices of boxes [N, 4], the highest score [N] first, each of which overlaps none that
    came before it by an IoU of more than `threshold`; at most `most`."""
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable").tolist():
        if len(kept) == most:
            break
        if not kept or iou(boxes[[i]], boxes[kept]).max() <= threshold:
            kept.append(i)
    return kept


def windows(
    width: int, height: int, scales: Sequence[float] = SCALES, ratios: Sequence[float] = RATIOS, step: float = STEP
) -> np.ndarray:
    """[N, 4] int64, different: windows of each scale and ratio, evenly spaced from edge to edge. One that is wider or
    higher than the image is cut to it."""
    found: dict[tuple[int, int, int, int], None] = {}
    for scale in scales:
        for ratio in ratios:
            side = scale * math.sqrt(width * height)
            w, h = (min(max(1, round(s)), most) for s, most in
                    ((side * math.sqrt(ratio), width), (side / math.sqrt(ratio), height)))  # fmt: skip
            for top in _starts(height, h, step):
                for left in _starts(width, w, step):
                    found[left, top, left + w, top + h] = None
    return np.array(list(found), dtype=np.int64)


def _starts(length: int, side: int, step: float) -> list[int]:
    """Where windows of a side begin in a length: evenly, from 0 to its end."""
    number = math.ceil((length - side) / (step * side)) + 1
    return np.linspace(0, length - side, number).round().astype(int).tolist()


def around(boxes: np.ndarray, width: int, height: int, move: float, size: float) -> np.ndarray:
    """Windows near each of boxes [N, 4]: moved by `move` of their sides, and with sides times or over `size`, each
    alone and both; within the image, different, and none that has no area."""
    found: dict[tuple[int, ...], None] = {}
    for left, top, right, bottom in np.asarray(boxes, np.float64).tolist():
        w, h, x, y = right - left, bottom - top, (left + right) / 2, (top + bottom) / 2
        changes = [(dx * move * w, dy * move * h, 1.0, 1.0) for dx in (-1, 0, 1) for dy in (-1, 0, 1) if dx or dy]
        changes += [(0, 0, a, b) for a in (1 / size, 1, size) for b in (1 / size, 1, size) if (a, b) != (1, 1)]
        for dx, dy, a, b in changes:
            edges = (x + dx - w * a / 2, y + dy - h * b / 2, x + dx + w * a / 2, y + dy + h * b / 2)
            limits = (width, height, width, height)
            box = tuple(min(max(0, round(e)), most) for e, most in zip(edges, limits, strict=True))
            if box[0] < box[2] and box[1] < box[3]:
                found[box] = None
    return np.array(list(found), dtype=np.int64).reshape(-1, 4)
