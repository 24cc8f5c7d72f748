"""The `minivlm2vec` command: one file a subcommand. Nothing here is imported by the rest of the package.

A file has `add_arguments(parser)` and `run(args)`, and imports what is heavy in `run`, so that --help is quick.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import Option, OptionError
from . import (
    answer,
    classify,
    demo,
    doctor,
    embed,
    ground,
    info,
    mmeb,
    new_checkpoint,
    rank,
    search,
    serve,
    similarity,
    train,
)  # fmt: skip
from .messages import say

COMMANDS = {
    "demo": (demo, "see what it does, with the bundled model and pictures"),
    "doctor": (doctor, "examine this machine: is everything right, and how fast"),
    "classify": (classify, "the nearest labels of images"),
    "answer": (answer, "the choice that answers a question about an image"),
    "rank": (rank, "targets by their nearness to a query"),
    "ground": (ground, "the part of an image that a text describes"),
    "similarity": (similarity, "rank without an instruction"),
    "embed": (embed, "folders and tables to files of vectors"),
    "search": (search, "find rows by text, image or likeness"),
    "serve": (serve, "answer OpenAI's embeddings API"),
    "mmeb": (mmeb, "evaluate on MMEB, or on data in its format"),
    "train": (train, "train by contrast, wholly or with LoRA"),
    "info": (info, "print a checkpoint's architecture"),
    "new-checkpoint": (new_checkpoint, "write a randomly initialised checkpoint"),
}
PIPE_CLOSED = 141  # what a shell gives a command that SIGPIPE ends


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand. Returns its exit code: 0 done, 1 a user's error (named on stderr), 2 wrong arguments."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the shell: >&-
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for the process)
    args = _parser().parse_args(argv)
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read has read enough, as `head` does
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else Python complains when it flushes at its end
        return PIPE_CLOSED
    except (ValueError, OSError, ImportError, RuntimeError) as e:
        say(f"minivlm2vec {args.command}: {_message(e)}")
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _message(e: Exception) -> str:
    """What an error says, with options spelled as flags: --max-length for max_length."""
    if not isinstance(e, OptionError):
        return str(e)
    return "".join(_flag(part) if isinstance(part, Option) else part for part in e.parts)


def _flag(option: str) -> str:
    return {"out": "-o", "truncate_dim": "--dimensions"}.get(option) or "--" + option.replace("_", "-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minivlm2vec", description="Text and images to vectors, with VLM2Vec-Full.")
    parser.add_argument("--version", action="version", version=f"minivlm2vec {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, what) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=what))
    return parser
