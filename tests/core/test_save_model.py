"""A model is saved as it is loaded, changed ones too."""

import json
import shutil

import pytest
import torch
from PIL import Image
from torch import nn

from minivlm2vec import CheckpointError, Embedder, VLM2Vec, VLM2VecConfig, register
from minivlm2vec.checkpoint import read_headers
from minivlm2vec.lora import LoraConfig, add_lora
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.weights import load_model, save_model
from tests.support.golden import synth_image
from tests.support.helpers import close

INPUTS = ["a cat", {"text": "what?", "image": Image.fromarray(synth_image(80, 60, 1))}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("tiny") / "m", preset="tiny", seed=5)


def load(folder, **options) -> Embedder:
    return Embedder.from_pretrained(folder, device="cpu", show_progress=False, **options)


@pytest.mark.parametrize("shards", ["5GB", "300KB"])
def test_the_published_layout(folder, tmp_path, shards):
    e = load(folder, optimize=False)
    saved = save_model(e.model, tmp_path / "saved", max_shard_size=shards)
    assert (len(list(saved.glob("*.safetensors"))) > 1) == (shards == "300KB")
    keys = {s.key for s in read_headers(folder)}
    assert {s.key for s in read_headers(saved)} <= keys
    for name in ("preprocessor_config.json", "tokenizer.json"):
        assert (saved / name).read_bytes() == (folder / name).read_bytes()
    for options in ({}, {"optimize": False}):
        close("vectors", *(torch.from_numpy(x.encode(INPUTS)) for x in (load(saved, **options), e)), 2e-6)
    assert not [p for p in tmp_path.iterdir() if p != saved], "nothing is left behind"


def test_the_dtype_is_the_models(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "transformers 5")
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = config.pop("torch_dtype")
    (source / "config.json").write_text(json.dumps(config))
    model = load_model(source, dtype="bfloat16")
    saved = save_model(model, tmp_path / "saved")
    assert json.loads((saved / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = load_model(saved)
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.named_parameters())


def test_a_folder_that_is_there_stays(folder, tmp_path):
    model = load_model(folder)
    saved = save_model(model, tmp_path / "saved")
    (saved / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_model(model, saved)
    assert (saved / "note").exists()
    save_model(model, saved, overwrite=True)
    assert not (saved / "note").exists()
    save_model(load_model(saved), saved, overwrite=True)  # its own source
    assert load_model(saved).dtype == model.dtype


class LinearProjector(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.vision.hidden_size, config.decoder.hidden_size)
        self.norm = nn.BatchNorm1d(config.decoder.hidden_size)

    def forward(self, features, grids):
        raise NotImplementedError


@register("model", "changed")
class Changed(VLM2Vec):
    """Another projector with statistics, and a pooling with a parameter."""

    def __init__(self, config, *, backend=None):
        super().__init__(config, backend=backend)
        self.projector = LinearProjector(config)
        self.pooling = Attentive(config.decoder.hidden_size)


class Attentive(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.query)

    def forward(self, x, cu_seqlens):
        parts = x.split(cu_seqlens.diff().tolist())
        return torch.stack([((p @ self.query).softmax(0)[:, None] * p).sum(0) for p in parts])


def test_a_changed_model_there_and_back(folder, tmp_path, caplog):
    torch.manual_seed(0)
    skip = ("projector.", "pooling.")
    first = load_model(folder, model_class=Changed, skip=skip)
    assert "new parameters begin by reset_parameters: projector.linear.weight" in caplog.text
    assert first.pooling.query.std() > 0.5 and (first.projector.norm.running_var == 1).all()
    first.projector.norm.running_mean += 3
    first.projector.norm.num_batches_tracked += 7
    saved = save_model(first, tmp_path / "saved")
    keys = {s.key for s in read_headers(saved)}
    assert {"pooling.query", "model.vision_embed_tokens.linear.weight", "model.norm.weight"} <= keys
    again = load_model(saved, model_class=Changed)
    state = again.state_dict()
    assert state.keys() == first.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    fast, plain = load(saved, model_class=Changed), load(saved, model_class=Changed, optimize=False)
    close("vectors", *(torch.from_numpy(e.encode(INPUTS[:1])) for e in (fast, plain)), 2e-6)


def test_strict_both_ways(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"parameters have no tensor: projector\.linear\.weight"):
        load_model(folder, model_class=Changed)
    with pytest.raises(CheckpointError, match=r"tensors have no place: .*img_projection"):
        load_model(folder, model_class=Changed, skip=("pooling.", "projector.linear", "projector.norm"))
    saved = save_model(load_model(folder, model_class=Changed, skip=("projector.", "pooling.")), tmp_path / "saved")
    assert type(load_model(saved)) is Changed, "config.json names it"
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_model(saved, model_class=VLM2Vec)


def test_new_parts_need_a_beginning(folder):
    class Without(VLM2Vec):
        def __init__(self, config, *, backend=None):
            super().__init__(config, backend=backend)
            self.extra = nn.ParameterDict({"x": nn.Parameter(torch.empty(3))})

    with pytest.raises(ValueError, match="extra is new and a ParameterDict, which has no reset_parameters"):
        load_model(folder, model_class=Without, skip=("extra.",))


def test_parts_of_the_plain_model_begin_too(folder):
    """Every module that owns a parameter can begin anew."""
    torch.manual_seed(0)
    model = load_model(folder, skip=("vision.", "projector.", "decoder."))
    for name, p in model.named_parameters():
        assert p.isfinite().all() and (p.std() > 0 or "norm" in name), name


def test_what_cannot_be_saved(folder, tmp_path):
    with pytest.raises(RuntimeError, match="optimize=False"):
        save_model(load(folder).model, tmp_path / "x")
    model = load_model(folder)
    model.decoder.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"decoder\.norm\.weight holds NaN"):
        save_model(model, tmp_path / "x")
    adapted = add_lora(load_model(folder), LoraConfig(r=2))
    with pytest.raises(ValueError, match="merge it first"):
        save_model(adapted, tmp_path / "x")
    with pytest.raises(ValueError, match="source="):
        save_model(VLM2Vec(model.config), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_another_tower_may_use_the_names_of_layers_that_are_dropped(folder, tmp_path):
    @register("model", "whole")
    class Whole(VLM2Vec):
        def __init__(self, config, *, backend=None):
            super().__init__(config, backend=backend)
            self.vision.layers.append(nn.Linear(4, 4))

    torch.manual_seed(0)
    number = len(load_model(folder).vision.layers)
    with pytest.raises(CheckpointError, match="have no tensor"):
        load_model(folder, model_class=Whole)
    model = load_model(folder, model_class=Whole, skip=(f"vision.layers.{number}.",))
    again = load_model(save_model(model, tmp_path / "saved"), model_class=Whole)
    assert torch.equal(again.vision.layers[number].weight, model.vision.layers[number].weight)


def test_a_folder_that_is_no_checkpoint_is_never_replaced(folder, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="is no checkpoint"):
        save_model(load_model(folder), mine, overwrite=True)
    assert (mine / "note").exists()


def test_a_buffer_that_nobody_fills_is_named(folder):
    class Scaled(VLM2Vec):
        device_of_gain = None

        def __init__(self, config, *, backend=None):
            super().__init__(config, backend=backend)
            self.register_buffer("gain", torch.full((1,), 2.0, device=self.device_of_gain), persistent=False)

    with pytest.raises(ValueError, match=r'gain: .*persistent=False; make them with device="cpu"'):
        load_model(folder, model_class=Scaled)
    Scaled.device_of_gain = "cpu"
    assert load_model(folder, model_class=Scaled).gain == 2


@register("pooling", "tied of tests")
class Tied(nn.Module):
    """A matrix that stands in two places."""

    def __init__(self, config, backend=None):
        super().__init__()
        self.first = nn.Linear(config.decoder.hidden_size, config.decoder.hidden_size, bias=False)
        self.second = nn.Linear(config.decoder.hidden_size, config.decoder.hidden_size, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x, cu_seqlens):
        return self.second(self.first(x[cu_seqlens[1:].long() - 1]))


def test_what_is_tied_stays_tied(folder, tmp_path):
    torch.manual_seed(0)
    model = load_model(folder, config=VLM2VecConfig.from_json(folder).with_parts(pooling="tied of tests"))
    assert model.pooling.first.weight is model.pooling.second.weight and model.pooling.first.weight.std() > 0
    saved = save_model(model, tmp_path / "saved")
    assert [s.key for s in read_headers(saved) if "pooling" in s.key] == ["pooling.first.weight"]
    again = load_model(saved)
    assert again.pooling.first.weight is again.pooling.second.weight
    assert torch.equal(again.pooling.first.weight, model.pooling.first.weight)


def test_a_dtype_that_no_checkpoint_has_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"the model holds torch\.float64; .*torch\.float32.* can be saved"):
        save_model(load_model(folder).double(), tmp_path / "x")
    assert not list(tmp_path.iterdir())
