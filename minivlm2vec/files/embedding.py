"""A source of any size to one file of vectors, which a kill cannot spoil.

    plan      refuses all that can be refused, and finds what is still to be done    -> Job
    compute   rows -> vectors, part by part; each is kept as soon as it is finished  -> Timing
    assemble  parts -> files, whole, but not yet in their place                      -> Assembled
    publish   moves them in place, and removes the parts                             -> Summary

`embed` is these four in a row. With torchrun, the first process plans, all compute, and the first does the rest.
"""

import errno
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minivlm2vec_kernels.ops import choose_backend

from .. import __version__
from ..atomic import remove
from ..distributed import Ranks
from ..embedder import Embedder
from ..errors import Option, OptionError
from . import writers
from .job import Job
from .options import Checkpoint, EmbedOptions, ModelSpec
from .parts import Parts
from .pipeline import Pipeline
from .progress import Progress, Timing
from .rows import BadRow, BadRowError, Columns, digest_of
from .sources import Index, JsonLines, Listing, Table, open_table, spool_folder, spool_stdin, table_of_folder
from .vectors import FlatFile, LanceDataset, VectorFile, check_lance_name, open_vectors

NO_VECTORS = {"vector_column", "batch_tokens", "part_rows"}  # settings that change no vector beyond rounding
NOT_COMPARED = {"text_column", "image_column", "image_root", "batch_tokens", "part_rows"}  # may differ when appending


@dataclass(frozen=True)
class Assembled:
    """The result, ready to be moved: files at `written` plus each of `suffixes`; OUT itself is the one with the suffix
    "", and is not among them where rows are appended."""

    job: Job
    head: writers.Head
    written: Path
    suffixes: list[str]


@dataclass(frozen=True)
class Summary:
    """What became of it.

    Fields:
        out: the file; rows: of this source; dimension: of a vector; bad_rows: how many rows have none.
        errors: the file that says why, or None where all have one.
        computed_with: what the vectors' last bits depend on, one entry for each way in which parts were computed.
        already_finished: nothing was left to do.
    """

    out: Path
    rows: int
    dimension: int
    bad_rows: int
    errors: Path | None
    computed_with: list[str]
    already_finished: bool = False


def embed(
    source: str | os.PathLike,
    out: str | os.PathLike,
    embedder: Embedder | None = None,
    options: EmbedOptions | None = None,
    progress: Progress | None = None,
) -> Summary | None:
    """Embeds a folder of images or a table into one file. Row i of OUT is row i of the source.

    It may be interrupted at any moment: the same call goes on, and the file is the same. A row that cannot be embedded
    has no vector (NaN), and OUT.errors.jsonl says why.

    Args:
        source: a folder of images (with all below it) or of Parquet files, a .jsonl, .csv, .tsv or .parquet table, or
            "-" for JSONL on stdin.
        out: ends in .npy, .safetensors, .parquet (extra `files`) or .lance (extra `lance`).
        embedder: default the one that `options.model` names, loaded when there is something to compute.

    Under torchrun every process calls this; all but the first get None.

    Raises ValueError for what the caller can mend (OptionError, InputError, CheckpointError, BadRowError among them),
    ImportError for a missing extra, OSError for a disk that is full or cannot be read.
    """
    options, progress = _checked(options), progress or Progress()
    if embedder is not None and options.model.name is None:
        options = replace(options, model=ModelSpec.of(embedder))
    with Ranks() as ranks, _planned_by_the_first(source, out, options, ranks, progress) as job:
        mine = ranks.share(job.todo)
        if mine:
            compute(job, embedder or _load(job, ranks), progress, mine)
        ranks.barrier()
        if not ranks.first:
            return None
        return _finished_before(job) if job.complete else publish(assemble(job))


def plan(source: str | os.PathLike, out: str | os.PathLike, options: EmbedOptions | None = None) -> Job:
    """Reads through the source, refuses everything that can be refused before a model is loaded, and finds or begins
    the run's folder, OUT.parts. See `embed` for what it takes and raises."""
    options, out = _checked(options), _check_target(source, out, _checked(options))
    parts = Parts(out)
    with ExitStack() as held:
        held.enter_context(parts.locked())
        begun, made = _begun(parts, options), _made(out, options)
        settings = (begun or {}).get("settings") or (made.settings if made else {})
        if not options.overwrite and "part_rows" in settings:
            options = replace(options, part_rows=settings["part_rows"])
        job = _describe(source, out, options, parts)
        manifest = {"settings": job.settings, "source": vars(job.index)}
        goes_on = _goes_on(job, begun, manifest)
        complete = made is not None
        if made is not None:
            _check_made(job, made)
        elif _appends(job):
            _check_append(job)
        if not complete:
            _check_written(job)
        kept = set(_unchanged(job)) if goes_on and not complete else set()
        todo = () if complete else tuple(n for n in job.numbers if n not in kept)
        if not complete:
            _check_space(job, todo)
        present = parts.present()
        for number in set(present) - kept:
            parts.discard(number)
        if begun != manifest:
            parts.begin(manifest)
        parts.write_todo(list(todo))
        changed = len(present) - len(kept) if goes_on and not complete else 0
        return replace(job, todo=todo, changed=changed, complete=complete, held=held.pop_all())


def compute(
    job: Job, embedder: Embedder, progress: Progress | None = None, numbers: Sequence[int] | None = None
) -> Timing:
    """Embeds parts, all of `job.todo` or these of them, and keeps each as soon as it is finished.

    Raises BadRowError under `strict`; ValueError for an Embedder that is not the job's."""
    progress = progress or Progress()
    numbers = job.todo if numbers is None else numbers
    _check_embedder(job, embedder)

    def on_bad_row(bad: BadRow) -> None:
        if job.options.strict:
            raise BadRowError(bad)
        progress.bad_row(bad)

    pipeline = Pipeline(
        embedder, job.columns, prompt=job.settings["instruction"] or None, max_length=job.options.max_length,
        batch_tokens=job.options.batch_tokens, num_workers=job.options.workers,
        on_bad_row=on_bad_row, on_rows=progress.advanced,
    )  # fmt: skip
    rows = job.num_rows(numbers)
    progress.begun(rows)
    for result in pipeline.run(job.rows(numbers)):
        made_with = f"{computed_with(embedder)}, {job.options.batch_tokens} tokens together"
        job.parts.write(result, job.run, job.dtype, made_with)
    timing = Timing(rows, pipeline.watch.elapsed, pipeline.watch.waited)
    progress.computed(timing)
    return timing


def assemble(job: Job) -> Assembled:
    """Puts the parts together, in the parts' folder. Raises ValueError where the source changed since it was planned,
    or parts are missing."""
    if job.table.stat() != job.stat:
        raise OptionError(f"{job.source} was changed while it was read; begin anew with ", Option("overwrite"))
    missing = set(job.numbers) - set(job.parts.present())
    if missing:
        raise ValueError(f"{len(missing)} of {len(job.numbers)} parts are not computed yet")
    heads = [job.parts.head(n) for n in job.numbers]
    bad_rows = [bad for head in heads for bad in head.errors]
    meta = {
        "model": job.checkpoint.address,
        "settings": job.settings,
        "source": {"name": job.source, "num_rows": job.index.num_rows, "fingerprint": job.index.fingerprint},
        "images": digest_of(head.images for head in heads),
        "rows": job.index.num_rows,
        "bad_rows": len(bad_rows),
        "computed_with": sorted({head.computed_with for head in heads}),
    }
    suffix = job.out.suffix
    head = _head(job, meta)
    written = job.parts.assembled(suffix)
    suffixes = writers.write_errors(written, [bad.as_json() for bad in bad_rows])
    if not _appends(job):
        suffixes += writers.WRITERS[suffix](written, head, _pieces(job))
    return Assembled(job, head, written, suffixes)


def publish(assembled: Assembled) -> Summary:
    """Moves the files in place, or appends the rows, and removes the parts."""
    job, head, suffixes = assembled.job, assembled.head, assembled.suffixes
    if "" not in suffixes:
        before = writers.append_lance(job.out, job.parts.folder / "append.json", head, _pieces(job))
        suffixes = writers.join_errors(job.out, assembled.written, before)
    writers.move(assembled.written, job.out, suffixes)
    job.parts.remove()
    return _summary(job.out, head.meta)


def computed_with(embedder: Embedder) -> str:
    """What the last bits of vectors depend on and the settings do not tell."""
    device, backend = embedder.device, choose_backend(embedder.model.backend, embedder.model.decoder.norm.weight)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"torch {torch.__version__}, {hardware}{threads}, {backend} kernels"


# ------------------------------------------------------------------------------------------------------------ planning


def _planned_by_the_first(
    source: str | os.PathLike, out: str | os.PathLike, options: EmbedOptions, ranks: Ranks, progress: Progress
) -> Job:
    """The job; the other processes read what the first has planned."""
    if ranks.first:
        job = plan(source, out, options)
        progress.planned(job)
        ranks.barrier()
        return job
    ranks.barrier()
    out = _check_target(source, out, options)
    parts = Parts(out)
    manifest = parts.manifest()
    assert manifest is not None, "the first process has begun the run"
    options = replace(options, part_rows=manifest["settings"]["part_rows"])
    job = _describe(source, out, options, parts, Index(**manifest["source"]), manifest["settings"])
    return replace(job, todo=tuple(parts.todo()))


def _describe(
    source: str | os.PathLike, out: Path, options: EmbedOptions, parts: Parts,
    index: Index | None = None, settings: dict[str, Any] | None = None,
) -> Job:  # fmt: skip
    """The job, from its source and options; without an index of the source it is spooled and read through."""
    name = os.fspath(source)
    table, root, listed = _open_source(name, options, parts, spool=index is None)
    stat = table.stat()
    index = index or table.index(options.part_rows)
    columns = Columns.choose(index.columns, options.text_column, options.image_column, root)
    _check_columns(list(index.columns), out.suffix, options.vector_column)
    checkpoint = options.model.locate()
    settings = settings or _settings(options, checkpoint, columns, folder=listed is not None and not listed.tables)
    return Job(name, table, index, columns, out, parts, options, checkpoint, settings, stat, listed)


def _open_source(
    source: str, options: EmbedOptions, parts: Parts, *, spool: bool
) -> tuple[Table, Path, Listing | None]:
    """The source as a table, what relative paths are relative to, and what was found in a folder."""
    path = Path(source)
    root = Path(options.image_root) if options.image_root else None
    if root is not None and not root.is_dir():
        raise OptionError(Option("image_root"), f" {root} is no folder")
    if source == "-":
        if spool:
            spool_stdin(parts.spool)
        return JsonLines(parts.spool), (root or Path()).absolute(), None
    if path.is_dir():
        listed = spool_folder(path, parts.spool) if spool or not parts.spool.stat().st_size else None
        table = table_of_folder(path, listed) if listed is not None and not listed.images else None
        return table or JsonLines(parts.spool, has_lines=False), (root or path).absolute(), listed
    if not path.exists():
        raise ValueError(f"{path} does not exist: SOURCE is a folder, a table, or - for JSONL on stdin")
    return open_table(path), (root or path.parent).absolute(), None


def _settings(options: EmbedOptions, checkpoint: Checkpoint, columns: Columns, *, folder: bool) -> dict[str, Any]:
    model, adapter = checkpoint.fingerprints
    return {
        "checkpoint": model,
        "adapter": adapter,
        "instruction": options.prompt(folder=folder),
        "num_crops": checkpoint.num_crops,
        "max_length": options.max_length,
        "computed_in": checkpoint.dtype,
        "stored_as": options.store,
        "dimension": checkpoint.dimension,
        "normalized": True,
        "text_column": columns.text,
        "image_column": columns.image,
        "image_root": str(columns.root),
        "vector_column": options.vector_column,
        "batch_tokens": options.batch_tokens,
        "part_rows": options.part_rows,
        "version": __version__,
    }


def _head(job: Job, meta: dict[str, Any]) -> writers.Head:
    schema = job.table.arrow_schema(job.index) if job.out.suffix in writers.ARROW else None
    shape = (job.index.num_rows, job.settings["dimension"])
    return writers.Head(*shape, job.dtype, meta, schema, job.settings["vector_column"])


# ------------------------------------------------------------------------------------------------------ what is refused


def _checked(options: EmbedOptions | None) -> EmbedOptions:
    if not isinstance(options, EmbedOptions | None):
        raise OptionError(Option("options"), f" are an EmbedOptions, got {type(options).__name__}")
    return options or EmbedOptions()


def _check_target(source: str | os.PathLike, out: str | os.PathLike, options: EmbedOptions) -> Path:
    """OUT, where it really is. Refuses one of another ending, or one that the options do not fit."""
    for what, name in (("source", source), ("out", out)):
        if not isinstance(name, str | os.PathLike):
            raise OptionError(Option(what), f" is a path, got {type(name).__name__}")
        if "://" in os.fspath(name):
            raise OptionError(Option(what), f" {os.fspath(name)} is an address; only local files are read and written")
    out = Path(os.path.realpath(out)) if os.path.islink(out) else Path(out)  # a link stays, and leads to the file
    *kinds, last = writers.WRITERS
    if out.suffix not in writers.WRITERS:
        raise OptionError(Option("out"), f" {out}: OUT ends in {', '.join(kinds)} or {last}")
    if options.append and (out.suffix != ".lance" or options.overwrite):
        raise OptionError(Option("append"), " adds to a Lance dataset, and excludes ", Option("overwrite"))
    writers.require_packages(out.suffix)
    if out.is_dir() and out.suffix != ".lance":
        raise OptionError(Option("out"), f" {out} is a folder")
    if out.suffix == ".lance":
        check_lance_name(out)
    written = (writers.beside(out, suffix) for suffix in ("", writers.META, writers.ROWS, writers.ERRORS))
    if any(path.exists() and os.path.exists(source) and os.path.samefile(path, source) for path in written):
        raise OptionError(Option("out"), f" {out} would be written over the source {os.fspath(source)}")
    return out


def _begun(parts: Parts, options: EmbedOptions) -> dict[str, Any] | None:
    """The manifest of the run in OUT.parts, if there is one; a damaged one is none where it is to be replaced."""
    try:
        return parts.manifest()
    except OptionError:
        if options.overwrite:
            return None
        raise


def _goes_on(job: Job, begun: dict[str, Any] | None, manifest: dict[str, Any]) -> bool:
    """Whether a run begun in OUT.parts is this one. Refuses another one."""
    if begun is None:
        return False
    if begun["source"] == manifest["source"] and not _differ(begun["settings"], job.settings, NO_VECTORS):
        return True
    if not job.options.overwrite:
        raise _made_otherwise(job.parts.folder, job, begun["settings"], begun["source"], NO_VECTORS)
    return False


def _differ(old: dict[str, Any], new: dict[str, Any], but: set[str]) -> list[str]:
    return [name for name, value in new.items() if name not in but and old.get(name) != value]


def _check_written(job: Job) -> None:
    """Has the writer of OUT write, or refuse, the first row: names and types that the format does not take are told
    before the work."""
    if job.out.suffix not in writers.ARROW or _appends(job):
        return
    tables = job.table.arrow_tables(job.index, [0] if job.index.num_rows else [], job.options.part_rows)
    trial = job.parts.assembled(f".trial{job.out.suffix}")
    head = _head(job, {"settings": job.settings})
    none = np.full((1, head.dimension), np.nan, job.dtype)
    try:
        writers.WRITERS[job.out.suffix](trial, head, ((none, table.slice(0, 1)) for table in tables))
    except (ValueError, TypeError, RuntimeError, OverflowError) as e:
        raise ValueError(f"{job.out.name} cannot hold the columns of {job.source}: {writers.said(e)}") from None
    finally:
        remove(trial)


def _check_columns(names: list[str], suffix: str, vector_column: str) -> None:
    """Refuses columns of the table that OUT needs for itself."""
    if suffix == ".lance" and writers.ROW_NUMBER in names:
        raise ValueError(f"the table has a column {writers.ROW_NUMBER!r} already; a Lance dataset needs that name for "
                         "itself")  # fmt: skip
    if suffix == ".lance":
        names = [*names, writers.ROW_NUMBER]
    if suffix in writers.ARROW and vector_column in names:
        raise OptionError(f"the table has a column {vector_column!r} already; ", Option("vector_column"),
                          " gives the vectors another name")  # fmt: skip


def _made(out: Path, options: EmbedOptions) -> VectorFile | LanceDataset | None:
    """The OUT that is there, unless it is to be replaced or added to. Refuses one whose files do not fit together."""
    if options.overwrite or options.append or not out.exists():
        return None
    try:
        made = open_vectors(out)
        if isinstance(made, FlatFile):
            made.check_rows()
    except ValueError as e:
        raise OptionError(f"{e}; ", Option("overwrite"), " replaces it") from None
    return made


def _check_made(job: Job, made: VectorFile | LanceDataset) -> None:
    """Refuses an OUT that this job did not make. Where it did, nothing is left to do."""
    meta = made.meta
    if meta is None:
        raise OptionError(f"{job.out} exists and does not say what made it; ", Option("overwrite"), " replaces it")
    but = NO_VECTORS - ({"vector_column"} if job.out.suffix in writers.ARROW else set())
    if _differ(meta["settings"], job.settings, but) or meta["source"]["fingerprint"] != job.index.fingerprint:
        raise _made_otherwise(job.out, job, meta["settings"], meta["source"], but)
    if meta["images"] != digest_of(job.columns.stamps(rows) for _, rows in job.rows(job.numbers)):
        raise OptionError(f"{job.out} is finished, but image files have changed since; ", Option("overwrite"),
                          " begins anew")  # fmt: skip


def _appends(job: Job) -> bool:
    return job.options.append and job.out.exists()


def _check_append(job: Job) -> None:
    """Refuses to append vectors that cannot be compared with OUT's, or columns that it has not."""
    dataset = LanceDataset(job.out)
    differ = [f"{name} is {dataset.settings.get(name)!r} there and {job.settings[name]!r} now"
              for name in _differ(dataset.settings, job.settings, NOT_COMPARED)]  # fmt: skip
    if differ:
        raise ValueError(f"cannot append to {job.out}, which was made otherwise: {'; '.join(differ)}")
    writers.check_appended(job.out, dataset.table.schema, job.table, job.index, job.options.part_rows)


def _made_otherwise(
    path: Path, job: Job, settings: dict[str, Any], source: dict[str, Any], but: set[str]
) -> OptionError:
    """What of a file or a run is not as this job would have it."""
    differ = [f"{name} is {_short(name, settings.get(name))} there and {_short(name, job.settings[name])} now"
              for name in _differ(settings, job.settings, but)]  # fmt: skip
    if not differ:
        rows = f"{source['num_rows']:,} rows then, {job.index.num_rows:,} now"
        differ = [f"the source has changed since ({rows})"]
    said = f"{path} was made otherwise: {'; '.join(differ)}. "
    if job.options.append:  # it excludes overwrite
        return OptionError(f"{said}Remove {path} to begin anew")
    return OptionError(said, Option("overwrite"), " begins anew")


def _short(name: str, value: Any) -> str:
    return value[:12] if name in ("checkpoint", "adapter") and value else repr(value)


def _unchanged(job: Job) -> list[int]:
    """The finished parts that are whole, and whose image files are still what they were. Raises BadRowError for a bad
    row in these, under `strict`."""
    heads = {n: job.parts.finished(n, job.run, job.num_rows([n]), job.settings["dimension"], job.dtype)
             for n in job.parts.present() if n in job.numbers}  # fmt: skip
    images = {n: head.images for n, head in heads.items() if head is not None}
    kept = [n for n, rows in job.rows(list(images)) if job.columns.stamps(rows) == images[n]]
    for bad in (bad for n in kept for bad in job.parts.head(n).errors if job.options.strict):
        raise BadRowError(bad)
    return kept


def _check_space(job: Job, todo: Sequence[int]) -> None:
    """Refuses a disk on which the vectors alone have no place: those of the parts that are still to be computed and,
    beside the parts, those of OUT."""
    job.parts.remove_assembled()
    vector = job.settings["dimension"] * job.dtype.itemsize  # bytes
    needed = (job.num_rows(todo) + job.index.num_rows) * vector
    usage = shutil.disk_usage(job.parts.folder)
    if usage.total and needed > usage.free:  # some file systems do not tell
        raise OSError(errno.ENOSPC, f"No space left on device: {needed / 1e6:,.1f} MB of vectors are still to be "
                      f"written, {usage.free / 1e6:,.1f} MB are free", str(job.parts.folder))  # fmt: skip


# ---------------------------------------------------------------------------------------------- the model, the result


def _load(job: Job, ranks: Ranks) -> Embedder:
    spec = job.checkpoint.spec
    return job.checkpoint.load(
        device=ranks.device(spec.device), show_progress=spec.show_progress and ranks.first
    )  # fmt: skip


def _check_embedder(job: Job, embedder: Embedder) -> None:
    """Refuses an Embedder that makes other vectors than the settings say."""
    dtype = str(embedder.model.dtype).removeprefix("torch.")
    own = {"dimension": embedder.dimension, "num_crops": embedder.processor.num_crops, "computed_in": dtype}
    differ = [f"{name} is {value!r} in the embedder and {job.settings[name]!r} in the job"
              for name, value in own.items() if value != job.settings[name]]  # fmt: skip
    if differ:
        raise ValueError(f"the embedder is not that of the job: {'; '.join(differ)}")


def _pieces(job: Job) -> writers.Pieces:
    """(vectors, content) of each part, see writers.py."""
    size = job.options.part_rows
    if job.out.suffix in writers.ARROW:
        for number, table in zip(job.numbers, job.table.arrow_tables(job.index, job.numbers, size), strict=True):
            yield job.parts.vectors(number), table
    else:
        for number, rows in job.table.parts(job.index, job.numbers, size):
            yield job.parts.vectors(number), [{c: row.columns.get(c) for c in job.index.columns} for row in rows]


def _finished_before(job: Job) -> Summary:
    meta = open_vectors(job.out).meta
    assert meta is not None, "it was planned as complete"
    return replace(_summary(job.out, meta), already_finished=True)


def _summary(out: Path, meta: dict[str, Any]) -> Summary:
    bad = meta["bad_rows"]
    errors = writers.beside(out, writers.ERRORS) if bad else None
    return Summary(out, meta["rows"], meta["settings"]["dimension"], bad, errors, meta.get("computed_with", []))
