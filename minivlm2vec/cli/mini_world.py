"""`python -m minivlm2vec.mini.world DIR`: builds mini-MMEB."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .messages import printed

if TYPE_CHECKING:
    from ..mini.world.build import Plan


def main(argv: Sequence[str] | None = None) -> int:
    """Builds. Returns the exit code: 0 done, 1 a user's error (named on stderr)."""
    args = _parser().parse_args(argv)
    plan = _plan(args)
    start = time.monotonic()

    def timed(line: str) -> str:
        return f"[{time.monotonic() - start:6.1f} s] {line}"

    from ..mini.world import build, sources

    try:
        with printed("minivlm2vec.mini.world", timed):
            build.write(args.folder, plan, sources.fetch(args.tarballs or args.folder / "tarballs"))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(timed(f"written to {args.folder}"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m minivlm2vec.mini.world", description="Fetches the packages through npm and builds mini-MMEB."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where MMEB-eval/ and MMEB-train/ go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-rows", type=int, metavar="N", help="rows per evaluation set (400)")
    parser.add_argument("--train-rows", type=int, metavar="N", help="rows per training set (1000)")
    parser.add_argument("--candidates", type=int, metavar="N", help="most candidates per row (1000)")
    parser.add_argument("--tarballs", type=Path, metavar="DIR", help="npm tarballs, kept here (DIR/tarballs)")
    parser.add_argument("--trimmed", action="store_true", help="the small copy that the package ships")
    return parser


def _plan(args: argparse.Namespace) -> "Plan":
    from ..mini.world import build

    plan = build.TRIMMED if args.trimmed else build.Plan()
    names = ("eval_rows", "train_rows", "candidates")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name, value in given.items():
        if value < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    return dataclasses.replace(plan, seed=args.seed, **given)
