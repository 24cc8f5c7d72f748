"""Visual question answering: an image and questions against choices.

Shapes: Q questions, L choices, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from ..cosines import cosines
from ..errors import InputError
from ..prompts import Task
from .common import (
    Encoder,
    Scored,
    as_image_input,
    as_task,
    checked_texts,
    checked_top,
    encode,
    rank_among,
    scored_texts,
    shown,
    table,
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """One question's choices, the nearest first.

    Fields:
        question: as it was asked.
        choices: the nearest ones, with cosines and probabilities.
        of: how many choices there were.
    """

    question: str
    choices: tuple[Scored, ...]
    of: int

    @property
    def choice(self) -> str:
        return self.choices[0].text

    @property
    def score(self) -> float:
        return self.choices[0].score

    @property
    def probability(self) -> float:
        return self.choices[0].probability

    def rank_of(self, choice: str) -> int:
        """The choice's rank, from 1, ties counted against it, as the MMEB evaluator counts. Raises ValueError where it
        is not among `choices`, or a tie may be beyond them."""
        return rank_among(choice, self.choices, self.of, "choices")

    def as_dict(self) -> dict[str, Any]:
        return {"question": self.question, "choices": [one.as_dict() for one in self.choices], "of": self.of}

    def __str__(self) -> str:
        return f"{shown(self.question)} {shown(self.choice)}\n{table(self.choices)}"


@overload
def answer(
    embedder: Encoder, image: Any, question: str, choices: Sequence[str], *, instruction: str | Task | None = ...,
    top: int | None = ..., **options: Any,
) -> Answer: ...  # fmt: skip
@overload
def answer(
    embedder: Encoder, image: Any, question: list[str] | tuple[str, ...],
    choices: Sequence[str] | Sequence[Sequence[str]], *, instruction: str | Task | None = ..., top: int | None = ...,
    **options: Any,
) -> list[Answer]: ...  # fmt: skip
def answer(
    embedder: Encoder,
    image: Any,
    question: Any,
    choices: Any,
    *,
    instruction: str | Task | None = "vqa",
    top: int | None = None,
    **options: Any,
) -> Answer | list[Answer]:
    """The choices that answer a question about an image, the nearest first.

    Args:
        embedder: an `Embedder`, or anything with its `encode`.
        image: a path, a PIL image, an array, bytes, or a data URI.
        question: a text; or a list of Q texts, whose answers are a list. They go into one call of `encode`, which
            decodes the image once and computes its tower once for all questions of a pack.
        choices: at least two different texts; for a list of questions these are for all of them, or a list of Q lists.
        instruction: a task of `prompts.TASKS`, a `prompts.Task` of one's own, or None.
        top: the nearest choices that an answer has; default all.
        options: of `Embedder.encode` (num_crops, batch_tokens, …).

    Raises InputError naming the question or choice at fault, before anything is computed.
    """
    one = isinstance(question, str)
    questions = [question] if one else checked_questions(question)
    if one and not question.strip():
        raise InputError(f"is empty: {question!r}", name="question")
    lists, task = _choices_of(choices, len(questions)), as_task(instruction)
    for texts in lists:
        top = checked_top(top, len(texts), "choices")
    picture = as_image_input(image)
    different = list(dict.fromkeys(text for texts in lists for text in texts))  # each is embedded once
    place = {text: i for i, text in enumerate(different)}
    asked = encode(
        embedder, [{**picture, "text": text} for text in questions], task.query, options, "question {}".format
    )
    known = encode(embedder, different, task.document, options, "choice {}".format)
    answers = [
        answered(vector, known[[place[text] for text in texts]], text_asked, texts, top=top)
        for vector, text_asked, texts in zip(asked, questions, lists, strict=True)
    ]
    return answers[0] if one else answers


def answered(
    vector: np.ndarray, choice_vectors: np.ndarray, question: str, choices: Sequence[str], *, top: int | None = None
) -> Answer:
    """The answer of vectors [D] and [L, D] of length 1, for those who compute vectors themselves."""
    scores = cosines(vector[None], choice_vectors)[0]
    return Answer(question, scored_texts(scores, choices, top), len(choices))


def checked_questions(questions: Any) -> list[str]:
    """A list of questions; one may be there twice."""
    if not isinstance(questions, (list, tuple)):
        raise InputError(f"a text or a list of texts is needed, got {type(questions).__name__}", name="question")
    if not questions:
        raise InputError("no question is given; 1 is needed at least, got 0", name="questions")
    for i, text in enumerate(questions):
        if not isinstance(text, str):
            raise InputError(f"a text is needed, got {type(text).__name__}", name=f"question {i}")
        if not text.strip():
            raise InputError(f"is empty: {text!r}", name=f"question {i}")
    return list(questions)


def _choices_of(choices: Any, number: int) -> list[list[str]]:
    """One list of choices a question."""
    nested = isinstance(choices, (list, tuple)) and len(choices) > 0 and not isinstance(choices[0], str)
    nested = nested and isinstance(choices[0], (list, tuple))
    if not nested:
        return [checked_texts(choices, "choice")] * number
    if len(choices) != number:
        raise InputError(f"{len(choices)} lists are given for {number} questions", name="choices")
    found = []
    for i, texts in enumerate(choices):
        try:
            found.append(checked_texts(texts, "choice"))
        except InputError as e:
            raise InputError(e.reason, name=f"question {i}, {e.name}") from None
    return found
