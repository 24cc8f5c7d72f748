"""What lies in a checkpoint's folder: where it is, which tensors its files hold, and what they are called.

Nothing is ever unpickled. The model's own names, and how parameters are filled and saved, are in weights.py.
"""

import hashlib
import logging
import os
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import VLM2VecConfig, read_object
from .errors import CheckpointError, some

_CLIP = "model.vision_embed_tokens.img_processor.vision_model."

# The first prefix that fits a checkpoint's key decides. Leaf names are the same on both sides.
RULES = (
    (_CLIP + "embeddings.", "vision.embeddings."),
    (_CLIP + "pre_layrnorm.", "vision.pre_layrnorm."),
    (_CLIP + "encoder.layers.", "vision.layers."),
    ("model.vision_embed_tokens.img_projection.", "projector.mlp."),
    ("model.vision_embed_tokens.wte.", "decoder.embed_tokens."),  # the same tensor as model.embed_tokens
    ("model.vision_embed_tokens.", "projector."),
    ("model.", "decoder."),
)
# What a checkpoint may hold and this model never uses; `drop_prefixes` adds the tower's last layer.
DROPPED = ("lm_head.", _CLIP + "post_layernorm.", _CLIP + "embeddings.position_ids")
FUSED = ("q_proj", "k_proj", "v_proj")  # of the tower: rows of qkv_proj, in this order
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KNOWN = DTYPES | {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}  # buffers may be these too
BESIDE = ("processor_config.json", "tokenizer_config.json")
CONFIGS = ("config.json", "preprocessor_config.json", "tokenizer.json")
COPIED = (*CONFIGS, *BESIDE)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
FILES = ["*.safetensors", "*.safetensors.index.json", *COPIED, ADAPTER_CONFIG]
MINI = Path(__file__).parent / "mini" / "checkpoint"  # the bundled checkpoint

log = logging.getLogger("minivlm2vec")


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint: its key, its file, its shape and dtype, as the file's header says."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a str is the header's name of one that no parameter can have


def resolve(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    config_only: bool = False,
) -> Path:
    """The folder of a checkpoint. A name that is no folder here is looked up on the Hugging Face Hub, of which
    only safetensors and JSON files are fetched (into its usual cache); with `config_only`, config.json alone.

    The string "mini" is the small checkpoint that ships with this package, wherever one is; a folder of that name is
    "./mini", or a Path."""
    if name_or_path == "mini":
        return _bundled(announce=not config_only)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_path)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.exists()
    if looks_local:
        kind = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{name!r} {kind}: a checkpoint is a folder, or a Hub name such as TIGER-Lab/VLM2Vec-Full"
        )
    files = "config.json" if config_only else FILES
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=local_files_only, allow_patterns=files))
    except Exception as e:
        raise CheckpointError(
            f"{name!r} is no folder here, and could not be had from the Hugging Face Hub"
            + (f" at revision {revision!r}" if revision else "")
            + (" (local_files_only: the cache alone was looked at)" if local_files_only else "")
            + f": {type(e).__name__}: {e}"
        ) from e


def _bundled(*, announce: bool) -> Path:
    absent = [name for name in ("config.json", "tokenizer.json", "model.safetensors") if not (MINI / name).is_file()]
    if absent:
        raise CheckpointError(f"'mini' is the checkpoint that ships with this package, and {MINI} has no "
                              f"{', no '.join(absent)}: install minivlm2vec again (a folder of that name "
                              "is ./mini)")  # fmt: skip
    if announce:
        _say_that_mini_is_small()
    return MINI


@cache  # once a process, however often it is loaded
def _say_that_mini_is_small() -> None:
    beside = "; the folder ./mini was not taken" if Path("mini").is_dir() and not Path("mini").samefile(MINI) else ""
    log.warning(
        "'mini' is a small demonstration model, trained on emoji: it shows how things work, and knows nothing of "
        f'photographs. The real one is "TIGER-Lab/VLM2Vec-Full"{beside}.'
    )


def parameter_of(key: str) -> tuple[str, int]:
    """The parameter that a checkpoint's key belongs to, and which part of it (0 but for the tower's k and v)."""
    for prefix, target in RULES:
        if key.startswith(prefix):
            name = target + key[len(prefix) :]
            for part, projection in enumerate(FUSED):
                if name.startswith("vision.") and f".self_attn.{projection}." in name:
                    return name.replace(projection, "qkv_proj"), part
            return name, 0
    return key, 0


def keys_of(name: str) -> tuple[str, ...]:
    """The inverse of `parameter_of`: the checkpoint's keys of a parameter, three for the tower's qkv_proj, else one."""
    for prefix, target in RULES:
        if name.startswith(target) and not prefix.endswith(".wte."):
            key = prefix + name[len(target) :]
            fused = name.startswith("vision.") and ".self_attn.qkv_proj." in name
            return tuple(key.replace("qkv_proj", p) for p in FUSED) if fused else (key,)
    return (name,)


def drop_prefixes(config: VLM2VecConfig) -> tuple[str, ...]:
    return (*DROPPED, f"{_CLIP}encoder.layers.{config.vision.num_hidden_layers - 1}.")


def fingerprint(folder: str | Path, *, adapter: bool = False) -> str:
    """Which checkpoint, or which adapter, a folder holds, told in a fraction of a second for 8 GB of weights.

    sha256 of the configuration files, and of name, shape, dtype and the first and last row of every tensor. The same
    for any sharding. Two fine-tunes of one model differ in it, as training moves whole tensors; it is no defence
    against someone who makes two checkpoints alike on purpose.
    """
    folder, digest = Path(folder), hashlib.sha256()
    for name in (ADAPTER_CONFIG,) if adapter else CONFIGS:
        path = folder / name
        digest.update(name.encode() + (hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"-"))
    by_file: dict[Path, list[str]] = defaultdict(list)
    for source in read_header(folder / ADAPTER_WEIGHTS) if adapter else read_headers(folder):
        by_file[source.file].append(source.key)
    ends: dict[str, bytes] = {}
    for file, keys in by_file.items():
        with safe_open(file, framework="pt") as f:
            ends |= {key: _ends(f.get_slice(key)) for key in keys}
    for key in sorted(ends):
        digest.update(key.encode() + ends[key])
    return digest.hexdigest()


def _ends(tensor) -> bytes:
    """Shape, dtype, first and last row of a tensor in a file."""
    head = f"{tensor.get_shape()}{tensor.get_dtype()}".encode()
    if 0 in tensor.get_shape() or not tensor.get_shape():
        return head
    try:
        rows = torch.cat([tensor[:1], tensor[-1:]]).contiguous()
    except (SafetensorError, RuntimeError):  # numbers of 4 and 6 bits, which no parameter can be
        return head
    return head + rows.view(torch.uint8).numpy().tobytes()


def read_headers(folder: str | Path) -> list[Source]:
    """Every tensor of the folder's safetensors files, by their headers. Checks that each file is whole.

    Where model.safetensors stands beside an index of shards, the one that is whole is taken, and the log says so; two
    that are whole and differ raise CheckpointError."""
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    found, faults = {}, {}
    for file, read in ((index, _read_shards), (single, read_header)):
        try:
            if file.is_file():
                found[file] = read(file)
        except CheckpointError as e:
            faults[file] = str(e)
    if not found:
        raise CheckpointError(next(iter(faults.values()), _no_weights(folder)))
    if len(found) == 2 and single not in {s.file for s in found[index]}:
        faults |= _compare(folder, found)
    (taken, sources), *_ = [one for one in found.items() if one[0] not in faults]
    for file, fault in faults.items():
        log.warning("%s: the weights are read from %s, and not from %s: %s", folder, taken.name, file.name, fault)
    return sources


def _compare(folder: Path, found: dict[Path, list[Source]]) -> dict[Path, str]:
    """What makes one of two checkpoints in a folder incomplete; nothing where they are alike. Raises if they differ."""
    drop = drop_prefixes(VLM2VecConfig.from_json(folder))
    used = [{parameter_of(s.key): s for s in sources if not s.key.startswith(drop)} for sources in found.values()]
    for file, ours, theirs in zip(found, used, reversed(used), strict=True):
        if ours.keys() < theirs.keys():
            return {file: f"it has no {next(s.key for name, s in theirs.items() if name not in ours)}"}
    ours, theirs = used
    for name, one in (ours | theirs).items():
        if name not in ours or name not in theirs or not _same(ours[name], theirs[name]):
            raise CheckpointError(f"{folder} holds two checkpoints, by {' and '.join(f.name for f in found)}, and "
                                  f"{one.key} differs: take one of them away")  # fmt: skip
    return {}


def _same(a: Source, b: Source) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(tensor_bytes(a), tensor_bytes(b))


def tensor_bytes(source: Source) -> Tensor:
    """The tensor as it is in the file, [n, itemsize] uint8."""
    try:
        with safe_open(source.file, framework="pt") as f:
            return f.get_tensor(source.key).reshape(-1, 1).view(torch.uint8)
    except SafetensorError as e:
        raise CheckpointError(f"{source.file}: {source.key} cannot be read: {e}") from None


def _read_shards(index: Path) -> list[Source]:
    folder, weight_map = index.parent, read_object(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index} is not a safetensors index: it has no weight_map of names of tensors to files")
    files = sorted(set(weight_map.values()))
    if any(Path(f).name != f for f in files):
        raise CheckpointError(f"{index} names a file outside its folder")
    absent = [f for f in files if not (folder / f).is_file()]
    if absent:
        raise CheckpointError(f"{index.name} names {len(files)} files, of which {len(absent)} are not in {folder}: "
                              f"{some(absent)}")  # fmt: skip
    by_file = {f: {s.key: s for s in read_header(folder / f)} for f in files}
    lost = [key for key, f in weight_map.items() if key not in by_file[f]]
    if lost:
        raise CheckpointError(f"{index.name} says that {weight_map[lost[0]]} holds {some(lost)}, but it does not")
    return [by_file[f][key] for key, f in weight_map.items()]


def read_header(file: Path) -> list[Source]:
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist")
    try:
        with open(file, "rb") as f:
            if f.read(64).startswith(b"version https://git-lfs"):
                raise CheckpointError(f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` there, or "
                                      "download it from the Hub")  # fmt: skip
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (no dict)
            found = [(key, s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()]
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{file} is truncated, damaged or not a safetensors file: it has {file.stat().st_size:,} "
                              f"bytes ({e})") from None  # fmt: skip
    return [Source(key, file, shape, KNOWN.get(dtype, dtype)) for key, dtype, shape in found]


def copy_tensor(source: Source, target: Tensor) -> None:
    try:
        with safe_open(source.file, framework="pt") as f:
            target.copy_(f.get_tensor(source.key).view(target.shape))
    except SafetensorError as e:
        raise CheckpointError(f"{source.file}: {source.key} cannot be read: {e}") from None


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        return (f"{folder} holds {some(pickles)} but no safetensors file: pickles are never read; convert them with "
                "safetensors.torch.save_file in an environment that you trust")  # fmt: skip
    return f"{folder} holds no model.safetensors and no model.safetensors.index.json"
