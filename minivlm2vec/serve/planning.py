"""One input of a caller -> Planned.

A caller's text is literal: "<|image_1|>" in it is ordinary text, as the original reads it where there are no images,
and never the place of one. Image tokens go only where an image part stands. Special tokens of the tokenizer, such as
"<|end|>" or "</s>", are parsed as such, as in the original.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from ..batch import num_image_tokens
from ..errors import InputError
from ..processor import Planned, Processor

Part = str | Image.Image


def plan_text(processor: Processor, text: str, max_length: int | None = None) -> Planned:
    """A text without images; max_length keeps the first tokens. As `Processor.plan`, but of any length."""
    return Planned(processor.tokenizer(text)[:max_length], _EMPTY, _EMPTY)


def plan_ids(processor: Processor, ids: Sequence[int], max_length: int | None = None) -> Planned:
    """Token ids as they are: no BOS is added. Raises InputError for an id that the model has no row for."""
    size = processor.config.decoder.vocab_size
    if max(ids) >= size:
        raise InputError(f"token id {max(ids)} is not below the vocabulary's {size}")
    return Planned(list(ids[:max_length]), _EMPTY, _EMPTY)


def plan_parts(
    processor: Processor, parts: Sequence[Part], *, num_crops: int | None = None, max_length: int | None = None
) -> Planned:
    """Texts and images in their order, joined by one space, as vLLM's template for VLM2Vec does it:
    [image, text] is the original's "<|image_1|> text". max_length cuts only where there is no image.

    Raises InputError.
    """
    images = [part for part in parts if isinstance(part, Image.Image)]
    if not images:
        return plan_text(processor, " ".join(parts), max_length)
    measured = processor.plan({"images": images}, num_crops=num_crops)  # checks the images, knows their grids
    sizes = [num_image_tokens(grid, processor.config.vision.merged_per_side) for grid in measured.grids]
    pieces = _texts_between(parts)
    ids, places = processor.tokenizer(pieces[0]), []
    for size, piece in zip(sizes, pieces[1:], strict=True):
        places.append(np.arange(len(ids), len(ids) + size))
        ids = ids + [0] * size + processor.tokenizer(piece)
    return replace(measured, input_ids=ids, image_index=np.concatenate(places), image_source=np.arange(sum(sizes)))


def _texts_between(parts: Sequence[Part]) -> list[str]:
    """The text before, between and behind the images."""
    pieces = [""]
    for n, part in enumerate(parts):
        pieces[-1] += " " if n else ""
        if isinstance(part, str):
            pieces[-1] += part
        else:
            pieces.append("")
    return pieces


_EMPTY = np.empty(0, np.int64)
