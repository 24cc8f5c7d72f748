"""CONFIG.toml -> frozen dataclasses. The defaults are the published run's: arXiv 2410.05160, section 4."""

import sys
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..config import Parts
from ..errors import nearest
from ..lora import LoraConfig

# Short spellings of data.root in a TOML file: the source that each stands for, and which keys of [data] are options of
# that source, under which names.
SHORT_ROOTS = {
    "mini-drawn": (
        "minivlm2vec.mini.drawn:DrawnRows",
        {"variation": "variation", "more_styles": "more_styles", "images": "tarballs"},
    ),
}


@dataclass(frozen=True)
class DataConfig:
    """[data]: which rows, in what order. `root` for rows in files, or `source` for others.

    Fields:
        root: a folder with a folder for each set; "mini" for the sets that ship with the package.
        source: "package.module:Name", a class or function that gives the rows; see `train.data.RowSource`. In a TOML
            file `root = "mini-drawn"` is short for that of `mini.drawn.DrawnRows`.
        options: [data.options], settings of the source's own.
        sets: names of the sets; default all.
        variant: "original" or "diverse_instruction", the beginning of the files' names.
        images: folder or zip of the pictures; default <root>/images.zip, <root>/images_zip/<set>.zip, else <root>.
        rows_per_set: at most so many rows of a set.
        row_choice: which: "random" (the paper) or "first" (the published code).
        sub_batch: batches consist of blocks of so many rows of one set. 1 mixes rows freely, as published; the
            batch size gives every batch one set.
        max_length: tokens that are kept of a text without images.
        num_crops: the most crops an image is cut into.
        workers: threads that read and cut images.
    """

    root: str | None = None
    source: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    sets: tuple[str, ...] = ()
    variant: str = "original"
    images: str | None = None
    rows_per_set: int = 50_000
    row_choice: str = "random"
    sub_batch: int = 1
    max_length: int = 256
    num_crops: int = 4
    workers: int = 4

    def __post_init__(self) -> None:
        if self.root is not None and self.source is not None:
            raise ValueError("data.root or data.source is needed, and not both")


@dataclass(frozen=True)
class LossConfig:
    """[loss]: see `contrastive_loss`.

    Fields:
        learn_temperature: it begins at `temperature` and is kept at 0.01 or more, as in CLIP.
        hard_negatives: use those that rows have (the published code drops them).
    """

    temperature: float = 0.02
    learn_temperature: bool = False
    symmetric: bool = False
    mask_duplicates: bool = False
    hard_negatives: bool = True
    dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class OptimConfig:
    """[optim]: AdamW, linear warm-up, linear decay to zero.

    Fields:
        batch_size: queries a step, of all processes together.
        chunk_size: inputs (queries and targets) that are encoded with gradients at a time. 0: all.
        clip: the largest norm of the gradient; 0 never clips.
    """

    batch_size: int = 1024
    chunk_size: int = 4
    steps: int = 2000
    lr: float = 2e-5
    warmup: int = 200
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True)
class LogConfig:
    """[log]: log.jsonl always; the others every so many steps, 0 for never.

    Fields:
        pictures: sheets of queries and their nearest targets, among `picture_rows` rows.
    """

    save: int = 500
    pictures: int = 0
    picture_rows: int = 64
    tensorboard: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Fields:
        model: the checkpoint to begin from, a folder or Hub name. In a TOML file also a table: [model] with
            `checkpoint`, `plugins`, `skip`, and other parts than the checkpoint's, such as `pooling = "attentive"`.
        parts: those, by registered names; see `config.Parts`. What is new in them is trained from its beginning.
        plugins: Python files of your own that register parts; see `registry.load_plugin`.
        skip: beginnings of names of parameters that are new in another `model` class; see `weights.load_weights`.
        out: the folder for checkpoints, logs and pictures.
        freeze: names of modules that stay as they are, such as "vision". With [lora] they get no adapter.
        gradient_checkpointing: layers are computed again in the backward pass instead of kept.
        autocast: products are computed in bfloat16; default on CUDA alone. On a CPU it pays where the processor has
            such instructions (AVX512_BF16, AMX).
        distributed: what several processes use: "ddp", or "fsdp" (fully_shard), which splits the model too.
        lora: a [lora] table of PEFT's names trains adapters alone; without one, everything is trained.
    """

    model: str
    out: str
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    lora: LoraConfig | None = None
    freeze: tuple[str, ...] = ()
    gradient_checkpointing: bool = True
    autocast: bool | None = None
    distributed: str = "ddp"
    seed: int = 0
    parts: dict[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self):
        _check(self)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_config(path: str | Path) -> TrainConfig:
    """Raises ValueError naming the file and the key."""
    path = Path(path)
    try:
        raw = _toml().loads(path.read_text(encoding="utf-8"))
        return build(TrainConfig, _with_source(_with_parts(raw)), "")
    except (ValueError, TypeError) as e:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path}: {e}") from None


def _with_parts(raw: dict[str, Any]) -> dict[str, Any]:
    """The file's settings, where [model] is a table."""
    table = raw.get("model")
    if not isinstance(table, dict):
        return raw
    if "checkpoint" not in table:
        raise ValueError("model.checkpoint is missing: the folder or Hub name to begin from")
    own = {key: table[key] for key in ("plugins", "skip") if key in table}
    parts = {key: value for key, value in table.items() if key not in (*own, "checkpoint")}
    known = ("checkpoint", "plugins", "skip", *(f.name for f in fields(Parts)))
    for key in parts.keys() - set(known):
        near = nearest(key, known)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"no setting is named model.{key}; {hint}")
    return raw | own | {"model": table["checkpoint"], "parts": parts}


def _with_source(raw: dict[str, Any]) -> dict[str, Any]:
    """The file's settings with the source and the options that a short data.root stands for."""
    data = raw.get("data")
    if not isinstance(data, dict) or str(data.get("root")) not in SHORT_ROOTS or "source" in data:
        return raw
    source, names = SHORT_ROOTS[data["root"]]
    kept = {key: value for key, value in data.items() if key != "root" and key not in names}
    options = {name: data[key] for key, name in names.items() if key in data}
    return raw | {"data": kept | {"source": source, "options": options | kept.get("options", {})}}


def _toml() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise ImportError("TOML on Python 3.10 needs tomli: pip install 'minivlm2vec[train]'") from None
    return tomllib


def build(cls: type, raw: dict[str, Any], where: str) -> Any:
    """A dataclass from a TOML table; `where` is the table's name with a dot, for messages. Raises ValueError naming
    the key that is unknown, missing or of another type."""
    hints = get_type_hints(cls)
    for key in raw.keys() - hints.keys():
        near = nearest(key, hints)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(hints)}"
        raise ValueError(f"no setting is named {where}{key}; {hint}")
    for f in fields(cls):
        if f.name not in raw and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where}{f.name} is missing")
    return cls(**{key: _value(hints[key], value, where + key) for key, value in raw.items()})


def _value(hint: Any, value: Any, name: str) -> Any:
    """`value` as the field's type; TOML's lists become tuples, and whole numbers floats where one is asked for."""
    options = get_args(hint) if get_origin(hint) not in (tuple, dict) and get_args(hint) else (hint,)
    table = next((o for o in options if isinstance(o, type) and is_dataclass(o)), None)
    if table is not None and isinstance(value, dict):
        return build(table, value, name + ".")
    if isinstance(value, list) and any(get_origin(o) is tuple for o in options):
        inner = get_args(next(o for o in options if get_origin(o) is tuple))
        return tuple(_value(inner[0], v, name) for v in value)
    plain = tuple(get_origin(o) or o for o in options)
    if float in plain and type(value) is int:
        return float(value)
    if type(value) not in plain:
        kinds = " or ".join(p.__name__ for p in plain if p is not type(None))
        raise ValueError(f"{name} is {value!r}; a {kinds} is needed")
    return value


def _check(c: TrainConfig) -> None:
    positive: dict[str, float] = {
        "data.rows_per_set": c.data.rows_per_set, "data.sub_batch": c.data.sub_batch, "data.workers": c.data.workers,
        "data.max_length": c.data.max_length, "data.num_crops": c.data.num_crops, "optim.steps": c.optim.steps,
        "optim.batch_size": c.optim.batch_size, "loss.temperature": c.loss.temperature, "optim.lr": c.optim.lr,
        "log.picture_rows": c.log.picture_rows,
    }  # fmt: skip
    for name, number in positive.items():
        if not number > 0:
            raise ValueError(f"{name} is {number}; it must be greater than 0")
    counts: dict[str, float] = {
        "optim.chunk_size": c.optim.chunk_size, "optim.warmup": c.optim.warmup, "optim.clip": c.optim.clip,
        "log.save": c.log.save, "log.pictures": c.log.pictures,
    }  # fmt: skip
    for name, number in counts.items():
        if number < 0:
            raise ValueError(f"{name} is {number}; it must not be negative")
    choices = {
        "data.variant": (c.data.variant, ("original", "diverse_instruction")),
        "data.row_choice": (c.data.row_choice, ("random", "first")),
        "distributed": (c.distributed, ("ddp", "fsdp")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it is {' or '.join(map(repr, allowed))}")
    if c.optim.batch_size % c.data.sub_batch:
        raise ValueError(f"optim.batch_size {c.optim.batch_size} is no multiple of data.sub_batch {c.data.sub_batch}")
