"""A checkpoint's tensors -> parameters, strictly, and back.

Tensors are mapped, cast and copied one at a time, and each file is unmapped
again before the next tensor, so loading needs the model's own memory and little more.
"""

import hashlib
import json
import logging
import math
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from .atomic import replacing
from .checkpoint import (
    COPIED,
    DTYPES,
    KNOWN,
    Source,
    copy_tensor,
    drop_prefixes,
    keys_of,
    parameter_of,
    read_headers,
    tensor_bytes,
)
from .checkpoint import MINI as MINI  # these were here before, and scripts import them from here
from .checkpoint import fingerprint as fingerprint
from .checkpoint import resolve as resolve
from .config import Parts, VLM2VecConfig, read_object
from .errors import CheckpointError, Option, OptionError, some
from .linear import Embedding, Linear
from .model import VLM2Vec
from .registry import find, name_of

_ALIKE: dict[type[nn.Module], type[nn.Module]] = {Linear: nn.Linear, Embedding: nn.Embedding}  # one may stand for both

log = logging.getLogger("minivlm2vec")
M = TypeVar("M", bound=VLM2Vec)


def load_model(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    backend: str | None = None,
    model_class: type[M] | None = None,
    config: VLM2VecConfig | None = None,
    skip: Sequence[str] = (),
    show_progress: bool = False,
) -> M:
    """Builds the model of a checkpoint folder and fills it; dtype None is that of config.json.

    model_class: VLM2Vec or a class derived from it; default the one that config.json names (`registry.register`).
    config: instead of config.json's, for other parts: VLM2VecConfig.from_json(folder).with_parts(pooling="mean").
        What such a part has and the checkpoint has not begins by its own `reset_parameters`.
    skip: see `load_weights`.
    Returned in eval mode, without gradients. Raises CheckpointError naming the file, part or tensor at fault.
    """
    written = VLM2VecConfig.from_json(folder)
    config = config or written
    model = empty_model(config, backend=backend, model_class=model_class)
    skip = (*skip, *new_parts(written, config))
    dtype = as_dtype(dtype or config.dtype)
    load_weights(model, folder, device=device, dtype=dtype, skip=skip, show_progress=show_progress)
    model.checkpoint = Path(folder)
    return model.eval().requires_grad_(False)


def empty_model(config: VLM2VecConfig, *, backend: str | None = None, model_class: type[M] | None = None) -> M:
    """The model that a configuration describes, without memory for its parameters (on the meta device)."""
    with torch.device("meta"):
        return cast(M, (model_class or find("model", config.parts.model))(config, backend=backend))


def new_parts(written: VLM2VecConfig, config: VLM2VecConfig) -> tuple[str, ...]:
    """Beginnings of the names of parameters that a checkpoint of another configuration cannot have: "pooling."."""
    places = {"tower": "vision.", "projector": "projector.", "pooling": "pooling."}
    return tuple(p for kind, p in places.items() if getattr(written.parts, kind) != getattr(config.parts, kind))


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """torch.float16 of itself, and of "float16". Raises OptionError for what parameters cannot be."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise OptionError(Option("dtype"), f" is {dtype!r}; bfloat16, float16 or float32 is needed")
    return found


def load_weights(
    model: VLM2Vec,
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    skip: Sequence[str] = (),
    show_progress: bool = False,
) -> None:
    """Fills every parameter and saved buffer of a model, which may be on the meta device. Parameters get `dtype`;
    buffers keep theirs.

    skip: beginnings of parameters' names that are new ("projector."): the checkpoint's tensors of such names are not
        read, and their modules begin by their own `reset_parameters`. They are named in a line of the log.

    Strict in all else: a tensor that is missing, unexpected, of another shape, or not finite raises CheckpointError.
    """
    sources = read_headers(folder)
    plan, tensors = assign(model, sources, skip=skip), saved_tensors(model)
    checks: dict[str, Tensor] = {}
    places = _places(model)
    items = tqdm(plan.items(), desc="Loading weights", unit="tensor", disable=not show_progress)
    for name, parts in items:
        like = tensors[name]
        is_parameter = isinstance(like, nn.Parameter)
        value = torch.empty(like.shape, dtype=dtype if is_parameter else like.dtype, device=device)
        for rows, source in zip(value.split([s.shape[0] for s in parts]) if like.ndim else [value], parts, strict=True):
            copy_tensor(source, rows)
        _set(model, places[name], value)
        if value.is_floating_point():
            checks[name] = value.sum(dtype=torch.float32)  # NaN and infinities survive a sum
    _begin_new(model, {name: t for name, t in tensors.items() if name not in plan}, places, device, dtype)
    _check_finite(model, checks)
    _check_tied(sources)
    _check_filled(model)


def assign(model: VLM2Vec, sources: list[Source], *, skip: Sequence[str] = ()) -> dict[str, list[Source]]:
    """Which tensors of the checkpoint make up which parameter or buffer: {name: tensors, stacked by rows}."""
    drop = drop_prefixes(model.config)
    found: dict[str, dict[int, Source]] = defaultdict(dict)
    unexpected = []
    tensors = {name: t for name, t in saved_tensors(model).items() if not name.startswith(tuple(skip))}
    for source in sources:
        name, part = parameter_of(source.key)
        if name not in tensors:
            if not source.key.startswith(drop) and not name.startswith(tuple(skip)):
                unexpected.append(source.key)
        elif part not in found[name] or not source.key.startswith("model.vision_embed_tokens.wte."):
            found[name][part] = source
    missing = [n for n in tensors if len(found[n]) < len(keys_of(n))]
    if missing or unexpected:
        raise CheckpointError(
            "the checkpoint does not fit the model:"
            + (f" {len(missing)} parameters have no tensor: {some(missing)}." if missing else "")
            + (f" {len(unexpected)} tensors have no place: {some(unexpected)}." if unexpected else "")
            + " Beginnings of the names of what is new, or left out on purpose, are given by `skip`."
        )
    plan = {name: [found[name][i] for i in sorted(found[name])] for name in tensors}
    for name, parts in plan.items():
        _check_shape(name, tensors[name], parts)
    return plan


def save_model(
    model: VLM2Vec,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Writes a model in the published layout, from which `load_model` and `Embedder.from_pretrained` read it back.

    Parameters and buffers have the published names where they have a place there, and their own elsewhere. The folder
    appears when it is whole. Configuration and tokenizer are copied from `source`: a checkpoint folder, by default that
    which the model was loaded from; config.json says the model's dtype, sizes and parts.

    Raises FileExistsError where the folder is there already (overwrite replaces all that is in a checkpoint's folder,
    and no other), ValueError for a model that cannot be saved: with adapters that are not merged (see
    `lora.save_adapter`), on the meta device, not finite, or changed in a way that config.json does not tell.
    """
    source = source or getattr(model, "checkpoint", None)
    if source is None:
        raise ValueError("the model was not loaded from a folder: source= says whose config and tokenizer to copy")
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; overwrite=True replaces it")
    if folder.exists() and not (folder / "config.json").is_file():
        raise FileExistsError(f"{folder} is no checkpoint, so overwrite=True does not replace it")
    tensors = checkpoint_tensors(model)
    config = described(model)
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if unknown := dtypes - set(DTYPES.values()):
        raise ValueError(f"the model holds {unknown.pop()}; {', '.join(map(str, DTYPES.values()))} can be saved")
    if len(dtypes) == 1:
        config = replace(config, dtype=str(dtypes.pop()).removeprefix("torch."))
    write_checkpoint(folder, tensors, config, source=source, max_shard_size=max_shard_size)
    return folder


def described(model: VLM2Vec) -> VLM2VecConfig:
    """The model's configuration, its parts as they are now: what config.json says of it.

    Raises ValueError naming the modules that a model made from that configuration would not have, and in which nothing
    that is registered stands; what is saved has to come back.
    """
    config = replace(model.config, parts=named_parts(model))
    if changed := _differences(model, empty_model(config)):
        raise ValueError(
            f"a model made from the config.json would be another: {some(changed)}. Say sizes in model.config, register "
            "the part (@register, see minivlm2vec/registry.py), or make the change in a registered class"
        )
    return config


def named_parts(model: VLM2Vec) -> Parts:
    """Its parts by the names that they are registered under; those that have none go by what `model.config` says.
    Raises ValueError for a class that is not registered."""
    parts = {"model": model, "tower": model.vision, "projector": model.projector, "pooling": model.pooling}
    names = {kind: name_of(kind, part) for kind, part in parts.items()}
    if names["model"] is None:
        raise ValueError(f"{type(model).__name__} is not registered, so that config.json cannot name it: put "
                         '@register("model", NAME) above the class')  # fmt: skip
    known: dict[str, Any] = {kind: name for kind, name in names.items() if name is not None}
    return replace(model.config.parts, causal=model.causal, **known)


def _differences(model: VLM2Vec, again: VLM2Vec) -> list[str]:
    """What the first has and the second has not: kinds of modules, shapes of tensors, the pooling."""
    ours, theirs = (
        {n: _ALIKE.get(type(m), type(m)).__name__ for n, m in one.named_modules()}
        | {n: f"a tensor {list(t.shape)}" for n, t in saved_tensors(one).items()}
        | {"pooling": getattr(one.pooling, "__qualname__", type(one.pooling).__name__)}
        for one in (model, again)
    )
    names = [n for n in ours | theirs if n and ours.get(n) != theirs.get(n)]
    return [f"{n} is {ours.get(n, 'nothing')}, and would be {theirs.get(n, 'nothing')}" for n in names]


def checkpoint_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a model under the checkpoint's keys. Raises ValueError, see `save_model`."""
    tensors: dict[str, Tensor] = {}
    once = saved_tensors(model).keys()  # what is tied, once
    for name, value in model.state_dict().items():
        if name.endswith("_extra_state"):
            raise ValueError(f"{name} is state that is no tensor, which a checkpoint cannot hold: make it a buffer")
        if name not in once:
            continue
        if type(value) not in (Tensor, nn.Parameter):
            raise ValueError(f"{name} is a {type(value).__name__}, stored in a way that no checkpoint has: save the "
                             "model before it is quantised or split")  # fmt: skip
        if ".adapters." in name or ".lora_" in name:
            raise ValueError(f"{name} belongs to an adapter: merge it first (lora.merge_lora), or save it by itself "
                             "(lora.save_adapter)")  # fmt: skip
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device: it has no values to save")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values")
        tensors |= under_keys(name, value)
    return tensors


def under_keys(name: str, value: Tensor) -> dict[str, Tensor]:
    """A parameter under the checkpoint's keys. Rows of the tower's qkv_proj are copied, as files hold no views."""
    keys = keys_of(name)
    if len(keys) == 1:
        return {keys[0]: value.contiguous()}
    return dict(zip(keys, (part.clone() for part in value.tensor_split(len(keys))), strict=True))


def write_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    config: VLM2VecConfig,
    *,
    source: str | Path,
    max_shard_size: str = "5GB",
) -> None:
    """Writes tensors under the checkpoint's keys, the configuration, and the tokenizer of the folder `source`, whose
    config.json keeps what is not known here."""
    raw = config.written_into(read_object(Path(source) / "config.json", "the configuration is copied from it"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as new:
        new.mkdir()
        save_torch_state_dict(tensors, new, max_shard_size=max_shard_size, metadata={"format": "pt"})
        for name in COPIED:
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, new / name)
        (new / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def model_fingerprint(model: nn.Module, *more: Any) -> str:
    """`fingerprint` of a plain model in memory, whatever was done to it since it was loaded.

    sha256 of its class, configuration, pooling and causality, of `more`, and of name, shape, dtype and the first and
    last row of every parameter and saved buffer.
    """
    pooling, causal = getattr(model, "pooling", None), getattr(model, "causal", None)
    parts = [type(model).__qualname__, getattr(pooling, "__qualname__", type(pooling).__qualname__), causal]
    digest = hashlib.sha256(repr([*parts, getattr(model, "config", None), *more]).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        if value.numel():
            rows = torch.atleast_1d(value.dequantize() if type(value).__module__.startswith("torchao") else value)
            digest.update(torch.cat([rows[:1], rows[-1:]]).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_shape(name: str, like: Tensor, parts: list[Source]) -> None:
    for source in parts:
        expected = (like.shape[0] // len(parts), *like.shape[1:]) if like.ndim else ()
        if isinstance(source.dtype, str):
            raise CheckpointError(f"{source.file}: {source.key} has dtype {source.dtype}; supported are "
                                  f"{', '.join(KNOWN)}")  # fmt: skip
        if source.shape != expected:
            raise CheckpointError(
                f"{source.key} in {source.file.name} has shape {list(source.shape)}, the model needs {list(expected)}"
            )
        if like.is_floating_point() != source.dtype.is_floating_point:
            raise CheckpointError(f"{source.key} in {source.file.name} has dtype {source.dtype}, the model needs "
                                  f"{like.dtype}")  # fmt: skip


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, and the buffers that a checkpoint holds; one that stands in several places under its first name."""
    buffers = {
        f"{prefix}.{name}".lstrip("."): b
        for prefix, module in model.named_modules()
        for name, b in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return dict(model.named_parameters()) | buffers


def _begin_new(
    model: nn.Module,
    new: dict[str, Tensor],
    places: dict[str, list[str]],
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Fills what the checkpoint has no tensor for, by the modules' own `reset_parameters`. places: see `_places`."""
    if not new:
        return
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in new):
        module = model.get_submodule(owner)
        reset = getattr(module, "reset_parameters", None)
        if not callable(reset):
            raise ValueError(
                f"{owner or type(model).__name__} is new and a {type(module).__name__}, which has no reset_parameters "
                "to begin with: give it one that fills its parameters and buffers"
            )
        kept = {n: t for n, t in module.state_dict().items() if "." not in n and f"{owner}.{n}".lstrip(".") not in new}
        for name in (n for n in new if n.rpartition(".")[0] == owner):
            like = new[name]
            value = torch.empty_like(like, device=device, dtype=dtype if like.is_floating_point() else None)
            _set(model, places[name], value.fill_(math.nan) if value.is_floating_point() else value.zero_())
        with torch.no_grad():
            reset()
            for name, value in kept.items():
                getattr(module, name).copy_(value)
    tensors = saved_tensors(model)
    if forgotten := [n for n in new if tensors[n].is_floating_point() and tensors[n].isnan().any()]:
        raise ValueError(f"{some(forgotten)} are new, and reset_parameters of their modules leaves them unset")
    log.warning("%d new parameters begin by reset_parameters: %s", len(new), some([*new], 6))


def _check_finite(model: nn.Module, sums: dict[str, Tensor]) -> None:
    if not sums or torch.stack([s.cpu() for s in sums.values()]).isfinite().all():
        return
    for name in [n for n, s in sums.items() if not s.isfinite()]:
        value = saved_tensors(model)[name]
        bad = int((~value.isfinite()).sum())
        if bad:
            raise CheckpointError(f"{name} holds {bad:,} values that are NaN or infinite, of "
                                  f"{value.numel():,}")  # fmt: skip


def _check_filled(model: nn.Module) -> None:
    """Raises ValueError for a tensor that is left without values: a buffer that no checkpoint holds, an attribute."""
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    left += [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name, t in vars(module).items()
        if isinstance(t, Tensor) and t.is_meta
    ]
    if left:
        raise ValueError(
            f"{some(left)}: a model is built on the meta device, and no checkpoint holds plain attributes or buffers "
            'with persistent=False; make them with device="cpu", or in `forward`'
        )


def _check_tied(sources: list[Source]) -> None:
    both = [s for s in sources if parameter_of(s.key)[0] == "decoder.embed_tokens.weight"]
    if len(both) > 1:
        first, *others = map(tensor_bytes, both)
        if not all(torch.equal(first, other) for other in others):
            raise CheckpointError(f"{' and '.join(s.key for s in both)} are one tensor in the model and differ in the "
                                  "checkpoint")  # fmt: skip


def _places(model: nn.Module) -> dict[str, list[str]]:
    """All names of each tensor (one that is tied stands in several places), by the first of them."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names[id(tensor)].append(name)
    return {places[0]: places for places in names.values()}


def _set(model: nn.Module, names: Sequence[str], value: Tensor) -> None:
    """Puts a tensor into all its places."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        setattr(module, leaf, value)
