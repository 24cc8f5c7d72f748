"""Text and images -> PackedBatch, as the original's processor does it.

The work is in two steps, so that inputs can be sorted by length before any image is decoded:
`plan` reads texts and image headers and knows each input's length; `load` decodes and cuts the images.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .batch import Grid, PackedBatch, cumulative, num_image_tokens
from .config import CLIP_MEAN, CLIP_STD, VLM2VecConfig, only, read_object, shown
from .encode_arguments import image_instead
from .errors import CheckpointError, InputError, at_least_one
from .images import hd_size, image_crops, image_name, image_size, open_image
from .tokenizer import Tokenizer

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
MOST_DIGITS = 18  # of an image's number in a tag
MOST_CROPS = 1024  # that a file may ask for
# The one value that is implemented of settings that change pixels.
SETTINGS = {"do_convert_rgb": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False, "resample": 2}
LEADING_TAGS = re.compile(r"(?:<\|image_\d+\|>\s*)*")


@dataclass(frozen=True)
class Planned:
    """One input, tokenised and measured, its images not yet decoded.

    Fields:
        input_ids: the tokens; 0 where an image token goes.
        image_index: places in input_ids that image tokens fill.
        image_source: which token of this input's images goes there (image after image, in list order).
        sources: the images as they were given.
        names: what messages call them.
        grids: (h, w) of each.
    """

    input_ids: list[int]
    image_index: np.ndarray = field(default_factory=lambda: _EMPTY)
    image_source: np.ndarray = field(default_factory=lambda: _EMPTY)
    sources: tuple[Any, ...] = ()
    names: tuple[str, ...] = ()
    grids: tuple[Grid, ...] = ()
    num_crops: int = 1

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Loaded:
    """One input with its images cut into crops [sum h * w, S, S, 3] uint8."""

    planned: Planned
    crops: list[np.ndarray] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.planned)


class Processor:
    """Turns inputs into a PackedBatch.

    Args:
        tokenizer: text -> ids.
        config: sizes of the model.
        num_crops: the most crops an image is cut into.
        fast_decode: JPEGs are decoded at a reduced scale: faster, not the same bits.
        exif_transpose: honour the EXIF orientation, which the original ignores.
        num_image_tokens: how many tokens an image of a grid (h, w) of crops is given; default as the published
            projector makes (`VLM2Vec.num_image_tokens` asks the model's own).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: VLM2VecConfig,
        *,
        num_crops: int = 4,
        fast_decode: bool = False,
        exif_transpose: bool = False,
        num_image_tokens: Callable[[Grid], int] | None = None,
    ):
        at_least_one(num_crops=num_crops)
        if tokenizer.largest_id >= config.decoder.vocab_size:
            raise CheckpointError(f"the tokenizer has ids up to {tokenizer.largest_id}; the model's vocab_size is "
                                  f"{config.decoder.vocab_size}")  # fmt: skip
        self.tokenizer = tokenizer
        self.config = config
        self.num_crops = num_crops
        self.fast_decode = fast_decode
        self.exif_transpose = exif_transpose
        self.num_image_tokens = num_image_tokens or partial(_as_published, config.vision.merged_per_side)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        config: VLM2VecConfig | None = None,
        *,
        num_crops: int | None = None,
        **options,
    ) -> "Processor":
        """Reads tokenizer.json and preprocessor_config.json of a checkpoint folder."""
        config = config or VLM2VecConfig.from_json(folder)
        settings = _preprocessor_config(Path(folder))
        tokenizer = Tokenizer(folder)
        if num_crops is None:
            num_crops = settings["num_crops"]
        return cls(tokenizer, config, num_crops=num_crops, **options)

    def __call__(self, inputs: Sequence[Any], **options) -> PackedBatch:
        """Plans, loads and packs a few inputs at once; options as for `plan`."""
        return self.pack([self.load(self.plan(x, **options)) for x in inputs])

    def plan(
        self,
        item: Any,
        *,
        prompt: str | None = None,
        num_crops: int | None = None,
        max_length: int | None = None,
    ) -> Planned:
        """Tokenises one input and reads the headers of its images.

        item: a text, a PIL image, or a dict with "text" and "image" or "images". The text is split at the tags
        <|image_n|>, and every piece is tokenised by itself, with a BOS; tag n stands for the n-th image. Images
        that no tag names are an error, but where the text has no tag at all the tags are put in front,
        "<|image_1|>\\n<|image_2|>\\n…", as in the MMEB data. Without images a tag is ordinary text.
        prompt: an instruction, put in front of the text, after the tags that begin it; where it holds "{text}",
            the text goes there instead.
        max_length: keeps the first tokens of a text; inputs with images are never cut, as in the original.

        Raises InputError.
        """
        text, sources = _text_and_images(item)
        text = _with_prompt(_with_tags(text, len(sources)), prompt, bool(sources))
        if not sources:
            return self._bounded(Planned(self._first_ids(text, max_length)))
        pieces = IMAGE_TAG.split(text)  # text, number, text, number, … text
        return self.plan_pieces(pieces[::2], sources, [int(n) for n in pieces[1::2]], num_crops=num_crops)

    def plan_pieces(
        self,
        pieces: Sequence[str],
        images: Sequence[Any],
        numbers: Sequence[int] | None = None,
        *,
        num_crops: int | None = None,
        names: Sequence[str] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> Planned:
        """As `plan`, of texts and the images between them: pieces[0], an image, pieces[1], …

        Every piece is tokenised by itself, with a BOS; a tag in it is ordinary text.
        numbers: which images stand there, from 1; default each once, in their order.
        names, sizes: what messages call the images, and their (width, height), where they are known; then `images`
            may hold anything, and nothing is opened.

        Raises InputError.
        """
        numbers = range(1, len(images) + 1) if numbers is None else numbers
        if len(pieces) != len(numbers) + 1:
            raise InputError(f"{len(pieces)} pieces of text do not fit around {len(numbers)} images")
        num_crops = self.num_crops if num_crops is None else num_crops
        names = tuple(map(image_name, images) if names is None else names)
        sizes = [self._size(s, n) for s, n in zip(images, names, strict=True)] if sizes is None else sizes
        grids = tuple(self._grid(s, n, num_crops) for s, n in zip(sizes, names, strict=True))
        tokens = [self._num_image_tokens([g]) for g in grids]
        first = np.cumsum([0, *tokens])
        self._check_characters(sum(map(len, pieces)))
        ids, index, source = self.tokenizer(pieces[0]), [], []
        for number, piece in zip(numbers, pieces[1:], strict=True):
            size = tokens[number - 1]
            index.append(np.arange(len(ids), len(ids) + size))
            source.append(np.arange(first[number - 1], first[number]))
            ids = ids + [0] * size + self.tokenizer(piece)
        places = np.concatenate([_EMPTY, *index]), np.concatenate([_EMPTY, *source])
        return self._bounded(Planned(ids, *places, tuple(images), names, grids, num_crops))

    def load(self, planned: Planned) -> Loaded:
        """Decodes and cuts the images. Touches no shared state and mostly runs without the interpreter lock."""
        crops = []
        for source, name, grid in zip(planned.sources, planned.names, planned.grids, strict=True):
            image = open_image(source, name=name)
            pixels, got = image_crops(
                image,
                planned.num_crops,
                self.crop_size,
                name=name,
                fast_decode=self.fast_decode and image is not source,
                exif_transpose=self.exif_transpose,
            )
            if got != grid:
                raise InputError(f"the image changed while it was read: grid {grid}, then {got}", name=name)
            crops.append(pixels)
        return Loaded(planned, crops)

    def pack(self, items: Sequence[Loaded]) -> PackedBatch:
        """Lays inputs end to end. Images of one batch share one numbering, in the order of the items. Items that hold
        the very same arrays of crops have them there once, so the image tower computes them once."""
        plans = [x.planned for x in items]
        lengths = [len(p) for p in plans]
        starts = np.cumsum([0, *lengths])
        different, image_starts = self._images_of(items)
        crops = [torch.from_numpy(c) for x in different for c in x.crops]
        S = self.crop_size
        return PackedBatch(
            input_ids=torch.tensor([t for p in plans for t in p.input_ids], dtype=torch.int64),
            position_ids=torch.cat([torch.arange(n) for n in lengths] or [torch.empty(0, dtype=torch.int64)]),
            cu_seqlens=cumulative(lengths),
            lengths=tuple(lengths),
            crops=torch.cat(crops) if crops else torch.empty(0, S, S, 3, dtype=torch.uint8),
            grids=tuple(g for x in different for g in x.planned.grids),
            image_index=_concatenate(p.image_index + s for p, s in zip(plans, starts, strict=False)),
            image_source=_concatenate(p.image_source + s for p, s in zip(plans, image_starts, strict=False)),
        )

    def _images_of(self, items: Sequence[Loaded]) -> tuple[list[Loaded], list[int]]:
        """The items with different images, and where in these images' tokens those of each item begin."""
        first: dict[tuple[int, ...], int] = {}
        different, starts, end = [], [], 0
        for item in items:
            start = first.setdefault(tuple(map(id, item.crops)), end) if item.crops else end
            starts.append(start)
            if item.crops and start == end:
                different.append(item)
                end += self._num_image_tokens(item.planned.grids)
        return different, starts

    @property
    def crop_size(self) -> int:
        return self.config.vision.image_size

    def _num_image_tokens(self, grids: Sequence[Grid]) -> int:
        return sum(map(self.num_image_tokens, grids))

    def _size(self, source: Any, name: str) -> tuple[int, int]:
        image = open_image(source, name=name)
        size = image_size(image, exif_transpose=self.exif_transpose)
        if image is not source and not isinstance(source, np.ndarray):
            image.close()
        return size

    def _grid(self, size: tuple[int, int], name: str, num_crops: int) -> Grid:
        try:
            return hd_size(*size, num_crops, self.crop_size).grid
        except ValueError as e:
            raise InputError(str(e), name=name) from None

    def _first_ids(self, text: str, max_length: int | None) -> list[int]:
        """Ids of a text, of which no more is tokenised than can matter."""
        if max_length is not None:
            begin = text[: self.tokenizer.longest_token * 2 * max_length]  # twice: what is cut through changes the last
            ids = self.tokenizer(begin)
            if len(ids) > max_length or len(begin) == len(text):
                return ids[:max_length]
        self._check_characters(len(text))
        return self.tokenizer(text)[:max_length]

    def _check_characters(self, number: int) -> None:
        """Refuses a text that must have too many tokens, before it is tokenised: that takes 200 bytes a character."""
        limit = self.config.decoder.max_position_embeddings
        if number > limit * self.tokenizer.longest_token:
            raise InputError(f"{number:,} characters are more than the {limit:,} tokens of max_position_embeddings can "
                             "hold; max_length cuts a text", name="text")  # fmt: skip

    def _bounded(self, planned: Planned) -> Planned:
        limit = self.config.decoder.max_position_embeddings
        if len(planned) > limit:
            raise InputError(
                f"{len(planned)} tokens are more than the {limit} of max_position_embeddings"
                + ("" if planned.grids else "; max_length cuts a text"),
                name="text and images" if planned.grids else "text",
            )
        return planned


def _as_published(merged_per_side: int, grid: Grid) -> int:
    return num_image_tokens(grid, merged_per_side)


_EMPTY: np.ndarray = np.empty(0, np.int64)


def _text_and_images(item: Any) -> tuple[str | None, tuple[Any, ...]]:
    """The text (None where there is none) and the images of an input."""
    if isinstance(item, str):
        return item, ()
    if isinstance(item, Image.Image):
        return None, (item,)
    if not isinstance(item, Mapping):
        raise InputError(
            f"an input is a text, a PIL image, or a dict with 'text' and 'image' or 'images', got {type(item).__name__}"
            + (f"; {instead}" if (instead := image_instead(item)) else "")
        )
    unknown = set(item) - {"text", "image", "images"}
    if unknown:
        raise InputError(f"unknown keys {sorted(map(str, unknown))}; known are 'text', 'image' and 'images'")
    text, image, images = item.get("text"), item.get("image"), item.get("images")
    if image is not None and images is not None:
        raise InputError("both 'image' and 'images' are given; use one")
    if text is not None and not isinstance(text, str):
        raise InputError(f"'text' is a str, got {type(text).__name__}", name="text")
    if images is not None and not isinstance(images, (list, tuple)):
        raise InputError(f"'images' is a list, got {type(images).__name__}; one image goes under 'image'")
    sources = tuple(images or ()) if image is None else (image,)
    if text is None and not sources:
        raise InputError("neither text nor image")
    for n, source in enumerate(sources, 1):
        if source is None:
            raise InputError(f"image {n} of {len(sources)} is None", name=f"image {n}")
    return text, sources


def _with_tags(text: str | None, num_images: int) -> str:
    """Puts tags in front where the text has none; checks those it has against the images."""
    text = text or ""
    if num_images == 0:
        return text  # a tag is ordinary text then, as in the original
    numbers = IMAGE_TAG.findall(text)
    longest = max(map(len, numbers), default=0)
    if longest > MOST_DIGITS:
        raise InputError(f"the text has a tag whose number has {longest} digits, but {num_images} image(s) are given; "
                         f"a number has at most {MOST_DIGITS} digits", name="text")  # fmt: skip
    tags = {int(n) for n in numbers}
    if not tags:
        return "".join(f"<|image_{n}|>\n" for n in range(1, num_images + 1)) + text
    if tags != set(range(1, num_images + 1)):
        names = ", ".join(f"<|image_{n}|>" for n in sorted(tags)[:8])
        names += f" and {len(tags) - 8} more" if len(tags) > 8 else ""
        raise InputError(f"the text has the tags {names} but {num_images} image(s) are given; image n is named by "
                         f"<|image_n|>, n from 1 to {num_images}", name="text")  # fmt: skip
    return text


def _with_prompt(text: str, prompt: str | None, has_images: bool) -> str:
    """Puts the instruction after the tags that begin the text; the text goes where it says "{text}", or behind."""
    if not prompt:
        return text
    tags = LEADING_TAGS.match(text) if has_images else None
    head = tags.group() if tags else ""
    body = text[len(head) :]
    return head + (prompt.replace("{text}", body) if "{text}" in prompt else prompt + body)


def _concatenate(arrays) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([_EMPTY, *arrays]))


def _preprocessor_config(folder: Path) -> dict[str, Any]:
    """num_crops of preprocessor_config.json, or of what transformers 5 writes in its place, after a check that it asks
    for what is done here, with CLIP's mean and deviation."""
    path, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
    raw = None
    if newer.is_file() and not path.is_file():
        path, raw = newer, read_object(newer, "").get("image_processor")
    if not isinstance(raw, dict):
        raw = read_object(folder / "preprocessor_config.json", "a checkpoint folder needs a preprocessor_config.json")
    if type(raw.get("num_crops")) is not int or not 1 <= raw["num_crops"] <= MOST_CROPS:
        raise CheckpointError(f"{path}: num_crops is {shown(raw.get('num_crops'))}; an integer from 1 to {MOST_CROPS} "
                              "is needed")  # fmt: skip
    for key, expected in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
        given = raw.get(key, expected)
        numbers = isinstance(given, (list, tuple)) and [type(x) for x in given] == [float] * 3
        if not numbers or not np.allclose(given, expected, rtol=0, atol=1e-7):
            raise CheckpointError(f"{path}: {key} is {shown(given)}, expected CLIP's {list(expected)}")
    factor = raw.get("rescale_factor")
    if factor is not None and not (type(factor) is float and math.isclose(factor, 1 / 255, rel_tol=1e-6)):
        raise CheckpointError(f"{path}: rescale_factor is {shown(factor)}; only 1/255 is supported")
    only({k: v for k, v in raw.items() if v is not None}, f"{path}: ", **SETTINGS)
    return raw
