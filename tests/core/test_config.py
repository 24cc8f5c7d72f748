"""config.json: what is published, or saved again, passes; what changes vectors and is not implemented does not."""

import copy
import json
import math
from dataclasses import replace

import pytest

from minivlm2vec import CheckpointError, Embedder, VLM2VecConfig
from minivlm2vec.new_checkpoint import base_config, merged, new_checkpoint

TINY, FULL = base_config("tiny"), base_config("full")
FACTORS = {k: TINY["rope_scaling"][k] for k in ("short_factor", "long_factor")}
FACTOR = math.sqrt(1 + math.log(4096 / 512) / math.log(512))  # what follows from tiny's lengths


def read(changes: dict, raw: dict = TINY) -> VLM2VecConfig:
    """The configuration with changes; ... takes a key away."""
    return VLM2VecConfig.from_dict(said(merged(raw, changes)))


def said(table: dict) -> dict:
    return {k: said(v) if isinstance(v, dict) else v for k, v in table.items() if v is not ...}


def rope(table, **changes) -> dict:
    """As transformers 5 saves it: rope_parameters in the place of rope_scaling and rope_theta."""
    return {"rope_parameters": table, "rope_scaling": ..., "rope_theta": ...} | changes


SAME = {
    "transformers 5, remote code": rope({"type": "su", "rope_type": "su", "rope_theta": 10000.0, **FACTORS}),
    "theta outside": rope({"rope_type": "su", **FACTORS}, rope_theta=10000),
    "theta in both": rope({"rope_type": "longrope", "rope_theta": 10000, **FACTORS}, rope_theta=10000.0),
    "lengths inside": rope(
        {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 512, "factor": 8.0,
         "attention_factor": None, "partial_rotary_factor": 1.0, **FACTORS},
        original_max_position_embeddings=...,
    ),
    "what follows": rope({"rope_type": "longrope", "rope_theta": 1e4, "attention_factor": FACTOR, "factor": 8,
                          "short_mscale": FACTOR, "long_mscale": FACTOR, **FACTORS}),
    "by type of layer": rope({"full_attention": {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS},
                              "sliding_attention": None}, layer_types=["full_attention"] * 3),
    "in both places": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}},
    "the newer name in the older place": {"rope_scaling": {"type": ..., "rope_type": "longrope"}},
    "a null": {"rope_parameters": None},
}  # fmt: skip


@pytest.mark.parametrize("form", SAME)
def test_every_form_of_rotary_settings_is_one_configuration(form):
    assert read(SAME[form]) == VLM2VecConfig.from_dict(TINY)


@pytest.mark.parametrize("table", [{"rope_type": "default", "rope_theta": 1e4}, {"rope_theta": 1e4}, None])
def test_no_scaling_in_either_form(table):
    theta = {"rope_theta": 10000.0} if table is None else {}
    assert read(rope(table) | theta) == VLM2VecConfig.from_dict(TINY | {"rope_scaling": None})


@pytest.mark.parametrize("inside", [True, False])
def test_vectors_after_transformers_saved_the_configuration_again(tmp_path, inside):
    """rope_theta as an argument of the class, and as an unknown keyword."""
    transformers = pytest.importorskip("transformers", "5.0")

    class Config(transformers.PretrainedConfig):
        model_type = "phi3_v"

        def __init__(self, rope_theta=10000.0, rope_scaling=None, original_max_position_embeddings=4096, **others):
            self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
            self.original_max_position_embeddings = original_max_position_embeddings
            super().__init__(**others)

    class Bare(transformers.PretrainedConfig):
        model_type = "phi3_v"

    folder = new_checkpoint(tmp_path / "m", preset="tiny")
    texts = ["a cat", "a cat and a dog on the beach", "word " * 200]  # the last in long mode
    expected = Embedder.from_pretrained(folder, device="cpu", show_progress=False).encode(texts)
    (Bare if inside else Config).from_pretrained(folder).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    assert "rope_scaling" not in saved and "rope_parameters" in saved and ("rope_theta" in saved) != inside
    again = Embedder.from_pretrained(folder, device="cpu", show_progress=False).encode(texts)
    assert (expected == again).all()


def test_what_the_published_files_say_passes():
    say = {
        "_name_or_path": "Phi-3.5-vision-instruct", "auto_map": {"AutoConfig": "configuration_phi3_v.Phi3VConfig"},
        "_attn_implementation": "flash_attention_2", "transformers_version": "4.38.1", "torch_dtype": "bfloat16",
    }  # fmt: skip
    expected = VLM2VecConfig.from_dict(FULL)
    assert read(say, FULL) == read(say | {"sliding_window": 131072}, FULL) == expected  # the latter: Phi-3-vision
    describe = {
        "_commit_hash": None, "id2label": {"0": "LABEL_0"}, "license": "mit", "unsloth_version": "2025.1", "top_k": 50,
        "attention_dropout": 0.1, "resid_pdrop": 0.1, "base_model_tp_plan": {"layers.*": "colwise"}, "note": [1, 2],
        "head_dim": 96, "partial_rotary_factor": 1.0, "attention_bias": False, "quantization_config": None,
        "torch_dtype": None, "dtype": "bfloat16", "minivlm2vec": {"pooling": "last_token"},
        "is_causal": True, "use_causal_mask": None, "compression_config": {},
        "layer_types": ["full_attention"] * 32, "chunk_size_feed_forward": 0, "pruned_heads": {}, "normalize": True,
        "tie_word_embeddings": True, "n_embd": 3072, "bos_token_id": None, "output_hidden_states": True,
        "image_token_id": 32044, "vision_model_name": "x", "use_flash_attn": True, "mm_projector_lr": 1e-5,
    }  # fmt: skip
    assert read(describe, FULL) == expected


def test_another_part_has_settings_of_its_own():
    """What the published tower and projector do not know, a registered one may."""
    for part, changes in (("tower", {"img_processor": {"name": "siglip", "grid": 3}}),
                          ("projector", {"embd_layer": {"projection_cls": "linear"}})):  # fmt: skip
        assert getattr(read(changes | {"minivlm2vec": {part: "mine"}}).parts, part) == "mine"
        with pytest.raises(CheckpointError, match=r"only 'mlp'|only 'clip"):
            read(changes)


def test_the_towers_width_follows_from_its_own_table(tmp_path):
    """As `new_checkpoint` lets image_dim_out follow; the shapes of tensors tell if a file says something wrong."""
    config = {"img_processor": {"vision_config": {"hidden_size": 32}}}
    folder = new_checkpoint(tmp_path / "m", preset="tiny", config=config)
    assert VLM2VecConfig.from_json(folder).vision.hidden_size == 32
    assert json.loads((folder / "config.json").read_text())["img_processor"]["image_dim_out"] == 32


def test_a_configuration_that_is_written_again_has_one_place_for_each_setting():
    raw = said(merged(TINY, SAME["lengths inside"] | {"dtype": "float32", "torch_dtype": None, "head_dim": 32}))
    other = replace(read({}), decoder=replace(read({}).decoder, num_attention_heads=1, num_key_value_heads=1,
                                              rope_scaling=None, original_max_position_embeddings=256))  # fmt: skip
    for config in (read({}), other):
        written = json.loads(json.dumps(config.written_into(raw)))
        assert VLM2VecConfig.from_dict(written) == config


def test_the_mask_of_a_changed_model_is_said_once():
    raw = TINY | {"is_causal": True}
    both = VLM2VecConfig.from_dict(raw).with_parts(causal=False)
    assert (
        VLM2VecConfig.from_dict(both.written_into(raw))
        == both
        == read({"is_causal": False} | {"minivlm2vec": {"causal": False}})
    )


CHANGES = {  # what changes vectors: the key that the message must name
    "attention_factor": {"rope_scaling": {"attention_factor": 1.5}},
    "short_mscale": {"rope_scaling": {"short_mscale": 1.0}},
    "long_mscale": rope({"rope_type": "longrope", "rope_theta": 1e4, "long_mscale": 1.3, **FACTORS}),
    "rope_scaling.factor": {"rope_scaling": {"factor": 4.0}},
    "rope_scaling.original_max_position_embeddings": {"rope_scaling": {"original_max_position_embeddings": 1024}},
    "rope_parameters.rope_theta": {"rope_parameters": {"rope_type": "su", "rope_theta": 5e5, **FACTORS}},
    "rope_parameters": {"rope_parameters": {"rope_type": "default"}},
    "rope_parameters.mrope_section": rope({"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}),
    "rope_parameters.short_factor": rope({"rope_theta": 1e4, **FACTORS}),
    "rope_parameters.partial_rotary_factor": rope(
        {"rope_type": "su", "rope_theta": 1e4, "partial_rotary_factor": 0.5, **FACTORS}
    ),
    "rope_parameters.rope_type": rope({"type": "su", "rope_type": "yarn", "rope_theta": 1e4, **FACTORS}),
    "sliding_attention": rope({"full_attention": {"rope_type": "default", "rope_theta": 1e4},
                               "sliding_attention": {"rope_type": "default", "rope_theta": 1e5}}),
    "layer_types": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "head_dim": {"head_dim": 64},
    "n_embd": {"n_embd": 128},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "quantization_config": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "qk_layernorm": {"qk_layernorm": True},
    "attn_logit_softcapping": {"attn_logit_softcapping": 30.0},
    "embedding_multiplier": {"embedding_multiplier": 12.0},
    "mup_attn_multiplier": {"mup_attn_multiplier": 1.0},
    "num_local_experts": {"num_local_experts": 16},
    "use_bidirectional_attention": {"use_bidirectional_attention": True},
    "is_causal": {"is_causal": False},
    "causal": {"causal": True, "minivlm2vec": {"causal": False}},
    "compression_config": {"compression_config": {"quant_method": "compressed-tensors"}},
    "sparsity_config": {"sparsity_config": {"format": "sparse-24-bitmask"}},
    "pruned_heads": {"pruned_heads": {"0": [1]}},
    "pooling": {"pooling": "mean"},
    "text_config": {"text_config": {"hidden_size": 64}},
    "img_processor.layer_idx": {"img_processor": {"layer_idx": -1}},
    "img_processor.type_feature": {"img_processor": {"type_feature": "cls_patch"}},
    "img_processor.name": {"img_processor": {"name": "siglip"}},
    "img_processor.model_name": {"img_processor": {"model_name": "openai/clip-vit-base-patch16"}},
    "img_processor.select_layer": {"img_processor": {"select_layer": -1}},
    "vision_config.hidden_act": {"img_processor": {"vision_config": {"hidden_act": "gelu"}}},
    "vision_config.num_channels": {"img_processor": {"vision_config": {"num_channels": 1}}},
    "vision_config.attention_bias": {"img_processor": {"vision_config": {"attention_bias": True}}},
    "embd_layer.use_hd_transform": {"embd_layer": {"use_hd_transform": False}},
    "embd_layer.with_learnable_separator": {"embd_layer": {"with_learnable_separator": False}},
    "embd_layer.hd_transform_order": {"embd_layer": {"hd_transform_order": "glb_sub"}},
    "embd_layer.projection_cls": {"embd_layer": {"projection_cls": "linear"}},
    "embd_layer.embedding_cls": {"embd_layer": {"embedding_cls": "audio"}},
    "dtype": {"dtype": "bfloat16"},  # beside torch_dtype float32
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_that_changes_vectors_is_refused_by_name(key):
    with pytest.raises(CheckpointError, match=rf"(^|\W){key}\b") as e:
        read(CHANGES[key])
    assert "\n" not in str(e.value)


NAN, DEEP = float("nan"), json.loads("[" * 900 + "]" * 900)
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
         "num_hidden_layers", "max_position_embeddings", "original_max_position_embeddings")  # fmt: skip
NO_NUMBERS = ["64", None, [], {}, True, NAN, math.inf, -1, 0, 10**30, [[64]], DEEP]


@pytest.mark.parametrize("key", [*SIZES, "rope_theta", "rms_norm_eps"])
def test_no_value_but_a_sensible_number_is_taken(key):
    for value in [*NO_NUMBERS, *([64.0, 1 << 25] if key in SIZES else [])]:
        with pytest.raises(CheckpointError, match=key) as e:
            read({key: value}, TINY | {key: 0})
        assert len(str(e.value)) < 200


@pytest.mark.parametrize("key", ["image_size", "patch_size", "num_hidden_layers", "layer_norm_eps"])
def test_nor_in_the_tower(key):
    for value in NO_NUMBERS:
        raw = copy.deepcopy(TINY)
        raw["img_processor"]["vision_config"][key] = value
        with pytest.raises(CheckpointError, match=f"img_processor.vision_config.{key} is "):
            VLM2VecConfig.from_dict(raw)


def test_absurd_sizes_are_refused_at_once():
    for changes in ({"num_hidden_layers": 10**9}, {"num_hidden_layers": 1025}, {"vocab_size": 1 << 40}):
        with pytest.raises(CheckpointError, match="a whole number from 1 to "):
            read(changes)
    with pytest.raises(CheckpointError, match="image_size is 1000000"):
        read({"img_processor": {"vision_config": {"image_size": 10**6, "patch_size": 10**5}}})


@pytest.mark.parametrize("key", ["img_processor", "embd_layer", "rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", ["default", 3, [], True, DEEP, None])
def test_something_else_where_a_table_belongs(key, value):
    if value is None and key.startswith("rope"):
        return
    with pytest.raises(CheckpointError, match=f"{key} is .*; a JSON object is needed"):
        VLM2VecConfig.from_dict(TINY | {key: value})


@pytest.mark.parametrize("value", ["1 2", None, 3, [], ["1"] * 16, [NAN] * 16, [0] * 16, [1.0] * 15, [True] * 16, {}])
def test_something_else_where_factors_belong(value):
    with pytest.raises(CheckpointError, match=r"rope_scaling\.long_factor"):
        read({"rope_scaling": {"long_factor": value}})


FILES = {
    "an array": b"[]", "nothing": b"", "deep": b"[" * 100_000, "digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "half a character": b'{"a": "\xc3', "UTF-16 without an end": "{".encode("utf-16"), "NUL": b"\0\0\0",
    "nested tables": b'{"rope_scaling": ' + b'{"a":' * 950 + b"1" + b"}" * 951,
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_holds_no_configuration(tmp_path, kind):
    (tmp_path / "config.json").write_bytes(FILES[kind])
    with pytest.raises(CheckpointError, match=r"config\.json"):
        VLM2VecConfig.from_json(tmp_path)
