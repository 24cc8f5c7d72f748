"""Writes a randomly initialised checkpoint in the published layout, for tests, benches and research.

Every tensor has a random stream of its own, PCG64(crc32(key) XOR seed) of standard normal float32 numbers z, so
the same key, shape and seed give the same numbers in every checkpoint:

    norm weights                                       1 + 0.1 z
    biases                                             0.02 z
    embed_tokens, position_embedding, class_embedding  0.5 z
    glb_GN, sub_GN                                     z
    q_proj, k_proj, qkv_proj                           1.5 / sqrt(fan_in) z    (attention that is not flat)
    every other matrix or convolution                  1 / sqrt(fan_in) z
"""

import copy
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from huggingface_hub.utils import tqdm
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, normalizers, processors

from .config import CLIP_MEAN, CLIP_STD, CLIP_VIT_L_14_336, OWN, Parts, Trained, VLM2VecConfig
from .errors import CheckpointError, nearest

# LongRoPE's divisors in the published config.json.
SHORT_FACTOR = [
    1.08, 1.1, 1.1300000000000001, 1.2800000000000002, 1.3100000000000003, 1.4500000000000004, 1.4500000000000004,
    1.9500000000000008, 2.030000000000001, 2.4299999999999926, 2.5699999999999896, 2.9499999999999815,
    3.729999999999965, 3.869999999999962, 4.189999999999955, 4.43999999999995, 4.6399999999999455,
    4.979999999999938, 5.159999999999934, 5.279999999999932, 5.759999999999922, 5.889999999999919,
    5.889999999999919, 5.969999999999917, 6.089999999999915, 6.2799999999999105, 6.7699999999999,
    6.8899999999998975, 7.109999999999893, 7.129999999999892, 7.179999999999891, 7.289999999999889,
    7.339999999999888, 7.559999999999883, 7.619999999999882, 7.69999999999988, 7.879999999999876,
    7.879999999999876, 7.879999999999876, 7.939999999999875, 7.949999999999875, 7.979999999999874,
    8.19999999999987, 8.439999999999864, 8.469999999999864, 8.589999999999861, 8.809999999999857,
    8.999999999999853,
]  # fmt: skip
LONG_FACTOR = [
    1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115,
    1.600000023841858, 1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863,
    4.789999961853027, 7.400000095367432, 7.700000286102295, 9.09000015258789, 12.199999809265137,
    17.670000076293945, 24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523,
    32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992, 50.340003967285156,
    50.45000457763672, 57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457,
    62.61000442504883, 62.62000274658203, 62.71000289916992, 63.1400032043457, 63.1400032043457,
    63.77000427246094, 63.93000411987305, 63.96000289916992, 63.970001220703125, 64.02999877929688,
    64.06999969482422, 64.08000183105469, 64.12000274658203, 64.41000366210938, 64.4800033569336,
    64.51000213623047, 64.52999877929688, 64.83999633789062,
]  # fmt: skip

# What a preset changes of the published config.json.
PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {
        "hidden_size": 384, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 1024,
        "num_hidden_layers": 3, "torch_dtype": "float32",
        "img_processor": {"vision_config": {"num_hidden_layers": 4, "intermediate_size": 512}},
    },
    "tiny": {
        "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 128,
        "num_hidden_layers": 3, "torch_dtype": "float32", "vocab_size": 320,
        "max_position_embeddings": 4096, "original_max_position_embeddings": 512, "sliding_window": None,
        "img_processor": {
            "image_dim_out": 64, "num_img_tokens": 4,
            "vision_config": {"num_hidden_layers": 3, "intermediate_size": 128, "num_attention_heads": 2,
                              "image_size": 56, "patch_size": 14},
        },
    },
}  # fmt: skip
_CLIP = "model.vision_embed_tokens.img_processor.vision_model."


def new_checkpoint(
    path: str | Path,
    *,
    preset: str = "tiny",
    config: dict[str, Any] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    num_crops: int = 4,
    tokenizer: str | Path | tokenizers.Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
    show_progress: bool = False,
) -> Path:
    """Writes config.json, preprocessor_config.json, tokenizer.json and the safetensors to a folder.

    Args:
        path: the folder; it must be empty or absent.
        preset: "tiny" (0.6 M parameters), "small" (52 M) or "full" (4.15 B, the published sizes).
        config: keys of config.json that replace the preset's; see `configured`.
        seed: of the weights.
        dtype: "float32", "float16" or "bfloat16"; default the preset's.
        tokenizer: one, or a tokenizer.json to copy; default is one made here that has a token for every byte.
        max_shard_bytes: a file holds at most so many bytes, or a single tensor.

    Returns the folder. Raises ValueError for an unknown preset or a folder that is in use, CheckpointError for a
    config that makes no model or has an unknown key.
    """
    raw = configured(preset, {} if config is None else config)
    raw["torch_dtype"] = dtype or raw["torch_dtype"]
    parsed = VLM2VecConfig.from_dict(raw)
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder")
    path.mkdir(parents=True, exist_ok=True)
    _write_weights(path, raw, parsed, seed, max_shard_bytes, show_progress)
    _write_json(path / "preprocessor_config.json", _preprocessor_config(parsed, num_crops))
    if tokenizer is None:
        tokenizer = byte_tokenizer(parsed.decoder.vocab_size)
    if isinstance(tokenizer, tokenizers.Tokenizer):
        tokenizer.save(str(path / "tokenizer.json"))
    else:
        (path / "tokenizer.json").write_bytes(Path(tokenizer).read_bytes())
    _write_json(path / "config.json", raw)  # last: a folder with it is complete
    return path


def base_config(preset: str) -> dict[str, Any]:
    """config.json as published, with what the preset changes."""
    if preset not in PRESETS:
        raise ValueError(f"no preset is named {preset!r}; there are {', '.join(PRESETS)}")
    published = {
        "architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v", "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 32000, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu",
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 262144,
        "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.02,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "embd_layer": {"embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
                       "use_hd_transform": True, "with_learnable_separator": True},
        "img_processor": {"image_dim_out": 1024, "model_name": "openai/clip-vit-large-patch14-336",
                          "name": "clip_vision_model", "num_img_tokens": 144},
    }  # fmt: skip
    raw = merged(published, copy.deepcopy(PRESETS[preset]))
    raw["rope_scaling"] = {"type": "su", **_rope_factors(raw["hidden_size"] // raw["num_attention_heads"])}
    return raw


def configured(preset: str, changes: dict[str, Any]) -> dict[str, Any]:
    """config.json of a preset with changed keys (nested dicts are merged).

    What depends on them follows, unless it is among the changes itself: key-value heads, RoPE factors, the attention
    window, the tower's width, tokens of an image.

    Raises CheckpointError for a key that is unknown, with the nearest known one, and for values that make no model.
    """
    if not isinstance(changes, dict):
        raise CheckpointError(f"a config is a JSON object, got {type(changes).__name__}")
    changes = {
        "torch_dtype" if key == "dtype" else key: value for key, value in changes.items()
    }  # as read in config.py
    _check_keys(changes, KNOWN)
    base = base_config(preset)
    raw = merged(base, changes)
    # The sizes of a model of these keys, whatever the preset says of those that follow.
    sizes = VLM2VecConfig.from_dict(raw | {"num_key_value_heads": 1, "rope_scaling": None, "sliding_window": None})
    heads, group = sizes.decoder.num_attention_heads, base["num_attention_heads"] // base["num_key_value_heads"]
    follows = {
        "num_key_value_heads": heads if heads % group else heads // group,
        "sliding_window": base["sliding_window"] and 2 * sizes.decoder.max_position_embeddings,  # as published
        "rope_scaling": _rope_factors(sizes.decoder.head_dim),
        "img_processor": {
            "image_dim_out": sizes.vision.hidden_size,
            "num_img_tokens": sizes.vision.merged_per_side**2,
        },
    }
    return merged(merged(raw, follows), changes)


def _check_keys(changes: dict[str, Any], known: dict[str, Any], where: str = "") -> None:
    for key, value in changes.items():
        if key not in known:
            near = nearest(key, known)
            path = _by_last_name(KNOWN).get(key) or (near and where + near)  # the same name elsewhere comes first
            hint = f"did you mean {path}?" if path else f"there are {', '.join(known)}"
            raise CheckpointError(f"no key of config.json is named {where}{key}; {hint}")
        if isinstance(value, dict) and isinstance(known[key], dict):
            _check_keys(value, known[key], f"{where}{key}.")


def _by_last_name(known: dict[str, Any], where: str = "") -> dict[str, str]:
    """{"image_size": "img_processor.vision_config.image_size"} of all keys; outer ones win."""
    nested = [_by_last_name(value, f"{where}{key}.") for key, value in known.items() if isinstance(value, dict)]
    return {name: path for one in nested for name, path in one.items()} | {key: where + key for key in known}


def tensor_shapes(config: VLM2VecConfig) -> dict[str, tuple[int, ...]]:
    """{key: shape} of every tensor of a published checkpoint, unused ones included, in the usual order."""
    d, v = config.decoder, config.vision
    h, D = d.hidden_size, v.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (d.vocab_size, h),
        "model.vision_embed_tokens.glb_GN": (1, 1, 4 * D),
        "model.vision_embed_tokens.sub_GN": (1, 1, 1, 4 * D),
        _CLIP + "embeddings.class_embedding": (D,),
        _CLIP + "embeddings.patch_embedding.weight": (D, 3, v.patch_size, v.patch_size),
        _CLIP + "embeddings.position_embedding.weight": (v.num_positions, D),
        **_affine(_CLIP + "pre_layrnorm", (D,)),
    }
    for i in range(v.num_hidden_layers):
        layer = f"{_CLIP}encoder.layers.{i}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= _affine(f"{layer}self_attn.{name}", (D, D))
        shapes |= _affine(layer + "layer_norm1", (D,))
        shapes |= _affine(layer + "mlp.fc1", (v.intermediate_size, D))
        shapes |= _affine(layer + "mlp.fc2", (D, v.intermediate_size))
        shapes |= _affine(layer + "layer_norm2", (D,))
    shapes |= _affine(_CLIP + "post_layernorm", (D,))
    shapes |= _affine("model.vision_embed_tokens.img_projection.0", (h, 4 * D))
    shapes |= _affine("model.vision_embed_tokens.img_projection.2", (h, h))
    qkv = (d.num_attention_heads + 2 * d.num_key_value_heads) * d.head_dim
    for i in range(d.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "self_attn.o_proj.weight": (h, h),
            layer + "self_attn.qkv_proj.weight": (qkv, h),
            layer + "mlp.gate_up_proj.weight": (2 * d.intermediate_size, h),
            layer + "mlp.down_proj.weight": (h, d.intermediate_size),
            layer + "input_layernorm.weight": (h,),
            layer + "post_attention_layernorm.weight": (h,),
        }
    return shapes | {"model.norm.weight": (h,), "lm_head.weight": (d.vocab_size, h)}


def random_tensor(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The float32 numbers of one key; see the top of this file."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()) ^ seed))
    z = rng.standard_normal(shape, dtype=np.float32)
    module, leaf = key.split(".")[-2:]
    if leaf == "bias":
        return z * np.float32(0.02)
    if "norm" in module:
        return z * np.float32(0.1) + np.float32(1)
    if module in ("embed_tokens", "position_embedding") or leaf == "class_embedding":
        return z * np.float32(0.5)
    if leaf.endswith("_GN"):
        return z
    gain = 1.5 if module in ("q_proj", "k_proj", "qkv_proj") else 1.0
    return z * np.float32(gain / math.sqrt(math.prod(shape[1:])))


def byte_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """A tokenizer in the published format that merges nothing: a token for every byte. Needs vocab_size >= 320."""
    if vocab_size < 320:
        raise ValueError(f"vocab_size is {vocab_size}; the byte tokenizer needs at least 320")
    return phi3_tokenizer((), ())


def phi3_tokenizer(pieces: Sequence[str], merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """A tokenizer in the published format (BPE with byte fallback, "▁" for spaces, BOS in front): a few special
    tokens, one for every byte and one for "▁", then `pieces`, which `merges` make."""
    first = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*first, *pieces]))}
    bpe = models.BPE(vocab, list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "<|endoftext|>")])
    tokenizer.add_special_tokens(
        [AddedToken(t, rstrip=True, normalized=False) for t in ("</s>", "<|user|>", "<|end|>")]
    )
    return tokenizer


def _write_weights(
    path: Path,
    raw: dict[str, Any],
    config: VLM2VecConfig,
    seed: int,
    max_shard_bytes: int,
    show_progress: bool,
) -> None:
    shapes = tensor_shapes(config)
    dtype = getattr(torch, raw["torch_dtype"])
    shards = list(_shards(shapes, dtype.itemsize, max_shard_bytes))
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]  # fmt: skip
    with tqdm(total=len(shapes), desc="Writing weights", unit="tensor", disable=not show_progress) as bar:
        for name, keys in zip(names, shards, strict=True):
            tensors = {}
            for key in keys:
                tensors[key] = torch.from_numpy(random_tensor(key, shapes[key], seed)).to(dtype)
                bar.update()
            save_file(tensors, path / name, metadata={"format": "pt"})
    if len(shards) > 1:
        size = sum(math.prod(s) for s in shapes.values()) * dtype.itemsize
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        _write_json(
            path / "model.safetensors.index.json",
            {"metadata": {"total_size": size}, "weight_map": weight_map},
        )


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> Iterator[list[str]]:
    keys: list[str] = []
    size = 0
    for key, shape in shapes.items():
        n = math.prod(shape) * itemsize
        if keys and size + n > max_bytes:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += n
    yield keys


def _affine(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {name + ".weight": shape, name + ".bias": shape[:1]}


def _rope_factors(head_dim: int) -> dict[str, list[float]]:
    """The published factors, thinned out or stretched to head_dim / 2 of them."""
    places = np.linspace(0, 47, head_dim // 2).round().astype(int)
    return {
        "short_factor": [SHORT_FACTOR[i] for i in places],
        "long_factor": [LONG_FACTOR[i] for i in places],
    }


def _preprocessor_config(config: VLM2VecConfig, num_crops: int) -> dict[str, Any]:
    return {
        "do_convert_rgb": True, "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD), "image_processor_type": "Phi3VImageProcessor",
        "num_crops": num_crops, "num_img_tokens": config.vision.merged_per_side**2, "processor_class": "Phi3VProcessor",
    }  # fmt: skip


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The base with the changes' keys; dicts in both are merged likewise."""
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if both else value
    return out


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# All keys of config.json. Those of the second line have no meaning here; published files have them.
KNOWN = merged(base_config("full"), {
    **dict.fromkeys(("_name_or_path", "_attn_implementation", "attention_bias", "auto_map", "transformers_version")),
    OWN: {f.name: None for one in (Parts, Trained) for f in fields(one)},
    "rope_scaling": {"rope_type": "longrope"},
    "img_processor": {"vision_config": CLIP_VIT_L_14_336 | {"hidden_act": "quick_gelu"}},
})  # fmt: skip
