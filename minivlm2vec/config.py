"""config.json -> frozen dataclasses, with the field names of config.json.

No size has a default here: what the file must say is read from the file, and a key that is absent is an error
that names it. Two documented exceptions. The published config.json says nothing about the image tower beyond its
name, so the sizes of CLIP ViT-L/14-336 stand in CLIP_VIT_L_14_336, and `img_processor.vision_config` may
override them (names as in transformers' CLIPVisionConfig). And it has no key "minivlm2vec", which says what a changed
model is made of (`Parts`).

A setting that would change vectors and is not implemented is an error that names it, whether the published
configuration class knows it or another model's does; what only describes passes.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Set
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from reprlib import repr as shown
from typing import Any, TypeVar

from .errors import CheckpointError, nearest, some

T = TypeVar("T")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green, blue in 0 .. 1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
}
LARGEST = 1 << 24  # of sizes and lengths: positions beyond it are no exact float32
LARGEST_OF = {"num_hidden_layers": 1024, "image_size": 4096, "patch_size": 4096}
DTYPES = ("bfloat16", "float16", "float32")
# The one value that is implemented of settings that the published code knows.
IMG_PROCESSOR = {"name": "clip_vision_model", "model_name": "openai/clip-vit-large-patch14-336", "layer_idx": -2,
                 "type_feature": "patch"}  # fmt: skip
EMBD_LAYER = {"embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
              "use_hd_transform": True, "with_learnable_separator": True}  # fmt: skip
# A key with one of these words in its name is a setting of the network, unless one of the second kind is there too.
NETWORK = re.compile(
    "(^|_)(act|activation|alibi|attention|attn|bias|bidirectional|block|blocksparse|causal|clip|compression|conv|crop|embd|"
    "embed|embedding|expert|factor|feed|ff|ffn|gate|gegelu|head|hidden|image|img|interleave|kv|layer|layernorm|linear|mask|"
    "merge|mlp|moe|mscale|multiplier|norm|patch|pixel|pool|pooling|position|positional|proj|projection|projector|qk|qkv|"
    "quant|quantization|residual|rope|rotary|router|scale|scaling|separator|shared|sliding|softcap|softcapping|sparse|"
    "sparsity|text|theta|vision|window)s?(_|$)"
)
NO_SETTING = re.compile(  # for training, for speed, or a note
    "^_|(^|_)(class|dropout|dtype|flash|freeze|frozen|grad|id|implementation|initializer|lr|name|path|pdrop|plan|"
    "version)(_|$)"
)
ROPE = ("rope_parameters", "rope_scaling")  # of transformers 5, and before
IMPLIED = ("head_dim", "n_embd")  # by the other sizes
ROPE_FACTORS = ("attention_factor", "short_mscale", "long_mscale", "factor")
CAUSAL = ("is_causal", "causal", "use_causal_mask")  # other names of Parts.causal
CHECKED = ("hidden_act", "img_processor", "embd_layer", "sliding_window", "layer_types", "tie_word_embeddings",
           "output_attentions", "output_hidden_states", "attn_implementation", *CAUSAL)  # fmt: skip

OWN = "minivlm2vec"  # the key of config.json for what only this project knows


@dataclass(frozen=True)
class VisionConfig:
    """The CLIP tower. Its last layer is never computed: the features are those of the last layer but one."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int  # as published, including the layer that is never used
    image_size: int  # pixels per side of a crop
    patch_size: int
    layer_norm_eps: float

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Patches and the class token: 577."""
        return self.patches_per_side**2 + 1

    @property
    def merged_per_side(self) -> int:
        """Rows of image tokens per crop after the 2x2 merge: 12."""
        return self.patches_per_side // 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class RopeScaling:
    """LongRoPE: one divisor per frequency, a set for short and a set for long sequences."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]


@dataclass(frozen=True)
class DecoderConfig:
    """The Phi-3 decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    original_max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rope_attention_factor(self) -> float:
        """What cos and sin are multiplied by, in short and long mode: sqrt(1 + ln(s) / ln(original length))."""
        s = self.max_position_embeddings / self.original_max_position_embeddings
        if self.rope_scaling is None or s <= 1:
            return 1.0
        return math.sqrt(1 + math.log(s) / math.log(self.original_max_position_embeddings))


@dataclass(frozen=True)
class Parts:
    """What a model is made of, by the names that are registered (registry.py), and whether a token sees only those
    before it. As published, where config.json does not say otherwise under "minivlm2vec"."""

    model: str = "vlm2vec"
    tower: str = "clip"
    projector: str = "hd_mlp"
    pooling: str = "last_token"
    causal: bool = True


@dataclass(frozen=True)
class Trained:
    """What training made of the vectors; under "minivlm2vec" too, beside the parts.

    Fields:
        dims: vectors may be cut to so many of their first numbers (Matryoshka, arXiv 2205.13147).
        temperature: of the loss, where it was learned.
    """

    dims: tuple[int, ...] = ()
    temperature: float | None = None


@dataclass(frozen=True)
class VLM2VecConfig:
    vision: VisionConfig
    decoder: DecoderConfig
    dtype: str  # "bfloat16", "float16" or "float32": what the checkpoint's tensors are
    parts: Parts = Parts()
    trained: Trained = Trained()

    def with_parts(self, **parts: Any) -> "VLM2VecConfig":
        """The same sizes, other parts: with_parts(pooling="mean", causal=False). Also takes the fields
        of `Trained`. Raises ValueError for what is neither."""
        found, trained = _own(asdict(self.parts) | asdict(self.trained) | parts)
        return replace(self, parts=found, trained=trained)

    def written_into(self, raw: dict[str, Any]) -> dict[str, Any]:
        """The content of a config.json with this configuration in it; what is not known here stays as it is."""
        raw, old = copy.deepcopy(raw), VLM2VecConfig.from_dict(raw)
        if self.decoder != old.decoder:
            raw = {key: value for key, value in raw.items() if key not in ("rope_parameters", *IMPLIED)}
            scaling = self.decoder.rope_scaling
            raw |= asdict(self.decoder) | {"rope_scaling": scaling and asdict(scaling) | {"type": "longrope"}}
        if vision := changes(old.vision, self.vision):
            raw["img_processor"].setdefault("vision_config", {}).update(vision)
            raw["img_processor"]["image_dim_out"] = self.vision.hidden_size
        raw.pop("dtype", None)
        raw["torch_dtype"] = self.dtype
        raw[OWN] = changes(Parts(), self.parts) | changes(Trained(), self.trained)
        return {key: value for key, value in raw.items() if key not in CAUSAL and (key != OWN or value)}

    @classmethod
    def from_json(cls, path: str | Path) -> "VLM2VecConfig":
        """Reads config.json (or the folder it is in). Raises CheckpointError naming the file and the key."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        raw = read_object(path, "a checkpoint folder needs a config.json")
        try:
            return cls.from_dict(raw)
        except (CheckpointError, RecursionError) as e:
            raise CheckpointError(f"{path}: {e}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "VLM2VecConfig":
        if not isinstance(raw, dict):
            raise CheckpointError(f"a config is a JSON object, got {type(raw).__name__}")
        only(raw, "", model_type="phi3_v")
        parts, trained = _own(_table(raw, OWN, absent={}))
        vision, decoder = _vision(raw, parts), _decoder(raw, parts)
        return cls(vision=vision, decoder=decoder, dtype=_dtype(raw), parts=parts, trained=trained)


def read_object(path: Path, missing: str) -> dict[str, Any]:
    """The JSON object that a file holds. Raises CheckpointError; `missing` says who needs the file."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: {missing}")
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as e:
        raise CheckpointError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a JSON object but {shown(raw)}")
    return raw


def _dtype(raw: dict[str, Any]) -> str:
    """transformers 5 writes `dtype`, and some files have both."""
    said = {key: raw[key] for key in ("torch_dtype", "dtype") if raw.get(key) is not None} or {"torch_dtype": None}
    for key, dtype in said.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{key} is {shown(dtype)}; expected bfloat16, float16 or float32")
    return _agreed(said)


def _own(raw: dict[str, Any]) -> tuple[Parts, Trained]:
    """What stands under "minivlm2vec"."""
    trained = {f.name: raw[f.name] for f in fields(Trained) if f.name in raw}
    return _parts({key: value for key, value in raw.items() if key not in trained}), _trained(**trained)


def _trained(dims: Any = (), temperature: Any = None) -> Trained:
    if not isinstance(dims, (list, tuple)) or any(type(d) is not int or d < 1 for d in dims):
        raise CheckpointError(f"{OWN}.dims is {shown(dims)}; a list of whole numbers above 0 is needed")
    if temperature is not None and not (type(temperature) in (int, float) and 0 < temperature < math.inf):
        raise CheckpointError(f"{OWN}.temperature is {shown(temperature)}; a number above 0 is needed")
    return Trained(tuple(dims), temperature)


def _parts(raw: dict[str, Any]) -> Parts:
    types = {f.name: f.type for f in fields(Parts)}
    for key, value in raw.items():
        if key not in types:
            known = (*types, *(f.name for f in fields(Trained)))
            near = nearest(key, known)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(known)}"
            raise CheckpointError(f"{OWN}.{key} is no part of a model; {hint}")
        if not isinstance(value, types[key]):  # type: ignore[arg-type]
            raise CheckpointError(f"{OWN}.{key} is {shown(value)}; a {types[key].__name__} is needed")  # type: ignore[union-attr]
    return Parts(**raw)


def changes(old: Any, new: Any) -> dict[str, Any]:
    """The fields of `new` that are not as in `old`."""
    return {f.name: getattr(new, f.name) for f in fields(new) if getattr(new, f.name) != getattr(old, f.name)}


def _vision(raw: dict[str, Any], parts: Parts) -> VisionConfig:
    at, inside = "img_processor.", "img_processor.vision_config."
    processor = _table(raw, "img_processor")
    if parts.tower == Parts.tower:
        only(processor, at, **IMG_PROCESSOR)
        _refuse_settings(processor, {*IMG_PROCESSOR, "image_dim_out", "num_img_tokens", "vision_config"}, at)
    width = _size(processor, "image_dim_out", at)
    table = CLIP_VIT_L_14_336 | {"hidden_size": width} | _table(processor, "vision_config", at, absent={})
    only(table, inside, hidden_act="quick_gelu", num_channels=3)
    sizes = {key: _size(table, key, inside) for key in CLIP_VIT_L_14_336 if key != "layer_norm_eps"}
    known = {*CLIP_VIT_L_14_336, "hidden_act", "num_channels", "projection_dim"}
    _refuse_settings(table, known, inside, named=True)
    config = VisionConfig(**sizes, layer_norm_eps=_number(table, "layer_norm_eps", inside))
    _divides("vision hidden_size", config.hidden_size, "num_attention_heads", config.num_attention_heads)
    _divides("image_size", config.image_size, "2 * patch_size", 2 * config.patch_size)
    if config.num_hidden_layers < 2:
        raise CheckpointError(f"vision num_hidden_layers is {config.num_hidden_layers}; the last is never used, "
                              "so at least 2 are needed")  # fmt: skip
    layer = _table(raw, "embd_layer", absent={})
    if parts.projector == Parts.projector:
        only(layer, "embd_layer.", **EMBD_LAYER)
        _refuse_settings(layer, set(EMBD_LAYER), "embd_layer.")
    return config


def _decoder(raw: dict[str, Any], parts: Parts) -> DecoderConfig:
    ropes = {f"{name}.": _rope_table(raw, name) for name in ROPE if raw.get(name) is not None}
    ints = (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "num_hidden_layers", "max_position_embeddings",
    )  # fmt: skip
    config = DecoderConfig(
        **{key: _size(raw, key) for key in ints},
        rms_norm_eps=_number(raw, "rms_norm_eps"),
        rope_theta=_anywhere({"": raw} | ropes, "rope_theta", _number),
        rope_scaling=_agreed({at[:-1]: _rope_scaling(t, at) for at, t in ropes.items()}) if ropes else None,
        original_max_position_embeddings=_anywhere({"": raw} | ropes, "original_max_position_embeddings", _size),
    )
    _divides("hidden_size", config.hidden_size, "num_attention_heads", config.num_attention_heads)
    _divides("num_attention_heads", config.num_attention_heads, "num_key_value_heads", config.num_key_value_heads)
    _divides("head_dim", config.head_dim, "2 (rotary halves)", 2)
    for at, table in ropes.items():
        _check_rope(table, at, config)
    _check_window(raw, config)
    only(raw, "", hidden_act="silu")
    implied = dict(zip(IMPLIED, (config.head_dim, config.hidden_size), strict=True)) | {"partial_rotary_factor": 1}
    follows = implied | dict.fromkeys(CAUSAL, parts.causal)
    only({k: v for k, v in raw.items() if v is not None}, "", **follows)
    _refuse_settings(raw, {*DecoderConfig.__dataclass_fields__, *implied, *ROPE, *CHECKED}, named=True)
    return config


def _check_window(raw: dict[str, Any], config: DecoderConfig) -> None:
    if raw.get("sliding_window") is not None:
        window = _size(raw, "sliding_window")
        if window < config.max_position_embeddings:
            raise CheckpointError(f"sliding_window {window} is shorter than max_position_embeddings "
                                  f"{config.max_position_embeddings}: windowed attention is not supported")  # fmt: skip
    types = raw.get("layer_types") or []
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        raise CheckpointError(f"layer_types is {shown(types)}; only 'full_attention' is supported")


def _rope_table(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """The table of rotary settings; transformers 5 may write one for each type of layer, of which all must be equal."""
    table = _table(raw, name)
    nested = [v for k, v in table.items() if k.endswith("_attention") and v is not None]
    if not nested:
        return table
    if not isinstance(nested[0], dict) or any(v != nested[0] for v in table.values() if v is not None):
        raise CheckpointError(f"{name} has settings of its own for {some([*table])}; one for all layers is supported")
    return nested[0]


def _rope_scaling(table: dict[str, Any], at: str) -> RopeScaling | None:
    kinds = {k: table[k] for k in ("type", "rope_type") if table.get(k) is not None} or {"rope_type": "default"}
    for key, kind in kinds.items():
        if kind not in ("su", "longrope", "default"):  # the first two are names of one thing
            raise CheckpointError(f"{at}{key} is {shown(kind)}; only 'su', 'longrope' and 'default' are supported")
    scaled = _agreed({at + key: kind != "default" for key, kind in kinds.items()})
    factors = ("short_factor", "long_factor")
    known = {"type", "rope_type", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor"}
    _refuse_settings(table, {*known, *factors, *ROPE_FACTORS} if scaled else known, at)
    return RopeScaling(*(_factors(table, key, at) for key in factors)) if scaled else None


def _factors(table: dict[str, Any], key: str, at: str) -> tuple[float, ...]:
    values = _get(table, key, at)
    if not isinstance(values, (list, tuple)):
        raise CheckpointError(f"{at}{key} is {shown(values)}; a list of numbers is needed")
    return tuple(_number({f"{key}[{i}]": v}, f"{key}[{i}]", at) for i, v in enumerate(values))


def _check_rope(table: dict[str, Any], at: str, config: DecoderConfig) -> None:
    """What the table may say besides must be what follows from the lengths."""
    n, longest, trained = config.head_dim // 2, config.max_position_embeddings, config.original_max_position_embeddings
    for name in ("short_factor", "long_factor") if config.rope_scaling else ():
        given = len(getattr(config.rope_scaling, name))
        if given != n:
            raise CheckpointError(f"{at}{name} has {given} factors; head_dim {config.head_dim} needs {n}")
    if table.get("partial_rotary_factor") is not None:
        only(table, at, partial_rotary_factor=1)
    if config.rope_scaling and trained < 2:
        raise CheckpointError(f"original_max_position_embeddings is {trained}; LongRoPE needs at least 2")
    follows = dict.fromkeys(ROPE_FACTORS, config.rope_attention_factor) | {"factor": longest / trained}
    for key, value in follows.items():
        if table.get(key) is not None and not math.isclose(_number(table, key, at), value, rel_tol=1e-6):
            raise CheckpointError(f"{at}{key} is {table[key]}; only {value:.6g} is supported, which follows from "
                                  f"{longest} and {trained} positions")  # fmt: skip


def _refuse_settings(table: dict[str, Any], known: Set[str], at: str = "", *, named: bool = False) -> None:
    """Raises for the first key that is not known and has a value; named: if its name tells that it is a setting."""
    for key, value in table.items():
        is_setting = not named or (NETWORK.search(key.lower()) and not NO_SETTING.search(key.lower()))
        if value and key not in known and is_setting:
            raise CheckpointError(f"{at}{key} is {shown(value)}, which is not supported")


def only(table: dict[str, Any], at: str, **supported: Any) -> None:
    """Raises for a key that has another value than the supported one; it may be absent."""
    for key, value in supported.items():
        if table.get(key, value) != value:
            raise CheckpointError(f"{at}{key} is {shown(table[key])}; only {value!r} is supported")


def _anywhere(tables: dict[str, dict[str, Any]], key: str, read: Callable[..., T]) -> T:
    """A setting that may stand in each of the tables, and must in one."""
    said = {at + key: read(table, key, at) for at, table in tables.items() if table.get(key) is not None}
    if not said:
        raise CheckpointError(f"{key} is missing")
    return _agreed(said)


def _agreed(said: dict[str, T]) -> T:
    """The one value of a setting that stands in several places."""
    (first, value), *others = said.items()
    for name, other in others:
        if other != value:
            raise CheckpointError(f"{first} and {name} are one setting and differ: {shown(value)} and {shown(other)}")
    return value


def _table(raw: dict[str, Any], key: str, at: str = "", *, absent: dict | None = None) -> dict[str, Any]:
    value = _get(raw, key, at) if absent is None else raw.get(key, absent)
    if not isinstance(value, dict):
        raise CheckpointError(f"{at}{key} is {shown(value)}; a JSON object is needed")
    return value


def _size(raw: dict[str, Any], key: str, at: str = "") -> int:
    value, most = _get(raw, key, at), LARGEST_OF.get(key, LARGEST)
    if type(value) is not int or not 1 <= value <= most:
        raise CheckpointError(f"{at}{key} is {shown(value)}; a whole number from 1 to {most:,} is needed")
    return value


def _number(raw: dict[str, Any], key: str, at: str = "") -> float:
    value = _get(raw, key, at)
    if type(value) not in (int, float) or not 0 < value <= 1e12:
        raise CheckpointError(f"{at}{key} is {shown(value)}; a number above 0, at most 1e12, is needed")
    return float(value)


def _get(raw: dict[str, Any], key: str, at: str = "") -> Any:
    if key not in raw:
        raise CheckpointError(f"{at}{key} is missing")
    return raw[key]


def _divides(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        raise CheckpointError(f"{name} {value} is not a multiple of {by_name} {by}")
