"""LoRA and DoRA: the numbers of the formulas and of PEFT, PEFT's files in both directions, and loud mistakes."""

import json
import math
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from minivlm2vec import Embedder, lora, register
from minivlm2vec.checkpoint import keys_of, parameter_of
from minivlm2vec.config import VLM2VecConfig
from minivlm2vec.errors import CheckpointError
from minivlm2vec.linear import Linear
from minivlm2vec.lora import (
    PREFIX,
    AdaptedLinear,
    Adapter,
    LoraConfig,
    RowSlice,
    add_lora,
    exclude_frozen,
    load_adapter,
    merge_adapter,
    merge_lora,
    save_adapter,
)  # fmt: skip
from minivlm2vec.new_checkpoint import new_checkpoint, tensor_shapes
from minivlm2vec.weights import load_model
from tests.support.helpers import close, randomize

TOWER = "model.vision_embed_tokens.img_processor.vision_model.encoder.layers."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("base") / "m", seed=3)


def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every adapter numbers that matter (B begins at zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
            elif "lora_magnitude" in name:
                p.mul_(1 + 0.2 * torch.rand(p.shape, generator=generator))
    return model


# --- one layer ---------------------------------------------------------------------------------------------


def adapted(dora: bool, bias: bool, dropout: float = 0.0) -> AdaptedLinear:
    """[40, 24] with an adapter on rows 8 to 24 and one on rows 24 to 40."""
    layer = AdaptedLinear(randomize(Linear(24, 40, bias=bias)), dropout)
    for start in (8, 24):
        magnitude = torch.ones(16) if dora else None
        place = RowSlice("", start, start + 16)
        layer.adapters.append(Adapter(str(start), place, torch.zeros(4, 24), torch.zeros(16, 4), magnitude, 0.5))
    return stir(layer)


def formula(layer: AdaptedLinear) -> torch.Tensor:
    weight = layer.weight.detach().clone()
    for a in layer.adapters:
        rows = weight[a.start : a.stop] + a.scale * a.lora_B.detach() @ a.lora_A.detach()
        if a.lora_magnitude_vector is not None:
            rows = a.lora_magnitude_vector.detach()[:, None] * rows / rows.norm(dim=1, keepdim=True)
        weight[a.start : a.stop] = rows
    return weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dora", [True, False])
@torch.no_grad()
def test_a_linear_layer_with_the_formulas_weight(dora, bias):
    layer = adapted(dora, bias)
    plain = Linear(24, 40, bias=bias)
    plain.weight, plain.bias = nn.Parameter(formula(layer)), layer.bias
    torch.manual_seed(0)
    x = torch.randn(7, 24)
    close("forward", layer(x), plain(x), 5e-6)
    close("merged", layer.merged()(x), plain(x), 5e-6)


@torch.no_grad()
def test_row_norms_without_the_product():
    layer = adapted(True, False)
    a = layer.adapters[0]
    expected = (layer.weight[8:24] + 0.5 * a.lora_B @ a.lora_A).norm(dim=1)
    close("row norms", a.row_norms(layer.weight[8:24]), expected, 1e-6)


# --- PEFT --------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, linear: type[nn.Module]):
        super().__init__()
        self.up, self.down, self.head = linear(12, 32), linear(32, 16, bias=False), linear(16, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.down(torch.relu(self.up(x)))))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dora", [False, True])
def test_vectors_and_gradients_are_pefts(tmp_path, dora, dropout):
    peft = pytest.importorskip("peft")
    theirs = randomize(Small(nn.Linear), 1)
    config = {"r": 4, "lora_alpha": 6, "lora_dropout": dropout, "use_dora": dora}
    patterns = {"rank_pattern": {"down": 2}, "alpha_pattern": {"up": 3}}
    config |= {"target_modules": ["up", "down"], "init_lora_weights": "gaussian", **patterns}
    ours = Small(Linear)
    ours.load_state_dict(theirs.state_dict())
    theirs = stir(peft.get_peft_model(theirs, peft.LoraConfig(**config)))
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)

    theirs.train(), ours.train()
    x, results = torch.randn(9, 12), []
    for model in (theirs, ours):
        torch.manual_seed(5)  # the same dropout masks
        y = model(x)
        y.square().sum().backward()
        results.append(y)
    close("outputs", results[1], results[0], 2e-6)
    gradients = [{tuple(n.split(".lora_")): p.grad for n, p in m.named_parameters() if p.grad is not None}
                 for m in (theirs, ours)]  # fmt: skip
    assert len(gradients[0]) == len(gradients[1]) == (6 if dora else 4)
    for (name, a), b in zip(gradients[0].items(), gradients[1].values(), strict=True):
        close(str(name), b, a, 2e-5)


class Tree(nn.Module):
    """Nothing but names and weights."""


def skeleton(folder) -> nn.Module:
    """The published module tree, with torch's own layers in the places that hold matrices."""
    weights, root = load_file(folder / "model.safetensors"), Tree()
    for key, shape in tensor_shapes(VLM2VecConfig.from_json(folder)).items():
        module, _, leaf = key.rpartition(".")
        *parents, last = module.split(".")
        at = root
        for name in parents:
            if name not in dict(at.named_children()):
                at.add_module(name, Tree())
            at = at.get_submodule(name)
        is_linear = leaf == "weight" and len(shape) == 2 and "embed" not in last
        if is_linear:
            at.add_module(last, nn.Linear(shape[1], shape[0], bias=f"{module}.bias" in weights))
        elif last not in dict(at.named_children()):
            at.add_module(last, Tree())
        at = at.get_submodule(last)
        at.register_parameter(leaf, nn.Parameter(weights[key].clone()))
    return root


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def published(request, folder, tmp_path_factory):
    """An adapter that PEFT wrote for the published module tree with VLM2Vec's targets, and its merged weights."""
    peft = pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("peft")
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "k_proj", "q_proj", "out_proj", "v_proj"]
    config = peft.LoraConfig(r=8, lora_alpha=64, lora_dropout=0.1, target_modules=targets, use_dora=request.param,
                             init_lora_weights="gaussian")  # fmt: skip
    model = stir(peft.get_peft_model(skeleton(folder), config))
    model.save_pretrained(out)
    return out, model.merge_and_unload().state_dict()


def test_an_adapter_of_peft_merges_into_every_parameter(folder, published):
    adapter, merged = published
    model, plain = load_model(folder), load_model(folder)
    merge_adapter(model, adapter)
    changed = 0
    for name, p in model.named_parameters():
        expected = torch.cat([merged[key] for key in keys_of(name)]).view(p.shape)
        close(name, p, expected, 2e-6)
        changed += not torch.equal(p, plain.get_parameter(name))
    assert changed == 3 * 4 + 2 * 2  # decoder layers; layers of the tower but the last, which is never computed
    assert not any(isinstance(m, AdaptedLinear) for m in model.modules())


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # of the tower's last layer, which is not computed
def test_an_adapter_of_ours_is_read_by_peft(folder, published, tmp_path):
    peft = pytest.importorskip("peft")
    adapter, _ = published
    config = LoraConfig.from_json(adapter / "adapter_config.json")
    model = load_adapter(load_model(folder), adapter)
    save_adapter(stir(model, seed=9), tmp_path, config, base_model="some/base")
    theirs = peft.PeftModel.from_pretrained(skeleton(folder), tmp_path)
    merged = theirs.merge_and_unload().state_dict()
    for name, p in merge_lora(model).named_parameters():
        close(name, p, torch.cat([merged[key] for key in keys_of(name)]).view(p.shape), 2e-6)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # as above
@pytest.mark.parametrize("exclude", [("down_proj",), r".*\.layers\.0\.mlp\..*"])
def test_excluded_and_frozen_modules_get_no_adapter_here_nor_in_peft(folder, tmp_path, exclude):
    peft = pytest.importorskip("peft")
    model = load_model(folder).requires_grad_(True)
    model.decoder.layers[1].requires_grad_(False)
    asked = LoraConfig(r=2, exclude_modules=exclude)
    config = exclude_frozen(asked, model)
    save_adapter(stir(add_lora(model, config)), tmp_path, config)
    assert LoraConfig.from_json(tmp_path / "adapter_config.json") == config
    keys = {n.split(".lora_")[0].removeprefix(PREFIX) for n in load_file(tmp_path / "adapter_model.safetensors")}
    assert keys and not any(k.startswith("model.layers.1.") or not asked.targets(k) for k in keys)
    theirs = peft.PeftModel.from_pretrained(skeleton(folder), tmp_path)
    made = {n.split(".lora_")[0].removeprefix(PREFIX) for n, _ in theirs.named_parameters() if ".lora_A" in n}
    assert {k for k in made if "encoder.layers.2." not in k} == keys
    merged = theirs.merge_and_unload().state_dict()
    for name, p in merge_lora(model).named_parameters():
        close(name, p, torch.cat([merged[key] for key in keys_of(name)]).view(p.shape), 2e-6)


def test_mistaken_targets(folder):
    with pytest.raises(ValueError, match="target_modules: no module fits q_porj"):
        add_lora(load_model(folder), LoraConfig(target_modules=("o_proj", "q_porj")))
    with pytest.raises(ValueError, match="exclude_modules: no module is left"):
        add_lora(load_model(folder), LoraConfig(target_modules=("o_proj",), exclude_modules=r".*layers.*"))
    frozen = load_model(folder)
    assert exclude_frozen(LoraConfig(exclude_modules="x"), frozen.requires_grad_(True)).exclude_modules == "x"
    with pytest.raises(ValueError, match="exclude_modules: no module is left"):
        add_lora(frozen, exclude_frozen(LoraConfig(), frozen.requires_grad_(False)))


def test_adapters_on_the_model_give_the_merged_models_vectors(folder, published):
    adapter, _ = published
    e = Embedder.from_pretrained(folder, device="cpu", optimize=False, show_progress=False)
    image = torch.randint(0, 255, (60, 80, 3)).byte().numpy()
    batch = e.processor(["a", "b" * 40, {"text": "what?", "image": image}])
    with torch.no_grad():
        plain = e.model(batch)
        load_adapter(e.model, adapter)
        e.model.eval()
        adapted = e.model(batch)
        close("vectors", adapted, merge_lora(e.model)(batch), 2e-6)
    assert (adapted - plain).abs().max() > 1e-2


# --- making and loading ------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_trains_alone(folder):
    for dora in (False, True):
        plain, model = load_model(folder), load_model(folder)
        add_lora(model, LoraConfig(use_dora=dora, r=4), generator=torch.Generator().manual_seed(0))
        e = Embedder.from_pretrained(folder, device="cpu", show_progress=False)
        batch = e.processor(["hello"])
        with torch.no_grad():
            close("vectors", model.eval()(batch), plain(batch), 2e-6)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all("lora_" in n for n in trained)
        assert len(trained) == (3 if dora else 2) * (3 * 4 + 2 * 4)


def test_gaussian_and_uniform_beginnings():
    for init, deviation in (("gaussian", 1 / 8), (True, 1000**-0.5 / math.sqrt(3))):
        model = nn.Sequential(Linear(1000, 4))
        randomize(model)
        add_lora(model, LoraConfig(r=8, target_modules=("0",), init_lora_weights=init))
        A = model[0].adapters[0].lora_A
        assert abs(float(A.std()) / deviation - 1) < 0.05
        assert not model[0].adapters[0].lora_B.any()


def _excluded() -> type:
    return pytest.importorskip("peft").tuners.tuners_utils._ExcludedModule


def test_targets_follow_pefts_rules():
    ends = LoraConfig(target_modules=("q_proj", "layers.0.mlp.fc1"))
    assert ends.targets("a.q_proj") and ends.targets("q_proj") and not ends.targets("a.xq_proj")
    assert ends.targets("model.layers.0.mlp.fc1") and not ends.targets("model.layers.1.mlp.fc1")
    whole = LoraConfig(target_modules=r"model\.layers\.\d+\..*_proj")
    assert whole.targets("model.layers.3.mlp.down_proj") and not whole.targets("x.model.layers.3.mlp.down_proj")


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": (0, 2)},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"layers_to_transform": (1,), "layers_pattern": ("blocks", r"encoder\.layers")},
        {"layers_to_transform": (0,), "target_modules": ("model.layers.1.self_attn.o_proj", "qkv_proj")},
        {"layers_to_transform": (), "exclude_modules": ("fc1",)},
    ],
)
def test_layers_to_transform_are_pefts(folder, fields):
    peft = pytest.importorskip("peft")
    fields = {"target_modules": ("qkv_proj", "o_proj", "q_proj", "fc1")} | fields
    lists = {k: [*v] if isinstance(v, tuple) else v for k, v in fields.items()}
    theirs = peft.LoraConfig(**lists)
    keys = [key.removesuffix(".weight") for key in tensor_shapes(VLM2VecConfig.from_json(folder))]
    rule = peft.tuners.tuners_utils.check_target_module_exists
    expected = [key for key in keys if rule(theirs, key) and not isinstance(rule(theirs, key), _excluded())]
    assert [key for key in keys if LoraConfig(**fields).targets(key)] == expected != []


def test_scale():
    c = LoraConfig(r=4, lora_alpha=8, alpha_pattern={r"layers\.0\..*": 16}, rank_pattern={"o_proj": 2})
    assert c.scale("m.layers.1.o_proj", c.rank("m.layers.1.o_proj")) == 4
    assert c.scale("m.layers.0.k_proj", c.rank("m.layers.0.k_proj")) == 4
    assert LoraConfig(r=4, lora_alpha=8, use_rslora=True).scale("x", 4) == 4


def test_the_embedder_takes_an_adapter(folder, published):
    adapter, _ = published
    inputs = ["a", {"text": "what?", "image": torch.randint(0, 255, (60, 80, 3)).byte().numpy()}]
    e = Embedder.from_pretrained(folder, device="cpu", optimize=False, show_progress=False)
    merge_adapter(e.model, adapter)
    for prepack in (True, False, None):
        got = Embedder.from_pretrained(folder, adapter=adapter, device="cpu", prepack=prepack, show_progress=False)
        close("vectors", torch.from_numpy(got.encode(inputs)), torch.from_numpy(e.encode(inputs)), 3e-6)


# --- mistakes ----------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(folder, tmp_path):
    """An adapter folder of ours, to be damaged."""
    config = LoraConfig(r=2, target_modules=("o_proj",))
    save_adapter(add_lora(load_model(folder), config), tmp_path / "a", config)
    return tmp_path / "a"


def change_tensors(adapter, change) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(change(tensors), adapter / "adapter_model.safetensors")


def change_config(adapter, **changes) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.7.self_attn.o_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.oproj.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.score.modules_to_save.weight",
    ],
)
def test_a_tensor_without_a_place_is_named(folder, adapter, key):
    change_tensors(adapter, lambda t: t | {key: torch.zeros(2, 64)})
    with pytest.raises(CheckpointError, match=r"1 of 7 tensors have no place in the model: .*") as e:
        load_adapter(load_model(folder), adapter)
    assert key.removeprefix("base_model.model.") in str(e.value)


def test_the_towers_last_layer_is_left_out(folder, adapter):
    last = f"base_model.model.{TOWER}2.self_attn.q_proj.lora_A.weight"
    change_tensors(adapter, lambda t: t | {last: torch.zeros(2, 64)})
    load_adapter(load_model(folder), adapter)


def layers(numbers: str):
    """Keeps the tensors of these decoder layers."""
    return lambda t: {k: v for k, v in t.items() if re.search(rf"model\.layers\.[{numbers}]\.", k)}


TARGETS = {  # of an adapter on o_proj in three layers, of which the tensors of one are lost
    "an end": (("o_proj",), {}),
    "whole names": (tuple(f"model.layers.{i}.self_attn.o_proj" for i in range(3)), {}),
    "an expression": (r".*layers\.\d+\.self_attn\.o_proj", {}),
    "layers": (("o_proj",), {"layers_to_transform": [0, 1, 2]}),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_modules_that_an_adapter_lost_are_named(folder, adapter, kind):
    modules, changes = TARGETS[kind]
    change_config(adapter, target_modules=modules, **changes)
    load_adapter(load_model(folder), adapter)
    change_tensors(adapter, layers("02"))
    model = load_model(folder)
    with pytest.raises(
        CheckpointError, match=r"no tensors of 1 modules that target_modules names: model\.layers\.1\.self"
    ):
        load_adapter(model, adapter)
    assert not any(isinstance(m, AdaptedLinear) for m in model.modules())


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"exclude_modules": ["layers.1.self_attn.o_proj"]},
        {"target_modules": r".*layers\.[02]\..*o_proj"},
    ],
)
def test_modules_that_an_adapter_does_not_mean_are_not_lost(folder, adapter, changes):
    change_config(adapter, **changes)
    change_tensors(adapter, layers("02"))
    load_adapter(load_model(folder), adapter)


def test_an_adapter_of_all_linear_layers(folder, tmp_path):
    config = LoraConfig(r=2, target_modules="all-linear")
    save_adapter(add_lora(load_model(folder), config), tmp_path, config)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * len([
        m for m in load_adapter(load_model(folder), tmp_path).modules() if isinstance(m, Adapter)
    ])  # fmt: skip
    change_tensors(tmp_path, layers("02"))
    with pytest.raises(CheckpointError, match="has no tensors of"):
        load_adapter(load_model(folder), tmp_path)


FOR_EVER = r"((\w|\.)+)+#"


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": FOR_EVER},
        {"exclude_modules": r"(?:.|.)*#"},
        {"rank_pattern": {r"(.+.+)+#": 4}},
        {"alpha_pattern": {"o_proj": 4, r"(?:model|.|\w)*(?=#)": 4}},
        {"layers_to_transform": 0, "layers_pattern": FOR_EVER},
        {"target_modules": ".?" * 60 + "#"},
    ],
)
def test_regular_expressions_that_take_for_ever(folder, adapter, changes, monkeypatch):
    monkeypatch.setattr(lora, "PATIENCE", 0.5)
    change_config(adapter, **changes)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: the regular expressions .* take more than"):
        load_adapter(load_model(folder), adapter)


@pytest.mark.parametrize(
    "changes", [{"target_modules": "*"}, {"rank_pattern": {"(": 2}}, {"exclude_modules": "(" * 9999}]
)
def test_what_is_no_regular_expression(folder, adapter, changes):
    change_config(adapter, **changes)
    with pytest.raises(CheckpointError, match=r"the regular expressions .* cannot be used: \w+"):
        load_adapter(load_model(folder), adapter)
    with pytest.raises(ValueError, match="is not a regular expression"):
        add_lora(load_model(folder), LoraConfig(**changes))


NO_NAMES, NO_NUMBERS = [3, {}, [None], [["o_proj"]], True], ["8", None, [8], float("nan"), 10**400, {}, True]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("r", [*NO_NUMBERS, 2.0, -1]), ("lora_alpha", NO_NUMBERS), ("lora_dropout", ["0.1", 1.0, -0.5]),
        ("target_modules", [*NO_NAMES, None]), ("exclude_modules", NO_NAMES), ("use_dora", ["no", 2, []]),
        ("rank_pattern", ["o_proj", [1], {"o_proj": 0}, {"o_proj": None}, {"o_proj": "2"}]),
        ("alpha_pattern", [3, {"o_proj": float("inf")}, {"o_proj": []}]), ("layers_to_transform", ["0", [None], 1.5]),
        ("init_lora_weights", [3, {}]), ("layers_pattern", [3, [3]]), ("use_rslora", ["yes"]), ("bias", [None, 3, []]),
        ("peft_type", [None, 3, []]),
    ],
)  # fmt: skip
def test_malformed_fields_of_an_adapter_are_named(folder, adapter, field, values):
    model = load_model(folder)
    for value in values:
        change_config(adapter, **{field: value})
        with pytest.raises(CheckpointError, match=field) as e:
            load_adapter(model, adapter)
        assert len(str(e.value)) < 300


def test_dtypes_and_doubles_in_an_adapter(folder, adapter):
    model, key = load_model(folder), "model.layers.1.self_attn.o_proj.lora_B.weight"
    tensors = load_file(adapter / "adapter_model.safetensors")
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float64, torch.bool):
        change_tensors(adapter, lambda t, d=dtype: t | {PREFIX + key: t[PREFIX + key].to(d)})
        with pytest.raises(CheckpointError, match=r"lora_B\.weight has dtype \w+; supported are F32, F16, BF16$"):
            load_adapter(model, adapter)
    change_tensors(adapter, lambda t: tensors | {key: tensors[PREFIX + key].clone()})
    with pytest.raises(CheckpointError, match=f"{key} is there twice"):
        load_adapter(model, adapter)


def test_half_an_adapter_is_named(folder, adapter):
    gone = "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"
    change_tensors(adapter, lambda t: {k: v for k, v in t.items() if k != gone})
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.o_proj has lora_A.weight; .*lora_B.weight are"):
        load_adapter(load_model(folder), adapter)


def test_nothing_is_changed_when_an_adapter_is_refused(folder, adapter):
    change_config(adapter, r=3)
    model = load_model(folder)
    with pytest.raises(CheckpointError, match=r"has shape \[2, 64\], the model and rank 3 need \[3, 64\]"):
        load_adapter(model, adapter)
    assert not any(isinstance(m, AdaptedLinear) for m in model.modules())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_dora": True}, r"lora_magnitude_vector are needed \(use_dora is True\)"),
        ({"peft_type": "IA3"}, "describes no LoRA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa_niter_16"}, "changes the base model too"),
        ({"modules_to_save": ["score"]}, "modules_to_save: no module with parameters fits score"),
        ({"modules_to_save": ["img_projection"]}, r"has no .*img_projection\.0\.weight.*, which modules_to_save names"),
        ({"use_something_new": True}, "use_something_new is True, which is not supported"),
        ({"r": 0}, "r is 0"),
    ],
)
def test_what_is_not_supported_is_an_error(folder, adapter, changes, match):
    change_config(adapter, **changes)
    with pytest.raises(CheckpointError, match=match):
        load_adapter(load_model(folder), adapter)


def test_missing_and_poisoned_files(folder, adapter, tmp_path):
    change_tensors(adapter, lambda t: {k: v * float("nan") for k, v in t.items()})
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        load_adapter(load_model(folder), adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(load_model(folder), adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickled adapters are never read"):
        load_adapter(load_model(folder), adapter)
    with pytest.raises(CheckpointError, match="needs an adapter_config"):
        load_adapter(load_model(folder), tmp_path)


def test_a_target_that_fits_nothing_is_named(folder):
    with pytest.raises(ValueError, match="no module fits oproj"):
        add_lora(load_model(folder), LoraConfig(target_modules=("qkv_proj", "oproj")))
    with pytest.raises(ValueError, match="has an adapter already"):
        model = load_model(folder)
        add_lora(add_lora(model, LoraConfig()), LoraConfig())


def test_keys_of_is_the_inverse_of_parameter_of(folder):
    for name, _ in load_model(folder).named_parameters():
        assert [parameter_of(key) for key in keys_of(name)] == [(name, i) for i in range(len(keys_of(name)))]


# --- modules that are trained whole ------------------------------------------------------------------------


@register("pooling", "weighted")
class Weighted(nn.Module):
    """The last token by a matrix, with a buffer that counts."""

    def __init__(self, config, backend=None):
        super().__init__()
        self.matrix = Linear(config.decoder.hidden_size, 8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    dimension = 8

    def reset_parameters(self):
        self.calls.zero_()

    def forward(self, x, cu_seqlens):
        return self.matrix(x[cu_seqlens[1:].long() - 1])


WHOLE = LoraConfig(r=2, modules_to_save=("pooling", "img_projection"), parts={"pooling": "weighted"})


def with_head(folder):
    torch.manual_seed(0)
    config = VLM2VecConfig.from_json(folder).with_parts(pooling="weighted")
    model = add_lora(load_model(folder, config=config), WHOLE)
    stir(model)
    randomize(model.projector.mlp, 3)
    model.pooling.calls += 5
    return model


def test_modules_to_save_are_trained_written_and_read(folder, tmp_path):
    model = with_head(folder)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(("pooling.", "projector.mlp."))}
    save_adapter(model, tmp_path / "a", WHOLE)
    written = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert written["modules_to_save"] == ["pooling", "img_projection"]
    assert written["minivlm2vec"] == {"pooling": "weighted"}
    keys = load_file(tmp_path / "a/adapter_model.safetensors").keys()
    assert {PREFIX + "pooling.matrix.weight", PREFIX + "pooling.calls"} <= keys
    assert PREFIX + "model.vision_embed_tokens.img_projection.2.bias" in keys
    expected = Embedder(model, None).model(batch_of(folder))
    for options in ({}, {"optimize": False}):
        e = Embedder.from_pretrained(folder, adapter=tmp_path / "a", device="cpu", show_progress=False, **options)
        assert e.dimension == 8 and e.model.pooling.calls == 5
        close("vectors", e.model(batch_of(folder)), expected.detach(), 2e-5)


def batch_of(folder):
    e = Embedder.from_pretrained(folder, device="cpu", optimize=False, show_progress=False)
    return e.processor(["a cat and a dog", {"text": "x", "image": Image.new("RGB", (40, 30), "red")}])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(PREFIX + "pooling.matrix.bias"), r"has no pooling\.matrix\.bias, which modules_to_save names"),
        (lambda t: t.update({PREFIX + "pooling.matrix.bias": torch.zeros(9)}), r"shape \[9\], the model needs \[8\]"),
        (
            lambda t: t.update({PREFIX + "pooling.calls": torch.zeros(())}),
            r"dtype torch\.float32, the model needs torch.int",
        ),
        (lambda t: [t.pop(k) for k in [*t] if "o_proj" in k], "no tensors of 3 modules that target_modules names"),
        (lambda t: t.update({PREFIX + "pooling.other": torch.zeros(9)}), "no place in the model: pooling.other"),
    ],
)
def test_modules_to_save_are_read_strictly(folder, tmp_path, change, match):
    save_adapter(with_head(folder), tmp_path / "a", WHOLE)
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    model = load_model(folder, config=VLM2VecConfig.from_json(folder).with_parts(pooling="weighted"))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        load_adapter(model, tmp_path / "a")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "refused before it is changed"


def test_targets_inside_modules_to_save_get_no_adapter(folder):
    """As in PEFT."""
    config = LoraConfig(r=2, target_modules=("o_proj",), modules_to_save=("layers.1",))
    model = add_lora(load_model(folder), config)
    assert [a.key.split(".")[2] for a in model.modules() if isinstance(a, Adapter)] == ["0", "2"]


def test_peft_takes_what_we_wrote_without_our_parts(folder, tmp_path):
    peft = pytest.importorskip("peft")
    save_adapter(with_head(folder), tmp_path / "a", WHOLE)
    theirs = peft.LoraConfig.from_pretrained(tmp_path / "a")
    assert theirs.modules_to_save == ["pooling", "img_projection"] and theirs.r == 2


def test_lm_head_in_modules_to_save_is_left_out(folder, adapter):
    change_config(adapter, modules_to_save=["lm_head"])
    change_tensors(adapter, lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(3, 64)})
    load_adapter(load_model(folder), adapter)


def test_what_is_new_or_trained_is_in_the_adapter_or_named(folder, tmp_path):
    """The configuration need not say it."""
    torch.manual_seed(0)
    config = VLM2VecConfig.from_json(folder).with_parts(pooling="weighted", causal=False)
    model = stir(add_lora(load_model(folder, config=config), LoraConfig(r=2)))
    assert model.pooling.matrix.weight.requires_grad
    save_adapter(model, tmp_path / "a", LoraConfig(r=2))
    e = Embedder.from_pretrained(folder, adapter=tmp_path / "a", device="cpu", show_progress=False)
    assert e.model.causal is False and torch.equal(e.model.pooling.matrix.weight, model.pooling.matrix.weight)
    close("vectors", e.model(batch_of(folder)), model.eval()(batch_of(folder)).detach(), 2e-5)
    model.decoder.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"decoder\.norm\.weight are trained too, and would not be in the adapter"):
        save_adapter(model, tmp_path / "b", LoraConfig(r=2))
    save_adapter(model, tmp_path / "b", LoraConfig(r=2, modules_to_save=("norm",)))
    assert PREFIX + "model.norm.weight" in load_file(tmp_path / "b/adapter_model.safetensors")
