"""`minivlm2vec embed`: a source of any size to one file of vectors."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.progress import Progress
from .arguments import add_model_arguments, model_spec
from .messages import say, visible

if TYPE_CHECKING:
    from ..files import BadRow, EmbedOptions, Job, Summary, Timing

DONE, USER_ERROR, BAD_ROWS, STRICT = 0, 1, 3, 4
SHOWN_BAD_ROWS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Embeds a folder of images or a table, of any size, into one file. It can be killed at any moment: the same "
        "command goes on, and the file is the same as without the interruption (on another device, or with another "
        "number of threads, up to rounding, and it says so). Row i of OUT is row i of SOURCE; a row that cannot be "
        "embedded stays empty there, and OUT.errors.jsonl says why."
    )
    parser.epilog = (
        "Exit codes: 0 all rows have a vector; 1 an error, named on stderr; 2 wrong arguments; 3 finished, some rows "
        "have no vector; 4 stopped at such a row (--strict); 130 interrupted. Several GPUs or hosts with a shared "
        "folder: torchrun --nproc-per-node N -m minivlm2vec embed … (torchrun itself exits with 1 for every code above "
        "but 0, and names it as `exitcode`)"
    )
    parser.add_argument("source", metavar="SOURCE",
                        help="a folder of images (with all below it) or of Parquet files, a .jsonl, .csv, .tsv or "
                        ".parquet table, or - for JSONL on stdin")  # fmt: skip
    parser.add_argument("-o", "--out", required=True, metavar="OUT",
                        help="ends in .npy, .safetensors, .parquet or .lance")  # fmt: skip
    add_model_arguments(parser)
    parser.add_argument("--text-column", metavar="NAME", help="default: text, where there is one")
    parser.add_argument("--image-column", metavar="NAME",
                        help="paths (or lists), data URIs or bytes; default: image, images or image_path")  # fmt: skip
    parser.add_argument("--image-root", metavar="DIR", help="what paths are relative to (default: the table's folder)")
    parser.add_argument("--instruction", metavar="TEXT",
                        help="in front of each text; {text} stands for the text itself (default: 'Represent the given "
                        "image.\\n' for a folder, else none)")  # fmt: skip
    parser.add_argument("--task", metavar="NAME", help="the document instruction of a task of MMEB, such as t2i")
    parser.add_argument("--max-length", type=int, metavar="N", help="keep the first N tokens of texts without images")
    parser.add_argument(
        "--store", choices=["float32", "float16"], default="float32", help="vectors' dtype in OUT (%(default)s)"
    )
    parser.add_argument(
        "--vector-column", default="embedding", metavar="NAME", help="in .parquet and .lance (%(default)s)"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be embedded")
    parser.add_argument("--overwrite", action="store_true", help="replace an OUT, or a run, that was made otherwise")
    parser.add_argument("--append", action="store_true", help="add to a .lance dataset of the same model")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads that decode images (default: the cores, at most 16)"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=16384, metavar="N", help="tokens computed together (%(default)s)"
    )
    parser.add_argument("--part-rows", type=int, default=512, metavar="N",
                        help="rows between two points from which a run can go on; their images must fit in memory "
                        "where a table holds them as bytes (%(default)s)")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Returns 0 where all rows have a vector, 3 where some have none, 4 where --strict met one, and 1 after an error of
    the user's or the system's."""
    from .. import files

    try:
        with Bar(args) as progress:
            summary = files.embed(args.source, args.out, None, _options(args), progress)
    except files.BadRowError as e:
        say(f"minivlm2vec embed: stopped (--strict) at {e}")
        return STRICT
    except BrokenPipeError:
        raise
    except OSError as e:
        say(f"minivlm2vec embed: {e}. What is finished is kept: the same command goes on from there")
        return USER_ERROR
    except KeyboardInterrupt:
        print("\nThe same command goes on from here.", file=sys.stderr)
        raise
    if summary is None:  # the first process of torchrun tells
        return DONE
    _report(summary, args)
    return BAD_ROWS if summary.bad_rows else DONE


def _options(args: argparse.Namespace) -> "EmbedOptions":
    from ..files import EmbedOptions

    names = ("text_column", "image_column", "image_root", "instruction", "task", "max_length", "store", "vector_column",
             "strict", "overwrite", "append", "workers", "batch_tokens", "part_rows")  # fmt: skip
    model = model_spec(args, show_progress=not args.quiet)
    return EmbedOptions(model, **{name: getattr(args, name) for name in names})


def _report(summary: "Summary", args: argparse.Namespace) -> None:
    out, rows, bad = summary.out, f"{summary.rows:,}", f"{summary.bad_rows:,}"
    if summary.already_finished:
        say(f"{out} is finished already: {rows} rows, {bad} of them bad")
        return
    if len(summary.computed_with) > 1:
        say(f"computed in part with {' and in part with '.join(summary.computed_with)}: vectors differ by rounding "
            "from those of one of them alone")  # fmt: skip
    verb = "appended to" if args.append else "wrote"
    say(f"{verb} {out}: {rows} vectors of {summary.dimension} {args.store}")
    if summary.errors:
        say(f"{bad} of them are empty: {summary.errors} says why")


class Bar(Progress):
    """A `files.Progress` for a terminal: a bar, the first bad rows, how long it took."""

    def __init__(self, args: argparse.Namespace):
        from huggingface_hub.utils import tqdm

        from ..distributed import rank_and_world

        rank, world = rank_and_world()
        self.quiet = args.quiet or rank > 0
        self.label = "Embedding" if world == 1 else f"Embedding (rank 0 of {world})"
        self.tqdm, self.num_bad = tqdm, 0
        self.bar: Any = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def planned(self, job: "Job") -> None:
        if job.listed is not None:
            tables, others = len(job.listed.tables), sum(job.listed.others.values())
            found = f"{tables:,} Parquet files" if tables and not job.listed.images else f"{job.listed.images:,} images"
            left = others - tables if found.endswith("files") else others
            say(f"{Path(job.source)}: {found}; {left:,} other files left out")
            for folder in job.listed.unreadable:
                say(f"{Path(job.source)}: left out, as it cannot be read: {folder}")
        if not job.index.num_rows:
            say(f"{Path(job.source)} has no rows: {job.out} holds no vector")
        kept = len(job.numbers) - len(job.todo)
        if (kept or job.changed) and not job.complete:
            again = f"; {job.changed} are done again, as they or their image files changed" if job.changed else ""
            say(f"going on: {kept} of {len(job.numbers)} parts are finished{again}")

    def begun(self, rows: int) -> None:
        self.bar = self.tqdm(total=rows, desc=self.label, unit="row", disable=self.quiet)

    def advanced(self, rows: int) -> None:
        self.bar.update(rows)

    def bad_row(self, bad: "BadRow") -> None:
        self.num_bad += 1
        if self.num_bad <= SHOWN_BAD_ROWS:
            more = "; further ones are not shown here" if self.num_bad == SHOWN_BAD_ROWS else ""
            self.bar.write(visible(f"no vector for {bad}{more}"), file=sys.stderr)

    def computed(self, timing: "Timing") -> None:
        self.bar.close()
        if not self.quiet:
            speed, waited = timing.rows / timing.elapsed, timing.waited / timing.elapsed
            print(f"{timing.rows:,} rows in {timing.elapsed:.1f} s ({speed:.1f} rows/s); the model waited for input "
                  f"{waited:.0%} of the time", file=sys.stderr)  # fmt: skip
