"""Grounding without boxes on the canvases of mini-MMEB: how often `tasks.ground` finds the object that a row names.

    python -m minivlm2vec.mini grounding CHECKPOINT       # writes grounding.json, which the model card shows

A row holds the right crop and not its box; the box is where the crop lies in the picture, found by its pixels.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..embedder import Embedder
from ..images import open_image, to_rgb
from ..mmeb import score
from ..mmeb.dataset import Dataset
from ..rows import Images
from ..tasks import ground
from ..tasks.boxes import Box, iou, windows
from .world.tasks import INSTRUCTIONS, own_part

SETS = {  # of the four groups of the model card
    "Seen-Scene-Isolate": "seen / training",
    "Seen-Fluent-Isolate": "seen / held out",
    "Scene-Isolate": "held out / training",
    "Fluent-Isolate": "held out / held out",
}
GROUNDING = "grounding.json"
ENOUGH = 0.5  # intersection over union, from which on a box counts as right
SAME = 500  # mean squared difference of pixels (WebP is lossy), below which a crop was cut there; others exceed 1,000


def measure_grounding(
    embedder: Embedder,
    dataset: Dataset,
    *,
    limit: int | None = None,
    on_row: Callable[[str, int], Any] = lambda name, row: None,
) -> dict[str, Any]:
    """For each of SETS, in percent of its rows: how often the best box of `ground` has an IoU of at least 0.5 with the
    object's (with a 95% bootstrap interval); how often a window drawn at random from its first ones has; and for how
    many rows any of these windows has, the most that could be found without refining. `iou` is the mean IoU."""
    start, sets = time.monotonic(), {}
    for name in SETS:
        found, random, reached, crops = [], [], [], []
        for number, row in enumerate(dataset.rows(dataset.subsets[name], limit=limit)):
            picture = read(dataset.images, row.query.image)
            truth = locate(picture, read(dataset.images, row.targets[0].image))
            text = own_part(INSTRUCTIONS["Scene-Isolate"][0], row.query.text)
            result = ground(embedder, picture, text, top=1)
            overlaps = iou(windows(*picture.size), np.array([truth]))[:, 0]
            found.append(float(iou(np.array([result.box]), np.array([truth]))[0, 0]))
            random.append(float((overlaps >= ENOUGH).mean()))
            reached.append(bool(overlaps.max() >= ENOUGH))
            crops.append(result.crops)
            on_row(name, number)
        hits = 100.0 * (np.array(found) >= ENOUGH)
        low, high = np.percentile(score.bootstrap(hits[:, None], name), [2.5, 97.5])
        sets[name] = {
            "group": SETS[name],
            "rows": len(found),
            "found": {"mean": round(float(hits.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)},
            "chance": round(100 * float(np.mean(random)), 4),
            "reachable": round(100 * float(np.mean(reached)), 4),
            "iou": round(float(np.mean(found)), 4),
            "crops": [min(crops), max(crops)],
        }
    measured = {"seconds": round(time.monotonic() - start), "device": str(embedder.device),
                "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip
    return {"sets": sets, "measured": measured}


def write_grounding(path: Path, measured: dict[str, Any]) -> None:
    path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def read(images: Images, path: str) -> Image.Image:
    return to_rgb(open_image(images.source(path), name=path), name=path)


def locate(picture: Image.Image, crop: Image.Image) -> Box:
    """The box where the crop lies in the picture: the place of the least squared difference. Raises ValueError where it
    is nowhere."""
    a, b = (np.asarray(one, dtype=np.float32) for one in (picture, crop))
    height, width = b.shape[:2]
    places = np.lib.stride_tricks.sliding_window_view(a, (height, width), axis=(0, 1))  # [y, x, 3, height, width]
    thin = places[..., ::3, ::3] - b[::3, ::3].transpose(2, 0, 1)
    difference = (thin**2).sum(axis=2).mean(axis=(-2, -1))
    top, left = (int(i) for i in np.unravel_index(difference.argmin(), difference.shape))
    if difference[top, left] > SAME:
        raise ValueError(f"the crop is nowhere in the picture: the least mean squared difference is "
                         f"{difference[top, left]:.0f}, {SAME} at most is expected")  # fmt: skip
    return left, top, left + width, top + height


def table(measured: dict[str, Any], titles: dict[str, str]) -> str:
    """The model card's table, in Markdown. titles: of the groups."""
    lines = ["| | n | found [95%] | chance | reachable | mean IoU |", "|:--|--:|--:|--:|--:|--:|"]
    for one in measured["sets"].values():
        p = one["found"]
        lines.append(f"| {titles[one['group']]} | {one['rows']} | {p['mean']:.1f} [{p['low']:.1f}, {p['high']:.1f}] "
                     f"| {one['chance']:.1f} | {one['reachable']:.1f} | {one['iou']:.2f} |")  # fmt: skip
    return "\n".join(lines) + "\n"
