"""What `Embedder.encode` is called with: one input or many, and options by either of their names."""

import os
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from PIL import Image

from .errors import Option, OptionError, nearest

Input = str | Image.Image | Mapping[str, Any]
Inputs = Input | Iterable[Any]  # of which each is an Input; any other iterable's type says nothing


class EncodeOptions(TypedDict, total=False):
    """The options of `Embedder.encode` which do not decide of what type the vectors are; see there."""

    prompt: str | None
    prompt_name: str | None
    num_crops: int | None
    max_length: int | None
    batch_tokens: int
    batch_size: int | None
    normalize: bool
    truncate_dim: int | None
    show_progress: bool
    normalize_embeddings: bool  # from here on as sentence-transformers calls them
    show_progress_bar: bool | None
    convert_to_numpy: bool
    device: str | torch.device | None
    precision: Literal["float32"] | None
    output_value: Literal["sentence_embedding"]


# Options of sentence-transformers that have one meaning here, and what has the others.
_ONE_VALUE: dict[str, tuple[tuple[Any, ...], str]] = {
    "precision": (("float32", None), "vectors are float32; astype makes others of them"),
    "output_value": (("sentence_embedding",), "model.trace gives hidden states"),
    "pool": ((None,), "`torchrun … -m minivlm2vec embed` uses several devices"),
    "chunk_size": ((None,), "`torchrun … -m minivlm2vec embed` uses several devices"),
    "processing_kwargs": ((None,), "num_crops and max_length are options of encode"),
    "task": ((None,), "prompt_name names a task's instruction"),
}
_KNOWN = ("convert_to", "convert_to_tensor", *EncodeOptions.__annotations__)


def one_or_many(inputs: Any) -> tuple[Sequence[Any], bool]:
    """The inputs as a sequence, and whether it was one input. A text, an image or a dict is one; a list, or whatever
    else has an order, is many. Raises TypeError that says what to pass instead."""
    if isinstance(inputs, str | Image.Image | Mapping):
        return [inputs], True
    if instead := _instead(inputs):
        raise TypeError(f"inputs is one input or a list of inputs, got {type(inputs).__name__}; {instead}")
    if isinstance(inputs, Sequence):
        return inputs, False
    as_list = getattr(inputs, "to_pylist", None)  # Arrow's own elements are no str
    return as_list() if as_list else list(inputs), False


def _instead(inputs: Any) -> str | None:
    """What to pass in place of what cannot be inputs; None where it can."""
    if not _is_array_of_texts(inputs) and (instead := image_instead(inputs)):
        return instead
    if isinstance(inputs, set | frozenset):
        return "a set has no order, so nobody could tell which vector is whose: pass a list of it"
    if hasattr(inputs, "columns"):
        return 'of a table, pass one column, or its rows as dicts with "text" and "image"'
    if isinstance(inputs, AsyncIterable):
        return "collect it first: [x async for x in …]"
    return None if isinstance(inputs, Iterable) else 'an input is a text, a PIL image, or a dict with "text" or "image"'


def _is_array_of_texts(inputs: Any) -> bool:
    return isinstance(inputs, np.ndarray) and inputs.ndim == 1 and inputs.dtype.kind in "UOT"


def image_instead(item: Any) -> str | None:
    """How an image goes in that was passed as it is; None for what is no image."""
    if isinstance(item, bytes | bytearray | memoryview):
        return 'the bytes of an image go in as {"image": bytes}, and a text is a str'
    if isinstance(item, os.PathLike):
        return 'the path of an image goes in as {"image": path}, and a text is a str'
    if isinstance(item, np.ndarray | torch.Tensor):
        what = f"{item.dtype} {list(item.shape)}"
        return f'{what} is no list of texts; an image goes in as {{"image": array uint8 [H, W, 3]}}'
    return None


def translated(
    theirs: Mapping[str, Any], *, normalize: bool, convert_to: str, show_progress: bool, device: torch.device
) -> tuple[bool, str, bool]:
    """normalize, convert_to and show_progress, after what options by the names of sentence-transformers say.

    Raises TypeError for an unknown name, and OptionError for a value that has no meaning here."""
    for name, value in theirs.items():
        if name == "normalize_embeddings":
            _check_bool(name, value)
            if value and not normalize:
                raise OptionError(Option("normalize"), " is False and ", Option(name), " is True; use one")
            normalize = value
        elif name == "show_progress_bar":
            show_progress = bool(value) or show_progress
        elif name == "convert_to_tensor":
            _check_bool(name, value)
            convert_to = "torch" if value else convert_to
        elif name == "convert_to_numpy":
            _check_bool(name, value)
            if not value and convert_to != "torch" and not theirs.get("convert_to_tensor"):
                raise OptionError(Option(name), " is False, which would be a list of tensors; convert_to='torch' gives "
                                  "one tensor")  # fmt: skip
        elif name == "device":
            _check_device(value, device)
        elif name in _ONE_VALUE:
            values, instead = _ONE_VALUE[name]
            if value not in values:
                raise OptionError(Option(name), f" is {value!r}; only {values[0]!r} is possible: {instead}")
        else:
            like = nearest(name, (*_KNOWN, *_ONE_VALUE))
            raise TypeError(f"encode has no option {name!r}" + (f"; did you mean {like}?" if like else ""))
    return normalize, convert_to, show_progress


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool | np.bool_):
        raise OptionError(Option(name), f" is {value!r}; True or False is needed")


def _check_device(asked: Any, device: torch.device) -> None:
    """None, or where the model is; "cuda" is any of them."""
    try:
        wanted = device if asked is None else torch.device(asked)
    except (RuntimeError, TypeError):
        wanted = None
    if wanted is None or wanted.type != device.type or wanted.index not in (None, device.index):
        raise OptionError(Option("device"), f" is {asked!r}, and the model is on {device}; "
                          "Embedder.from_pretrained(device=…) decides that")  # fmt: skip
