"""`minivlm2vec demo`: the first thing to run."""

import argparse
import sys
import time
from pathlib import Path

from .arguments import add_model_arguments, load_embedder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Embeds the bundled emoji pictures, answers questions made of text, of an image and of both, prints the "
        "answers and how many are right, and writes them to a page with the pictures. Without --model it takes the "
        "bundled checkpoint and downloads nothing."
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("demo.html"), metavar="HTML", help="(%(default)s)")
    add_model_arguments(parser)
    parser.set_defaults(run=run, model="mini")


def run(args: argparse.Namespace) -> int:
    """Asks, prints and writes as the arguments say. Errors are raised, for the caller to print."""
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f"the folder {args.out.parent} of --out does not exist")
    start = time.perf_counter()
    from ..mini import demo

    progress = sys.stderr.isatty()
    loading = time.perf_counter()
    embedder = load_embedder(args, show_progress=progress)
    load_seconds = time.perf_counter() - loading
    found = demo.run(embedder, args.out, name=args.model, load_seconds=load_seconds, show_progress=progress)
    print(found.text())
    print(f"With pictures: {args.out} ({args.out.stat().st_size / 1e6:.1f} MB). All of it took "
          f"{time.perf_counter() - start:.1f} s on {embedder.device}.")  # fmt: skip
    if embedder.device.type == "cuda":
        print("On a GPU that is new to it, see whether all is right: minivlm2vec doctor")
    print(f"Next: {_next(args)}")
    return 0


def _next(args: argparse.Namespace) -> str:
    """A command that shows something more."""
    if args.model == "mini":
        return "minivlm2vec demo --model TIGER-Lab/VLM2Vec-Full -o full.html   (downloads 8.3 GB, once; wants a GPU)"
    return f"minivlm2vec embed PHOTOS/ -o photos.npy --model {args.model}"
