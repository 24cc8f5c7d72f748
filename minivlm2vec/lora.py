"""LoRA and DoRA adapters, in PEFT's file format: made, trained, written, read, merged.

    y = W x + b + s B A x                                LoRA, arXiv 2106.09685; s = alpha / r
    y = m / |W + s B A| * (W + s B A) x + b              DoRA, arXiv 2402.09353; |.| of each row, held constant

K inputs, N outputs, n outputs that one adapter changes, r rank. A [r, K], B [n, r], m [n].
"""

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DTYPES, KNOWN, drop_prefixes, keys_of, parameter_of
from .config import OWN, VLM2VecConfig, changes, read_object, shown
from .errors import CheckpointError, some
from .linear import Linear
from .model import VLM2Vec
from .weights import named_parts, new_parts, saved_tensors, under_keys

M = TypeVar("M", bound=nn.Module)

CONFIG, WEIGHTS, PREFIX = ADAPTER_CONFIG, ADAPTER_WEIGHTS, "base_model.model."
# What VLM2Vec adapts: all of the decoder's matrices and the attention of the tower.
TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "out_proj")
# Keys of adapter_config.json that change nothing in how finished tensors are used.
IRRELEVANT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# These beginnings change the base's weights too, so their adapters fit a base that nobody has stored.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
MUST_SAY = ("r", "lora_alpha", "target_modules")
PATIENCE = 10.0  # seconds that an adapter's regular expressions may take; a sensible one takes a millisecond
_TRY = "import json, re, sys\nfor e, k in json.load(sys.stdin): re.fullmatch(e, k)"
_TENSOR = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)(?:\.weight)?")


@dataclass(frozen=True)
class LoraConfig:
    """adapter_config.json, with PEFT's names.

    Fields:
        r, lora_alpha: rank and scale; what B A gives is multiplied by lora_alpha / r.
        lora_dropout: of an adapter's input, while training.
        target_modules: ends of the checkpoint's module names; or one regular expression for whole names.
        exclude_modules: the same, of modules that get no adapter although target_modules fits them.
        layers_to_transform: numbers of the layers whose modules are meant; None is all of them.
        layers_pattern: what stands before such a number in a module's name ("layers"); None is any name.
        use_dora: see the top of this file.
        use_rslora: lora_alpha / sqrt(r) instead.
        rank_pattern, alpha_pattern: other r and lora_alpha for the modules whose names end in a regular expression.
        modules_to_save: the same, of modules that are trained whole and kept in the adapter: a head, a projector.
        parts: names of registered parts that the adapter was trained with, where they are not the base's
            (`config.Parts`); under "minivlm2vec" in the file.
        init_lora_weights: how A begins: "gaussian", of deviation 1 / r (VLM2Vec's), or True, uniform (PEFT's
            default). B begins at zero, so that a new adapter changes nothing.
    """

    r: int = 8
    lora_alpha: float = 64
    lora_dropout: float = 0.1
    target_modules: tuple[str, ...] | str = TARGETS
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_lora_weights: bool | str = "gaussian"
    modules_to_save: tuple[str, ...] = ()
    parts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name, needed in NEEDED.items():
            if not needed(value := getattr(self, name)):
                raise ValueError(f"{name} is {shown(value)}, which is not what belongs there")
        if self.r < 1:
            raise ValueError(f"r is {self.r!r}; a rank of at least 1 is needed")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; a share from 0 to less than 1 is needed")

    @classmethod
    def from_json(cls, path: Path) -> "LoraConfig":
        """Raises CheckpointError for what is no LoRA, or asks for something that is not done here."""
        raw = read_object(path, f"an adapter folder needs an {CONFIG}")
        if raw.get("peft_type") != "LORA":
            raise CheckpointError(f"{path} describes no LoRA: peft_type is not 'LORA'")
        _refuse_unsupported(path, raw)
        if absent := [key for key in MUST_SAY if raw.get(key) is None]:
            raise CheckpointError(f"{path}: {', '.join(absent)} is missing")
        raw["parts"] = raw.pop(OWN, None)
        known = {k: raw[k] for k in cls.__dataclass_fields__ if raw.get(k) is not None}
        known |= {k: tuple(v) for k, v in known.items() if isinstance(v, list)}
        try:
            return cls(**known)
        except (TypeError, ValueError) as e:
            raise CheckpointError(f"{path}: {e}") from None

    def to_json(self, base_model: str | None = None) -> str:
        raw = {"peft_type": "LORA", "base_model_name_or_path": base_model, "bias": "none", "inference_mode": True}
        own = asdict(self)
        if parts := own.pop("parts"):
            own[OWN] = parts
        return json.dumps(raw | own, indent=2) + "\n"

    def targets(self, key: str) -> bool:
        """Whether the checkpoint's module of that name is adapted; the rules are PEFT's."""
        if not _fits(self.target_modules, key) or _fits(self.exclude_modules, key):
            return False
        if _is_inside(f"{key}.weight", self.modules_to_save):
            return False
        if self.layers_to_transform in (None, ()) or isinstance(self.target_modules, str) or key in self.target_modules:
            return True
        layer = next((m["idx"] for e in self._before_layers() if (m := _match(e, key))), None)
        return layer is not None and int(layer) in _several(self.layers_to_transform)

    def expressions(self) -> list[str]:
        """Every regular expression that is matched with modules' names."""
        whole = [m for m in (self.target_modules, self.exclude_modules) if isinstance(m, str)]
        return [*whole, *map(_at_the_end, (*self.rank_pattern, *self.alpha_pattern)), *self._before_layers()]

    def _before_layers(self) -> list[str]:
        if self.layers_to_transform is None:
            return []
        return [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in _several(self.layers_pattern or "[^.]*")]

    def rank(self, key: str) -> int:
        return _by_pattern(self.rank_pattern, key, self.r)

    def scale(self, key: str, rank: int) -> float:
        alpha = _by_pattern(self.alpha_pattern, key, self.lora_alpha)
        return alpha / rank**0.5 if self.use_rslora else alpha / rank


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e12


def _whole(value: Any) -> bool:
    return type(value) is int and _number(value)


def _names(value: Any) -> bool:
    return all(isinstance(name, str) for name in _several(value))


def _several(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list, set)) else (value,)


NEEDED: dict[str, Callable[[Any], bool]] = {  # of each field, in a file or in Python
    "r": _whole,
    "lora_alpha": _number,
    "lora_dropout": _number,
    "target_modules": _names,
    "exclude_modules": _names,
    "layers_to_transform": lambda v: v is None or all(map(_whole, _several(v))),
    "layers_pattern": lambda v: v is None or _names(v),
    "use_dora": lambda v: type(v) is bool,
    "use_rslora": lambda v: type(v) is bool,
    "rank_pattern": lambda v: isinstance(v, dict) and all(_whole(n) and n > 0 for n in v.values()),
    "alpha_pattern": lambda v: isinstance(v, dict) and all(map(_number, v.values())),
    "init_lora_weights": lambda v: isinstance(v, (bool, str)),
    "modules_to_save": lambda v: isinstance(v, (tuple, list)) and _names(v),
    "parts": lambda v: isinstance(v, dict),
}


class RowSlice(NamedTuple):
    """Where a module of the checkpoint is in the model: rows start to stop of a Linear."""

    module: str
    start: int
    stop: int


class Adapter(nn.Module):
    """The change of rows start to stop of a Linear: A, B and, for DoRA, m; float32.

    Attributes:
        key: the module's name in the checkpoint.
        scale: s.
    """

    def __init__(self, key: str, place: RowSlice, A: Tensor, B: Tensor, magnitude: Tensor | None, scale: float):
        super().__init__()
        self.key, self.start, self.stop, self.scale = key, place.start, place.stop, scale
        self.lora_A = nn.Parameter(A.float())
        self.lora_B = nn.Parameter(B.float())
        self.lora_magnitude_vector = None if magnitude is None else nn.Parameter(magnitude.float())

    @torch.no_grad()
    def row_norms(self, weight: Tensor) -> Tensor:
        """|W + s B A| of each row, [n] float32, of weight [n, K], without the product B A [n, K]:
        |w|^2 + 2 s b . (A w) + s^2 b A A^T b^T."""
        A, B, s = self.lora_A, self.lora_B, self.scale
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        cross = (B * (weight @ A.to(weight.dtype).T).float()).sum(1)
        return (squares + 2 * s * cross + s * s * ((B @ (A @ A.T)) * B).sum(1)).clamp_min(0).sqrt()


class AdaptedLinear(Linear):
    """A frozen Linear with adapters, each on rows of its own."""

    def __init__(self, linear: Linear, dropout: float = 0.0):
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.adapters: Any = nn.ModuleList()  # of Adapter

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for a in self.adapters:
            change = self._change(a, x, y[..., a.start : a.stop])
            y = y + F.pad(change, (a.start, self.out_features - a.stop))
        return y

    def _change(self, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        """What the adapter adds to the outputs y of its rows. As in PEFT, DoRA with dropout on sees W x through the
        same dropout."""
        dropped = self.dropout(x)
        low = F.linear(F.linear(dropped, adapter.lora_A.to(x.dtype)), adapter.lora_B.to(x.dtype)) * adapter.scale
        if adapter.lora_magnitude_vector is None:
            return low
        weight = self.weight[adapter.start : adapter.stop]
        factor = (adapter.lora_magnitude_vector / adapter.row_norms(weight)).to(x.dtype)
        if self.training and self.dropout.p > 0:
            y = F.linear(dropped, weight)
        elif self.bias is not None:
            y = y - self.bias[adapter.start : adapter.stop]
        return (factor - 1) * y + factor * low

    @torch.no_grad()
    def merged(self) -> Linear:
        """A plain Linear with the adapters in its weight, which is this one's, written over; computed in float32."""
        for a in self.adapters:
            rows = self.weight[a.start : a.stop]
            weight = rows.float() + a.scale * (a.lora_B @ a.lora_A)
            if a.lora_magnitude_vector is not None:
                weight *= (a.lora_magnitude_vector / weight.norm(dim=1))[:, None]
            rows.copy_(weight)
        with torch.device("meta"):
            linear = Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)


def add_lora(model: M, config: LoraConfig, *, generator: torch.Generator | None = None) -> M:
    """Freezes the model and puts new adapters on the modules that `config` targets. Returns the model.

    Parts that the model's checkpoint does not have, and `config.modules_to_save`, are trained whole beside them.
    generator: for A's first numbers, on the CPU. Raises ValueError where a target, or a module to save, fits no module,
    or all are excluded.
    """
    places = _places(model)
    targets = config.target_modules
    each = {targets: targets} if isinstance(targets, str) else {t: (t,) for t in targets}
    unused = [name for name, one in each.items() if not any(_fits(one, key) for key in places)]
    if unused and targets != TARGETS:  # another tower may lack some of the usual ones
        raise ValueError(f"target_modules: no module fits {', '.join(unused)}")
    places = {key: place for key, place in places.items() if config.targets(key)}
    if not places:
        raise ValueError("exclude_modules: no module is left for an adapter")
    whole = whole_tensors(model, with_new_parts(config, model))
    model.requires_grad_(False)
    for tensor in whole.values():
        tensor.requires_grad_(tensor.is_floating_point() and isinstance(tensor, nn.Parameter))
    for key, place in places.items():
        linear: Any = model.get_submodule(place.module)
        r, (n, K) = config.rank(key), (place.stop - place.start, linear.in_features)
        A, B = _first_A(r, K, config.init_lora_weights, generator), torch.zeros(n, r)
        _attach(model, key, place, A, B, None, config)
    return model


def exclude_frozen(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The configuration that also excludes the modules whose weights are frozen in the model, by their full names."""
    targets = {k: model.get_submodule(p.module) for k, p in _places(model).items() if _fits(config.target_modules, k)}
    if all(layer.weight.requires_grad for layer in targets.values()):
        return config
    kept = {k for k, layer in targets.items() if config.targets(k) and layer.weight.requires_grad}
    return replace(config, exclude_modules=tuple(k for k in targets if k not in kept))


def load_adapter(model: M, folder: str | Path) -> M:
    """Freezes the model and puts an adapter folder's adapters on it, to train them on. Returns the model.

    Raises CheckpointError where the folder holds no LoRA, a tensor of it has no place in the model, or a module that
    it adapts by its configuration has no tensors.
    """
    config = LoraConfig.from_json(Path(folder) / CONFIG)
    tensors = _read_tensors(Path(folder) / WEIGHTS)
    whole = _take_whole(model, tensors, config, Path(folder) / WEIGHTS)
    places, found = _places(model), _by_module(tensors, _dropped(model))
    _try_expressions(Path(folder) / CONFIG, config.expressions(), places)
    lost = [f"{key}.{kind}" for key, kinds in found.items() for kind in kinds if key not in places]
    if lost or not found:
        raise CheckpointError(
            f"{Path(folder) / WEIGHTS}: "
            + (f"{len(lost)} of {len(tensors)} tensors have no place in the model: {some(lost, 5)}" if lost else "it "
               "holds no adapter of a module that the model computes")
        )  # fmt: skip
    if absent := [key for key in places if config.targets(key) and key not in found]:
        raise CheckpointError(f"{Path(folder) / WEIGHTS} has no tensors of {len(absent)} modules that target_modules "
                              f"names: {some(absent)}")  # fmt: skip
    for key, kinds in found.items():
        _check(key, kinds, places[key], model, config)
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    for key, (rows, value) in whole.items():
        rows.copy_(value)
        if parameter_of(key)[0] in parameters:
            parameters[parameter_of(key)[0]].requires_grad_(True)
    for key, kinds in found.items():
        A, B, magnitude = kinds["lora_A.weight"], kinds["lora_B.weight"], kinds.get("lora_magnitude_vector")
        _attach(model, key, places[key], A, B, magnitude, config)
    return model


def merge_adapter(model: M, folder: str | Path) -> M:
    """Adds an adapter folder to the model's weights, for inference. Returns the model. Errors as `load_adapter`."""
    return merge_lora(load_adapter(model, folder)).requires_grad_(False)


def merge_lora(model: M) -> M:
    """Every adapted layer of the model becomes a plain one with the adapters in its weight. Returns the model."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, AdaptedLinear)]:
        model.set_submodule(name, layer.merged())
    return model


def save_adapter(model: nn.Module, folder: str | Path, config: LoraConfig, *, base_model: str | None = None) -> None:
    """Writes the model's adapters as PEFT does: adapter_config.json and adapter_model.safetensors, in which
    `config.modules_to_save` lie too. Parts that the model's checkpoint does not have are kept and named there.

    base_model: what the adapters belong to, a folder or a Hub name, for the config. Raises ValueError where the model
    has no adapter, or trains something that would not be in the file.
    """
    tensors = {name: t.detach() for name, t in adapter_tensors(model)}
    if not tensors:
        raise ValueError("the model has no adapter of `add_lora` to write (PEFT writes its own by save_pretrained)")
    config = with_new_parts(config, model)
    whole = whole_tensors(model, config)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and ".adapters." not in n and n not in whole]
    if trained:
        raise ValueError(f"{some(trained)} are trained too, and would not be in the adapter: modules_to_save keeps "
                         "modules that are trained whole")  # fmt: skip
    for name, t in whole.items():
        tensors |= under_keys(name, t.detach())
    write_adapter(folder, tensors, config, base_model=base_model)


def write_adapter(
    folder: str | Path, tensors: dict[str, Tensor], config: LoraConfig, *, base_model: str | None = None
) -> None:
    """`save_adapter` of tensors as `adapter_tensors` names them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: t.contiguous() for name, t in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(config.to_json(base_model), encoding="utf-8")


def adapter_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names, as in the checkpoint, and values of the adapters' tensors."""
    for a in (m for m in model.modules() if isinstance(m, Adapter)):
        yield f"{a.key}.lora_A.weight", a.lora_A
        yield f"{a.key}.lora_B.weight", a.lora_B
        if a.lora_magnitude_vector is not None:
            yield f"{a.key}.lora_magnitude_vector", a.lora_magnitude_vector


def whole_tensors(model: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """Parameters and saved buffers of `config.modules_to_save`, but of modules that the model never computes (lm_head).
    Raises ValueError for a name that fits none."""
    tensors = saved_tensors(model)
    computed = [one for one in config.modules_to_save if not f"{one}.".startswith(_dropped(model))]
    found = {one: [n for n in tensors if _is_inside(n, (one,))] for one in computed}
    if unused := [one for one, names in found.items() if not names]:
        raise ValueError(f"modules_to_save: no module with parameters fits {', '.join(unused)}")
    return {name: tensors[name] for names in found.values() for name in names}


def with_new_parts(config: LoraConfig, model: nn.Module, base: VLM2VecConfig | None = None) -> LoraConfig:
    """The configuration that names the model's parts which the base does not have, and keeps them whole. base: default
    that of the folder which the model was loaded from."""
    if not isinstance(model, VLM2Vec) or (base is None and model.checkpoint is None):
        return config
    base = base or VLM2VecConfig.from_json(cast(Path, model.checkpoint))
    own, tensors = replace(base, parts=named_parts(model)), saved_tensors(model)
    new = (part.rstrip(".") for part in new_parts(base, own) if any(n.startswith(part) for n in tensors))
    modules = tuple(dict.fromkeys([*config.modules_to_save, *new]))
    return replace(config, modules_to_save=modules, parts=config.parts | changes(base.parts, own.parts))


def with_adapters_parts(config: VLM2VecConfig, folder: str | Path) -> VLM2VecConfig:
    """A base's configuration with the parts that the adapter of a folder was trained with."""
    return config.with_parts(**LoraConfig.from_json(Path(folder) / CONFIG).parts)


def _is_inside(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a tensor lies in one of these modules, by the checkpoint's names of them or the model's."""
    paths = (name, *keys_of(name))
    return any(_fits(modules, path[:i]) for path in paths for i, c in enumerate(path) if c == ".")


def _take_whole(model: nn.Module, tensors: dict[str, Tensor], config: LoraConfig, file: Path) -> dict[str, tuple]:
    """Takes the tensors of `modules_to_save` out of an adapter's: {key: (place in the model, value)}."""
    try:
        found = whole_tensors(model, config)
    except ValueError as e:
        raise CheckpointError(f"{file}: {e}") from None
    places = {
        key: rows
        for name, t in found.items()
        for key, rows in zip(keys_of(name), t.detach().tensor_split(len(keys_of(name))) if t.ndim else [t], strict=True)
    }
    if lost := [key for key in places if PREFIX + key not in tensors]:
        raise CheckpointError(f"{file} has no {some(lost)}, which modules_to_save names")
    whole = {key: (rows, tensors.pop(PREFIX + key)) for key, rows in places.items()}
    for key, (rows, value) in whole.items():
        if value.shape != rows.shape:
            raise CheckpointError(f"{key} in {file} has shape {list(value.shape)}, the model needs {list(rows.shape)}")
        if value.is_floating_point() != rows.is_floating_point():
            raise CheckpointError(f"{key} in {file} has dtype {value.dtype}, the model needs {rows.dtype}")
    return whole


def _places(model: nn.Module) -> dict[str, RowSlice]:
    """Every module of the checkpoint that is a Linear, or rows of one, here."""
    places: dict[str, RowSlice] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and hasattr(module, "weight"):
            keys = [key.removesuffix(".weight") for key in keys_of(f"{name}.weight")]
            n = module.out_features // len(keys)
            places |= {key: RowSlice(name, i * n, (i + 1) * n) for i, key in enumerate(keys)}
    return places


def _attach(
    model: nn.Module, key: str, place: RowSlice, A: Tensor, B: Tensor, magnitude: Tensor | None, config: LoraConfig
) -> None:
    layer = model.get_submodule(place.module)
    if type(layer) is Linear:
        layer = AdaptedLinear(layer, config.lora_dropout).train(layer.training)
        model.set_submodule(place.module, layer)
    if not isinstance(layer, AdaptedLinear):
        raise ValueError(f"{place.module} is a {type(layer).__name__}: adapters go on plain layers, before others")
    if any(a.key == key for a in layer.adapters):
        raise ValueError(f"{key} has an adapter already; merge it first")
    adapter = Adapter(key, place, A, B, magnitude, config.scale(key, A.shape[0])).to(layer.weight.device)
    if config.use_dora and magnitude is None:
        norms = adapter.row_norms(layer.weight[place.start : place.stop])
        adapter.lora_magnitude_vector = nn.Parameter(norms)
    layer.adapters.append(adapter)


def _first_A(r: int, K: int, init: bool | str, generator: torch.Generator | None) -> Tensor:
    A = torch.empty(r, K)
    if init == "gaussian":
        return A.normal_(std=1 / r, generator=generator)
    if init is True:
        return A.uniform_(-(K**-0.5), K**-0.5, generator=generator)  # kaiming_uniform with a = sqrt(5)
    raise ValueError(f"init_lora_weights is {init!r}; new adapters begin with 'gaussian' or true")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: an adapter folder needs it (pickled adapters are never read)")
    try:
        with safe_open(path, framework="pt") as f:
            dtypes = {key: f.get_slice(key).get_dtype() for key in f.keys()}  # noqa: SIM118 (no dict)
            for key, dtype in dtypes.items():
                if dtype not in (allowed := DTYPES if _TENSOR.fullmatch(key) else KNOWN):
                    raise CheckpointError(f"{path}: {key} has dtype {dtype}; supported are {', '.join(allowed)}")
            tensors = {key: f.get_tensor(key) for key in dtypes}
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from None
    bad = [key for key, t in tensors.items() if not t.isfinite().all()]
    if bad:
        raise CheckpointError(f"{path}: {some(bad, 5)} hold NaN or infinite values")
    return tensors


def _by_module(tensors: dict[str, Tensor], dropped: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """{module's key: {kind: tensor}}, without modules that the model never computes (the tower's last layer)."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        name = name.removeprefix(PREFIX)
        match = _TENSOR.fullmatch(name)
        key, kind = match.groups() if match else name.rpartition(".")[::2]
        if kind in found.get(key, ()):
            raise CheckpointError(f"{key}.{kind} is there twice, with and without {PREFIX} in front")
        if not (key + ".").startswith(dropped):
            found[key][kind] = tensor
    return found


def _dropped(model: nn.Module) -> tuple[str, ...]:
    config = getattr(model, "config", None)
    return () if config is None else drop_prefixes(config)


def _check(key: str, kinds: dict[str, Tensor], place: RowSlice, model: nn.Module, config: LoraConfig) -> None:
    needed = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if config.use_dora else set())
    if set(kinds) != needed:
        raise CheckpointError(f"the adapter of {key} has {', '.join(sorted(kinds))}; {', '.join(sorted(needed))} are "
                              f"needed (use_dora is {config.use_dora})")  # fmt: skip
    K, n, r = model.get_submodule(place.module).in_features, place.stop - place.start, config.rank(key)
    expected = {"lora_A.weight": (r, K), "lora_B.weight": (n, r), "lora_magnitude_vector": (n,)}
    for kind, tensor in kinds.items():
        if tuple(tensor.shape) != expected[kind]:
            raise CheckpointError(
                f"{key}.{kind} has shape {list(tensor.shape)}, the model and rank {r} need {list(expected[kind])}"
            )


def _refuse_unsupported(path: Path, raw: dict[str, Any]) -> None:
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(CHANGES_BASE):
        raise CheckpointError(f"{path}: init_lora_weights is {init!r}, which changes the base model too; convert the "
                              "adapter to a plain LoRA with PEFT")  # fmt: skip
    if raw.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {raw['bias']!r}; only 'none' is supported")
    known = {*LoraConfig.__dataclass_fields__, *IRRELEVANT, "peft_type", "bias", OWN}
    for key in raw.keys() - known:
        if raw[key]:
            raise CheckpointError(f"{path}: {key} is {raw[key]!r}, which is not supported")


def _fits(modules: tuple[str, ...] | str, key: str) -> bool:
    """Whether a module's name ends in one of these; a str is a regular expression for all of it. As in PEFT."""
    if isinstance(modules, str):
        return modules == "all-linear" or _match(modules, key, whole=True) is not None
    return any(key == m or key.endswith(f".{m}") for m in modules)


def _by_pattern(patterns: dict[str, Any], key: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of the name, as PEFT looks it up."""
    return next((v for p, v in patterns.items() if _match(_at_the_end(p), key)), default)


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _match(expression: str, key: str, whole: bool = False) -> re.Match | None:
    try:
        return re.fullmatch(expression, key) if whole else re.match(expression, key)
    except (re.error, RecursionError, OverflowError) as e:
        raise ValueError(f"{shown(expression)} is not a regular expression: {e}") from None


def _try_expressions(path: Path, expressions: list[str], keys: Iterable[str]) -> None:
    """Raises CheckpointError for regular expressions that are none, or take for ever: nothing stops one within this
    process, so another tries them first."""
    pairs = [(e, key) for e in expressions for key in keys]
    if not pairs:
        return
    command = [sys.executable or "python3", "-I", "-S", "-c", _TRY]
    fault = f"{path}: the regular expressions {shown(expressions)}"
    try:
        subprocess.run(command, input=json.dumps(pairs), text=True, capture_output=True, timeout=PATIENCE, check=True)
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{fault} take more than {PATIENCE:.0f} s on the names of modules") from None
    except subprocess.CalledProcessError as e:
        raise CheckpointError(f"{fault} cannot be used: {[*e.stderr.splitlines(), 'killed'][-2:][0]}") from None
