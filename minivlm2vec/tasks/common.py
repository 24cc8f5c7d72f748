"""What all tasks share: the encoder, instructions, checks of lists of texts, and texts with their scores.

Shapes: N queries, L texts, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .. import prompts
from ..cosines import unit_rows
from ..errors import InputError, Option, OptionError, at_least_one, one_line
from ..images import image_name
from ..prompts import TEXT, Task

TEMPERATURE = 0.02  # of VLM2Vec's training loss (arXiv 2410.05160, section 4.1): probabilities are softmax(cosine / it)
SHOWN = 80  # characters of a text in a table


class Encoder(Protocol):
    """What computes vectors: an `Embedder`, or anything of one's own with its `encode`."""

    @property
    def encode(self) -> Callable[..., Any]:
        """encode(inputs, *, prompt, **options) -> [B, D], as `Embedder.encode`. Vectors need not have length 1."""


@dataclass(frozen=True)
class Scored:
    """One text of a list (a label, a choice) and how near it is.

    Fields:
        index: its place in the list, from 0.
        text: as it was given.
        score: cosine, -1 to 1.
        probability: softmax of all texts' cosines at the training temperature 0.02; they sum to 1 over the whole list.
    """

    index: int
    text: str
    score: float
    probability: float

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def scored_texts(scores: np.ndarray, texts: Sequence[str], top: int | None) -> tuple[Scored, ...]:
    """The `top` texts of the highest scores [L], highest first, equal ones in the order of the list."""
    order = np.argsort(-scores, kind="stable")[:top].tolist()
    probability = softmax(scores)
    return tuple(Scored(i, texts[i], float(scores[i]), float(probability[i])) for i in order)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Cosines [..., L] -> probabilities [..., L], float64."""
    logits = scores.astype(np.float64) / TEMPERATURE
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def rank_among(text: str, shown: Sequence[Scored], of: int, what: str) -> int:
    """The rank of a text, from 1, ties counted against it. Raises ValueError where it is not among those shown."""
    found = [one for one in shown if one.text == text]
    if not found:
        raise ValueError(f"{text!r} is not among the {len(shown)} nearest of {of} {what}; top=None keeps all")
    others = sum(one.score >= found[0].score for one in shown if one is not found[0])
    if others + 1 == len(shown) < of:
        raise ValueError(f"{text!r} is the last of the {len(shown)} nearest of {of} {what}, and further ones may be as "
                         "near; top=None keeps all")  # fmt: skip
    return 1 + others


def table(scored: Sequence[Scored], indent: str = "  ") -> str:
    """Lines of score, probability, text."""
    return "\n".join(f"{indent}{one.score:7.4f}  {one.probability:6.1%}  {shown(one.text)}" for one in scored)


def shown(text: str) -> str:
    """A text as tables show it."""
    return one_line(text, SHOWN)


# --- checks ----------------------------------------------------------------------------------------------


def checked_texts(texts: Any, what: str, *, fewest: int = 2) -> list[str]:
    """A list of different texts. `what`: "label", "choice"; errors name it, and where in the list.

    Raises InputError where it is no list of texts, has fewer than `fewest`, or a text is blank or there twice (spaces
    around it do not count)."""
    if isinstance(texts, (str, bytes, Mapping)) or not hasattr(texts, "__iter__"):
        got = f"text {texts!r}" if isinstance(texts, str) else type(texts).__name__
        raise InputError(f"a list of texts is needed, got one {got}", name=f"{what}s")
    found = list(texts)
    first: dict[str, int] = {}
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise InputError(f"a text is needed, got {type(text).__name__}", name=f"{what} {i}")
        if not text.strip():
            raise InputError(f"is empty: {text!r}", name=f"{what} {i}")
        if first.setdefault(text.strip(), i) != i:
            raise InputError(f"{text!r} is {what} {first[text.strip()]} too", name=f"{what} {i}")
    if len(found) < fewest:
        said = "none is given" if not found else f"only {found[0]!r} is given"
        raise InputError(f"{said}; {fewest} are needed at least, got {len(found)}", name=f"{what}s")
    return found


def checked_top(top: int | None, number: int, what: str, *, allowed: int = 0) -> int | None:
    """`top`, at least 1 and at most `number` or `allowed`. Raises OptionError."""
    at_least_one(top=top)
    if top is not None and top > max(number, allowed):
        raise OptionError(Option("top"), f" is {top}; there are {number} {what}")
    return top


def as_task(instruction: str | Task | None) -> Task:
    """The instructions by a name of `prompts.TASKS` or of a dataset of MMEB, given as a Task, or none
    (None). Raises OptionError."""
    if isinstance(instruction, Task):
        return instruction
    if instruction is None:
        return Task(TEXT, TEXT)
    if not isinstance(instruction, str) or prompts.DATASETS.get(instruction, instruction) not in prompts.TASKS:
        raise OptionError(Option("instruction"), f" is {instruction!r}; there are {', '.join(prompts.TASKS)}, and Task("
                          "query, document) for one's own")  # fmt: skip
    return prompts.task(instruction)


def as_image_input(image: Any, index: int | None = None) -> dict[str, Any]:
    """{"image": image} and perhaps "text": what `encode` takes for an image, where a text alone is a path. Raises
    InputError where there is no image in it."""
    if isinstance(image, Mapping):
        if image.get("image") is None and not image.get("images"):
            raise InputError("has no image", name="image" if index is None else f"image {index}")
        return dict(image)
    if image is None or (isinstance(image, str) and not image.strip()):
        raise InputError(f"is {image!r}; a path, a PIL image, an array, bytes or a data URI is needed",
                         name="image" if index is None else f"image {index}")  # fmt: skip
    return {"image": image}


def is_one_image(images: Any) -> bool:
    """Whether it is one image, not a list of them."""
    return isinstance(images, (str, PathLike, Image.Image, bytes, bytearray, np.ndarray, Mapping))


def name_of(item: Any) -> str:
    """How a result calls an input: its image, else its text."""
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        sources = item.get("images") or ([item["image"]] if item.get("image") is not None else [])
        return " + ".join([*map(image_name, sources), *filter(None, [item.get("text")])])
    return image_name(item)


def has_image(item: Any) -> bool:
    if isinstance(item, Mapping):
        return item.get("image") is not None or bool(item.get("images"))
    return not isinstance(item, str)


def text_of(item: Any) -> str:
    if isinstance(item, Mapping):
        return item.get("text") or ""
    return item if isinstance(item, str) else ""


def check_has_text(item: Any, prompt: str, name: str) -> None:
    """Raises InputError where the instruction is around a text and the input has none."""
    if TEXT in prompt and prompt != TEXT and not text_of(item).strip():
        said = prompt.strip()
        raise InputError(f"has no text, and the instruction {said!r} is around one", name=name)


def encode(
    encoder: Encoder,
    inputs: Sequence[Any],
    prompt: str,
    options: Mapping[str, Any],
    name: Callable[[int], str] = "input {}".format,
) -> np.ndarray:
    """Unit vectors [B, D] float64. A prompt that is the text alone is none. name(index): what errors call an input."""
    try:
        return unit_rows(np.asarray(encoder.encode(inputs, prompt=None if prompt == TEXT else prompt, **options)))
    except InputError as e:
        if e.index is None:
            raise
        raise InputError(e.reason, name=f"{name(e.index)} ({e.name})") from None
