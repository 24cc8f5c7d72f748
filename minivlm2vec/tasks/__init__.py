"""The four tasks of VLM2Vec, one function each: classification, visual question answering, retrieval, grounding.

    e = Embedder.from_pretrained("TIGER-Lab/VLM2Vec-Full")
    print(classify(e, ["photo.jpg"], ["a cat", "a dog"])[0])
    print(answer(e, "photo.jpg", "What is the animal doing?", ["sleeping", "running"]))
    print(rank(e, "a cat on a sofa", [{"image": "a.jpg"}, {"image": "b.jpg"}]))
    print(ground(e, "photo.jpg", "the cat on the left"))

Each puts the instruction that the model was trained with around its inputs, embeds them in as few calls as it can, and
compares cosines as the MMEB evaluator does: what is equal ties. Each result is a frozen dataclass that prints as a
table and converts to a dict of plain values (`as_dict`).

    common.py          what all use: the encoder, instructions, checks, scored texts
    classification.py  images against labels
    answering.py       an image and questions against choices
    ranking.py         any query against any candidates
    grounding.py       an image and a description against parts of the image
    boxes.py           boxes in pixels: checks, overlap, windows over an image, drawing
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .answering import Answer, answer, answered
    from .classification import Classification, Classifier, classified, classify, label_texts, label_vectors
    from .common import TEMPERATURE, Encoder, Scored
    from .grounding import Grounding, ScoredBox, ground
    from .ranking import Hit, Ranking, rank, ranked

__all__ = [
    "TEMPERATURE",
    "Answer",
    "Classification",
    "Classifier",
    "Encoder",
    "Grounding",
    "Hit",
    "Ranking",
    "Scored",
    "ScoredBox",
    "answer",
    "answered",
    "classified",
    "classify",
    "ground",
    "label_texts",
    "label_vectors",
    "rank",
    "ranked",
]
_HOMES = {
    "Answer": "answering",
    "answer": "answering",
    "answered": "answering",
    "Classification": "classification",
    "Classifier": "classification",
    "classified": "classification",
    "classify": "classification",
    "label_texts": "classification",
    "label_vectors": "classification",
    "TEMPERATURE": "common",
    "Encoder": "common",
    "Scored": "common",
    "Grounding": "grounding",
    "ScoredBox": "grounding",
    "ground": "grounding",
    "Hit": "ranking",
    "Ranking": "ranking",
    "rank": "ranking",
    "ranked": "ranking",
}

__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
