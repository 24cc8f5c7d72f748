"""What a caller says: which model, how to embed, what to search for. Frozen, and checked when it is made."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .. import prompts
from ..checkpoint import fingerprint, resolve
from ..config import VLM2VecConfig, changes
from ..embedder import Embedder, vector_length
from ..errors import Option, OptionError, at_least_one, some
from ..lora import with_adapters_parts
from ..model import VLM2Vec
from ..processor import Processor
from ..weights import empty_model, named_parts

DTypeName = Literal["float32", "bfloat16", "float16"]


def _check_types(options: Any) -> None:
    """Refuses a value that is not of its field's type."""
    hints = get_type_hints(type(options))
    for name in (f.name for f in fields(options)):
        value, allowed = getattr(options, name), _allowed(hints[name])
        if Any in allowed or value in [a for a in allowed if isinstance(a, str)]:
            continue
        kinds = tuple(Integral if a is int else a for a in allowed if isinstance(a, type))
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in allowed):
            names = [a if isinstance(a, str) else a.__name__ for a in allowed if a is not type(None)]
            raise OptionError(Option(name), f" is {' or '.join(names)}, got {value!r}")


def _allowed(hint: Any) -> list[Any]:
    """The types, and the strings of a Literal, that a hint allows."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [a for part in get_args(hint) for a in _allowed(part)] or [hint]


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is to be loaded: arguments of `Embedder.from_pretrained`, which see. None is loaded yet.

    `name` None: in a search, the model that made the vectors.
    """

    name: str | None = None
    adapter: str | None = None
    revision: str | None = None
    dtype: DTypeName | None = None
    num_crops: int | None = None
    truncate_dim: int | None = None
    force_dimensions: bool = False
    local_files_only: bool = False
    device: str | None = None
    backend: str | None = None
    show_progress: bool = False

    def __post_init__(self) -> None:
        _check_types(self)

    @classmethod
    def of(cls, embedder: Embedder) -> "ModelSpec":
        """What an Embedder was loaded from, told by its name. Weights that were changed since are not seen: save the
        model, and load it from there. Raises ValueError for one without a name, or of other parts than its
        checkpoint's."""
        if not embedder.name:
            raise OptionError("the embedder has no name: ", Option("model"), " tells which checkpoint it is of")
        name, _, adapter = embedder.name.partition(" + ")
        dtype: Any = str(embedder.model.dtype).removeprefix("torch.")
        spec = cls(
            name,
            adapter or None,
            dtype=dtype,
            num_crops=embedder.processor.num_crops,
            truncate_dim=embedder.truncate_dim,
            force_dimensions=embedder.force_dimensions,
            local_files_only=True,
        )
        own, written = named_parts(embedder.model), spec.locate().config.parts
        if changed := changes(written, own):
            raise ValueError(f"the embedder's model has other parts than {embedder.name} ({changed}): save it "
                             "(weights.save_model), and load it from there")  # fmt: skip
        return spec

    def locate(self) -> "Checkpoint":
        """Finds the files, on the Hub where need be. Raises CheckpointError."""
        if self.name is None:
            raise OptionError(Option("model"), " names no checkpoint")
        folder = resolve(self.name, revision=self.revision, local_files_only=self.local_files_only)
        adapter = resolve(self.adapter, local_files_only=self.local_files_only) if self.adapter else None
        return Checkpoint(self, folder, adapter)


@dataclass(frozen=True)
class Checkpoint:
    """The files of a model: the folder of its checkpoint, and of its adapter, if it has one."""

    spec: ModelSpec
    folder: Path
    adapter: Path | None

    @cached_property
    def fingerprints(self) -> tuple[str, str | None]:
        """Of the checkpoint and of the adapter, see `checkpoint.fingerprint`."""
        return fingerprint(self.folder), fingerprint(self.adapter, adapter=True) if self.adapter else None

    @cached_property
    def config(self) -> VLM2VecConfig:
        config = VLM2VecConfig.from_json(self.folder)
        return config if self.adapter is None else with_adapters_parts(config, self.adapter)

    @property
    def dtype(self) -> str:
        return self.spec.dtype or self.config.dtype

    @property
    def dimension(self) -> int:
        """Length of its vectors. Raises OptionError where they cannot be cut so."""
        model: VLM2Vec = empty_model(self.config)
        return vector_length(self.spec.truncate_dim, self.config, model.dimension, force=self.spec.force_dimensions)

    @property
    def num_crops(self) -> int:
        return Processor.from_pretrained(self.folder, self.config, num_crops=self.spec.num_crops).num_crops

    @property
    def address(self) -> dict[str, str | None]:
        """Where a search finds the model again: folders by their absolute paths, others by their names."""
        name, adapter = self.spec.name, self.spec.adapter
        local = name is not None and _is_folder(name)
        return {
            "name": str(self.folder.absolute()) if local else name,
            "revision": None if local else self.spec.revision,
            "adapter": str(self.adapter.absolute()) if self.adapter and adapter and _is_folder(adapter) else adapter,
        }

    def load(self, **options: Any) -> Embedder:
        """options: of `Embedder.from_pretrained`, instead of the spec's."""
        spec = self.spec
        loading = {"device": spec.device, "num_crops": spec.num_crops, "show_progress": spec.show_progress,
                   "truncate_dim": spec.truncate_dim, "force_dimensions": spec.force_dimensions}  # fmt: skip
        return Embedder.from_pretrained(
            self.folder,
            adapter=self.adapter,
            dtype=spec.dtype,
            backend=spec.backend,
            **loading | options,
        )

    def __str__(self) -> str:
        return named(self.spec.name, self.spec.adapter, self.fingerprints)


@dataclass(frozen=True)
class EmbedOptions:
    """How a source is embedded.

    Fields:
        model: which one, where no Embedder is given or its name does not tell.
        text_column, image_column: where a row keeps its text and its images (paths, data URIs or bytes; lists of
            these); default: text; image, images or image_path.
        image_root: what relative paths are relative to; default the table's folder.
        instruction: in front of each text; {text} stands for the text itself; default prompts.IMAGE for a folder.
        task: instead of it, the document instruction of a task of `prompts.TASKS`.
        max_length: keeps the first tokens of texts without images.
        store: the vectors' dtype in the file.
        vector_column: their column in .parquet and .lance.
        strict: raise BadRowError at the first row that cannot be embedded.
        overwrite: replace a file, or a run, that was made otherwise.
        append: add to a .lance dataset of the same model.
        workers: threads that decode images; default the embedder's.
        batch_tokens: tokens computed together.
        part_rows: rows between two points from which a run can go on. Their images must fit in memory where a table
            holds them as bytes.

    Raises ValueError (OptionError) for values that cannot be, alone or together.
    """

    model: ModelSpec = ModelSpec()
    text_column: str | None = None
    image_column: str | None = None
    image_root: str | os.PathLike | None = None
    instruction: str | None = None
    task: str | None = None
    max_length: int | None = None
    store: Literal["float32", "float16"] = "float32"
    vector_column: str = "embedding"
    strict: bool = False
    overwrite: bool = False
    append: bool = False
    workers: int | None = None
    batch_tokens: int = 16384
    part_rows: int = 512

    def __post_init__(self) -> None:
        _check_types(self)
        at_least_one(batch_tokens=self.batch_tokens, part_rows=self.part_rows, max_length=self.max_length,
                     num_crops=self.model.num_crops, workers=self.workers)  # fmt: skip
        _check_instruction(self.instruction, self.task)

    def prompt(self, *, folder: bool) -> str:
        """The instruction; folder: for a folder of images."""
        if self.task is not None:
            return prompts.task(self.task).document
        if self.instruction is not None:
            return self.instruction
        return prompts.IMAGE if folder else ""


QUERY_TASKS = {  # (the collection has images, query has text, query has an image) -> task of MMEB
    (True, True, False): "t2i",
    (True, False, True): "i2i",
    (True, True, True): "change",
    (False, False, True): "i2t",
}


@dataclass(frozen=True)
class Query:
    """What is searched for.

    Fields:
        text, image: one of them or both; an image is anything that `Embedder.encode` takes as one.
        like: a row of the collection (from 0) instead.
        instruction: in front of the text, or around it with {text}; "" for none; default that of MMEB for such a query.
        task: instead of it, the query instruction of a task of `prompts.TASKS`.

    Raises ValueError (OptionError) where nothing is asked, or too much.
    """

    text: str | None = None
    image: Any = None
    like: int | None = None
    instruction: str | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        asked = self.text is not None or self.image is not None
        if self.like is not None and asked:
            raise OptionError(Option("like"), " asks by a row of VECTORS; it excludes ", Option("text"), " and ",
                              Option("image"))  # fmt: skip
        _check_instruction(self.instruction, self.task)
        if self.like is None and not asked:
            raise OptionError("nothing is asked: give ", Option("text"), ", ", Option("image"), " or ", Option("like"))

    def resolved(self, *, images: bool) -> "Query":
        """The same query with the instruction that it will be embedded with; images: the collection holds some."""
        if self.like is not None or self.instruction is not None:
            return self
        task = self.task or QUERY_TASKS.get((images, self.text is not None, self.image is not None))
        return replace(self, task=None, instruction=prompts.task(task).query if task else "")

    def as_json(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if v is not None}


def as_query(query: Any) -> Query:
    """The Query of a text, or of a dict of its fields."""
    if isinstance(query, Mapping):
        known = [f.name for f in fields(Query)]
        unknown = [str(name) for name in query if name not in known]
        if unknown:
            raise OptionError(f"a query has no {some(unknown)}; it has {', '.join(known)}")
        return Query(**query)
    if not isinstance(query, str | Query):
        raise OptionError(f"a query is a text, a Query or a dict of its fields, got {type(query).__name__}")
    return Query(text=query) if isinstance(query, str) else query


@dataclass(frozen=True)
class SearchOptions:
    """How a collection is searched.

    Fields:
        model: what the query is embedded with, where no Embedder is given; default the one that made the vectors.
        top: how many rows.
        device: where vectors are scanned; default the CPU.
        force: embed the query with another checkpoint than made the vectors.
        where: only rows that fulfil this SQL condition, such as "price < 10" (Lance).
        exact: search without the index (Lance).
        nprobes: cells of the index to look into (Lance).
    """

    model: ModelSpec = ModelSpec()
    top: int = 10
    device: str | None = None
    force: bool = False
    where: str | None = None
    exact: bool = False
    nprobes: int = 20

    def __post_init__(self) -> None:
        _check_types(self)
        at_least_one(top=self.top, num_crops=self.model.num_crops, nprobes=self.nprobes)


def named(model: str | None, adapter: str | None, fingerprints: tuple[str | None, str | None]) -> str:
    """ "MODEL (fingerprint 0123456789ab)", with an adapter "MODEL + ADAPTER (fingerprint 0123456789ab + ba98…)"."""
    name = " + ".join(filter(None, (model, adapter)))
    return f"{name} (fingerprint {' + '.join(f[:12] for f in fingerprints if f)})"


def _check_instruction(instruction: str | None, task: str | None) -> None:
    if instruction is not None and task is not None:
        raise OptionError(Option("instruction"), " and ", Option("task"), " are both given; use one")
    if task is not None:
        prompts.task(task)


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()
