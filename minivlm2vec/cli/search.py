"""`minivlm2vec search`: the rows of a file of vectors that are nearest to a query; a table, JSON, or a page."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import add_model_arguments, model_spec
from .messages import say

if TYPE_CHECKING:
    from ..files import Hit, Query, SearchOptions

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
    if args.build_index:
        return _build_index(args)
    if args.text is None and args.image is None and args.like is None:
        return _write_gallery(args)
    return _search(args)


def _search(args: argparse.Namespace) -> int:
    from .. import files

    query, options = files.Query(args.text, args.image, args.like, args.instruction, args.task), _options(args)
    vectors = files.open_vectors(args.vectors)
    query = query.resolved(images=vectors.has_images)
    hits = files.search(vectors, query, None, options)
    if args.html:
        files.write_hits(args.html, vectors, query, hits, image_root=args.image_root)
        say(f"wrote {args.html}")
    if args.json:
        print(_as_json(args.vectors, query, hits))
    elif not args.html:
        print(_as_table(query, hits))
    return 0


def _options(args: argparse.Namespace) -> "SearchOptions":
    from ..files import SearchOptions

    spec = model_spec(args, show_progress=sys.stderr.isatty() and not args.json)
    if args.model == THAT_OF_VECTORS:
        spec = replace(spec, name=None)
    names = ("top", "device", "force", "where", "exact", "nprobes")
    return SearchOptions(spec, **{name: getattr(args, name) for name in names})


def _build_index(args: argparse.Namespace) -> int:
    from ..files import build_index

    report = build_index(args.vectors, args.build_index, nprobes=args.nprobes, k=args.top)
    say(f"{args.vectors}: index {report.kind} over {report.rows:,} rows; recall@{report.k} against exact search "
        f"{report.recall:.3f} ({report.queries} of its own vectors, {report.nprobes} probes)")  # fmt: skip
    return 0


def _write_gallery(args: argparse.Namespace) -> int:
    from .. import files

    if not args.html:
        raise ValueError(
            "nothing is asked: give --text, --image or --like; or --html alone, for a gallery of everything"
        )
    if args.where or args.exact:
        raise ValueError("--where and --exact are for a search: give --text, --image or --like")
    vectors = files.open_vectors(args.vectors)
    shown = files.write_gallery(
        args.html, vectors, top=args.top, limit=args.limit, image_root=args.image_root, device=args.device or "cpu"
    )
    size = Path(args.html).stat().st_size / 1e6
    say(f"wrote {args.html}: {shown:,} of {vectors.shape[0]:,} rows, {size:,.1f} MB")
    return 0


def _as_json(vectors: str, query: "Query", hits: "Sequence[Hit]") -> str:
    from ..files.rows import as_json

    found = {"vectors": vectors, "query": query.as_json(), "hits": [vars(hit) for hit in hits]}
    text = as_json(found, indent=2)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _as_table(query: "Query", hits: "Sequence[Hit]") -> str:
    from ..files.rows import printable

    names = list(hits[0].columns) if hits else []
    table = [["rank", "score", "row", *map(printable, names)]]
    table += [[str(h.rank), f"{h.score:.4f}", str(h.row), *(printable(h.columns.get(c)) for c in names)] for h in hits]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [f"instruction: {printable(query.instruction, 100)}"] if query.instruction else []
    for line in table:
        cells = [
            cell.rjust(w) if i < 3 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
