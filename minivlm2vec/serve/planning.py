"""One input of a caller -> Planned.

A caller's text is literal: "<|image_1|>" in it is ordinary text, as the original reads it where there are no images,
and never the place of one. Image tokens go only where an image part stands. Special tokens of the tokenizer, such as
"<|end|>" or "</s>", are parsed as such, as in the original.
"""

from collections.abc import Sequence

from PIL import Image

from ..errors import InputError
from ..processor import Planned, Processor

Part = str | Image.Image


def plan_text(processor: Processor, text: str, max_length: int | None = None) -> Planned:
    """A text without images; max_length keeps the first tokens. As `Processor.plan`, but of any length."""
    return Planned(processor.tokenizer(text)[:max_length])


def plan_ids(processor: Processor, ids: Sequence[int], max_length: int | None = None) -> Planned:
    """Token ids as they are: no BOS is added. Raises InputError for an id that the model has no row for."""
    size = processor.config.decoder.vocab_size
    if max(ids) >= size:
        raise InputError(f"token id {max(ids)} is not below the vocabulary's {size}")
    return Planned(list(ids[:max_length]))


def plan_parts(processor: Processor, parts: Sequence[Part], *, num_crops: int | None = None) -> Planned:
    """Texts and images in their order, joined by one space, as vLLM's template for VLM2Vec does it:
    [image, text] is the original's "<|image_1|> text". Raises InputError.
    """
    images = [part for part in parts if isinstance(part, Image.Image)]
    return processor.plan_pieces(_texts_between(parts), images, num_crops=num_crops)


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
