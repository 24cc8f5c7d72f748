"""`minivlm2vec answer`: a question about an image against choices."""

import argparse
import csv
import json
import sys

from .arguments import add_model_arguments, load_embedder
from .pictures import add_forms, check_paths, instruction_named, texts_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints the choices that answer a question about an image, the nearest first."
    parser.add_argument("image", metavar="IMG")
    parser.add_argument("--question", action="append", required=True, metavar="Q", help="repeatable: the image is "
                        "decoded and seen once")  # fmt: skip
    parser.add_argument("--choices", required=True, nargs="+", metavar="FILE|A,B,C|A B C",
                        help="a file with one a line, a list, or several arguments")  # fmt: skip
    parser.add_argument("--instruction", default="vqa", metavar="NAME", help="a task of MMEB, or 'none' (%(default)s)")
    parser.add_argument("--top", type=int, metavar="K", help="choices to print (all)")
    add_forms(parser, json="one JSON object a question", csv="a row for each question: its nearest choice")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..tasks import answer
    from ..tasks.common import checked_texts

    choices = texts_of(args.choices[0], "--choices") if len(args.choices) == 1 else args.choices
    checked_texts(choices, "choice")
    instruction = instruction_named(args.instruction)
    check_paths([args.image])
    embedder = load_embedder(args, show_progress=sys.stderr.isatty() and not args.json)
    answers = answer(embedder, args.image, args.question, choices, instruction=instruction, top=args.top)
    rows = csv.writer(sys.stdout, lineterminator="\n")
    if args.csv:
        rows.writerow(("question", "choice", "score", "probability"))
    for one in answers:
        if args.json:
            print(json.dumps(one.as_dict()))
        elif args.csv:
            rows.writerow((one.question, one.choice, f"{one.score:.6f}", f"{one.probability:.6f}"))
        else:
            print(one)
    return 0
