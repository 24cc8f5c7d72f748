"""`minivlm2vec embed`: a source of any size to one file of vectors, which a kill cannot spoil."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm

from minivlm2vec_kernels.ops import choose_backend

from .. import __version__, prompts
from ..cli.arguments import load_embedder
from ..config import VLM2VecConfig
from ..embedder import Embedder
from ..processor import Processor
from ..weights import fingerprint, resolve
from . import writers
from .inputs import BadRow, Fields, digest_of
from .parts import Parts, flush, rename
from .pipeline import Pipeline
from .ranks import Ranks
from .sources import Index, JsonLines, Parquet, open_table, spool_folder, spool_stdin
from .vectors import read_meta

DONE, USER_ERROR, BAD_ROWS, STRICT = 0, 1, 3, 4
SHOWN_BAD_ROWS = 20


class BadRowError(Exception):
    """--strict, and a row without a vector."""


@dataclass
class Job:
    """One `embed` command.

    Fields:
        source: what to read, after spooling; index: what a pass over it told.
        fields: where a row keeps its text and images.
        settings: everything that the command decides about the vectors and the file's form. A run goes on, and a file
            counts as finished, only under the same settings. What rounds otherwise and no more (the device, its number
            of threads, the kernels, torch's version) is no setting, so that a run can go on elsewhere: the parts say
            what they were computed with, see `computed_with`.
        checkpoint: its folder; adapter: that of the adapter, or None.
        stat: size and time of change of the table before it was read.
    """

    args: argparse.Namespace
    out: Path
    parts: Parts
    source: Any
    index: Index
    fields: Fields
    settings: dict[str, Any]
    checkpoint: Path
    adapter: Path | None
    stat: tuple[int, int]

    @property
    def numbers(self) -> range:
        return range(-(-self.index.num_rows // self.args.part_rows))

    @cached_property
    def dtype(self) -> np.dtype:
        return np.dtype({"float32": "<f4", "float16": "<f2"}[self.args.store])

    def rows(self, numbers: Sequence[int]) -> Iterator[tuple[int, list]]:
        return self.source.parts(self.index, numbers, self.args.part_rows, self.fields.names())


def embed(args: argparse.Namespace) -> int:
    """Runs the command. Returns 0 where all rows have a vector, 3 where some have none, 4 where --strict met one, and
    1 after an error of the user's or the system's, which it prints."""
    try:
        with Ranks() as ranks:
            return _embed(args, ranks)
    except BadRowError as e:
        print(f"minivlm2vec embed: stopped (--strict) at {e}", file=sys.stderr)
        return STRICT
    except OSError as e:
        print(f"minivlm2vec embed: {e}. What is finished is kept: the same command goes on from there", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("\nThe same command goes on from here.", file=sys.stderr)
        raise


def _embed(args: argparse.Namespace, ranks: Ranks) -> int:
    _check_arguments(args)
    parts = Parts(Path(args.out))
    if not ranks.first:
        ranks.barrier()
        todo = _todo(parts)
        if todo is not None:
            _compute(_join(args, parts), todo, ranks)
        ranks.barrier()
        return DONE
    with parts.locked():
        job = _begin(args, parts)
        if _is_complete(job):
            _write_todo(parts, None)
            ranks.barrier()
            ranks.barrier()  # now all have read it
            return _report_complete(job)
        todo = _unfinished(job)
        _write_todo(parts, todo)
        ranks.barrier()
        _compute(job, todo, ranks)
        ranks.barrier()
        return _assemble(job)


def _begin(args: argparse.Namespace, parts: Parts) -> Job:
    """Reads through the source, and finds or begins the run's folder."""
    old = parts.manifest()
    source, root = _open_source(args, parts)
    stat = _stat(source)
    index = source.index(args.part_rows)
    job = _job(args, parts, source, index, root, stat)
    manifest = {"settings": job.settings, "source": vars(index)}
    if old is not None and old != manifest:
        if not args.overwrite:
            raise ValueError(_refusal(parts.folder, old["settings"], job.settings, old["source"], vars(index)))
        for number in parts.finished():
            parts.discard(number)
    if args.append and job.out.exists():
        from .lance import check_append

        check_append(job.out, job.settings)
    elif not args.overwrite:
        _check_existing(job)
    if old != manifest:
        parts.begin(manifest)
    return job


def _join(args: argparse.Namespace, parts: Parts) -> Job:
    """The run that rank 0 has begun."""
    manifest = parts.manifest()
    source, root = _open_source(args, parts, spool=False)
    return _job(args, parts, source, Index(**manifest["source"]), root, _stat(source))


def _job(args: argparse.Namespace, parts: Parts, source: Any, index: Index, root: Path, stat: tuple[int, int]) -> Job:
    fields = Fields.choose(index.columns, args.text_column, args.image_column, root)
    checkpoint = resolve(args.model, revision=args.revision, local_files_only=args.local_files_only)
    adapter = resolve(args.adapter, local_files_only=args.local_files_only) if args.adapter else None
    settings = _settings(args, checkpoint, adapter, fields)
    return Job(args, Path(args.out), parts, source, index, fields, settings, checkpoint, adapter, stat)


def _stat(source: Any) -> tuple[int, int]:
    stat = source.path.stat()
    return stat.st_size, stat.st_mtime_ns


def _open_source(args: argparse.Namespace, parts: Parts, *, spool: bool = True) -> tuple[Any, Path]:
    """The source as a table, and what relative paths are relative to."""
    path = Path(args.source)
    root = Path(args.image_root) if args.image_root else None
    if args.source == "-":
        if spool:
            spool_stdin(parts.spool)
        return JsonLines(parts.spool), (root or Path()).absolute()
    if path.is_dir():
        if spool:
            images, others = spool_folder(path, parts.spool)
            print(f"{path}: {images:,} images; {others:,} other files left out", file=sys.stderr)
        return JsonLines(parts.spool, has_lines=False), (root or path).absolute()
    if not path.exists():
        raise ValueError(f"{path} does not exist: SOURCE is a folder, a table, or - for JSONL on stdin")
    return open_table(path), (root or path.parent).absolute()


def _settings(args: argparse.Namespace, checkpoint: Path, adapter: Path | None, fields: Fields) -> dict[str, Any]:
    config = VLM2VecConfig.from_json(checkpoint)
    processor = Processor.from_pretrained(checkpoint, config, num_crops=args.num_crops)
    return {
        "checkpoint": fingerprint(checkpoint),
        "adapter": fingerprint(adapter, adapter=True) if adapter else None,
        "instruction": _instruction(args),
        "num_crops": processor.num_crops,
        "max_length": args.max_length,
        "computed_in": args.dtype or config.dtype,
        "stored_as": args.store,
        "dimension": config.decoder.hidden_size,
        "normalized": True,
        "text_column": fields.text,
        "image_column": fields.image,
        "image_root": str(fields.root),
        "vector_column": args.vector_column,
        "batch_tokens": args.batch_tokens,
        "part_rows": args.part_rows,
        "version": __version__,
    }


def _model(job: "Job") -> dict[str, str | None]:
    """Where `search` finds the checkpoint and the adapter again."""
    local = _is_folder(job.args.model)
    return {
        "name": str(job.checkpoint.absolute()) if local else job.args.model,
        "revision": None if local else job.args.revision,
        "adapter": str(job.adapter.absolute()) if job.adapter and _is_folder(job.args.adapter) else job.args.adapter,
    }


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()


def _instruction(args: argparse.Namespace) -> str:
    if args.instruction is not None and args.task is not None:
        raise ValueError("--instruction and --task are both given; use one")
    if args.task is not None:
        return prompts.task(args.task).document
    if args.instruction is not None:
        return args.instruction
    return prompts.IMAGE if Path(args.source).is_dir() else ""


def _check_arguments(args: argparse.Namespace) -> None:
    out = Path(args.out)
    kinds = [*writers.WRITERS, ".lance"]
    if out.suffix not in kinds:
        raise ValueError(f"-o {out}: OUT ends in {', '.join(kinds[:-1])} or {kinds[-1]}")
    for name in ("batch_tokens", "part_rows", "max_length", "num_crops", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; at least 1 is needed")
    if args.append and (out.suffix != ".lance" or args.overwrite):
        raise ValueError("--append adds to a Lance dataset, and excludes --overwrite")
    if out.suffix == ".parquet":
        writers.import_pyarrow("to write Parquet")
    if out.suffix == ".lance":
        from . import lance

        lance.import_lancedb()
    elif out.is_dir():
        raise ValueError(f"-o {out} is a folder")


# What exists already


def _check_existing(job: Job) -> None:
    """Refuses an OUT that this command did not make."""
    if not job.out.exists():
        return
    meta = read_meta(job.out)
    if meta is None:
        raise ValueError(f"{job.out} exists and does not say what made it; --overwrite replaces it")
    if meta["settings"] != job.settings or meta["source"]["fingerprint"] != job.index.fingerprint:
        raise ValueError(_refusal(job.out, meta["settings"], job.settings, meta["source"], vars(job.index)))


def _refusal(path: Path, old: dict, new: dict, old_source: dict, new_source: dict) -> str:
    """What of a file or a run is not as this command would have it."""
    differ = [f"{name} is {_short(name, old.get(name))} there and {_short(name, new.get(name))} now"
              for name in new if old.get(name) != new.get(name)]  # fmt: skip
    if not differ:
        rows = f"{old_source['num_rows']:,} rows then, {new_source['num_rows']:,} now"
        differ = [f"the source has changed since ({rows})"]
    return f"{path} was made otherwise: {'; '.join(differ)}. --overwrite begins anew"


def _short(name: str, value: Any) -> str:
    return value[:12] if name in ("checkpoint", "adapter") and value else repr(value)


def _is_complete(job: Job) -> bool:
    """True where OUT is there and finished: it then was made by this very command, see `_check_existing`."""
    return job.out.exists() and not job.args.overwrite and not job.args.append


def _report_complete(job: Job) -> int:
    meta = read_meta(job.out)
    images = digest_of(_stamps_of_parts(job))
    job.parts.remove()
    if images != meta["images"]:
        raise ValueError(f"{job.out} is finished, but image files have changed since; --overwrite begins anew")
    bad = meta["bad_rows"]
    print(f"{job.out} is finished already: {meta['rows']:,} rows, {bad:,} of them bad", file=sys.stderr)
    return BAD_ROWS if bad else DONE


def _stamps_of_parts(job: Job) -> Iterator[str]:
    for _, rows in job.rows(job.numbers):
        yield digest_of(map(job.fields.stamp, rows))


def _unfinished(job: Job) -> list[int]:
    """The parts still to be computed; those whose image files have changed since are among them again."""
    finished = [n for n in job.parts.finished() if n in job.numbers]
    changed = []
    for number, rows in job.rows(finished):
        if digest_of(map(job.fields.stamp, rows)) != job.parts.head(number).images:
            job.parts.discard(number)
            changed.append(number)
    kept = sorted(set(finished) - set(changed))
    if finished:
        again = f"; {len(changed)} are done again, as their image files changed" if changed else ""
        print(f"going on: {len(kept)} of {len(job.numbers)} parts are finished{again}", file=sys.stderr)
    if job.args.strict:
        for number in kept:
            for bad in job.parts.head(number).errors:
                raise BadRowError(bad)
    return sorted(set(job.numbers) - set(kept))


# The work


def _compute(job: Job, todo: list[int], ranks: Ranks) -> None:
    """Embeds this rank's share of the parts."""
    mine = ranks.share(todo)
    if not mine:
        return
    args = argparse.Namespace(**{**vars(job.args), "model": str(job.checkpoint), "adapter": job.adapter})
    args.device = args.device or ranks.device()
    embedder = load_embedder(args, show_progress=ranks.first and not args.quiet)
    rows = sum(_part_size(job, n) for n in mine)
    with tqdm(total=rows, desc=_label(ranks), unit="row", disable=args.quiet or not ranks.first) as bar:
        pipeline = Pipeline(
            embedder, job.fields, prompt=job.settings["instruction"] or None, max_length=args.max_length,
            batch_tokens=args.batch_tokens, num_workers=args.workers,
            on_bad_row=_BadRows(args.strict, bar), on_rows=bar.update,
        )  # fmt: skip
        for result in pipeline.run(job.rows(mine)):
            job.parts.write(result, job.dtype, computed_with(embedder))
    watch = pipeline.watch
    if ranks.first and not args.quiet:
        print(f"{rows:,} rows in {watch.elapsed:.1f} s ({rows / watch.elapsed:.1f} rows/s); the model waited for input "
              f"{watch.waited / watch.elapsed:.0%} of the time", file=sys.stderr)  # fmt: skip


def computed_with(embedder: Embedder) -> str:
    """What the last bits of vectors depend on and the settings do not tell."""
    device, backend = embedder.device, choose_backend(embedder.model.backend, embedder.model.decoder.norm.weight)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"torch {torch.__version__}, {hardware}{threads}, {backend} kernels"


class _BadRows:
    """Says which rows have no vector, the first of them at least; under --strict raises at the first."""

    def __init__(self, strict: bool, bar: tqdm):
        self.strict, self.bar, self.seen = strict, bar, 0

    def __call__(self, bad: BadRow) -> None:
        if self.strict:
            raise BadRowError(bad)
        self.seen += 1
        if self.seen <= SHOWN_BAD_ROWS:
            more = "; further ones are not shown here" if self.seen == SHOWN_BAD_ROWS else ""
            self.bar.write(f"no vector for {bad}{more}", file=sys.stderr)


def _part_size(job: Job, number: int) -> int:
    return min(job.args.part_rows, job.index.num_rows - number * job.args.part_rows)


def _label(ranks: Ranks) -> str:
    return "Embedding" if ranks.world == 1 else f"Embedding (rank 0 of {ranks.world})"


def _write_todo(parts: Parts, todo: list[int] | None) -> None:
    """Tells the other ranks what is to be done: the parts, or None where OUT is complete."""
    (parts.folder / "todo.json").write_text(json.dumps(todo), encoding="utf-8")


def _todo(parts: Parts) -> list[int] | None:
    return json.loads((parts.folder / "todo.json").read_text(encoding="utf-8"))


# The result


def _assemble(job: Job) -> int:
    """Puts the parts together, moves the file in place, and removes the parts."""
    if _stat(job.source) != job.stat:
        raise ValueError(f"{job.args.source} was changed while it was read; begin anew with --overwrite")
    heads = [job.parts.head(n) for n in job.numbers]
    bad_rows = [bad for head in heads for bad in head.errors]
    meta = {
        "model": _model(job),
        "settings": job.settings,
        "source": {"name": job.args.source, "num_rows": job.index.num_rows, "fingerprint": job.index.fingerprint},
        "images": digest_of(head.images for head in heads),
        "rows": job.index.num_rows,
        "bad_rows": len(bad_rows),
        "computed_with": sorted({head.computed_with for head in heads}),
    }
    if len(meta["computed_with"]) > 1:
        print(f"computed in part with {' and in part with '.join(meta['computed_with'])}: vectors differ by rounding "
              "from those of one of them alone", file=sys.stderr)  # fmt: skip
    lance = job.out.suffix == ".lance"
    arrow = lance or job.out.suffix == ".parquet"
    head = writers.Head(
        job.index.num_rows, job.settings["dimension"], job.dtype, meta,
        schema=_arrow_schema(job) if arrow else None, vector_column=job.settings["vector_column"],
    )  # fmt: skip
    written = job.parts.folder / f"out{job.out.suffix}"
    if lance:
        from .lance import publish_dataset

        publish_dataset(written, job.out, head, _pieces(job, arrow), append=job.args.append)
    else:
        suffixes = writers.WRITERS[job.out.suffix](written, head, _pieces(job, arrow))
        _write_errors(job, bad_rows)
        writers.publish(written, job.out, suffixes)
    if lance:
        _write_errors(job, bad_rows)
    job.parts.remove()
    return _report(job, len(bad_rows))


def _pieces(job: Job, arrow: bool) -> writers.Pieces:
    """(vectors, content) of each part, see writers.py."""
    size = job.args.part_rows
    if arrow and isinstance(job.source, Parquet):
        contents = job.source.tables(job.index, job.numbers, size)
    else:
        contents = job.source.parts(job.index, job.numbers, size)
    for number, content in contents:
        if not arrow:
            content = [{c: row.columns.get(c) for c in job.index.columns} for row in content]
        elif not isinstance(job.source, Parquet):
            content = writers.arrow_table(content, job.index.columns)
        yield job.parts.vectors(number), content


def _arrow_schema(job: Job):
    return job.source.schema() if isinstance(job.source, Parquet) else writers.arrow_schema(job.index.columns)


def _write_errors(job: Job, bad_rows: list[BadRow]) -> None:
    """OUT.errors.jsonl, or no such file where every row has a vector."""
    target = errors_path(job.out)
    if not bad_rows:
        target.unlink(missing_ok=True)
        return
    new = job.parts.folder / "errors.jsonl"
    with open(new, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(bad.as_json(), ensure_ascii=False) + "\n" for bad in bad_rows)
        flush(f)
    rename(new, target)


def errors_path(out: Path) -> Path:
    return out.with_name(out.name + ".errors.jsonl")


def _report(job: Job, num_bad: int) -> int:
    verb = "appended to" if job.args.append else "wrote"
    print(f"{verb} {job.out}: {job.index.num_rows:,} vectors of {job.settings['dimension']} {job.args.store}",
          file=sys.stderr)  # fmt: skip
    if num_bad:
        print(f"{num_bad:,} of them are empty: {errors_path(job.out)} says why", file=sys.stderr)
    return BAD_ROWS if num_bad else DONE
