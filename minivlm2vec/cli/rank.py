"""`minivlm2vec rank`: candidates by their nearness to a query. `minivlm2vec similarity` is the same without an
instruction."""

import argparse
import csv
import json
import sys
from typing import Any

from ..files.rows import printable
from .arguments import add_model_arguments, load_embedder
from .messages import say
from .pictures import add_forms, check_paths, image_paths

AUTO, NONE = "auto", "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Embeds one query and any number of targets and prints the targets, the nearest first."
    add_model_arguments(parser)
    parser.add_argument("images", nargs="*", metavar="IMG", help="target images; a folder is all its images; - reads "
                        "paths")  # fmt: skip
    parser.add_argument("--query-text", help="may hold <|image_1|>; without it the image comes first")
    parser.add_argument("--query-image", metavar="PATH")
    parser.add_argument("--target-text", action="append", default=[], metavar="TEXT", help="repeatable")
    parser.add_argument("--target-image", action="append", default=[], metavar="PATH", help="repeatable")
    parser.add_argument("--target-prompt", default="Represent the given image.\n",
                        help="instruction for target images (default: %(default)r)")  # fmt: skip
    parser.add_argument("--instruction", default=AUTO, metavar="NAME",
                        help="the query's: a task of MMEB, 'none', or 'auto': t2i for a text, i2t or i2i for an image, "
                        "change for both (%(default)s)")  # fmt: skip
    parser.add_argument("--top", type=int, metavar="K", help="targets to print (all)")
    parser.add_argument("--right", type=int, metavar="I", help="the target (from 0: texts, then images) that is right: "
                        "print its rank")  # fmt: skip
    add_forms(parser, json="for machines", csv="a row for each target")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..prompts import TEXT, Task
    from ..tasks import rank
    from ..tasks.common import as_task, checked_top
    from ..tasks.ranking import checked_right

    if args.query_text is None and args.query_image is None:
        raise ValueError("--query-text or --query-image is needed")
    pictures = [*args.target_image, *image_paths(args.images)]
    if not args.target_text and not pictures:
        raise ValueError("at least one --target-text or --target-image is needed")
    query = {"text": args.query_text, "image": args.query_image}
    names = [("text", t) for t in args.target_text] + [("image", p) for p in pictures]
    name = _instruction(args, bool(pictures)) if args.instruction == AUTO else args.instruction
    task = as_task(None if name == NONE else name)
    checked_top(args.top, len(names), "targets")
    checked_right(args.right, len(names))
    check_paths(args.images)
    targets: list[Any] = [{"text": text} for text in args.target_text]
    targets += [{"text": args.target_prompt, "image": path} for path in pictures]
    embedder = load_embedder(args, show_progress=not args.json and sys.stderr.isatty())
    found = rank(embedder, query, targets, instruction=Task(task.query, TEXT), top=args.top, right=args.right)
    rows = [{"score": hit.score, "kind": names[hit.index][0], "target": names[hit.index][1]} for hit in found.hits]
    right = {} if args.right is None else {"right": args.right, "right_rank": found.right_rank}
    if args.json:
        asked = {k: v for k, v in query.items() if v is not None}
        print(json.dumps({"query": asked, "targets": rows} | right, indent=2))
    elif args.csv:
        table = csv.DictWriter(sys.stdout, ("score", "kind", "target"), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        if right:  # the table has no place for it
            say(f"target {args.right} has rank {found.right_rank} of {found.of}")
    else:
        print("  score  kind   target")
        for row in rows:
            print(f"{row['score']:>7.4f}  {row['kind']:<5}  {printable(row['target'], 100)}")
        if right:
            print(f"target {args.right} has rank {found.right_rank} of {found.of}")
    return 0


def _instruction(args: argparse.Namespace, pictures: bool) -> str:
    """MMEB's for such a query and such targets."""
    if args.query_image is None:
        return "t2i" if pictures else NONE
    if args.query_text:
        return "change" if pictures else "vqa"
    return "i2i" if pictures else "i2t"
