"""`minivlm2vec similarity`: scores of targets against a query."""

import argparse
import json
import sys

from ..files.rows import printable
from .arguments import add_model_arguments, load_embedder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Embeds one query and any number of targets and prints the targets, the nearest first."
    add_model_arguments(parser)
    parser.add_argument("--query-text", help="may hold <|image_1|>; without it the image comes first")
    parser.add_argument("--query-image", metavar="PATH")
    parser.add_argument("--target-text", action="append", default=[], metavar="TEXT", help="repeatable")
    parser.add_argument("--target-image", action="append", default=[], metavar="PATH", help="repeatable")
    parser.add_argument("--target-prompt", default="Represent the given image.\n",
                        help="instruction for target images (default: %(default)r)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.query_text is None and args.query_image is None:
        raise ValueError("--query-text or --query-image is needed")
    if not args.target_text and not args.target_image:
        raise ValueError("at least one --target-text or --target-image is needed")
    query = {"text": args.query_text, "image": args.query_image}
    texts = [{"text": text} for text in args.target_text]
    images = [{"text": args.target_prompt, "image": path} for path in args.target_image]
    embedder = load_embedder(args, show_progress=not args.json and sys.stderr.isatty())
    vectors = embedder.encode([query, *texts, *images])
    scores = embedder.similarity(vectors[:1], vectors[1:])[0]
    names = [("text", t) for t in args.target_text] + [("image", p) for p in args.target_image]
    order = sorted(range(len(names)), key=lambda i: -scores[i])
    rows = [{"score": float(scores[i]), "kind": names[i][0], "target": names[i][1]} for i in order]
    if args.json:
        print(json.dumps({"query": {k: v for k, v in query.items() if v is not None}, "targets": rows}, indent=2))
    else:
        print("  score  kind   target")
        for row in rows:
            print(f"{row['score']:>7.4f}  {row['kind']:<5}  {printable(row['target'], 100)}")
    return 0
