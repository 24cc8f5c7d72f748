"""What a model is made of stands in its config.json, by names; nobody takes one model for another."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from minivlm2vec import CheckpointError, Embedder, VLM2Vec, VLM2VecConfig, load_plugin, register
from minivlm2vec.checkpoint import fingerprint
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.registry import find, name_of
from minivlm2vec.weights import described, load_model, save_model

PLUGIN = """
import torch
from torch import nn
from minivlm2vec import register


@register("pooling", "plugged")
class Attentive(nn.Module):
    def __init__(self, config, backend=None):
        super().__init__()
        self.query = nn.Parameter(torch.empty(config.decoder.hidden_size))

    def reset_parameters(self):
        nn.init.normal_(self.query)

    def forward(self, x, cu_seqlens):
        parts = x.split(cu_seqlens.diff().tolist())
        return torch.stack([((p @ self.query).softmax(0)[:, None] * p).sum(0) for p in parts])
"""


@register("pooling", "mean of tests")
def mean(x, cu_seqlens):
    return torch.stack([s.mean(0) for s in x.split(cu_seqlens.diff().tolist())])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("tiny") / "m", preset="tiny", seed=5)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "my_model.py"
    path.write_text(PLUGIN)
    return path


def encode(folder, **options):
    return Embedder.from_pretrained(folder, device="cpu", show_progress=False, **options).encode(["a cat and a dog"])


def test_a_changed_model_comes_back_as_it_was(folder, tmp_path):
    config = VLM2VecConfig.from_json(folder).with_parts(pooling="mean of tests", causal=False)
    e = Embedder.from_pretrained(folder, device="cpu", config=config, optimize=False, show_progress=False)
    saved = save_model(e.model, tmp_path / "saved")
    assert json.loads((saved / "config.json").read_text())["minivlm2vec"] == {
        "pooling": "mean of tests", "causal": False
    }  # fmt: skip
    again = load_model(saved)
    assert again.pooling is mean and again.causal is False
    ours, published = e.encode(["a cat and a dog"]), encode(folder)
    for options in ({}, {"optimize": False}):
        assert np.abs(encode(saved, **options) - ours).max() < 2e-6
    assert np.abs(ours - published).max() > 1e-3
    assert fingerprint(saved) != fingerprint(folder)


def test_attributes_that_were_set_are_recorded(folder, tmp_path):
    model = load_model(folder)
    model.pooling, model.causal = mean, False
    assert (described(model).parts.pooling, described(model).parts.causal) == ("mean of tests", False)


def test_a_published_checkpoint_says_nothing(folder, tmp_path):
    saved = save_model(load_model(folder), tmp_path / "saved")
    assert "minivlm2vec" not in json.loads((saved / "config.json").read_text())
    assert json.loads((saved / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_an_unknown_name_is_refused_with_the_way_to_bring_it(folder, tmp_path, plugin):
    config = VLM2VecConfig.from_json(folder)
    with pytest.raises(CheckpointError, match=r"pooling 'nobody' is not registered.*'last_token'.*--plugin"):
        load_model(folder, config=config.with_parts(pooling="nobody"))
    with pytest.raises(CheckpointError, match=r"minivlm2vec\.poling is no part of a model; did you mean pooling"):
        config.with_parts(poling="mean")
    with pytest.raises(CheckpointError, match=r"minivlm2vec\.causal is 'no'; a bool is needed"):
        config.with_parts(causal="no")


def test_a_plugin_in_a_new_process_and_by_the_commands(folder, tmp_path, plugin):
    load_plugin(plugin)
    load_plugin(plugin)
    torch.manual_seed(0)
    config = VLM2VecConfig.from_json(folder).with_parts(pooling="plugged")
    model = load_model(folder, config=config)
    assert model.pooling.query.std() > 0.5
    saved = save_model(model, tmp_path / "saved")
    expected = encode(saved)
    (tmp_path / "texts.csv").write_text("text\na cat and a dog\n")

    def command(*arguments):
        line = [sys.executable, "-m", "minivlm2vec", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)

    embed = ("embed", "texts.csv", "-o", "out.npy", "--model", saved, "--device", "cpu")
    refused = command(*embed)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "pooling 'plugged' is not registered here" in refused.stderr and "--plugin" in refused.stderr
    done = command(*embed, "--plugin", plugin)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.load(tmp_path / "out.npy") - expected).max() < 2e-6
    found = command("search", "out.npy", "--text", "a cat and a dog", "--instruction", "", "--plugin", plugin)
    assert found.returncode == 0 and "1.000" in found.stdout, found.stderr
    shown = command("info", saved, "--plugin", plugin)
    assert "pooling: plugged" in shown.stdout and "pooling.query" in shown.stdout, shown.stdout


@pytest.mark.parametrize(
    "text, message",
    [(None, "does not exist"), ("1 / 0", "ZeroDivisionError"), ("def", "SyntaxError")],
)
def test_a_plugin_that_fails_is_named(tmp_path, text, message):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"mine.py.*{message}"):
            load_plugin(path)


def test_what_config_json_cannot_tell_is_not_saved(folder, tmp_path):
    class Mine(VLM2Vec):
        pass

    class Layer(nn.Identity):
        pass

    def unregistered(x, cu_seqlens):
        return x[cu_seqlens[:-1].long()]

    with pytest.raises(ValueError, match=r"Mine is not registered.*@register\(.model., NAME\)"):
        save_model(load_model(folder, model_class=Mine), tmp_path / "x")
    model = load_model(folder)
    model.pooling = unregistered
    with pytest.raises(ValueError, match=r"pooling is .*unregistered, and would be last_token"):
        save_model(model, tmp_path / "x")
    model = load_model(folder)
    model.decoder.layers.append(Layer())
    with pytest.raises(ValueError, match=r"decoder\.layers\.\d+ is Layer, and would be nothing"):
        save_model(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_fewer_layers_and_another_width_are_written(folder, tmp_path):
    from dataclasses import replace

    model = load_model(folder)
    model.decoder.layers = model.decoder.layers[:1]
    model.vision.layers = model.vision.layers[:1]
    with pytest.raises(ValueError, match=r"is nothing, and would be"):
        save_model(model, tmp_path / "saved")
    model.config = replace(
        model.config,
        decoder=replace(model.config.decoder, num_hidden_layers=1),
        vision=replace(model.config.vision, num_hidden_layers=2),
    )
    again = load_model(save_model(model, tmp_path / "saved"))
    assert len(again.decoder.layers) == 1 and len(again.vision.layers) == 1
    assert again.config == model.config


def test_names_are_of_one_part_each():
    with pytest.raises(ValueError, match=r"'mean of tests' already: .*mean; .*other needs another name"):

        @register("pooling", "mean of tests")
        def other(x, cu_seqlens):
            return x

    with pytest.raises(ValueError, match="kind is one of model, tower, projector, pooling, got 'head'"):
        register("head", "x")
    assert find("model", "vlm2vec") is VLM2Vec and name_of("pooling", mean) == "mean of tests"


def test_a_model_that_was_made_fast_is_still_named(folder):
    e = Embedder.from_pretrained(folder, device="cpu", show_progress=False)
    assert type(e.model) is not VLM2Vec
    assert name_of("model", e.model) == "vlm2vec" and name_of("tower", e.model.vision) == "clip"


def test_vectors_are_not_taken_for_those_of_the_unchanged_checkpoint(folder, tmp_path):
    from minivlm2vec import files

    (tmp_path / "t.csv").write_text("text\na cat\n")
    e = Embedder.from_pretrained(folder, device="cpu", optimize=False, show_progress=False)
    e.model.causal = False
    with pytest.raises(ValueError, match=r"other parts than .*'causal': False.*save_model"):
        files.embed(tmp_path / "t.csv", tmp_path / "v.npy", e)
    assert not (tmp_path / "v.npy").exists()


class Forgetful(nn.Module):
    def __init__(self, config, backend=None):
        super().__init__()
        self.query = nn.Parameter(torch.empty(config.decoder.hidden_size))
        self.scale = nn.Parameter(torch.full((3,), 3.0))

    def reset_parameters(self):
        nn.init.ones_(self.query)

    def forward(self, x, cu_seqlens):
        return x[cu_seqlens[1:].long() - 1]


@register("pooling", "forgetful of tests")
class Resetless(Forgetful):
    pass


@register("pooling", "attribute of tests")
class WithAttribute(Forgetful):
    def __init__(self, config, backend=None):
        super().__init__(config, backend)
        del self.scale
        self.table = torch.linspace(0, 1, 5)


@register("pooling", "state of tests")
class WithState(nn.Module):
    def __init__(self, config, backend=None):
        super().__init__()
        self.p = 3

    def get_extra_state(self):
        return self.p

    def set_extra_state(self, state):
        self.p = state

    def forward(self, x, cu_seqlens):
        return x[cu_seqlens[1:].long() - 1]


@register("model", "narrow of tests")
class NarrowModel(VLM2Vec):
    def forward(self, batch, *, normalize=True):
        return super().forward(batch, normalize=normalize)[:, :7]


def changed(folder, **parts):
    return load_model(folder, config=VLM2VecConfig.from_json(folder).with_parts(**parts))


def test_what_is_new_is_set_or_named(folder):
    with pytest.raises(ValueError, match=r"pooling\.scale are new, and reset_parameters of their modules leaves"):
        changed(folder, pooling="forgetful of tests")
    with pytest.raises(ValueError, match=r"pooling\.table: a model is built on the meta device.*plain attributes"):
        changed(folder, pooling="attribute of tests")


def test_state_that_is_no_tensor_is_not_saved(folder, tmp_path):
    with pytest.raises(ValueError, match=r"pooling\._extra_state is state that is no tensor.*make it a buffer"):
        save_model(changed(folder, pooling="state of tests"), tmp_path / "x")


def test_a_width_that_was_not_declared_is_named(folder):
    config = VLM2VecConfig.from_json(folder).with_parts(model="narrow of tests")
    e = Embedder.from_pretrained(folder, config=config, device="cpu", show_progress=False)
    with pytest.raises(ValueError, match=r"NarrowModel made vectors of 7 numbers, and its `dimension` is \d+"):
        e.encode(["a"])
    NarrowModel.dimension = 7
    try:
        assert e.encode(["a"]).shape == (1, 7) and e.dimension == 7
    finally:
        del NarrowModel.dimension


def test_a_plugin_that_is_imported_too_is_one(tmp_path, monkeypatch):
    path = tmp_path / "imported_plugin.py"
    path.write_text(PLUGIN.replace('"plugged"', '"imported plugin"'))
    monkeypatch.syspath_prepend(tmp_path)
    load_plugin(path)
    import imported_plugin

    assert find("pooling", "imported plugin") is imported_plugin.Attentive
