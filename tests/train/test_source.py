"""Rows of a source of one's own, named in the configuration."""

from pathlib import Path

import pytest

from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.rows import Pair
from minivlm2vec.train.config import DataConfig, OptimConfig, TrainConfig
from minivlm2vec.train.data import Row, open_data
from minivlm2vec.train.trainer import Trainer


class CountingRows:
    """What a user's own module may hold: rows that are made as they are needed."""

    def __init__(self, config, *, seed):
        self.first = config.options.get("first", 0) + seed

    def check(self, *, thoroughly=False):
        pass

    def batch(self, step, batch_size, part=slice(None)):
        return [self._row(i) for i in range(step * batch_size, (step + 1) * batch_size)[part]]

    def sample(self, n):
        return [self._row(-i) for i in range(1, n + 1)]

    def _row(self, i):
        return Row(f"number {i}", Pair(f"{self.first + i}?", ""), (Pair(str(self.first + i), ""),), (), NoPictures())


class NoPictures:
    place = Path("nowhere")

    def source(self, path):
        raise FileNotFoundError(path)

    def check(self, path, *, thoroughly=False):
        raise FileNotFoundError(path)


OWN = f"{__name__}:CountingRows"


def test_it_trains_on_rows_of_a_source_of_ones_own(tmp_path):
    data = DataConfig(source=OWN, options={"first": 100}, workers=1)
    optim = OptimConfig(batch_size=4, chunk_size=0, steps=2, warmup=1)
    base = new_checkpoint(tmp_path / "base")
    t = Trainer(TrainConfig(str(base), str(tmp_path / "out"), data, optim=optim, seed=5), device="cpu")
    assert [row.query.text for row in t.own_rows(1)] == ["109?", "110?", "111?", "112?"]
    assert t.run().name == "step-000002"


@pytest.mark.parametrize(
    "name, message",
    [
        ("CountingRows", r'looks like "package.module:Name"'),
        (":CountingRows", r'looks like "package.module:Name"'),
        (".data:TrainingData", r'looks like "package.module:Name"'),
        ("no_such_module:Rows", r"no_such_module:Rows cannot be imported: No module named 'no_such_module'"),
        (f"{__name__}:Missing", r"Missing cannot be imported: module .* has no attribute 'Missing'"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        open_data(DataConfig(source=name))


class OnlyBatches:
    def __init__(self, config, *, seed): ...

    def batch(self, step, batch_size, part=slice(None)): ...


def test_a_source_without_the_methods_is_refused():
    with pytest.raises(ValueError, match="OnlyBatches gives a OnlyBatches, which lacks check, sample"):
        open_data(DataConfig(source=f"{__name__}:OnlyBatches"))


@pytest.mark.parametrize("given", [{}, {"root": "r", "source": OWN}])
def test_rows_come_from_files_or_from_a_source(given):
    with pytest.raises(ValueError, match=r"data\.root or data\.source is needed, and not both"):
        open_data(DataConfig(**given))
