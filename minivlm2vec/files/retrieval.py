"""Search in what `embed` wrote: exactly, over a file of vectors, or through the index of a Lance dataset.

A million vectors are scanned at the speed at which memory (or the disk) delivers them: each chunk meets the query once,
in the dtype that it is stored in. What that dtype's rounding could have moved into or out of the top is then scored
again in float32, so the hits and their order are those of float32.

Shapes: N rows, D width.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ..embedder import Embedder, truncated
from ..errors import Option, OptionError, at_least_one
from ..extras import import_lancedb
from .options import Checkpoint, ModelSpec, Query, SearchOptions, as_query, named
from .vectors import LanceDataset, VectorFile, Vectors, open_vectors

INDEX_TYPES = {"IVF_FLAT": "IvfFlat", "IVF_PQ": "IvfPq", "IVF_HNSW_SQ": "HnswSq"}  # LanceDB's names
RECALL_QUERIES = 100  # rows with which an index is compared with exact search


@dataclass(frozen=True)
class Hit:
    """A row found: its rank (from 1), its number in the source, its cosine similarity, its columns."""

    rank: int
    row: int
    score: float
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class IndexReport:
    """An index that was built: its kind, over how many rows; the share of the exact nearest `k` rows that a search
    through it finds, looking into `nprobes` cells, over `queries` of the dataset's own vectors."""

    kind: str
    rows: int
    k: int
    nprobes: int
    recall: float
    queries: int


@overload
def search(
    vectors: str | os.PathLike | VectorFile | LanceDataset,
    query: str | Mapping[str, Any] | Query,
    embedder: Embedder | None = None,
    options: SearchOptions | None = None,
) -> list[Hit]: ...
@overload
def search(
    vectors: str | os.PathLike | VectorFile | LanceDataset,
    query: list | tuple,
    embedder: Embedder | None = None,
    options: SearchOptions | None = None,
) -> list[list[Hit]]: ...
def search(vectors: Any, query: Any, embedder: Embedder | None = None, options: SearchOptions | None = None) -> list:
    """The rows that are nearest to a query, the nearest first; for a list of queries, a list of these.

    Args:
        vectors: what `embed` wrote, or another file of vectors of length 1; `open_vectors` opens it once for many
            searches.
        query: a text, a Query, or a dict of the fields of one; or a list of such.
        embedder: embeds the query; default the model that made the vectors (or `options.model`), loaded for this
            search. Not needed for a query by `like`.

    Raises ValueError (OptionError) where query, options and vectors do not go together; among others where another
    checkpoint made the vectors, unless `force`.
    """
    options = SearchOptions() if options is None else options
    if not isinstance(options, SearchOptions):
        raise OptionError(Option("options"), f" are a SearchOptions, got {type(options).__name__}")
    collection = vectors if isinstance(vectors, Vectors) else open_vectors(vectors)
    _check_options(options, collection)
    many = isinstance(query, (list, tuple))
    queries = [as_query(q).resolved(images=collection.has_images) for q in (query if many else [query])]
    if any(q.like is None for q in queries):
        embedder = _embedder_for(collection, embedder, options)
    found = [_hits(collection, q, embedder, options) for q in queries]
    return found if many else found[0]


def _hits(collection: Any, query: Query, embedder: Embedder | None, options: SearchOptions) -> list[Hit]:
    vector = _query_vector(collection, query, embedder, options)
    k = options.top + (query.like is not None)  # a row finds itself
    if isinstance(collection, LanceDataset):
        found = collection.nearest(vector, k, where=options.where, exact=options.exact, nprobes=options.nprobes)
    else:
        found = _scan(collection, vector, k, torch.device(options.device or "cpu"))
    others = [hit for hit in found if hit[0] != query.like][: options.top]
    return [Hit(rank, *hit) for rank, hit in enumerate(others, 1)]


def build_index(path: str | Path, kind: str = "IVF_PQ", *, nprobes: int = 20, k: int = 10) -> IndexReport:
    """Builds the index that later searches in a Lance dataset go through, in place of an older one.

    kind: one of `INDEX_TYPES`. Raises ValueError for other files."""
    if Path(path).suffix != ".lance":
        raise _needs_lance("build_index")
    if kind not in INDEX_TYPES:
        raise OptionError(Option("build_index"), f" is one of {', '.join(INDEX_TYPES)}, got {kind!r}")
    at_least_one(top=k)
    dataset = LanceDataset(Path(path))
    config = getattr(import_lancedb().index, INDEX_TYPES[kind])(distance_type="cosine")
    dataset.table.create_index(dataset.column, config=config, replace=True)
    recall, queries = _recall(dataset, k, nprobes)
    return IndexReport(kind, dataset.shape[0], k, nprobes, recall, queries)


# -------------------------------------------------------------------------------------------------------- exact search


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


def rounding(dtype: torch.dtype, width: int) -> float:
    """How far a dot product of two vectors of length 1, computed in `dtype` but summed in float32, can be from the
    exact one: half an ulp for each number of the query and for the result, and `width` roundings of a float32 sum."""
    return 2 * torch.finfo(dtype).eps + width * torch.finfo(torch.float32).eps


def neighbours(
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


def _scan(vectors: VectorFile, query: Tensor, k: int, device: torch.device) -> list[tuple[int, float, dict[str, Any]]]:
    """(row, cosine similarity, columns) of the k rows nearest to a vector [D]."""
    if vectors.meta is None:
        _check_normalized(vectors)
    chunks = ((start, chunk.to(device)) for start, chunk in vectors.chunks())
    scores, rows = top_k(query.to(device), chunks, k)
    columns = vectors.rows(rows.tolist())
    return [(row, score, columns[row]) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)]


def _candidates(query: Tensor, chunk: Tensor, k: int, floor: Tensor) -> Tensor:
    """Rows of a chunk, ascending, that may be among its k best and reach `floor`."""
    scores = torch.mv(chunk, query.to(chunk.dtype)).float()
    scores = torch.where(scores.isnan(), -math.inf, scores)
    slack = rounding(chunk.dtype, chunk.shape[1])
    kth = scores.topk(min(k, len(scores))).values[-1]
    at = (scores >= torch.maximum(kth - 2 * slack, floor - slack)) & (scores > -math.inf)
    return at.nonzero().flatten()


def _dot(vectors: Tensor, query: Tensor) -> Tensor:
    """Scores [n] in float32. One by one, so that a row's score does not depend on its neighbours."""
    return (vectors.float() * query).sum(dim=1)


def _check_normalized(vectors: VectorFile) -> None:
    first = next(vectors.chunks(), (0, torch.empty(0, 1)))[1].float()[:1000]
    lengths = torch.linalg.vector_norm(first, dim=1)
    if ((lengths - 1).abs() > 0.01).any():
        raise ValueError(f"{vectors.path}: the vectors are not of length 1 (the first {len(lengths)} have "
                         f"{lengths.min():.3g} to {lengths.max():.3g}); normalise them first")  # fmt: skip


def _recall(dataset: LanceDataset, k: int, nprobes: int) -> tuple[float, int]:
    """The share of the exact k nearest that the index finds, and over how many of the dataset's own vectors."""
    numbers = range(0, dataset.shape[0], max(1, dataset.shape[0] // RECALL_QUERIES))
    queries = [v for v in dataset.vectors(numbers) if not v.isnan().any()]
    same = total = 0
    for query in queries:
        exact = {row for row, *_ in dataset.nearest(query, k, exact=True)}
        through = {row for row, *_ in dataset.nearest(query, k, nprobes=nprobes)}
        same, total = same + len(exact & through), total + len(exact)
    return (same / total if total else 1.0), len(queries)


# ----------------------------------------------------------------------------------------------------------- the query


def _check_options(options: SearchOptions, collection: Vectors) -> None:
    if not isinstance(collection, LanceDataset):
        for option in ("where", "exact"):
            if getattr(options, option):
                raise _needs_lance(option)


def _needs_lance(option: str) -> OptionError:
    return OptionError(Option(option), " needs a Lance dataset (embed … -o OUT.lance)")


def _query_vector(collection: Vectors, query: Query, embedder: Embedder | None, options: SearchOptions) -> Tensor:
    """[D] float32 of length 1."""
    if query.like is not None:
        return _own_vector(collection, query.like)
    assert embedder is not None, "it was loaded for the queries that are embedded"
    num_crops = options.model.num_crops or collection.settings.get("num_crops")
    item = {"text": query.text, "image": query.image}
    found = embedder.encode([item], prompt=query.instruction or None, num_crops=num_crops, convert_to="torch")
    return truncated(torch.as_tensor(found), collection.shape[1])[0].cpu()


def _embedder_for(collection: Vectors, embedder: Embedder | None, options: SearchOptions) -> Embedder:
    """The model that embeds the queries; it is loaded once it is known to have made the vectors."""
    comparable = collection.meta is None or options.force
    if embedder is None:
        checkpoint = _model_of(collection, options).locate()
        if not comparable:
            _check_made_by(collection, checkpoint)
        embedder, name = checkpoint.load(), checkpoint.spec.name
    else:
        name = embedder.name
        if not comparable:
            _check_made_by(collection, ModelSpec.of(embedder).locate())
    # This model made the vectors, and they say to what they were cut: so is the query.
    recorded = not comparable and embedder.truncate_dim is None
    if embedder.dimension != collection.shape[1] and not (recorded and embedder.dimension > collection.shape[1]):
        raise ValueError(f"{name} makes vectors of {embedder.dimension} numbers, those of {collection.path} have "
                         f"{collection.shape[1]}")  # fmt: skip
    return embedder


def _own_vector(collection: Vectors, row: int) -> Tensor:
    if not 0 <= row < collection.shape[0]:
        raise OptionError(Option("like"), f" {row}: {collection.path} has rows 0 to {collection.shape[0] - 1}")
    vector = collection.vectors([row])[0]
    if vector.isnan().any():
        raise OptionError(Option("like"), f" {row}: that row has no vector")
    return torch.nn.functional.normalize(vector, dim=0)


def _model_of(collection: Vectors, options: SearchOptions) -> ModelSpec:
    """`options.model`; where that has no name, the one that made the vectors."""
    spec = options.model
    if spec.name is not None:
        return spec
    address = collection.meta["model"] if collection.meta else {"name": None}
    if address["name"] is None:
        raise OptionError(f"{collection.path} does not say what made it; ", Option("model"), " names the checkpoint")
    return replace(spec, name=address["name"], revision=spec.revision or address["revision"],
                   adapter=spec.adapter or address["adapter"])  # fmt: skip


def _check_made_by(collection: Vectors, checkpoint: Checkpoint) -> None:
    """Refuses a query by another model than made the vectors, or by one that has changed since."""
    assert collection.meta is not None
    settings, model = collection.settings, collection.meta["model"]
    made_by = settings["checkpoint"], settings["adapter"]
    if made_by != checkpoint.fingerprints:
        raise OptionError(
            f"{collection.path} was made with {named(model['name'], model['adapter'], made_by)}, this is "
            f"{checkpoint}: their vectors cannot be compared; ", Option("force"), " does it all the same",
        )  # fmt: skip
