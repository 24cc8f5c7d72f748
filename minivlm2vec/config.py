"""config.json -> frozen dataclasses, with the field names of config.json.

No size has a default here: what the file must say is read from the file, and a key that is absent is an error
that names it. Two documented exceptions. The published config.json says nothing about the image tower beyond its
name, so the sizes of CLIP ViT-L/14-336 stand in CLIP_VIT_L_14_336, and `img_processor.vision_config` may
override them (names as in transformers' CLIPVisionConfig). And it has no key "minivlm2vec", which says what a changed
model is made of (`Parts`).
"""

import copy
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .errors import CheckpointError, nearest

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
        for name, value in changes(old.decoder, self.decoder).items():
            raw[name] = asdict(value) | {"type": "longrope"} if isinstance(value, RopeScaling) else value
        if vision := changes(old.vision, self.vision):
            raw["img_processor"].setdefault("vision_config", {}).update(vision)
            raw["img_processor"]["image_dim_out"] = self.vision.hidden_size
        raw.pop("dtype", None)
        raw["torch_dtype"] = self.dtype
        raw[OWN] = changes(Parts(), self.parts) | changes(Trained(), self.trained)
        return {key: value for key, value in raw.items() if key != OWN or value}

    @classmethod
    def from_json(cls, path: str | Path) -> "VLM2VecConfig":
        """Reads config.json (or the folder it is in). Raises CheckpointError naming the file and the key."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            raw = read_json(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist: a checkpoint folder needs a config.json") from None
        try:
            return cls.from_dict(raw)
        except CheckpointError as e:
            raise CheckpointError(f"{path}: {e}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "VLM2VecConfig":
        if not isinstance(raw, dict):
            raise CheckpointError(f"a config is a JSON object, got {type(raw).__name__}")
        if raw.get("model_type", "phi3_v") != "phi3_v":
            raise CheckpointError(f"model_type is {raw['model_type']!r}; only 'phi3_v' is supported")
        vision, decoder = _vision(raw), _decoder(raw)
        dtype = raw.get("torch_dtype", raw.get("dtype"))
        if dtype not in ("bfloat16", "float16", "float32"):
            raise CheckpointError(f"torch_dtype is {dtype!r}; expected bfloat16, float16 or float32")
        own = raw.get(OWN, {})
        if not isinstance(own, dict):
            raise CheckpointError(f"{OWN} is {own!r}; a table of the model's parts is needed")
        parts, trained = _own(own)
        return cls(vision=vision, decoder=decoder, dtype=dtype, parts=parts, trained=trained)


def _own(raw: dict[str, Any]) -> tuple[Parts, Trained]:
    """What stands under "minivlm2vec"."""
    trained = {f.name: raw[f.name] for f in fields(Trained) if f.name in raw}
    return _parts({key: value for key, value in raw.items() if key not in trained}), _trained(**trained)


def _trained(dims: Any = (), temperature: Any = None) -> Trained:
    if not isinstance(dims, (list, tuple)) or any(type(d) is not int or d < 1 for d in dims):
        raise CheckpointError(f"{OWN}.dims is {dims!r}; a list of whole numbers above 0 is needed")
    if temperature is not None and not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise CheckpointError(f"{OWN}.temperature is {temperature!r}; a number above 0 is needed")
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
            raise CheckpointError(f"{OWN}.{key} is {value!r}; a {types[key].__name__} is needed")  # type: ignore[union-attr]
    return Parts(**raw)


def changes(old: Any, new: Any) -> dict[str, Any]:
    """The fields of `new` that are not as in `old`."""
    return {f.name: getattr(new, f.name) for f in fields(new) if getattr(new, f.name) != getattr(old, f.name)}


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises CheckpointError naming it where that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path} is not valid JSON: {e}") from None


def _vision(raw: dict[str, Any]) -> VisionConfig:
    processor = _get(raw, "img_processor", dict)
    sizes = CLIP_VIT_L_14_336 | {"hidden_size": _get(processor, "image_dim_out", int, "img_processor.")}
    override = _get({"vision_config": {}} | processor, "vision_config", dict, "img_processor.")
    act = override.get("hidden_act", "quick_gelu")
    if act != "quick_gelu":
        raise CheckpointError(f"img_processor.vision_config.hidden_act is {act!r}; only 'quick_gelu' is supported")
    kinds = {name: (int, float) if isinstance(size, float) else int for name, size in sizes.items()}
    where = "img_processor.vision_config."
    config = VisionConfig(**{name: _get(sizes | override, name, kind, where) for name, kind in kinds.items()})
    _divides("vision hidden_size", config.hidden_size, "num_attention_heads", config.num_attention_heads)
    _divides("image_size", config.image_size, "2 * patch_size", 2 * config.patch_size)
    if config.num_hidden_layers < 2:
        raise CheckpointError(f"vision num_hidden_layers is {config.num_hidden_layers}; the last is never used, "
                              "so at least 2 are needed")  # fmt: skip
    for key, supported in (("hd_transform_order", "sub_glb"), ("projection_cls", "mlp")):
        value = _get({"embd_layer": {}} | raw, "embd_layer", dict).get(key, supported)
        if value != supported:
            raise CheckpointError(f"embd_layer.{key} is {value!r}; only {supported!r} is supported")
    return config


def _decoder(raw: dict[str, Any]) -> DecoderConfig:
    ints = (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "num_hidden_layers", "max_position_embeddings", "original_max_position_embeddings",
    )  # fmt: skip
    floats = ("rms_norm_eps", "rope_theta")
    numbers: dict[str, Any] = {k: _get(raw, k, int) for k in ints}
    numbers |= {k: float(_get(raw, k, (int, float))) for k in floats}
    config = DecoderConfig(**numbers, rope_scaling=_rope_scaling(raw))
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act is {raw['hidden_act']!r}; only 'silu' is supported")
    _divides("hidden_size", config.hidden_size, "num_attention_heads", config.num_attention_heads)
    _divides("num_attention_heads", config.num_attention_heads, "num_key_value_heads", config.num_key_value_heads)
    _divides("head_dim", config.head_dim, "2 (rotary halves)", 2)
    scaling = config.rope_scaling
    for name in ("short_factor", "long_factor") if scaling else ():
        n = len(getattr(scaling, name))
        if n != config.head_dim // 2:
            raise CheckpointError(f"rope_scaling.{name} has {n} factors; head_dim {config.head_dim} needs "
                                  f"{config.head_dim // 2}")  # fmt: skip
    window = raw.get("sliding_window")
    if window is not None and _get(raw, "sliding_window", int) < config.max_position_embeddings:
        raise CheckpointError(f"sliding_window {window} is shorter than max_position_embeddings "
                              f"{config.max_position_embeddings}: windowed attention is not supported")  # fmt: skip
    return config


def _rope_scaling(raw: dict[str, Any]) -> RopeScaling | None:
    if raw.get("rope_scaling") is None:
        return None
    scaling = _get(raw, "rope_scaling", dict)
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind not in ("su", "longrope"):  # two names of one thing
        raise CheckpointError(f"rope_scaling.type is {kind!r}; only 'su' and 'longrope' are supported")
    factors = {k: _get(scaling, k, list, "rope_scaling.") for k in ("short_factor", "long_factor")}
    for k, values in factors.items():
        if bad := [v for v in values if not isinstance(v, (int, float))]:
            raise CheckpointError(f"rope_scaling.{k} holds {bad[0]!r}, which is no number")
    return RopeScaling(**{k: tuple(map(float, v)) for k, v in factors.items()})


def _get(raw: dict[str, Any], key: str, kind: type | tuple[type, ...], prefix: str = "") -> Any:
    if key not in raw:
        raise CheckpointError(f"{prefix}{key} is missing")
    if not isinstance(raw[key], kind) or isinstance(raw[key], bool):
        raise CheckpointError(f"{prefix}{key} is {raw[key]!r}, which is not the expected type")
    return raw[key]


def _divides(name: str, value: int, by_name: str, by: int) -> None:
    if by <= 0 or value <= 0 or value % by:
        raise CheckpointError(f"{name} {value} is not a multiple of {by_name} {by}")
