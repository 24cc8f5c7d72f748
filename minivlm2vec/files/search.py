"""Exact search: `minivlm2vec search`, over a file of vectors or a Lance dataset.

A million vectors are scanned at the speed at which memory (or the disk) delivers them: each chunk meets the query once,
in the dtype that it is stored in. What that dtype's rounding could have moved into or out of the top is then scored
again in float32, so the hits and their order are those of float32.

Shapes: N rows, D width, Q queries.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import prompts
from ..cli.arguments import load_embedder
from ..cli.search import THAT_OF_VECTORS
from ..weights import fingerprint, resolve
from .vectors import VectorFile, open_vectors

QUERY_TASKS = {  # (the collection has images, query has text, query has an image) -> task of MMEB
    (True, True, False): "t2i",
    (True, False, True): "i2i",
    (True, True, True): "change",
    (False, False, True): "i2t",
}


@dataclass(frozen=True)
class Hit:
    """A row found: its rank (from 1), its number in the source, its cosine similarity, its columns."""

    rank: int
    row: int
    score: float
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Query:
    """What was asked; `like` is a row of the collection instead of text or image."""

    text: str | None = None
    image: str | None = None
    like: int | None = None
    instruction: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if v is not None}


def top_k(query: Tensor, chunks: Iterable[tuple[int, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k rows whose dot product with the query is largest: float32 scores [<= k], int64 rows [<= k].

    query: [D] float32, of length 1; chunks: (first row, [n, D] float32 or float16 of length about 1), on the query's
    device. Of equal scores the lower row comes first. Rows that hold NaN are left out.

    Raises ValueError where k < 1 or a chunk has another width.
    """
    if k < 1:
        raise ValueError(f"{k} hits are wanted; at least 1 is needed")
    best = torch.empty(0, device=query.device)
    rows = torch.empty(0, dtype=torch.int64, device=query.device)
    for start, chunk in chunks:
        if chunk.shape[1] != len(query):
            raise ValueError(f"the query has {len(query)} numbers, the vectors have {chunk.shape[1]}")
        floor = best[-1] if len(best) == k else torch.tensor(-math.inf, device=query.device)
        at = _candidates(query, chunk, k, floor)
        best, rows = torch.cat([best, _dot(chunk[at], query)]), torch.cat([rows, at + start])
        best, order = best.sort(descending=True, stable=True)  # stable: earlier rows stay in front
        best, rows = best[:k], rows[order[:k]]
    return best, rows


def _candidates(query: Tensor, chunk: Tensor, k: int, floor: Tensor) -> Tensor:
    """Rows of a chunk, ascending, that may be among its k best and reach `floor`."""
    scores = torch.mv(chunk, query.to(chunk.dtype)).float()
    scores = torch.where(scores.isnan(), -math.inf, scores)
    slack = rounding(chunk.dtype, chunk.shape[1])
    kth = scores.topk(min(k, len(scores))).values[-1]
    at = (scores >= torch.maximum(kth - 2 * slack, floor - slack)) & (scores > -math.inf)
    return at.nonzero().flatten()


def rounding(dtype: torch.dtype, width: int) -> float:
    """How far a dot product of two vectors of length 1, computed in `dtype` but summed in float32, can be from the
    exact one: half an ulp for each number of the query and for the result, and `width` roundings of a float32 sum."""
    return 2 * torch.finfo(dtype).eps + width * torch.finfo(torch.float32).eps


def _dot(vectors: Tensor, query: Tensor) -> Tensor:
    """Scores [n] in float32. One by one, so that a row's score does not depend on its neighbours."""
    return (vectors.float() * query).sum(dim=1)


def nearest(
    vectors: VectorFile, k: int, rows: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each of the first `rows` rows, its k nearest others among them: yields (first row, scores [n, k], rows
    [n, k]); a score of -inf where there are not so many. float32; holds `rows` scores of 256 queries at a time."""
    for start in range(0, rows, 256):
        mine = list(range(start, min(start + 256, rows)))
        queries = vectors.vectors(mine).to(device)
        scores = torch.full((len(mine), rows), -math.inf, device=device)
        for first, chunk in vectors.chunks():
            if first >= rows:
                break
            part = queries @ chunk[: rows - first].to(device).float().T
            scores[:, first : first + part.shape[1]] = torch.where(part.isnan(), -math.inf, part)
        scores[torch.arange(len(mine)), torch.tensor(mine)] = -math.inf
        best, order = scores.topk(min(k, rows), dim=1)
        yield start, best.cpu(), order.cpu()


def search(args: argparse.Namespace) -> int:
    """Runs the command. Returns 0; errors are ValueErrors."""
    _check_arguments(args)
    path = Path(args.vectors)
    if path.suffix == ".lance":
        from .lance import Dataset, build_index

        if args.build_index:
            build_index(Dataset(path), args.build_index, nprobes=args.nprobes, k=args.top)
            return 0
        collection = Dataset(path)
    else:
        collection = open_vectors(path)
    query = _query(args, collection.meta)
    if query is None:
        return _gallery(args, collection)
    hits = _find(args, collection, query)
    if args.html:
        from .page import write_hits

        write_hits(Path(args.html), query, hits, collection.meta, root=_image_root(args, collection.meta))
        print(f"wrote {args.html}", file=sys.stderr)
    if args.json:
        print(json.dumps(_as_json(args, query, hits), indent=2, ensure_ascii=False, default=_plain))
    elif not args.html:
        print(_as_table(query, hits))
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    lance = Path(args.vectors).suffix == ".lance"
    asked = args.text is not None or args.image is not None or args.like is not None
    if args.top < 1:
        raise ValueError(f"--top is {args.top}; at least 1 is needed")
    if args.like is not None and (args.text is not None or args.image is not None):
        raise ValueError("--like asks by a row of VECTORS; it excludes --text and --image")
    if args.instruction is not None and args.task is not None:
        raise ValueError("--instruction and --task are both given; use one")
    if not asked and not args.html and not args.build_index:
        raise ValueError(
            "nothing is asked: give --text, --image or --like; or --html alone, for a gallery of everything"
        )
    for option, given in (("--where", args.where), ("--build-index", args.build_index), ("--exact", args.exact)):
        if given and not lance:
            raise ValueError(f"{option} needs a Lance dataset (embed … -o OUT.lance)")


def _query(args: argparse.Namespace, meta: dict[str, Any] | None) -> Query | None:
    if args.like is not None:
        return Query(like=args.like)
    if args.text is None and args.image is None:
        return None
    instruction = args.instruction
    if args.task is not None:
        instruction = prompts.task(args.task).query
    if instruction is None:
        images = meta is None or meta["settings"]["image_column"] is not None
        task = QUERY_TASKS.get((images, args.text is not None, args.image is not None))
        instruction = prompts.task(task).query if task else ""
    return Query(args.text, args.image, instruction=instruction)


def _find(args: argparse.Namespace, collection: Any, query: Query) -> list[Hit]:
    vector = _query_vector(args, collection, query)
    k = args.top + (query.like is not None)  # a row finds itself
    if not isinstance(collection, VectorFile):
        hits = collection.search(vector, k, where=args.where, exact=args.exact, nprobes=args.nprobes)
        others = [hit for hit in hits if hit.row != query.like][: args.top]
        return [replace(hit, rank=rank) for rank, hit in enumerate(others, 1)]
    if collection.meta is None:
        _check_normalized(collection)
    device = torch.device(args.device) if args.device else torch.device("cpu")
    chunks = ((start, chunk.to(device)) for start, chunk in collection.chunks())
    scores, rows = top_k(vector.to(device), chunks, k)
    found = [(r, s) for r, s in zip(rows.tolist(), scores.tolist(), strict=True) if r != query.like][: args.top]
    columns = collection.rows([r for r, _ in found])
    return [Hit(rank, r, s, columns[r]) for rank, (r, s) in enumerate(found, 1)]


def _query_vector(args: argparse.Namespace, collection: Any, query: Query) -> Tensor:
    """[D] float32 of length 1."""
    if query.like is not None:
        if not 0 <= query.like < collection.shape[0]:
            raise ValueError(f"--like {query.like}: {args.vectors} has rows 0 to {collection.shape[0] - 1}")
        vector = collection.vectors([query.like])[0]
        if vector.isnan().any():
            raise ValueError(f"--like {query.like}: that row has no vector")
        return torch.nn.functional.normalize(vector, dim=0)
    embedder = _embedder(args, collection.meta)
    if embedder.dimension != collection.shape[1]:
        raise ValueError(f"{args.model} makes vectors of {embedder.dimension} numbers, those of {args.vectors} have "
                         f"{collection.shape[1]}")  # fmt: skip
    item = {"text": query.text, "image": query.image}
    return embedder.encode([item], prompt=query.instruction or None, convert_to="torch")[0].cpu()


def _embedder(args: argparse.Namespace, meta: dict[str, Any] | None):
    """The model that made the vectors. Raises ValueError where another is asked for, or it has changed since."""
    if args.model == THAT_OF_VECTORS:
        if meta is None:
            raise ValueError(f"{args.vectors} does not say what made it; --model names the checkpoint")
        args.model, args.revision = meta["model"]["name"], args.revision or meta["model"]["revision"]
        args.adapter = args.adapter or meta["model"]["adapter"]
    folder = resolve(args.model, revision=args.revision, local_files_only=args.local_files_only)
    adapter = resolve(args.adapter, local_files_only=args.local_files_only) if args.adapter else None
    if meta is not None:
        old = meta["settings"]["checkpoint"], meta["settings"]["adapter"]
        new = fingerprint(folder), fingerprint(adapter, adapter=True) if adapter else None
        if old != new and not args.force:
            made_with = _named(meta["model"]["name"], meta["model"]["adapter"], *old)
            raise ValueError(
                f"{args.vectors} was made with {made_with}, this is {_named(args.model, args.adapter, *new)}: their "
                "vectors cannot be compared; --force does it all the same"
            )
        if args.num_crops is None:
            args.num_crops = meta["settings"]["num_crops"]
    args.model, args.adapter = str(folder), adapter
    return load_embedder(args, show_progress=sys.stderr.isatty() and not args.json)


def _named(model: str, adapter: str | None, *fingerprints: str | None) -> str:
    """ "MODEL (fingerprint 0123456789ab)", with an adapter "MODEL + ADAPTER (fingerprint 0123456789ab + ba98…)"."""
    name = " + ".join(filter(None, (model, adapter)))
    return f"{name} (fingerprint {' + '.join(f[:12] for f in fingerprints if f)})"


def _check_normalized(vectors: VectorFile) -> None:
    first = next(vectors.chunks(), (0, torch.empty(0, 1)))[1].float()[:1000]
    lengths = torch.linalg.vector_norm(first, dim=1)
    if ((lengths - 1).abs() > 0.01).any():
        raise ValueError(f"{vectors.path}: the vectors are not of length 1 (the first {len(lengths)} have "
                         f"{lengths.min():.3g} to {lengths.max():.3g}); normalise them first")  # fmt: skip


def _gallery(args: argparse.Namespace, collection: Any) -> int:
    from .page import write_gallery

    if not isinstance(collection, VectorFile):
        raise ValueError("a gallery is made of .npy, .safetensors or .parquet")
    shown = write_gallery(
        Path(args.html), collection, top=args.top, limit=args.limit, root=_image_root(args, collection.meta),
        device=args.device or "cpu",
    )  # fmt: skip
    size = Path(args.html).stat().st_size / 1e6
    print(f"wrote {args.html}: {shown:,} of {collection.shape[0]:,} rows, {size:,.1f} MB", file=sys.stderr)
    return 0


def _image_root(args: argparse.Namespace, meta: dict[str, Any] | None) -> Path:
    return Path(args.image_root or (meta["settings"]["image_root"] if meta else "."))


def _as_json(args: argparse.Namespace, query: Query, hits: list[Hit]) -> dict[str, Any]:
    return {"vectors": args.vectors, "query": query.as_json(), "hits": [vars(hit) for hit in hits]}


def _as_table(query: Query, hits: list[Hit]) -> str:
    names = list(hits[0].columns) if hits else []
    table = [["rank", "score", "row", *names]]
    table += [[str(h.rank), f"{h.score:.4f}", str(h.row), *(printable(h.columns.get(c)) for c in names)] for h in hits]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [f"instruction: {printable(query.instruction, 100)}"] if query.instruction else []
    for line in table:
        cells = [
            cell.rjust(w) if i < 3 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def printable(value: Any, width: int = 60) -> str:
    """A value on one line, without characters that would steer a terminal."""
    if not isinstance(value, str):
        value = "" if value is None else json.dumps(value, ensure_ascii=False, default=_plain)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in value)
    return text if len(text) <= width else text[: width - 1] + "…"


def _plain(value: Any) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)
