"""`minivlm2vec search`: the arguments. Nothing heavy is imported before they are parsed."""

import argparse

from .arguments import add_model_arguments

THAT_OF_VECTORS = "the one that made VECTORS"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Finds the rows of a file of vectors that are nearest to a text, an image, both, or another row. Without a "
        "query, --html makes a gallery of everything, each picture with its nearest neighbours."
    )
    parser.add_argument("vectors", metavar="VECTORS", help="what embed wrote: .npy, .safetensors, .parquet or .lance")
    parser.add_argument("--text", help="may hold <|image_1|>; without it the image comes first")
    parser.add_argument("--image", metavar="PATH")
    parser.add_argument(
        "--like", type=int, metavar="ROW", help="a row of VECTORS (from 0) as the query; needs no model"
    )
    parser.add_argument("--top", type=int, default=10, metavar="K", help="(%(default)s)")
    parser.add_argument("--instruction", metavar="TEXT",
                        help="in front of the query's text, or around it with {text}; '' for none (default: that of "
                        "MMEB for such a query)")  # fmt: skip
    parser.add_argument("--task", metavar="NAME", help="the query instruction of a task of MMEB, such as t2i")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page")
    parser.add_argument("--limit", type=int, metavar="N", help="a gallery of the first N rows (default: all)")
    parser.add_argument(
        "--image-root", metavar="DIR", help="where the images are now (default: where embed found them)"
    )
    parser.add_argument("--where", metavar="SQL", help='only rows that fulfil this, such as "price < 10" (.lance)')
    parser.add_argument("--build-index", nargs="?", const="IVF_PQ", choices=["IVF_FLAT", "IVF_PQ", "IVF_HNSW_SQ"],
                        help="build an index and print its recall against exact search (.lance)")  # fmt: skip
    parser.add_argument(
        "--nprobes", type=int, default=20, metavar="N", help="cells of the index to look into (%(default)s)"
    )
    parser.add_argument("--exact", action="store_true", help="search without the index (.lance)")
    parser.add_argument("--force", action="store_true", help="query with another checkpoint than made the vectors")
    add_model_arguments(parser)
    parser.set_defaults(run=run, model=THAT_OF_VECTORS)


def run(args: argparse.Namespace) -> int:
    from ..files.search import search

    return search(args)
