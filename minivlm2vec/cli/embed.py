"""`minivlm2vec embed`: the arguments. Nothing heavy is imported before they are parsed."""

import argparse

from .arguments import add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..files.embed import embed

    return embed(args)
