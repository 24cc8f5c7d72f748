"""The pipeline's way to the host, on cards that are not there."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minivlm2vec.files.pipeline import Pipeline, Stopwatch
from minivlm2vec.files.rows import Columns, Row
from minivlm2vec.processor import Loaded, Planned
from tests.support.two_cards import OnCard, two_cards


def embedder_on(device: str):
    """Every vector is the number in its text, four times."""

    def embed(items):
        values = torch.tensor([[float(x.planned.input_ids[0])] * 4 for x in items])
        return OnCard(values, device)

    return SimpleNamespace(
        device=torch.device(device), dimension=4, num_workers=2, embed=embed, load=Loaded,
        plan=lambda item, **_: Planned([int(item["text"])]),
    )  # fmt: skip


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_vectors_are_waited_for_on_the_models_device(device):
    """Where torchrun or --device gave the model another card than the current one."""
    rows = [Row(n, None, {"text": str(n)}) for n in range(12)]
    with two_cards():
        pipeline = Pipeline(embedder_on(device), Columns("text", None, Path()), batch_tokens=3)
        (result,) = pipeline.run([(0, rows)])
    assert not result.errors
    assert (result.vectors == np.arange(12, dtype=np.float32)[:, None]).all()


@pytest.mark.parametrize("device", [0, 1])
def test_the_watch_looks_at_the_models_device(device):
    """Events of another card's stream are over at once, and the time between packs would be all that there is."""
    with two_cards():
        watch = Stopwatch(torch.device("cuda", device))
        with watch.computing():
            pass
    assert [event.device for event in watch.events[0]] == [device, device]
