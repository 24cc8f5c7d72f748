"""Classifying, reranking, scoring: inputs of a request -> vectors, by the service -> scores, by `minivlm2vec.tasks`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..cosines import cosines, unit_rows
from ..tasks import classified, label_vectors, ranked
from .inputs import Input
from .schema import ImagePart, TextPart
from .service import EmbeddingService
from .task_inputs import TaskReader, together
from .task_schema import ClassifyRequest, Fields, RerankRequest, ScoreRequest, TaskRequest

INLINE_SCORES = 1 << 14  # cosines and numbers of vectors up to here are computed in the event loop


class Tasks:
    """Answers as dicts, and how many tokens they took. All raise APIError."""

    def __init__(self, service: EmbeddingService):
        self.service, self.reader = service, TaskReader(service.reader)

    async def classify(self, request: ClassifyRequest) -> tuple[dict[str, Any], int]:
        images, labels, top = self.reader.classification(request)
        vectors, tokens = await self._embed(together(images, labels), request)
        results = await self._compute(len(images) * len(labels), _classified, vectors, len(images), request.labels, top)
        return {"data": results}, tokens

    async def rerank(self, request: RerankRequest) -> tuple[dict[str, Any], int]:
        query, documents = self.reader.reranking(request)
        vectors, tokens = await self._embed(together([query], documents), request)
        results = await self._compute(vectors.size, _reranked, vectors, request)
        return {"results": results}, tokens

    async def score(self, request: ScoreRequest) -> tuple[dict[str, Any], int]:
        queries, documents = self.reader.scoring(request)
        vectors, tokens = await self._embed(together(queries, documents), request)
        scores = await self._compute(vectors.size, _pair_scores, vectors, len(queries))
        return {"data": [{"index": i, "object": "score", "score": s} for i, s in enumerate(scores)]}, tokens

    async def _embed(self, inputs: list[Input], request: TaskRequest) -> tuple[np.ndarray, int]:
        num_crops = self.service.reader.num_crops(request)
        return await self.service.embed_inputs(inputs, request.truncate_prompt_tokens or None, num_crops)

    async def _compute(self, size: int, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args) if size <= INLINE_SCORES else await self.service.in_thread(function, *args)


def _classified(vectors: np.ndarray, images: int, labels: list[str], top: int | None) -> list[dict[str, Any]]:
    unit = unit_rows(vectors)
    found = classified(unit[:images], label_vectors(unit[images:], len(labels)), labels, [""] * images, top=top)
    return [
        {
            "object": "classification",
            "index": i,
            "prediction": one.label,
            "score": one.probability,
            "predictions": [{"label": x.text, "score": x.probability, "cosine": x.score} for x in one.labels],
        }
        for i, one in enumerate(found)
    ]


def _reranked(vectors: np.ndarray, request: RerankRequest) -> list[dict[str, Any]]:
    unit = unit_rows(vectors)
    documents = request.documents if isinstance(request.documents, list) else [request.documents]
    top = min(request.top_n or len(documents), len(documents))
    ranking = ranked(unit[0], unit[1:], "", [""] * len(documents), top=top)
    return [
        {"index": hit.index, "relevance_score": hit.score} | _document(documents[hit.index], request.return_documents)
        for hit in ranking.hits
    ]


def _document(item: Any, asked: bool | None) -> dict[str, Any]:
    """As it was given; of those with an image only where it was asked for."""
    if asked is False:
        return {}
    if isinstance(item, str):
        return {"document": {"text": item}}
    if isinstance(item, TextPart) or (isinstance(item, Fields) and item.image is None):
        return {"document": {"text": item.text}}
    if not asked and (isinstance(item, Fields | ImagePart) or not isinstance(item.content, str)):
        return {}
    return {"document": item.model_dump(exclude_none=True)}


def _pair_scores(vectors: np.ndarray, queries: int) -> list[float]:
    """One query against all documents, or each against its own; rounded as all cosines are."""
    unit = unit_rows(vectors)
    first, second = unit[:queries], unit[queries:]
    if queries == 1:
        return cosines(first, second)[0].tolist()
    return np.concatenate([cosines(a[None], b[None])[0] for a, b in zip(first, second, strict=True)]).tolist()
