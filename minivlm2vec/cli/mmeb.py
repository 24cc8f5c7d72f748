"""`minivlm2vec mmeb`: Precision@1 of a model on MMEB, or on data in its format; two such evaluations compared."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import add_model_arguments, load_embedder

if TYPE_CHECKING:
    from ..mmeb import EvaluateOptions

EXAMPLES = """\
the whole benchmark (37 subsets; rows and pictures are downloaded once):
  minivlm2vec mmeb --model TIGER-Lab/VLM2Vec-Full -o outputs/mmeb
two subsets of a local copy, on four GPUs:
  torchrun --nproc-per-node 4 -m minivlm2vec mmeb --data MMEB-eval --image-dir eval_images \\
      --subsets VOC2007 CIRR -o outputs/mmeb
the small benchmark that ships with the package (emoji, not MMEB):
  minivlm2vec mmeb --model CHECKPOINT --data mini -o outputs/mini
the difference between two evaluations, with paired bootstrap intervals:
  minivlm2vec mmeb --compare outputs/before outputs/after
An interrupted run goes on where it was when the same command is given again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..mmeb.subsets import HUB_NAME, META_TASKS

    parser.description = __doc__
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-o", "--out", type=Path, metavar="DIR", help="scores, predictions, tables")
    what.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="two such folders: how B differs from A"
    )
    parser.add_argument("--data", default=HUB_NAME, help='folder, Hub dataset, or "mini" (%(default)s)')
    parser.add_argument("--data-revision", metavar="REV", help="branch, tag or commit of the Hub dataset")
    parser.add_argument("--image-dir", type=Path, metavar="DIR", help="folder or zip (default: the data's images.zip)")
    parser.add_argument("--subsets", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--meta-task", nargs="+", choices=META_TASKS, help="default: all")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of inputs without image (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="inputs per saved chunk (%(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each subset")
    parser.add_argument("--skip-damaged", action="store_true", help="leave unreadable rows out and say so")
    parser.add_argument("--allow-collapsed", action="store_true", help="score vectors that carry no information")
    parser.add_argument("--name", default="", help="of the model, in the table")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluates, or compares, as the arguments say and prints the table. Errors are raised, for the caller to print."""
    from ..distributed import Ranks
    from ..mmeb import ProgressBars, compare, evaluate
    from ..mmeb.subsets import HUB_NAME

    if args.compare:
        print(compare(*args.compare).table())
        return 0
    if args.num_crops is None and args.data == HUB_NAME:
        args.num_crops = 4  # what the published scores were measured with
    options = _options(args)
    with Ranks() as ranks:
        args.device = ranks.device(args.device)
        embedder = load_embedder(args, show_progress=not args.quiet)
        progress = {"on_progress": ProgressBars()} if ranks.first and not args.quiet else {}
        results = evaluate(embedder, args.data, args.out, options, **progress)
        if ranks.first:
            print(results.table())
            print(f"written to {args.out}", file=sys.stderr)
    return 0


def _options(args: argparse.Namespace) -> "EvaluateOptions":
    from ..mmeb import EvaluateOptions

    return EvaluateOptions(
        image_dir=args.image_dir,
        subsets=args.subsets,
        meta_tasks=args.meta_task,
        num_crops=args.num_crops,
        max_length=args.max_length,
        batch_size=args.batch_size,
        limit=args.limit,
        skip_damaged=args.skip_damaged,
        allow_collapsed=args.allow_collapsed,
        revision=args.data_revision,
        local_files_only=args.local_files_only,
        name=args.name,
    )
