"""Loading: strict, by prefix rules, and with an error of its own for everything that can be wrong with a folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from minivlm2vec import CheckpointError, Embedder, VLM2VecConfig
from minivlm2vec.checkpoint import FUSED, MINI, drop_prefixes, fingerprint, parameter_of, resolve
from minivlm2vec.new_checkpoint import base_config, new_checkpoint, random_tensor, tensor_shapes
from minivlm2vec.processor import Processor
from minivlm2vec.tokenizer import Tokenizer
from minivlm2vec.weights import empty_model, load_model

CLIP = "model.vision_embed_tokens.img_processor.vision_model."


@pytest.fixture
def folder(tmp_path) -> Path:
    return new_checkpoint(tmp_path / "m", preset="tiny", seed=2)


def edit(folder: Path, change) -> None:
    """Loads the tensors, lets `change` edit the dict, writes them back."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_preset_is_given_away_as_a_copy():
    base_config("small")["img_processor"]["vision_config"].clear()
    assert base_config("small")["img_processor"]["vision_config"]


@pytest.mark.parametrize("preset", ["tiny", "small", "full"])
def test_every_published_key_has_one_place(preset):
    """Each key is dropped by name or fills one part of one parameter, and every parameter is filled."""
    config = VLM2VecConfig.from_dict(base_config(preset))
    drop, filled = drop_prefixes(config), []
    for key in tensor_shapes(config):
        if not key.startswith(drop):
            filled.append(parameter_of(key))
    assert len(set(filled)) == len(filled)
    parameters = {name for name, _ in empty_model(config).named_parameters()}
    assert {name for name, _ in filled} == parameters
    fused = {name: sum(n == name for n, _ in filled) for name in parameters}
    assert all(count == (3 if "vision" in name and "qkv_proj" in name else 1) for name, count in fused.items())


def test_values_land_where_they_belong(folder):
    model = load_model(folder)
    config = model.config
    for key, shape in tensor_shapes(config).items():
        if key.startswith(drop_prefixes(config)):
            continue
        name, part = parameter_of(key)
        value = model.get_parameter(name)
        if any(p in key for p in FUSED) and "vision" in key:
            value = value[part * shape[0] : (part + 1) * shape[0]]
        assert torch.equal(value, torch.from_numpy(random_tensor(key, shape, 2)).view(value.shape)), key
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_dtypes_and_shards(tmp_path, dtype, shards):
    size = 10**9 if shards == 1 else 300_000
    folder = new_checkpoint(tmp_path / "m", preset="tiny", seed=2, dtype=dtype, max_shard_bytes=size)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) == 1) == (shards == 1) and (folder / "model.safetensors.index.json").exists() == (shards > 1)
    model = load_model(folder)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    value = torch.from_numpy(random_tensor("model.norm.weight", (64,), 2)).to(getattr(torch, dtype))
    assert torch.equal(model.decoder.norm.weight, value)
    cast = load_model(folder, dtype=torch.float32)
    assert torch.equal(cast.decoder.norm.weight, value.float())
    vector = Embedder.from_pretrained(folder, device="cpu", show_progress=False).encode(["a cat"])
    exact = Embedder.from_pretrained(folder, device="cpu", dtype=torch.float32, show_progress=False).encode(["a cat"])
    assert (vector * exact).sum() > 0.999


def test_wte_is_the_token_embedding(folder):
    """Quirk 33: some files name it model.vision_embed_tokens.wte, some have both."""
    wte = "model.vision_embed_tokens.wte.weight"
    expected = load_model(folder).decoder.embed_tokens.weight
    edit(folder, lambda t: t.update({wte: t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load_model(folder).decoder.embed_tokens.weight, expected)
    edit(folder, lambda t: t.pop("model.embed_tokens.weight"))
    assert torch.equal(load_model(folder).decoder.embed_tokens.weight, expected)


def test_two_different_token_embeddings_raise(folder):
    wte = "model.vision_embed_tokens.wte.weight"
    edit(folder, lambda t: t.update({wte: t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"wte\.weight are one tensor .* differ"):
        load_model(folder)


def test_unused_tensors_may_be_absent_or_present(folder):
    """Quirks 20, 34: lm_head, the last tower layer, post_layernorm, position_ids."""
    expected = load_model(folder).state_dict()
    config = VLM2VecConfig.from_json(folder)

    def strip(tensors):
        for key in [k for k in tensors if k.startswith(drop_prefixes(config))]:
            del tensors[key]
        tensors[CLIP + "embeddings.position_ids"] = torch.zeros(1, 17)

    edit(folder, strip)
    got = load_model(folder).state_dict()
    assert all(torch.equal(got[k], v) for k, v in expected.items())


CHANGES = {
    "missing": (lambda t: t.pop("model.layers.1.mlp.down_proj.weight"),
                r"1 parameters have no tensor: decoder\.layers\.1\.mlp\.down_proj\.weight"),
    "missing part": (lambda t: t.pop(CLIP + "encoder.layers.0.self_attn.k_proj.bias"),
                     r"no tensor: vision\.layers\.0\.self_attn\.qkv_proj\.bias"),
    "unexpected": (lambda t: t.update({"model.layers.9.mlp.gate.weight": torch.zeros(3)}),
                   r"1 tensors have no place: model\.layers\.9\.mlp\.gate\.weight"),
    "unknown prefix": (lambda t: t.update({"adapter.x": torch.zeros(3)}), r"no place: adapter\.x"),
    "mis-shaped": (lambda t: t.update({"model.norm.weight": torch.zeros(63)}),
                   r"model\.norm\.weight in model\.safetensors has shape \[63\], the model needs \[64\]"),
    "mis-shaped part": (lambda t: t.update({CLIP + "encoder.layers.0.self_attn.v_proj.weight": torch.zeros(60, 64)}),
                        r"v_proj\.weight .* \[60, 64\], the model needs \[64, 64\]"),
    "NaN": (lambda t: t["model.layers.0.mlp.down_proj.weight"].fill_(float("nan")),
            r"decoder\.layers\.0\.mlp\.down_proj\.weight holds 8,192 values that are NaN or infinite, of 8,192"),
    "one infinity": (lambda t: t["model.norm.weight"][3:4].fill_(float("inf")), r"decoder\.norm\.weight holds 1 "),
    "integers": (lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}),
                 r"model\.norm\.weight has dtype I8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_tensors_at_fault_are_named(folder, kind):
    change, message = CHANGES[kind]
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def _truncate(f: Path):
    f.write_bytes(f.read_bytes()[:-1000])


def change_tokenizer(d: Path, piece: str = "<unk>", **changes) -> None:
    """piece gets the id 4000, if it is new."""
    raw = json.loads((d / "tokenizer.json").read_text())
    raw["model"]["vocab"].setdefault(piece, 4000)
    (d / "tokenizer.json").write_text(json.dumps(raw | changes))


def template(single: str, *tokens: tuple[str, int]) -> dict:
    processor = TemplateProcessing(single=single, pair="$A $B", special_tokens=[*tokens])
    return json.loads(processor.__getstate__())


FILES = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
    "pickles only": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
                     r"pytorch_model\.bin but no safetensors file: pickles are never read"),
    "git-lfs pointer": (lambda d: (d / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"), "git-lfs pointer"),
    "truncated": (lambda d: _truncate(d / "model.safetensors"), r"truncated, damaged or not a safetensors file: it has "
                  r"[\d,]+ bytes"),
    "header alone": (lambda d: (d / "model.safetensors").write_bytes(b"\xff\xff\x00\x00\x00\x00\x00\x00{}"),
                     "truncated, damaged or not a safetensors file: it has 10 bytes"),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "it has 0 bytes"),
    "no JSON": (lambda d: (d / "model.safetensors").write_bytes(b"\x04\x00\x00\x00\x00\x00\x00\x00abcd"),
                "not a safetensors file"),
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json does not exist"),
    "damaged config": (lambda d: (d / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), r"tokenizer\.json does not exist"),
    "damaged tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), r"not a readable tokenizer\.json"),
    "no preprocessor": (lambda d: (d / "preprocessor_config.json").unlink(), r"preprocessor_config\.json does not"),
    "other mean": (lambda d: (d / "preprocessor_config.json").write_text(
        json.dumps({"num_crops": 4, "image_mean": [0.5, 0.5, 0.5]})), r"image_mean is \[0\.5, 0\.5, 0\.5\]"),
    "a list": (lambda d: (d / "preprocessor_config.json").write_text("[4]"), "is not a JSON object but"),
    "means in words": (lambda d: (d / "preprocessor_config.json").write_text(
        json.dumps({"num_crops": 4, "image_std": ["0.2", None, {}]})), r"image_std is \['0\.2', None, {}\]"),
    "num_crops 1e9": (lambda d: (d / "preprocessor_config.json").write_text(json.dumps({"num_crops": 10**9})),
                      "num_crops is 1000000000; an integer from 1 to 1024"),
    "no BOS": (lambda d: change_tokenizer(d, post_processor=None), r"an empty text has the ids \[\], 'a cat' \[\d"),
    "an EOS behind": (lambda d: change_tokenizer(d, post_processor=template("<s> $A </s>", ("<s>", 1), ("</s>", 2))),
                      r"an empty text has the ids \[1, 2\]"),
    "a BOS behind": (lambda d: change_tokenizer(d, post_processor=template("$A <s>", ("<s>", 1))), "a BOS is needed"),
    "a BOS beyond": (lambda d: change_tokenizer(d, post_processor=template("<s> $A", ("<s>", 320))),
                     "the tokenizer has ids up to 320; the model's vocab_size is 320"),
    "ids beyond": (lambda d: change_tokenizer(d, piece="<|more|>"), "the tokenizer has ids up to 4000; "),
    "num_crops 0": (lambda d: (d / "preprocessor_config.json").write_text(json.dumps({"num_crops": 0})),
                    "num_crops is 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_each_damaged_file_has_its_own_error(folder, kind):
    damage, message = FILES[kind]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        Embedder.from_pretrained(folder, device="cpu", show_progress=False)


BESIDE = [("tokenizer_config.json", key, value) for key, value in (
    ("add_bos_token", False), ("add_eos_token", True), ("add_prefix_space", False), ("split_special_tokens", True),
)] + [("preprocessor_config.json", key, value) for key, value in (
    ("do_normalize", False), ("do_rescale", False), ("do_convert_rgb", False), ("do_center_crop", True),
    ("resample", 3), ("rescale_factor", 1 / 127.5), ("rescale_factor", "1/255"),
)]  # fmt: skip


@pytest.mark.parametrize("file, key, value", BESIDE)
def test_a_setting_beside_the_model_that_changes_vectors_is_refused(folder, file, key, value):
    path = folder / file
    raw = json.loads(path.read_text()) if path.is_file() else {}
    taken = 0.003921568859368563 if key == "rescale_factor" else 2 if key == "resample" else not value
    for allowed in (taken, None):
        path.write_text(json.dumps(raw | {key: allowed}))
        assert Processor.from_pretrained(folder).num_crops == raw.get("num_crops", 4)
    path.write_text(json.dumps(raw | {key: value}))
    with pytest.raises(CheckpointError, match=rf"{file}: {key} is {value!r}; only .* is supported"):
        Processor.from_pretrained(folder)


def test_the_files_that_transformers_5_writes(folder):
    (folder / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + (folder / "tokenizer.json").read_bytes())
    raw = json.loads((folder / "preprocessor_config.json").read_text()) | {"num_crops": 7}
    (folder / "preprocessor_config.json").unlink()
    newer = folder / "processor_config.json"
    newer.write_text(json.dumps({"image_processor": raw, "processor_class": "Phi3VProcessor"}))
    assert Processor.from_pretrained(folder).num_crops == 7
    newer.write_text(json.dumps({"image_processor": raw | {"do_normalize": False}}))
    with pytest.raises(CheckpointError, match=r"/processor_config\.json: do_normalize is False"):
        Processor.from_pretrained(folder)
    newer.write_text(json.dumps({"processor_class": "Phi3VProcessor"}))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json does not exist"):
        Processor.from_pretrained(folder)


def test_an_adapter_in_the_checkpoints_folder_is_not_passed_over_in_silence(folder, caplog):
    Embedder.from_pretrained(folder, device="cpu", show_progress=False)
    assert not caplog.text
    (folder / "adapter_config.json").write_text("{}")
    Embedder.from_pretrained(folder, device="cpu", show_progress=False)
    assert "m holds an adapter_config.json, which is not applied: adapter=… applies one" in caplog.text


@pytest.mark.parametrize("dropout", [0.5, 1.0])
def test_a_tokenizers_dropout_is_for_training(tmp_path, dropout):
    text, whole = "a cat and a dog on the beach", Tokenizer(MINI)
    raw = json.loads((MINI / "tokenizer.json").read_text())
    raw["model"]["dropout"] = dropout
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    dropping = tokenizers.Tokenizer.from_str(json.dumps(raw))
    assert any(dropping.encode(text).ids != whole(text) for _ in range(20))
    mended = Tokenizer(tmp_path)
    assert all(mended(text) == whole(text) for _ in range(20))
    assert mended.content_hash() == whole.content_hash()


def _one_of_each(tmp_path, change=lambda t: None) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A folder with the tiny model in shards and a changed one in a single file; a norm's weight in each."""
    folder = new_checkpoint(tmp_path / "m", preset="tiny", seed=2, max_shard_bytes=400_000)
    one = new_checkpoint(tmp_path / "one", preset="tiny", seed=2)
    edit(one, change)
    (one / "model.safetensors").rename(folder / "model.safetensors")
    weights = load_file(folder / "model.safetensors").get("model.norm.weight")
    return folder, torch.from_numpy(random_tensor("model.norm.weight", (64,), 2)), weights


def _double(tensors) -> None:
    tensors["model.norm.weight"] *= 2


def _one_number(tensors) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][30, 40] += 1  # neither in its first row nor in its last


@pytest.mark.parametrize("change", [_double, _one_number, lambda t: t.update({"model.norm.weight": torch.ones(3)})])
def test_two_checkpoints_in_one_folder_that_differ(tmp_path, change):
    folder, *_ = _one_of_each(tmp_path, change)
    for read in (load_model, fingerprint):
        with pytest.raises(
            CheckpointError, match=r"holds two checkpoints, .* and model\.\S+weight differs: take one of"
        ):
            read(folder)


def test_two_checkpoints_that_are_alike(tmp_path, caplog):
    folder, norm, _ = _one_of_each(tmp_path, lambda t: t.pop("lm_head.weight"))  # which is never used
    assert torch.equal(load_model(folder).decoder.norm.weight, norm) and not caplog.messages


def _shards(d: Path, n: int) -> None:
    for file in sorted(d.glob("model-0*"))[:n]:
        file.unlink()


SHARDS = "model.safetensors.index.json"
STALE = {  # what is wrong with one of the two: which is taken then
    "no shard": (lambda d: _shards(d, 9), "model.safetensors", "names 4 files, of which 4 are not"),
    "one shard less": (lambda d: _shards(d, 1), "model.safetensors", "names 4 files, of which 1 are not"),
    "a damaged shard": (lambda d: _truncate(d / "model-00002-of-00004.safetensors"), "model.safetensors", "truncated"),
    "no index in it": (lambda d: (d / "model.safetensors.index.json").write_text("[1]"), "model.safetensors", "JSON"),
    "a damaged file": (lambda d: _truncate(d / "model.safetensors"), SHARDS, "truncated"),
    "a pointer": (lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
                  SHARDS, "git-lfs pointer"),
    "a part": (lambda d: edit(d, lambda t: [t.pop(k) for k in [*t] if "layers.1." in k]), SHARDS,
               r"it has no model\.\S*layers\.1\."),
}  # fmt: skip


@pytest.mark.parametrize("kind", STALE)
def test_the_one_of_two_checkpoints_that_is_whole(tmp_path, caplog, kind):
    folder, old, new = _one_of_each(tmp_path, _double)
    spoil, taken, why = STALE[kind]
    spoil(folder)
    assert torch.equal(load_model(folder).decoder.norm.weight, new if taken == "model.safetensors" else old)
    assert re.search(rf"the weights are read from {taken}, and not from .*{why}", caplog.text)


def test_an_index_of_a_single_file(folder, caplog):
    keys = [k for k in load_file(folder / "model.safetensors") if k != "lm_head.weight"]
    index = {"weight_map": dict.fromkeys(keys, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load_model(folder)
    assert not caplog.messages


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float64, torch.float8_e4m3fn, torch.complex64])
def test_the_dtype_of_what_is_not_used_does_not_matter(folder, dtype):
    unused = [CLIP + "embeddings.position_ids", CLIP + "encoder.layers.2.mlp.fc1.weight", "lm_head.weight"]
    expected = load_model(folder).state_dict()
    edit(folder, lambda t: t.update({key: torch.zeros(1, 17).to(dtype) for key in unused}))
    got = load_model(folder).state_dict()
    assert all(torch.equal(got[k], v) for k, v in expected.items()) and fingerprint(folder)


@pytest.mark.parametrize(("kind", "n"), {"I8": 256, "F8_E4M3": 256, "F4": 512, "F64": 32, "U16": 128}.items())
def test_a_dtype_that_no_parameter_has_is_named(folder, kind, n):
    """The header says so; the bytes stay."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["model.norm.weight"] |= {"dtype": kind, "shape": [n]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    assert fingerprint(folder)
    with pytest.raises(CheckpointError, match=rf"model\.norm\.weight has dtype {kind}"):
        load_model(folder)


INDEX = {
    "missing shard": (lambda d, i: (d / "model-00002-of-00004.safetensors").unlink(),
                      r"names 4 files, of which 1 are not in .*model-00002"),
    "key elsewhere": (lambda d, i: i["weight_map"].update({"model.norm.weight": "model-00001-of-00004.safetensors"}),
                      r"model-00001-of-00004\.safetensors holds model\.norm\.weight, but it does not"),
    "no weight_map": (lambda d, i: i.pop("weight_map"), "not a safetensors index"),
    "outside": (lambda d, i: i["weight_map"].update({"x": "../m/model-00001-of-00004.safetensors"}),
                "outside its folder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INDEX)
def test_index_errors(tmp_path, kind):
    folder = new_checkpoint(tmp_path / "m", preset="tiny", max_shard_bytes=400_000)
    assert len(list(folder.glob("model-*-of-00004.safetensors"))) == 4
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    INDEX[kind][0](folder, index)
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=INDEX[kind][1]):
        load_model(folder)


CONFIGS = {
    "hidden_size gone": ({"hidden_size": ...}, "hidden_size is missing"),
    "heads": ({"num_attention_heads": 3}, "hidden_size 64 is not a multiple of num_attention_heads 3"),
    "kv heads": ({"num_key_value_heads": 4}, "num_attention_heads 2 is not a multiple of num_key_value_heads 4"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "another model": ({"model_type": "llama"}, "model_type is 'llama'"),
    "rope type": ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.type is 'yarn'"),
    "rope factors": ({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
                     "short_factor has 1 factors; head_dim 32 needs 16"),
    "window": ({"sliding_window": 64}, "sliding_window 64 is shorter than max_position_embeddings 4096"),
    "crop size": ({"img_processor": {"image_dim_out": 64,
                                     "vision_config": {"image_size": 50, "num_attention_heads": 2}}},
                  "image_size 50 is not a multiple of 2 . patch_size 28"),
    "a string": ({"hidden_size": "64"}, "hidden_size is '64'"),
    "dtype": ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_config_errors_name_the_key(kind):
    changes, message = CONFIGS[kind]
    raw = base_config("tiny") | {k: v for k, v in changes.items() if v is not ...}
    raw = {k: v for k, v in raw.items() if changes.get(k) is not ...}
    with pytest.raises(CheckpointError, match=message):
        VLM2VecConfig.from_dict(raw)


def test_longrope_is_another_name_of_su():
    """Quirk 35."""
    raw = base_config("tiny")
    raw["rope_scaling"]["type"] = "longrope"
    assert VLM2VecConfig.from_dict(raw) == VLM2VecConfig.from_dict(base_config("tiny"))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "single"])
def test_folders_that_do_not_exist(name):
    with pytest.raises(CheckpointError, match="does not exist: a checkpoint is a folder, or a Hub name"):
        resolve(name)


def test_a_hub_name_that_is_not_cached():
    with pytest.raises(CheckpointError, match=r"'no-such/model' is no folder here.*local_files_only"):
        resolve("no-such/model", local_files_only=True)


def test_a_cached_hub_name_needs_no_network(folder, tmp_path, monkeypatch):
    """The Hub's own cache layout: snapshots/<commit>, and refs/main naming the commit."""
    import huggingface_hub

    cache, commit = tmp_path / "cache", "0" * 40
    snapshots = cache / "models--some--model" / "snapshots"
    snapshots.mkdir(parents=True)
    folder.rename(snapshots / commit)
    (cache / "models--some--model" / "refs").mkdir()
    (cache / "models--some--model" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert resolve("some/model", local_files_only=True) == snapshots / commit
    e = Embedder.from_pretrained("some/model", local_files_only=True, device="cpu", show_progress=False)
    assert e.encode(["a"]).shape == (1, 64) and e.name == "some/model"


def test_the_hub_is_asked_for_safetensors_and_json_alone(monkeypatch, tmp_path):
    from minivlm2vec import checkpoint

    asked = {}
    monkeypatch.setattr(
        checkpoint, "snapshot_download", lambda name, **k: asked.update(name=name, **k) or str(tmp_path)
    )
    assert resolve("TIGER-Lab/VLM2Vec-Full", revision="abc", local_files_only=True) == tmp_path
    assert asked["name"] == "TIGER-Lab/VLM2Vec-Full" and asked["revision"] == "abc" and asked["local_files_only"]
    assert all(p.endswith(("safetensors", ".json")) for p in asked["allow_patterns"])


@pytest.mark.parametrize("step", ["", "optimize(model)"], ids=["loaded", "packed"])
def test_loading_does_not_hold_a_second_copy(tmp_path, step):
    """Peak resident memory while loading grows by the model's size and little more (see bench_load for full size)."""
    folder = new_checkpoint(tmp_path / "m", preset="small", dtype="bfloat16")
    code = (
        "import re, sys\n"
        "from minivlm2vec.weights import load_model\n"
        "read = lambda key: int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "before = read('VmRSS')\n"
        "from minivlm2vec.inference import optimize\n"
        "model = load_model(sys.argv[1])\n"
        "size = sum(p.numel() * p.element_size() for p in model.parameters())\n"
        f"{step}\n"
        "print(before, read('VmHWM'), size)\n"
    )
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    out = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True, env=env)
    before, peak, size = map(int, out.stdout.split())
    largest = 2 * 32064 * 384
    print(f"before {before / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, model {size / 1e6:.0f} MB")
    assert peak - before < 1.1 * size + largest + 40e6  # one tensor is mapped while it is copied
