"""Parts that are other than the published ones need their `forward` and little else."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from minivlm2vec import Embedder, VLM2VecConfig, register
from minivlm2vec.config import CLIP_MEAN, CLIP_STD
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.vision import normalized_images
from minivlm2vec.weights import load_model, save_model
from tests.support.golden import synth_image
from tests.support.helpers import close

INPUTS = [
    "a cat",
    {"text": "<|image_1|> or <|image_2|>?", "images": [Image.fromarray(synth_image(90, 40, n)) for n in (1, 2)]},
]


@register("tower", "convolutions of tests")
class Convolutions(nn.Module):
    """No ViT: three strided convolutions of whole images, one vector a crop."""

    def __init__(self, config, backend=None):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, config.hidden_size, 3, 2))

    def forward(self, crops, grids):
        return self.net(normalized_images(crops, grids, self.net[0].weight.dtype)).mean((2, 3))[:, None]


@register("projector", "one token of tests")
class OneToken(nn.Module):
    """An image is one token, the mean of its crops."""

    def __init__(self, config, backend=None):
        super().__init__()
        self.linear = nn.Linear(config.vision.hidden_size, config.decoder.hidden_size)

    def num_tokens(self, grid):
        return 1

    def forward(self, features, grids):
        views = features.split([1 + h * w for h, w in grids])
        return self.linear(torch.stack([v.mean((0, 1)) for v in views]))


@register("pooling", "narrow of tests")
class Narrow(nn.Module):
    dimension = 5

    def __init__(self, config, backend=None):
        super().__init__()
        self.linear = nn.Linear(config.decoder.hidden_size, 5)

    def forward(self, x, cu_seqlens):
        return self.linear(x[cu_seqlens[1:].long() - 1])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("tiny") / "m", preset="tiny", seed=5)


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    torch.manual_seed(0)
    parts = {"tower": "convolutions of tests", "projector": "one token of tests", "pooling": "narrow of tests"}
    model = load_model(base, config=VLM2VecConfig.from_json(base).with_parts(**parts))
    return save_model(model, tmp_path_factory.mktemp("other") / "m")


def load(folder, **options):
    return Embedder.from_pretrained(folder, device="cpu", show_progress=False, **options)


def test_other_parts_from_end_to_end(folder):
    plain, fast = load(folder, optimize=False), load(folder)
    vectors = plain.encode(INPUTS)
    assert vectors.shape == (2, 5) and plain.dimension == fast.dimension == 5
    assert np.abs(fast.encode(INPUTS) - vectors).max() < 2e-6
    batch = plain.processor(INPUTS)
    pieces = [plain.processor.tokenizer(x) for x in ("", " or ", "?")]
    assert batch.lengths[1] == 2 + sum(map(len, pieces)), "one token an image"
    one = plain.encode([INPUTS[1]])
    assert np.abs(one - vectors[1:]).max() < 2e-6


def test_they_train(folder):
    model = load_model(folder).requires_grad_(True).train()
    model(load(folder, optimize=False).processor(INPUTS)).sum().backward()
    for part in (model.vision, model.projector, model.pooling):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())


def test_they_are_embedded_searched_and_evaluated_by_their_dimension(folder, tmp_path):
    from minivlm2vec import files

    (tmp_path / "t.csv").write_text("text\na cat\na dog\n")
    summary = files.embed(tmp_path / "t.csv", tmp_path / "v.npy", load(folder))
    assert summary.dimension == 5 and np.load(tmp_path / "v.npy").shape == (2, 5)


def test_the_images_of_a_tower_that_is_no_vit(base):
    """The same pixels as the patches that the published tower begins with, put together again."""
    e = load(base, optimize=False)
    batch, p = e.processor(INPUTS), e.model.config.vision.patch_size
    images = normalized_images(batch.crops, batch.grids, torch.float32)
    S = e.model.config.vision.image_size
    assert images.shape == (sum(1 + h * w for h, w in batch.grids), 3, S, S)
    embedding = e.model.vision.embeddings.patch_embedding
    expected = nn.functional.conv2d(images, embedding.weight, stride=p).flatten(2).mT
    close("patches", embedding(batch.crops, batch.grids), expected, 1e-5)
    crops = images[1 : 1 + batch.grids[0][0] * batch.grids[0][1]]
    mean, std = (crops.new_tensor(x) for x in (CLIP_MEAN, CLIP_STD))
    pixels = batch.crops[: len(crops)].permute(0, 3, 1, 2) / 255
    close("crops", crops, (pixels - mean[:, None, None]) / std[:, None, None], 1e-6)


def test_a_projector_that_miscounts_is_named(folder, monkeypatch):
    e = load(folder, optimize=False)
    monkeypatch.setattr(OneToken, "num_tokens", lambda self, grid: 2)
    with pytest.raises(ValueError, match="the projector gave 2 image tokens, the batch has places for 4"):
        e.encode(INPUTS[1:])


def test_a_tower_that_does_not_fit_the_projector_is_named(base):
    config = VLM2VecConfig.from_json(base).with_parts(tower="convolutions of tests")
    e = load(base, config=config, optimize=False)
    with pytest.raises(ValueError, match="an even number of patches per side, got 1 patches a crop"):
        e.encode(INPUTS[1:])
