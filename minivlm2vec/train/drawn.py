"""Training rows of mini-MMEB that are drawn as they are needed, without files and without end."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from minivlm2vec.mmeb.dataset import Pair
from minivlm2vec.mmeb.mini import sources, stream, tasks
from minivlm2vec.mmeb.mini.concepts import World, load_world
from minivlm2vec.mmeb.mini.more_styles import add_styles

from .config import DataConfig
from .data import ALL, Row

ROOT = "mini-drawn"  # the data.root that means this
TARBALLS = "outputs/tarballs"


class DrawnData:
    """The batches of a run on drawn rows; stands in for `TrainingData`.

    A batch consists of blocks of `sub_batch` rows of one set. All sets have had equally many blocks whenever as many
    blocks as sets are through; a set that is named twice gets two. Which rows a step sees depends on the seed and the
    step alone.

    Args:
        config: `images` is the folder of npm tarballs, fetched where they are missing.
        seed: of the rows and their order. (The split into training and held-out concepts is always that of seed 0.)
        world: what to draw, instead of the training concepts of mini-MMEB.
    """

    def __init__(self, config: DataConfig, *, seed: int = 0, world: World | None = None):
        self.config, self.seed = config, seed
        self.names = config.sets or tasks.TRAIN
        unknown = sorted(set(self.names) - set(tasks.TRAIN))
        if unknown:
            raise ValueError(f"data.sets: {', '.join(unknown)} is no training set; there are {', '.join(tasks.TRAIN)}")
        self.world = world or _training_world(Path(config.images or TARBALLS).expanduser(), config.more_styles)
        self.variation = stream.Variation().times(config.variation)

    def check(self, *, thoroughly: bool = False) -> None:
        """Draws one row of each set; there are no files that could be missing."""
        self.batch(0, self.config.sub_batch * len(self.names))

    def batch(self, step: int, batch_size: int, part: slice = ALL) -> list[Row]:
        """The rows of a step, counted from 0, or a part of them; no others are drawn."""
        rows = range(step * batch_size, (step + 1) * batch_size)[part]
        return [row for block, numbers in itertools.groupby(rows, lambda i: i // self.config.sub_batch)
                for row in self._block(block, list(numbers))]  # fmt: skip

    def sample(self, n: int) -> list[Row]:
        """n rows, the same at every call, that no batch has."""
        names = [self.names[i % len(self.names)] for i in range(n)]
        return [self._row(name, row, i) for i, name in enumerate(names) for row in self._drawn(name, [i], "sample")]

    def _block(self, block: int, numbers: Sequence[int]) -> list[Row]:
        """Rows of one block. Its set: each round goes through all of them in an order of its own."""
        round_, turn = divmod(block, len(self.names))
        order = np.random.default_rng([self.seed, round_]).permutation(len(self.names))
        name = self.names[order[turn]]
        return [self._row(name, row, i) for i, row in zip(numbers, self._drawn(name, numbers, "train"), strict=True)]

    def _drawn(self, name: str, numbers: Sequence[int], purpose: str) -> list[tasks.Row]:
        return stream.rows(self.world, name, numbers, self.variation, f"{self.seed}/{purpose}")

    def _row(self, name: str, row: tasks.Row, number: int) -> Row:
        """Wrong candidates of the row that are texts are all hard negatives, of pictures the first."""
        near = [item for item in row.near if item.image is None] or list(row.near[:1])
        pictures: dict[str, Image.Image] = {}
        query, positive, *negatives = (
            _pair(item, f"{name}/{number}/{i}", pictures) for i, item in enumerate((row.query, row.positive, *near))
        )
        negatives = tuple(pair for pair in dict.fromkeys(negatives) if pair != positive)
        return Row(f"{name}, row {number}", query, (positive,), negatives, Pictures(pictures))


class Pictures:
    """A row's pictures by name, as `mmeb.dataset.Images` gives those of files."""

    place = Path(ROOT)

    def __init__(self, pictures: dict[str, Image.Image]):
        self.pictures = pictures

    def source(self, name: str) -> Image.Image:
        return self.pictures[name]

    def check(self, name: str, *, thoroughly: bool = False) -> None:
        self.pictures[name].load()


def _pair(item: tasks.Item, name: str, pictures: dict[str, Image.Image]) -> Pair:
    if item.image is None:
        return Pair(item.text, "")
    name = stream.picture_name(item, name)
    pictures[name] = item.image
    return Pair(item.text, name)


def _training_world(folder: Path, more_styles: bool) -> World:
    train, _ = load_world(sources.fetch(folder, print), seed=0)
    return add_styles(train, sources.fetch(folder, print, sources.MORE_STYLES)) if more_styles else train
