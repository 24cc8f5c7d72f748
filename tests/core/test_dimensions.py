"""Vectors that are cut (Matryoshka): what config.json says, what the Embedder gives, what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from minivlm2vec import Embedder, VLM2VecConfig
from minivlm2vec.cli import main
from minivlm2vec.errors import CheckpointError
from minivlm2vec.lora import LoraConfig
from minivlm2vec.new_checkpoint import configured, new_checkpoint
from minivlm2vec.weights import load_model, save_model
from tests.support.files_data import make_adapter
from tests.support.golden import synth_image

DIMS = {"minivlm2vec": {"dims": [8, 16]}}
INPUTS = ["a cat", "a longer text about a dog", Image.fromarray(synth_image(60, 40, 1))]


def load(folder, **options) -> Embedder:
    return Embedder.from_pretrained(folder, device="cpu", show_progress=False, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("m") / "m", config=DIMS)


@pytest.fixture(scope="module")
def full(folder):
    return load(folder)


def cut(vectors, size):
    return vectors[:, :size] / np.linalg.norm(vectors[:, :size], axis=1, keepdims=True)


@pytest.mark.parametrize("optimize", [True, False])
def test_vectors_are_cut_and_normalised_again(folder, full, optimize):
    whole = full.encode(INPUTS)
    e = load(folder, truncate_dim=16, optimize=optimize)
    assert e.dimension == 16 and full.dimension == 64
    for got in (e.encode(INPUTS), full.encode(INPUTS, truncate_dim=16), e.encode_query(INPUTS, truncate_dim=16)):
        np.testing.assert_allclose(got, cut(whole, 16), atol=2e-6)
    np.testing.assert_allclose(e.encode(INPUTS, truncate_dim=8), cut(whole, 8), atol=2e-6)
    np.testing.assert_allclose(e.encode(INPUTS, truncate_dim=64), whole, atol=2e-6)
    assert e.encode([]).shape == (0, 16) and full.encode([], truncate_dim=8).shape == (0, 8)
    raw = full.encode(INPUTS, normalize=False)
    np.testing.assert_allclose(e.encode(INPUTS, normalize=False), raw[:, :16], atol=1e-5)
    loaded = [e.load(e.plan(x)) for x in INPUTS]
    np.testing.assert_allclose(e.embed(loaded).numpy(), cut(whole, 16), atol=2e-6)


def test_vectors_of_an_own_pooling_are_left_as_they_are(folder):
    """Where no size is asked for: the pooling may give more numbers than the model would, and says how many."""

    def twice(x, cu_seqlens):
        return x[cu_seqlens[1:].long() - 1].repeat(1, 2)

    e = load(folder, optimize=False)
    e.model.pooling, twice.dimension = twice, 128
    assert e.encode(INPUTS).shape == (3, 128)


def test_info_says_what_a_model_was_trained_for(folder, capsys):
    assert main(["info", str(folder)]) == 0
    assert "trained for: dims (8, 16)\n" in capsys.readouterr().out


def test_a_size_that_the_model_was_not_trained_for_is_refused(folder, full, tmp_path):
    """Before weights are read; forced, it is cut all the same. More numbers than there are cannot be forced."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "config.json").read_text())
    words = r"truncate_dim is 12; the model's vectors have 64 numbers, and it was trained to have them cut to 8, 16 "
    for refused in (lambda: load(bare, truncate_dim=12), lambda: full.encode(["a"], truncate_dim=12)):
        with pytest.raises(ValueError, match=words + r"\(Matryoshka\): force_dimensions does it all the same"):
            refused()
    with pytest.raises(ValueError, match="truncate_dim is 65; the model's vectors have 64 numbers"):
        load(bare, truncate_dim=65, force_dimensions=True)
    for wrong, said in ((0, "is 0; at least 1 is needed"), (8.0, "is 8.0; a whole number is needed")):
        with pytest.raises(ValueError, match=f"truncate_dim {said}"):
            load(bare, truncate_dim=wrong)
        with pytest.raises(ValueError, match=f"truncate_dim {said}"):
            full.encode(["a"], truncate_dim=wrong)
    forced = load(folder, truncate_dim=12, force_dimensions=True)
    np.testing.assert_allclose(forced.encode(INPUTS), cut(full.encode(INPUTS), 12), atol=2e-6)
    plain = load(new_checkpoint(tmp_path / "plain"))
    with pytest.raises(ValueError, match=r"and it was not trained to have them cut \(Matryoshka\)"):
        plain.encode(["a"], truncate_dim=8)


def test_an_adapter_brings_the_sizes_that_it_was_trained_for(folder, tmp_path):
    """Those of the base do not count any more: the adapter has changed the vectors."""
    adapter = make_adapter(folder, tmp_path / "a")
    config = LoraConfig.from_json(adapter / "adapter_config.json")
    assert load(folder, adapter=adapter, truncate_dim=8).dimension == 8
    (adapter / "adapter_config.json").write_text(
        json.dumps(json.loads(config.to_json()) | {"minivlm2vec": {"dims": [32], "temperature": 0.03}})
    )
    assert load(folder, adapter=adapter, truncate_dim=32).encode(["a"]).shape == (1, 32)
    with pytest.raises(ValueError, match="trained to have them cut to 32 "):
        load(folder, adapter=adapter, truncate_dim=8)


def test_what_training_made_stands_in_the_config(folder, tmp_path):
    """There and back; a published checkpoint's config.json gets no key."""
    config = VLM2VecConfig.from_json(folder)
    assert config.trained.dims == (8, 16) and config.trained.temperature is None
    other = config.with_parts(dims=[32], temperature=0.05, causal=False)
    assert (other.trained.dims, other.trained.temperature, other.parts.causal) == ((32,), 0.05, False)
    raw = other.written_into(json.loads((folder / "config.json").read_text()))
    assert json.loads(json.dumps(raw))["minivlm2vec"] == {"causal": False, "dims": [32], "temperature": 0.05}
    assert VLM2VecConfig.from_dict(json.loads(json.dumps(raw))) == other
    assert "minivlm2vec" not in config.with_parts(dims=()).written_into(raw)
    again = save_model(load_model(folder), tmp_path / "again")
    assert VLM2VecConfig.from_json(again).trained.dims == (8, 16)


@pytest.mark.parametrize(("own", "message"), [
    ({"dims": 8}, "minivlm2vec.dims is 8; a list of whole numbers above 0 is needed"),
    ({"dims": [8, 0]}, "minivlm2vec.dims is [8, 0]"),
    ({"dims": [8.5]}, "minivlm2vec.dims is [8.5]"),
    ({"temperature": -1}, "minivlm2vec.temperature is -1; a number above 0 is needed"),
    ({"temperature": "0.02"}, "minivlm2vec.temperature is '0.02'"),
    ({"dim": [8]}, "minivlm2vec.dim is no part of a model; did you mean dims?"),
])  # fmt: skip
def test_what_cannot_be_is_named(own, message):
    with pytest.raises(CheckpointError) as refused:
        VLM2VecConfig.from_dict(configured("tiny", {}) | {"minivlm2vec": own})
    assert message in str(refused.value)
