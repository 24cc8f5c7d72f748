"""Training rows of mini-MMEB that are drawn as they are needed, without files and without end."""

import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..rows import Pair
from ..train.config import DataConfig, build
from ..train.data import ALL, Row
from .world import sources, stream, tasks
from .world.concepts import World, load_world
from .world.more_styles import add_styles

Task = tuple[str, Sequence[int], str]


@dataclass(frozen=True)
class DrawOptions:
    """[data.options] of the source "minivlm2vec.mini.drawn:DrawnRows".

    Fields:
        variation: how much drawings vary, from 0, not at all, to 3; 1 is `world.stream.Variation`.
        more_styles: draw in the styles of `world.more_styles` too (extra `mini`).
        tarballs: the folder of npm packages, which are fetched where they are missing.
    """

    variation: float = 1.0
    more_styles: bool = False
    tarballs: str = "outputs/tarballs"


class DrawnRows:
    """Rows of mini-MMEB's training sets, drawn as they are needed, without end: a `train.data.RowSource`.

    A batch consists of blocks of `sub_batch` rows of one set. All sets have had equally many blocks whenever as many
    blocks as sets are through; a set that is named twice gets two. Which rows a step sees depends on the seed and the
    step alone.

    Args:
        config: its `options` are those of `DrawOptions`. With more than one of its `workers`, so many processes draw,
            since drawing keeps the interpreter busy.
        seed: of the rows and their order. (The split into training and held-out concepts is always that of seed 0.)
        world: what to draw, instead of the training concepts of mini-MMEB.

    Raises ValueError for an unknown set or option.
    """

    def __init__(self, config: DataConfig, *, seed: int = 0, world: World | None = None):
        self.config, self.seed = config, seed
        self.names = config.sets or tasks.TRAIN
        unknown = sorted(set(self.names) - set(tasks.TRAIN))
        if unknown:
            raise ValueError(f"data.sets: {', '.join(unknown)} is no training set; there are {', '.join(tasks.TRAIN)}")
        options: DrawOptions = build(DrawOptions, config.options, "data.options.")
        variation = stream.Variation().scaled(options.variation)
        self.drawer = Drawer(world or _training_world(options), variation)
        self.draw = self.drawer if config.workers == 1 else DrawingProcesses(self.drawer, config.workers)

    def __str__(self) -> str:
        return f"rows without end of {len(set(self.names))} sets"

    def check(self, *, thoroughly: bool = False) -> None:
        """Draws a row of each set; there are no files that could be missing."""
        self.sample(len(self.names))

    def batch(self, step: int, batch_size: int, part: slice = ALL) -> list[Row]:
        """The rows of a step, counted from 0, or a part of them; no others are drawn."""
        rows = range(step * batch_size, (step + 1) * batch_size)[part]
        blocks = itertools.groupby(rows, lambda i: i // self.config.sub_batch)
        work = [(self._set_of(block), list(numbers), f"{self.seed}/train") for block, numbers in blocks]
        return [row for rows in self.draw.map(work) for row in rows]

    def sample(self, n: int) -> list[Row]:
        """n rows, the same at every call, that no batch has."""
        work = [(self.names[i % len(self.names)], [i], f"{self.seed}/sample") for i in range(n)]
        return [row for rows in self.drawer.map(work) for row in rows]

    def _set_of(self, block: int) -> str:
        """Each round of blocks goes through all sets, in an order of its own."""
        round_, turn = divmod(block, len(self.names))
        return self.names[np.random.default_rng([self.seed, round_]).permutation(len(self.names))[turn]]


class Drawer:
    """(set, numbers of its rows, seed) -> those rows."""

    def __init__(self, world: World, variation: stream.Variation):
        self.world, self.variation = world, variation

    def __call__(self, task: Task) -> list[Row]:
        name, numbers, seed = task
        drawn = stream.rows(self.world, name, numbers, self.variation, seed)
        return [_row(name, row, number) for number, row in zip(numbers, drawn, strict=True)]

    def map(self, work: Sequence[Task]) -> Iterator[list[Row]]:
        return map(self, work)


class DrawingProcesses:
    """A drawer in several processes, each with a copy of it. They start with the first rows that are asked for."""

    def __init__(self, drawer: Drawer, processes: int):
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(processes, context, initializer=_keep, initargs=(drawer,))

    def map(self, work: Sequence[Task]) -> Iterator[list[Row]]:
        return self.pool.map(_draw, work)


_kept: list[Drawer] = []  # of a drawing process


def _keep(drawer: Drawer) -> None:
    _kept.append(drawer)


def _draw(task: Task) -> list[Row]:
    return _kept[0](task)


def _row(name: str, row: tasks.Row, number: int) -> Row:
    """Hard negatives that are texts are all taken; of pictures only the first, since each costs a picture to encode."""
    used = [item for item in row.hard_negatives if item.image is None] or row.hard_negatives[:1]
    drawings: dict[str, Image.Image] = {}
    query, positive, *wrong = (
        _pair(item, f"{name}/{number}/{i}", drawings) for i, item in enumerate((row.query, row.positive, *used))
    )
    negatives = tuple(pair for pair in dict.fromkeys(wrong) if pair != positive)
    return Row(f"{name}, row {number}", query, (positive,), negatives, DrawnPictures(drawings))


class DrawnPictures:
    """A row's drawings by name: a `train.data.Pictures`."""

    place = Path("mini-drawn")  # of all rows: drawings of one name are one picture

    def __init__(self, drawings: dict[str, Image.Image]):
        self.drawings = drawings

    def source(self, name: str) -> Image.Image:
        return self.drawings[name]

    def check(self, name: str, *, thoroughly: bool = False) -> None:
        self.drawings[name].load()


def _pair(item: tasks.Item, name: str, drawings: dict[str, Image.Image]) -> Pair:
    if item.image is None:
        return Pair(item.text, "")
    name = stream.picture_name(item, name)
    drawings[name] = item.image
    return Pair(item.text, name)


def _training_world(options: DrawOptions) -> World:
    folder = Path(options.tarballs).expanduser()
    train, _ = load_world(sources.fetch(folder), seed=0)
    return add_styles(train, sources.fetch(folder, sources.MORE_STYLES)) if options.more_styles else train
