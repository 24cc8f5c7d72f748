"""inference.optimize: the same vectors, only what it knows is changed, and what is changed refuses to mislead."""

import copy
import functools
import pickle

import pytest
import torch
from PIL import Image
from torch import nn

from minivlm2vec import Embedder, VLM2Vec
from minivlm2vec.decoder import DecoderLayer
from minivlm2vec.inference import FusedVLM2Vec, InferenceOnly, optimize
from minivlm2vec.inference.fused import FusedDecoderLayer, FusedVisionLayer, FusedVisionTower
from minivlm2vec.inference.prepack import PackedLinear
from minivlm2vec.new_checkpoint import new_checkpoint
from tests.support.golden import synth_image
from tests.support.helpers import close

INPUTS = ["a cat", "a text of some length " * 3, {"text": "what?", "image": Image.fromarray(synth_image(80, 60, 1))}]
HOW = [{}, {"prepack": False}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("tiny") / "m", preset="tiny", seed=5)


def load(folder, **options) -> Embedder:
    return Embedder.from_pretrained(folder, device="cpu", show_progress=False, **options)


@pytest.fixture
def plain(folder) -> Embedder:
    return load(folder, optimize=False)


@pytest.mark.parametrize("options", HOW, ids=str)
@torch.no_grad()
def test_same_vectors_and_hidden_states(folder, plain, options):
    fast, batch = load(folder, **options), plain.processor(INPUTS)
    assert type(fast.model) is FusedVLM2Vec and type(plain.model) is VLM2Vec
    for normalize in (True, False):
        expected = plain.model(batch, normalize=normalize)
        close("vectors", fast.model(batch, normalize=normalize), expected, 2e-6 * float(expected.abs().max()))
    ours, theirs = (x.model.hidden_states(batch, [0, -1]) for x in (fast, plain))
    for layer in theirs:
        close(f"layer {layer}", ours[layer], theirs[layer], 2e-5)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@torch.no_grad()
def test_the_tower_in_chunks(folder, plain, chunk):
    batch, tower = plain.processor(INPUTS), load(folder).model.vision
    assert type(tower) is FusedVisionTower
    got = tower(batch.crops, batch.grids, crops_per_chunk=chunk)
    close("features", got, plain.model.vision(batch.crops, batch.grids), 1e-5)


@torch.no_grad()
def test_a_fused_layer_leaves_its_input_alone(folder):
    model = load(folder, prepack=False).model
    x = torch.randn(2, 5, model.config.vision.hidden_size)
    before, layer = x.clone(), model.vision.layers[0]
    assert type(layer) is FusedVisionLayer
    layer(x)
    assert torch.equal(x, before)


# -------------------------------------------------------------------------------------------------- what it refuses

REFUSED = {
    "train": lambda m: m.train(),
    "hook": lambda m: m.register_forward_hook(print),
    "pre-hook": lambda m: m.register_forward_pre_hook(print),
    "backward hook": lambda m: m.register_full_backward_hook(print),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(print),
    "pickle": pickle.dumps,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "state_dict": lambda m: m.state_dict(),
    "to": lambda m: m.to(torch.float64),
    "half": lambda m: m.half(),
    "compile": lambda m: m.compile(),
    "add_module": lambda m: m.add_module("another", nn.Identity()),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("options", HOW, ids=str)
def test_what_was_replaced_refuses(folder, what, options):
    """The model, and each module in it that is not as it was."""
    model = load(folder, **options).model
    replaced = {n: m for n, m in model.named_modules() if isinstance(m, InferenceOnly)}
    assert {
        "",
        "decoder",
        "decoder.norm",
        "decoder.layers",
        "decoder.layers.0.mlp.down_proj",
        "vision.layers.1",
    } <= set(replaced)
    for name, module in replaced.items():
        with pytest.raises(RuntimeError, match="optimize=False"):
            REFUSED[what](module)
        assert module is model.get_submodule(name)


def test_loading_weights_and_replacing_parts_are_refused(folder, plain):
    model, state = load(folder).model, plain.model.state_dict()
    changes = [
        lambda: model.load_state_dict(state),
        lambda: model.load_state_dict(state, assign=True),
        lambda: setattr(model, "projector", nn.Identity()),
        lambda: setattr(model, "pooling", torch.mean),
        lambda: setattr(model, "causal", False),
        lambda: setattr(model.decoder.layers[1].mlp.down_proj, "forward", lambda x: x),
        lambda: setattr(model.decoder.layers[0].mlp, "down_proj", nn.Linear(3, 3)),
        lambda: model.decoder.layers.__setitem__(0, nn.Identity()),
        lambda: model.decoder.layers.append(nn.Identity()),
        lambda: model.decoder.layers.__delitem__(0),
        lambda: delattr(model.decoder, "norm"),
        lambda: setattr(model.decoder.norm, "weight", nn.Parameter(torch.ones(3))),
        lambda: model.set_submodule("decoder.layers.1.self_attn", nn.Identity()),
    ]
    for change in changes:
        with pytest.raises(RuntimeError, match="optimize=False"):
            change()


@pytest.mark.parametrize("options", HOW, ids=str)
@torch.no_grad()
def test_hooks_on_the_rest_are_told_the_truth(folder, options):
    e = load(folder, **options)
    batch, seen, then = e.processor(INPUTS), {}, {}

    def record(name, module, args, out):
        seen[name], then[name] = out, out.clone()

    for name, module in e.model.named_modules():
        if not isinstance(module, InferenceOnly):
            module.register_forward_hook(functools.partial(record, name))
    e.model(batch)
    e.model(e.processor(INPUTS[:2]))
    owners = {"vision.embeddings.patch_embedding", "vision.embeddings.position_embedding", "vision.pre_layrnorm",
              "decoder.embed_tokens", "projector"}  # fmt: skip
    assert owners <= set(seen)
    assert all(torch.equal(seen[name], then[name]) for name in seen)


def test_gradients_are_refused(folder):
    e = load(folder, prepack=False)
    e.model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="gradient"):
        e.model(e.processor(["a cat"]))


# ------------------------------------------------------------------------------------------------ what it leaves


class Doubled(VLM2Vec):
    def forward(self, batch, *, normalize=True):
        return 2 * super().forward(batch, normalize=normalize)


class Noisy(DecoderLayer):
    def forward(self, x, packing):
        return super().forward(x, packing) + 0.5


@torch.no_grad()
def test_a_subclass_keeps_its_forward(folder):
    plain, fast = (load(folder, model_class=Doubled, optimize=o) for o in (False, True))
    assert type(fast.model) is Doubled and type(fast.model.decoder.layers[0]) is FusedDecoderLayer
    for _ in range(3):
        close("vectors", torch.from_numpy(fast.encode(INPUTS)), torch.from_numpy(plain.encode(INPUTS)), 4e-6)
        assert abs((fast.encode(["a cat"]) ** 2).sum() - 4) < 1e-5


def adapted(model: VLM2Vec) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


CHANGES = {
    "another layer": lambda m: m.decoder.layers.__setitem__(1, _as(Noisy, m.decoder.layers[1])),
    "a hook": lambda m: m.decoder.layers[1].mlp.register_forward_hook(lambda module, args, out: out + 0.25),
    "a hook in the tower": lambda m: m.vision.layers[0].register_forward_hook(lambda module, args, out: out + 0.25),
    "a forward of its own": lambda m: setattr(m.decoder.layers[0].mlp, "forward", lambda x: 0.5 * x),
    "an adapter": adapted,
    "a pooling": lambda m: setattr(m, "pooling", lambda x, cu_seqlens: x[cu_seqlens[:-1].long()]),
    "a shared MLP": lambda m: setattr(m.decoder.layers[2], "mlp", m.decoder.layers[0].mlp),
    "shared attention in the tower": lambda m: setattr(m.vision.layers[1], "self_attn", m.vision.layers[0].self_attn),
    "not causal": lambda m: setattr(m, "causal", False),
    "a tower": lambda m: setattr(m, "vision", Mean(m.config.vision)),
    "a projector's matrix": lambda m: m.projector.mlp.__setitem__(0, Twice(m.projector.mlp[0])),
}


def _as(cls, module):
    module.__class__ = cls
    return module


class Mean(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, crops, grids):
        mean = crops.float().mean() / 255
        return mean.expand(sum(1 + h * w for h, w in grids), self.config.patches_per_side**2, self.config.hidden_size)


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 2


@pytest.mark.parametrize("prepack", [None, False], ids=["packed", "not packed"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_not_the_plain_models_stays(folder, plain, change, prepack):
    fast, unchanged = load(folder, optimize=False), plain.encode(INPUTS)
    for e in (plain, fast):
        torch.manual_seed(0)
        CHANGES[change](e.model)
    optimize(fast.model, prepack=prepack)
    assert any(isinstance(m, InferenceOnly) for m in fast.model.modules())
    for _ in range(3):
        got, expected = fast.encode(INPUTS), plain.encode(INPUTS)
        close("vectors", torch.from_numpy(got), torch.from_numpy(expected), 2e-6)
    assert abs(expected - unchanged).max() > 1e-4


# ------------------------------------------------------------------------------------------------------- options


def test_options_that_contradict_each_other(folder, plain):
    for options in ({"prepack": True}, {"cuda_graphs": True}, {"precision": "fp8"}, {"share_prefixes": True}):
        with pytest.raises(ValueError, match=f"optimize=False.*{next(iter(options))}"):
            load(folder, optimize=False, **options)
    with pytest.raises(ValueError, match=r"'bf16' and dtype=torch\.float32 exclude each other"):
        load(folder, precision="bf16", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"'bf16' is for bfloat16 models, got torch\.float32"):
        optimize(plain.model, precision="bf16")
    assert type(plain.model) is VLM2Vec, "nothing was changed"
    with pytest.raises(ValueError, match="optimized already"):
        optimize(optimize(plain.model))


@pytest.mark.parametrize("options, message", [
    ({"backend": "nonsense"}, "backend is one of auto, triton, torch, got 'nonsense'"),
    ({"precision": "int4"}, "precision is 'bf16' or 'fp8', got 'int4'"),
    ({"precision": "fp8", "prepack": True}, "exclude each other"),
])  # fmt: skip
def test_what_fits_no_model_is_told_before_anything_is_read(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "no such folder", **options)


def test_precision_bf16_is_bfloat16(folder):
    for optimized in (True, False):
        e = load(folder, precision="bf16", optimize=optimized)
        assert e.model.dtype == torch.bfloat16


def test_the_fast_model_is_the_default(folder):
    assert type(load(folder).model) is FusedVLM2Vec


def test_packed_weights_are_not_to_be_had(folder):
    layer = load(folder).model.decoder.layers[0].mlp.down_proj
    if not isinstance(layer, PackedLinear):
        pytest.skip("this torch has no oneDNN")
    with pytest.raises(AttributeError, match=r"'weight'.*optimize=False"):
        _ = layer.weight
