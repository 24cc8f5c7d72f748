"""`python -m minivlm2vec.mini`: the bundled checkpoint's start, its packaging, its model card."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .messages import printed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit code: 0 done, 1 a user's error (named on stderr)."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m minivlm2vec.mini",
        description="What the bundled checkpoint is trained from, how it comes into the package, and its model card.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    start = commands.add_parser("start", help="write what training begins from: tokenizer, config, random weights")
    start.add_argument("folder", type=Path, metavar="DIR")
    start.add_argument("--tarballs", type=Path, default=Path("outputs/tarballs"), help="npm packages (%(default)s)")
    start.add_argument(
        "--size", choices=("cpu", "gpu"), default="cpu", help="what it is to be trained on (%(default)s)"
    )
    start.add_argument("--seed", type=int, default=0)
    start.set_defaults(run=_start)
    package = commands.add_parser("package", help="copy a trained checkpoint in half its size")
    package.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    package.add_argument("folder", type=Path, metavar="DIR")
    package.set_defaults(run=_package)
    ground = commands.add_parser("grounding", help="how often it finds what is named in a canvas, for the model card")
    ground.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    ground.add_argument("-o", "--out", type=Path, metavar="DIR", help="for grounding.json (CHECKPOINT)")
    ground.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each set")
    ground.set_defaults(run=_grounding)
    card = commands.add_parser("card", help="score a checkpoint on mini-MMEB and write its model card")
    _add_card_arguments(card)
    card.set_defaults(run=_card)
    return parser


def _add_card_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes scores.json and README.md, the card, into CHECKPOINT. The same scores give the same card; without DATA "
        "it is written again from scores.json. How the checkpoint was trained stands in its training.json: see "
        "minivlm2vec/mini/card.py."
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument(
        "data", type=Path, nargs="?", metavar="DATA", help="what the builder wrote; without: no scoring"
    )
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help="for scores.json and README.md (CHECKPOINT)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the evaluator's files here, and go on from them")
    parser.add_argument("--name", help="of the model, in the card (the folder's)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each set")
    parser.add_argument("--allow-collapsed", action="store_true", help="score vectors that carry no information")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _start(args: argparse.Namespace) -> None:
    from ..mini.start import write_start
    from ..mini.world import sources

    with printed(sources.log.name):
        tarballs = sources.fetch(args.tarballs)
    write_start(args.folder, tarballs, size=args.size, seed=args.seed)
    print(f"written to {args.folder}")


def _package(args: argparse.Namespace) -> None:
    from ..mini.start import package

    package(args.checkpoint, args.folder)
    print(f"written to {args.folder}")


def _grounding(args: argparse.Namespace) -> None:
    from ..embedder import Embedder
    from ..mini import bundled
    from ..mini.grounding import GROUNDING, measure_grounding, write_grounding
    from ..mmeb.dataset import Dataset

    embedder = Embedder.from_pretrained(args.checkpoint, show_progress=False)
    measured = measure_grounding(embedder, Dataset(bundled() / "MMEB-eval"), limit=args.limit)
    path = (args.out or args.checkpoint) / GROUNDING
    write_grounding(path, measured)
    print(f"written to {path}; `card` puts it into the model card")


def _card(args: argparse.Namespace) -> None:
    from ..mini.card import write_card, write_scores

    out = args.out or args.checkpoint
    if args.data is not None:
        write_scores(
            args.checkpoint,
            args.data,
            out,
            work=args.work,
            limit=args.limit,
            allow_collapsed=args.allow_collapsed,
            show_progress=not args.quiet,
        )
    overview = write_card(args.checkpoint, out, name=args.name or args.checkpoint.resolve().name)
    print(f"{overview}\nwritten to {out / 'README.md'}")
