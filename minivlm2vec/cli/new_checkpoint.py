"""`minivlm2vec new-checkpoint`: a randomly initialised checkpoint in the published layout."""

import argparse
from pathlib import Path

PRESETS = ("full", "small", "tiny")  # those of new_checkpoint.py, which imports torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes a randomly initialised checkpoint in the published layout."
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--config", metavar="JSON", help="file with keys of config.json that replace the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json to copy (default: one of bytes)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..config import read_object
    from ..new_checkpoint import new_checkpoint

    config = read_object(Path(args.config), "--config names it") if args.config else None
    path = new_checkpoint(
        args.path, preset=args.preset, config=config, seed=args.seed, dtype=args.dtype, tokenizer=args.tokenizer,
        show_progress=True,
    )  # fmt: skip
    print(f"wrote {path}")
    return 0
