"""What a trace shows is what the model computes, and gradients flow through it."""

import pytest
import torch
from PIL import Image
from torch import nn

from minivlm2vec import Embedder
from minivlm2vec.new_checkpoint import new_checkpoint
from tests.support.golden import synth_image
from tests.support.helpers import close

INPUTS = [
    "a cat",
    {"text": "<|image_1|> and <|image_2|>", "images": [Image.fromarray(synth_image(90, 40, n)) for n in (1, 2)]},
    "a longer text than the first",
]


@pytest.fixture(scope="module")
def e(tmp_path_factory):
    folder = new_checkpoint(tmp_path_factory.mktemp("tiny") / "m", preset="tiny", seed=5)
    return Embedder.from_pretrained(folder, device="cpu", optimize=False, show_progress=False)


@pytest.fixture(scope="module")
def batch(e):
    return e.processor(INPUTS)


@pytest.mark.parametrize("causal", [True, False])
def test_everything_of_every_layer(e, batch, causal, monkeypatch):
    monkeypatch.setattr(e.model, "causal", causal)
    trace = e.model.trace(batch, attentions=True, hidden_states=True, vision=True)
    close("vectors", trace.vectors, e.model(batch), 2e-6)
    n, tower = len(e.model.decoder.layers), len(e.model.vision.layers)
    assert [*trace.hidden_states] == [*trace.attentions] == [*range(n)]
    assert [*trace.vision_hidden_states] == [*trace.vision_attentions] == [*range(tower)]
    for layer, expected in e.model.hidden_states(batch, range(n)).items():
        close(f"layer {layer}", trace.hidden_states[layer], expected, 2e-5)
    for sequences in trace.attentions.values():
        assert [p.shape[1:] for p in sequences] == [(x, x) for x in batch.lengths]
        for p in sequences:
            close("sums", p.sum(-1), torch.ones_like(p[..., 0]), 1e-5)
            assert (p.triu(1).max() == 0) == causal
    for p in trace.vision_attentions.values():
        assert p.shape[0] == sum(1 + h * w for h, w in batch.grids)
        close("sums", p.sum(-1), torch.ones_like(p[..., 0]), 1e-5)


def test_a_sequence_alone_shows_the_same(e, batch):
    together = e.model.trace(batch, attentions=[-1])
    for i, item in enumerate(INPUTS):
        alone = e.model.trace(e.processor([item]), attentions=[-1])
        close(f"input {i}", together.attentions[-1][i], alone.attentions[-1][0], 1e-5)


def test_chosen_layers_by_the_names_that_were_given(e, batch):
    trace = e.model.trace(batch, attentions=[-1, 0], hidden_states=[1], vision=[0])
    assert {*trace.attentions} == {-1, 0} and [*trace.hidden_states] == [1]
    assert [*trace.vision_attentions] == [*trace.vision_hidden_states] == [0]
    assert not e.model.trace(batch).attentions
    assert not e.model.trace(batch, hidden_states=True).vision_hidden_states
    with pytest.raises(ValueError, match=r"layers \[9\] are none of the \d"):
        e.model.trace(batch, attentions=[9])


def test_no_hook_stays_behind(e, batch):
    with pytest.raises(ValueError, match="are none of"):
        e.model.trace(batch, hidden_states=True, attentions=[99])
    e.model.trace(batch, attentions=True, hidden_states=True, vision=True)
    assert not any(m._forward_hooks for m in e.model.modules())


def test_gradients_flow_through_the_probabilities(e, batch):
    e.model.requires_grad_(True)
    try:
        trace = e.model.trace(batch, attentions=True, vision=True)
        trace.vectors[1].sum().backward(inputs=(p := [trace.attentions[0][1], trace.vision_attentions[0]]))
        assert all(x.grad is not None and x.grad.abs().max() > 0 for x in p)
        first = trace.attentions[0][0]
        assert first.grad is None, "another sequence"
    finally:
        e.model.requires_grad_(False)
        e.model.zero_grad()


def test_a_map_of_an_images_tokens(e, batch):
    """Every image token knows its place: the tokens' own numbers, laid out as the projector does."""
    m = e.model.config.vision.merged_per_side
    trace = e.model.trace(batch)
    numbers = torch.full((batch.num_tokens,), -1.0)
    numbers[batch.image_index] = batch.image_source.float()
    start = 0
    for i, (h, w) in enumerate(batch.grids):
        got = trace.image_map(numbers, i)
        assert got.shape == (h * m, w * m)
        expected = start + torch.arange(h * m)[:, None] * (w * m + 1) + torch.arange(w * m)
        assert torch.equal(got, expected.float())
        start += e.model.num_image_tokens((h, w))
    with pytest.raises(ValueError, match="image 2 is none of the batch's, which has 2"):
        trace.image_map(numbers, 2)


def test_a_layer_of_ones_own_is_named(e, batch, monkeypatch):
    class Other(nn.Module):
        def forward(self, x, packing):
            return x

    layer = e.model.decoder.layers[1]
    monkeypatch.setitem(layer._modules, "self_attn", Other())
    assert e.model.trace(batch, hidden_states=[1], attentions=[0]).hidden_states[1].shape[0] == batch.num_tokens
    with pytest.raises(ValueError, match=r"layer 1 is a DecoderLayer whose self_attn is a Other"):
        e.model.trace(batch, attentions=True)


def test_the_fast_model_says_what_to_do(e, batch):
    fast = Embedder.from_pretrained(e.name, device="cpu", show_progress=False)
    with pytest.raises(RuntimeError, match="optimize=False"):
        fast.model.trace(batch, attentions=True)


def test_what_cannot_be_shown_is_named(e, batch, monkeypatch):
    with pytest.raises(ValueError, match="layers are True, False or a list of numbers, got -1"):
        e.model.trace(batch, attentions=-1)
    with pytest.raises(ValueError, match="attentions or hidden_states says what"):
        e.model.trace(batch, vision=True)
    with pytest.raises(ValueError, match=r"a number for each of the batch's \d+ tokens, got \[43\]"):
        e.model.trace(batch).image_map(torch.arange(43.0))

    class Other(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, features, grids):
            return self.inner(features, grids)

    monkeypatch.setitem(e.model._modules, "projector", Other(e.model.projector))
    with pytest.raises(ValueError, match="the projector is not the published one"):
        e.model.trace(batch).image_map(torch.zeros(batch.num_tokens))


def test_an_image_that_stands_twice_shows_the_mean(e):
    batch = e.processor([{"text": "<|image_1|> a <|image_1|> b", "image": Image.fromarray(synth_image(90, 40, 1))}])
    values = torch.arange(batch.num_tokens).float()
    first, second = values[batch.image_index].chunk(2)
    got = e.model.trace(batch).image_map(values)
    assert got[0, 0] == (first[0] + second[0]) / 2
