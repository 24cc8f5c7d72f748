"""What a score is worth without a model: chance, and nearest neighbours in pixels.

R rows, L labelled pictures of training, S = 32 * 32 * 3 numbers of a small picture.

Pictures are compared as 32 x 32 RGB by squared distance. Where candidates are pictures, the answer is the one nearest
to the query's. Where they are texts, the nearest training picture of the same task answers: its label, among labels
that are candidates. The query's text is ignored, since this baseline cannot know what is asked about a picture; without
a picture in the query it has no answer. It sees the training pictures alone, in the styles of training; where the query
is one of them, as with single emoji of seen concepts, it looks the answer up.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..images import open_image, to_rgb
from ..mmeb.dataset import Rows
from ..rows import Images, read_jsonl, read_rows
from .world.concepts import SEEN_STYLES

SIDE = 32


def small(source: Path | bytes) -> np.ndarray:
    """A picture's file as uint8 [S]."""
    return np.asarray(to_rgb(open_image(source)).resize((SIDE, SIDE), Image.Resampling.BOX)).reshape(-1)


class SmallPictures:
    """Small pictures by path, each read once."""

    def __init__(self, images: Images):
        self.images = images
        self.known: dict[str, np.ndarray] = {}

    def __call__(self, paths: Sequence[str]) -> np.ndarray:
        """uint8 [len(paths), S]."""
        for path in paths:
            if path not in self.known:
                self.known[path] = small(self.images.source(path))
        return np.stack([self.known[path] for path in paths])


# --- training pictures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledPictures:
    """Training pictures uint8 [L, S] of one task, and the right answer to each."""

    pictures: np.ndarray
    texts: np.ndarray  # [L] of str


def read_labelled(data: Path) -> dict[str, LabelledPictures]:
    """By task of `tasks.SETS`, every training picture of mini-MMEB whose answer is a text: rows of MMEB-train, and the
    single emoji of seen concepts with their names and classes. Tasks that are not trained have none."""
    pairs: dict[str, list[tuple[np.ndarray, str]]] = {}
    for task, picture, text in (*_training_rows(data / "MMEB-train"), *_seen_emoji(data / "MMEB-eval")):
        pairs.setdefault(task, []).append((picture, text))
    return {
        task: LabelledPictures(np.stack([picture for picture, _ in found]), np.array([text for _, text in found]))
        for task, found in pairs.items()
    }


def _training_rows(folder: Path) -> Iterator[tuple[str, np.ndarray, str]]:
    for one in sorted(path for path in folder.glob("*") if path.is_dir() and path.name != "images_zip"):
        place = folder / "images.zip"
        read = SmallPictures(Images(place if place.exists() else folder / "images_zip" / f"{one.name}.zip"))
        for path in sorted(one.glob("original*")):
            for row in read_rows(path):
                if row["qry_image_path"] and not row["pos_image_path"]:
                    yield one.name, read([row["qry_image_path"]])[0], row["pos_text"]


def _seen_emoji(folder: Path) -> Iterator[tuple[str, np.ndarray, str]]:
    read = SmallPictures(Images(folder / "images.zip"))
    for one in read_jsonl(folder / "pictures_seen.jsonl"):
        if one["style"] in SEEN_STYLES:
            (picture,) = read([one["path"]])
            yield "Emoji-i2t", picture, one["label"]
            yield "Emoji-Subgroup", picture, one["class"]


# --- baselines -------------------------------------------------------------------------------------------


def chance(rows: Rows) -> np.ndarray:
    """[R]: how often a random order puts the positive first."""
    return np.array([1 / len(_distinct(targets)) for _, targets in rows.numbered])


def nearest(rows: Rows, read: SmallPictures, labelled: LabelledPictures | None) -> np.ndarray | None:
    """[R]: how often the positive is the nearest candidate, where ties are broken at random. None where the baseline
    cannot answer: queries without a picture, or positives that are no label of a training picture."""
    used = np.unique(np.concatenate([targets for _, targets in rows.numbered]))
    with_picture = {bool(rows.pairs[i].image) for i in used}
    if len(with_picture) > 1 or not all(rows.pairs[query].image for query, _ in rows.numbered):
        return None
    queries = read([rows.pairs[query].image for query, _ in rows.numbered])
    if with_picture == {True}:
        distances = squared_distances(queries, read([rows.pairs[i].image for i in used]))
    else:
        texts = [rows.pairs[i].text for i in used]
        right = [rows.pairs[targets[0]].text for _, targets in rows.numbered]
        if labelled is None or not np.isin(right, labelled.texts).any():
            return None
        distances = _to_texts(squared_distances(queries, labelled.pictures), labelled.texts, texts)
    columns = [np.searchsorted(used, _distinct(targets)) for _, targets in rows.numbered]
    return np.array([first(row[of]) for row, of in zip(distances, columns, strict=True)])


def first(distances: np.ndarray) -> float:
    """How often the first of the candidates is the nearest: 1, 0, or its share of a tie."""
    ties = distances == distances.min()
    return float(ties[0]) / int(ties.sum())


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """uint8 [A, S], [B, S] -> float64 [A, B], exact: whole numbers below 2**53 in every step."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)


def _to_texts(distances: np.ndarray, labels: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """[R, L] -> [R, texts]: the least distance to a picture of this label; infinite where there is none."""
    out = np.full((len(distances), len(texts)), np.inf)
    for i, text in enumerate(texts):
        mine = labels == text
        if mine.any():
            out[:, i] = distances[:, mine].min(axis=1)
    return out


def _distinct(targets: np.ndarray) -> np.ndarray:
    """A row's candidates, the positive first, without those that list it again."""
    return np.concatenate([targets[:1], targets[targets != targets[0]]])
