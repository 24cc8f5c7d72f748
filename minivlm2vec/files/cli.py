"""The arguments of `minivlm2vec embed` and `minivlm2vec search`. Nothing heavy is imported before they are parsed."""

import argparse

from ..cli import add_model_arguments

THAT_OF_VECTORS = "the one that made VECTORS"


def add_embed_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Embeds a folder of images or a table, of any size, into one file. It can be killed at any moment: the same "
        "command goes on, and the file is the same as without the interruption (on another device, or with another "
        "number of threads, up to rounding, and it says so). Row i of OUT is row i of SOURCE; a row that cannot be "
        "embedded stays empty there, and OUT.errors.jsonl says why."
    )
    parser.epilog = (
        "Exit codes: 0 all rows have a vector; 1 an error, named on stderr; 2 wrong arguments; 3 finished, some rows "
        "have no vector; 4 stopped at such a row (--strict); 130 interrupted. Several GPUs or hosts with a shared "
        "folder: torchrun --nproc-per-node N -m minivlm2vec embed … (torchrun itself exits with 1 for every code above "
        "but 0, and names it as `exitcode`)"
    )
    parser.add_argument("source", metavar="SOURCE",
                        help="a folder of images (with all below it), a .jsonl, .csv, .tsv or .parquet table, or - for "
                        "JSONL on stdin")  # fmt: skip
    parser.add_argument("-o", "--out", required=True, metavar="OUT",
                        help="ends in .npy, .safetensors, .parquet or .lance")  # fmt: skip
    add_model_arguments(parser)
    parser.add_argument("--text-column", metavar="NAME", help="default: text, where there is one")
    parser.add_argument("--image-column", metavar="NAME",
                        help="paths (or lists), data URIs or bytes; default: image, images or image_path")  # fmt: skip
    parser.add_argument("--image-root", metavar="DIR", help="what paths are relative to (default: the table's folder)")
    parser.add_argument("--instruction", metavar="TEXT",
                        help="in front of each text; {text} stands for the text itself (default: 'Represent the given "
                        "image.\\n' for a folder, else none)")  # fmt: skip
    parser.add_argument("--task", metavar="NAME", help="the document instruction of a task of MMEB, such as t2i")
    parser.add_argument("--max-length", type=int, metavar="N", help="keep the first N tokens of texts without images")
    parser.add_argument(
        "--store", choices=["float32", "float16"], default="float32", help="vectors' dtype in OUT (%(default)s)"
    )
    parser.add_argument(
        "--vector-column", default="embedding", metavar="NAME", help="in .parquet and .lance (%(default)s)"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be embedded")
    parser.add_argument("--overwrite", action="store_true", help="replace an OUT, or a run, that was made otherwise")
    parser.add_argument("--append", action="store_true", help="add to a .lance dataset of the same model")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads that decode images (default: the cores, at most 16)"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=16384, metavar="N", help="tokens computed together (%(default)s)"
    )
    parser.add_argument("--part-rows", type=int, default=512, metavar="N",
                        help="rows between two points from which a run can go on; their images must fit in memory "
                        "where a table holds them as bytes (%(default)s)")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_embed)


def _embed(args: argparse.Namespace) -> int:
    from .embed import embed

    return embed(args)


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.set_defaults(run=_search, model=THAT_OF_VECTORS)


def _search(args: argparse.Namespace) -> int:
    from .search import search

    return search(args)
