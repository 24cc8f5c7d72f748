"""README's modifications, run as they are printed there."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minivlm2vec
import minivlm2vec.projector
import minivlm2vec_kernels
from minivlm2vec import Embedder
from minivlm2vec.new_checkpoint import new_checkpoint
from tests.support.golden import synth_image

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def names(tmp_path):
    """What the examples take for granted."""
    e = Embedder.from_pretrained(new_checkpoint(tmp_path / "m"), device="cpu", optimize=False, show_progress=False)
    image = Image.fromarray(synth_image(60, 40, 1))
    return {"e": e, "image": image, "torch": torch, "minivlm2vec": minivlm2vec,
            "minivlm2vec_kernels": minivlm2vec_kernels}  # fmt: skip


def block(word: str) -> str:
    (found,) = [b for b in BLOCKS if word in b]
    assert len(found.strip().splitlines()) <= 10, "a modification takes at most ten lines"
    return found


def test_another_pooling(names):
    e, image = names["e"], names["image"]
    inputs = ["a cat and a dog", {"text": "x", "image": image}]
    before = e.encode(inputs)
    exec(block("mean_pool"), names)
    after = e.encode(inputs)
    assert np.abs(after - before).max() > 1e-3
    alone = np.concatenate([e.encode([x]) for x in inputs])
    assert np.abs(after - alone).max() < 2e-6
    batch = e.processor(inputs[:1])
    final = e.model.decoder.norm(e.model.hidden_states(batch, [-1])[-1])
    expected = torch.nn.functional.normalize(final.mean(0), dim=-1)
    assert np.abs(after[0] - expected.numpy()).max() < 2e-6


def test_bidirectional_attention(names):
    exec(block("causal = False"), names)
    e, batch, hidden = names["e"], names["batch"], names["hidden"]
    assert names["vectors"].shape == (2, e.dimension) and set(hidden) == {0, -1}
    assert all(h.shape == (batch.num_tokens, e.dimension) for h in hidden.values())
    e.model.causal = True
    one_way = e.model.hidden_states(batch, layers=[0])[0]
    e.model.causal = False
    ends = batch.cu_seqlens[1:] - 1
    assert (one_way - hidden[0]).abs()[0].max() > 1e-4, "the first token now sees what follows"
    assert (one_way - hidden[0]).abs()[ends].max() < 1e-5, "the last token saw everything before"
    swapped = batch.input_ids.clone()
    swapped[0] = 5  # another first text leaves the second sequence alone
    other = e.model(replace(batch, input_ids=swapped))
    assert (other[1] - names["vectors"][1]).abs().max() < 1e-6 and (other[0] - names["vectors"][0]).abs().max() > 1e-4


def test_a_different_projector(names):
    e, image = names["e"], names["image"]
    before = e.encode([image, "text"])
    exec(block("LinearProjector"), names)
    after = e.encode([image, "text"])
    assert np.abs(after[0] - before[0]).max() > 1e-3, "the image's vector comes through the new projector"
    np.testing.assert_allclose(after[1], before[1], atol=2e-6)


def test_the_first_example_uses_the_real_names():
    (first,) = [b for b in BLOCKS if "encode_query" in b]
    compile(first, "README", "exec")
    for name in re.findall(r"\be\.(\w+)", first):
        assert hasattr(Embedder, name), name
