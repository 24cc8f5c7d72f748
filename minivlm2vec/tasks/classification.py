"""Classification: images against labels.

Shapes: N images, L labels, T templates, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from ..cosines import cosines, unit_rows
from ..errors import InputError, Option, OptionError
from ..prompts import Task
from .common import (
    Encoder,
    Scored,
    as_image_input,
    as_task,
    check_has_text,
    checked_texts,
    checked_top,
    encode,
    is_one_image,
    name_of,
    rank_among,
    scored_texts,
    shown,
    table,
)  # fmt: skip

TOP = 5


@dataclass(frozen=True)
class Classification:
    """One image's labels, the nearest first.

    Fields:
        image: what the image is called.
        labels: the nearest ones, with cosines and probabilities.
        of: how many labels there were to choose from.
    """

    image: str
    labels: tuple[Scored, ...]
    of: int

    @property
    def label(self) -> str:
        return self.labels[0].text

    @property
    def score(self) -> float:
        return self.labels[0].score

    @property
    def probability(self) -> float:
        return self.labels[0].probability

    def rank_of(self, label: str) -> int:
        """The label's rank, from 1, ties counted against it, as the MMEB evaluator counts. Raises ValueError where it
        is not among `labels`, or a tie may be beyond them."""
        return rank_among(label, self.labels, self.of, "labels")

    def row(self) -> tuple[str, str, str]:
        """The nearest label, its cosine and its probability, as a table of many images has them."""
        return self.label, f"{self.score:.6f}", f"{self.probability:.6f}"

    def as_dict(self) -> dict[str, Any]:
        return {"image": self.image, "labels": [one.as_dict() for one in self.labels], "of": self.of}

    def __str__(self) -> str:
        return f"{shown(self.image)}: {shown(self.label)}\n{table(self.labels)}"


class Classifier:
    """Labels, embedded once; `classifier(images)` classifies images.

        classifier = Classifier(e, ["a cat", "a dog"], template=["{}", "a photo of {}"])
        for result in classifier(["a.jpg", "b.jpg"]):
            print(result.label, result.probability)

    Args:
        embedder: an `Embedder`, or anything with its `encode`.
        labels: at least two different texts.
        instruction: a task of `prompts.TASKS`, such as "classify_scene"; a `prompts.Task` of one's own; or None.
        template: what is made of a label, "{}" being the label. Several: the mean of their unit vectors stands for it.
        options: of `Embedder.encode` (num_crops, max_length, batch_tokens, …), for labels and images.

    Raises InputError naming the label at fault, OptionError for the others.

    Attributes:
        labels: a list of L texts.
        vectors: [L, D] float64, of length 1.
    """

    def __init__(
        self,
        embedder: Encoder,
        labels: Sequence[str],
        *,
        instruction: str | Task | None = "classify",
        template: str | Sequence[str] = "{}",
        **options: Any,
    ):
        self.embedder, self.task, self.options = embedder, as_task(instruction), options
        self.labels = checked_texts(labels, "label")
        texts = label_texts(self.labels, template)
        number = len(self.labels)
        vectors = encode(embedder, texts, self.task.document, options, lambda i: f"label {i % number}")
        self.vectors = label_vectors(vectors, number)

    @overload
    def __call__(self, images: Sequence[Any], *, top: int | None = ...) -> list[Classification]: ...
    @overload
    def __call__(self, images: Any, *, top: int | None = ...) -> Any: ...
    def __call__(self, images: Any, *, top: int | None = TOP) -> Any:
        """A `Classification` of each image; of one image that is no list, one.

        images: paths, PIL images, arrays, bytes, data URIs, or dicts of "image" and "text" where the instruction is
            around a text ("classify_news").
        top: the nearest labels that a result has; None for all.
        """
        top = checked_top(top, len(self.labels), "labels", allowed=TOP)
        found = self._classify([images] if is_one_image(images) else list(images), top)
        return found[0] if is_one_image(images) else found

    def scores(self, images: Sequence[Any]) -> np.ndarray:
        """Cosines [N, L] float32 of all labels."""
        return cosines(self._image_vectors(images), self.vectors)

    def _classify(self, images: list[Any], top: int | None) -> list[Classification]:
        return classified(self._image_vectors(images), self.vectors, self.labels, list(map(_name, images)), top=top)

    def _image_vectors(self, images: Sequence[Any]) -> np.ndarray:
        inputs = _checked_images(images, self.task)
        if not inputs:
            return np.empty((0, self.vectors.shape[1]))
        return encode(self.embedder, inputs, self.task.query, self.options, "image {}".format)


@overload
def classify(
    embedder: Encoder, images: Sequence[Any], labels: Sequence[str], *, instruction: str | Task | None = ...,
    template: str | Sequence[str] = ..., top: int | None = ..., **options: Any,
) -> list[Classification]: ...  # fmt: skip
@overload
def classify(
    embedder: Encoder, images: Any, labels: Sequence[str], *, instruction: str | Task | None = ...,
    template: str | Sequence[str] = ..., top: int | None = ..., **options: Any,
) -> Any: ...  # fmt: skip
def classify(
    embedder: Encoder,
    images: Any,
    labels: Sequence[str],
    *,
    instruction: str | Task | None = "classify",
    template: str | Sequence[str] = "{}",
    top: int | None = TOP,
    **options: Any,
) -> Any:
    """The nearest labels of each image: a list of `Classification`; of one image that is no list, one.

    Arguments as of `Classifier`, which keeps the labels' vectors for the next call, and of its call."""
    images = images if is_one_image(images) else list(images)
    checked_top(top, len(label_texts(labels, template)), "labels", allowed=TOP)
    _checked_images([images] if is_one_image(images) else images, as_task(instruction))  # before labels are embedded
    return Classifier(embedder, labels, instruction=instruction, template=template, **options)(images, top=top)


def label_texts(labels: Sequence[str], template: str | Sequence[str] = "{}") -> list[str]:
    """T * L texts: all labels in the first template, then all in the second. Raises InputError."""
    texts = checked_texts(labels, "label")
    templates = [template] if isinstance(template, str) else list(template)
    if not templates:
        raise OptionError(Option("template"), " is empty; '{}' is the label alone")
    for one in templates:
        if not isinstance(one, str) or "{}" not in one:
            raise OptionError(Option("template"), f" {one!r} has no {{}} for the label")
    return [one.replace("{}", text) for one in templates for text in texts]


def label_vectors(vectors: np.ndarray, number: int) -> np.ndarray:
    """Vectors [T * L, D] of `label_texts` -> unit vectors [L, D] float64: the mean over templates. number: L."""
    unit = unit_rows(vectors)
    if len(unit) == number:
        return unit
    return unit_rows(unit.reshape(-1, number, unit.shape[1]).mean(axis=0))


def classified(
    image_vectors: np.ndarray,
    label_vectors: np.ndarray,
    labels: Sequence[str],
    names: Sequence[str],
    *,
    top: int | None = TOP,
) -> list[Classification]:
    """The results of vectors [N, D] and [L, D] of length 1, for those who compute vectors themselves."""
    if len(image_vectors) != len(names) or len(label_vectors) != len(labels):
        raise InputError(f"{len(image_vectors)} vectors for {len(names)} images, {len(label_vectors)} for "
                         f"{len(labels)} labels", name="vectors")  # fmt: skip
    scores = cosines(image_vectors, label_vectors)
    return [
        Classification(name, scored_texts(row, labels, top), len(labels))
        for name, row in zip(names, scores, strict=True)
    ]


def _checked_images(images: Sequence[Any], task: Task) -> list[dict[str, Any]]:
    inputs = [as_image_input(image, i) for i, image in enumerate(images)]
    for i, item in enumerate(inputs):
        check_has_text(item, task.query, f"image {i}")
    return inputs


def _name(image: Any) -> str:
    return name_of({"image": image} if isinstance(image, str) else image)
