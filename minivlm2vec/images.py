"""Images -> crops, exactly as the original cuts them (its "HD transform").

An image is enlarged or shrunk to fill as many crops of S x S pixels as `num_crops` allows, padded with white to
whole crops, and cut. Pillow's own bilinear resize is part of the specification: its integer arithmetic decides
the last bit of the pixels. Everything here releases the interpreter lock, so threads help.

The global view (the whole canvas at S x S) is not made here: it is a float image, computed from the crops where
the model runs (`minivlm2vec_kernels.image_patches`).
"""

import base64
import binascii
import io
import math
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .errors import InputError, at_least_one

if TYPE_CHECKING:
    from .batch import Grid  # not imported: processes that only decode images need no torch

MAX_PIXELS = 2 * 89_478_485  # what Pillow calls a decompression bomb
REFUSED_FORMATS = {"EPS"}  # decoded by running another program, Ghostscript, on the file
# Read by Pillow itself or by the libraries in its wheels: what a server takes from strangers.
SAFE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
WHITE = 255
_BASE64_SPELLINGS = str.maketrans("-_", "+/", " \t\r\n")  # URL-safe to standard; white space dropped
_LOAD_LOCKS = [threading.Lock() for _ in range(64)]


@dataclass(frozen=True)
class HDSize:
    """Where an image goes: its resized size, the grid of crops, and its place on the white canvas."""

    width: int  # of the resized image, pixels
    height: int
    grid: "Grid"
    left: int
    top: int


def hd_size(width: int, height: int, num_crops: int, crop_size: int = 336) -> HDSize:
    """The size that a `width` x `height` image is brought to, for at most `num_crops` crops.

    Raises ValueError where the image is too thin for one row of pixels to remain, or num_crops < 1.
    """
    at_least_one(num_crops=num_crops)
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels is empty")
    long, short = max(width, height), min(width, height)
    ratio = long / short
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
        scale += 1
    new_long = scale * crop_size
    new_short = int(new_long / ratio)
    if new_short == 0:
        raise ValueError(
            f"an image of {width} x {height} pixels is too thin: one side is {ratio:.0f} times the other, at most "
            f"{new_long} times is possible with num_crops {num_crops}"
        )
    across = math.ceil(new_short / crop_size)
    margin = (across * crop_size - new_short) // 2
    if width >= height:
        return HDSize(new_long, new_short, (across, scale), left=0, top=margin)
    return HDSize(new_short, new_long, (scale, across), left=margin, top=0)


def hd_crops(image: Image.Image, num_crops: int, crop_size: int = 336) -> "tuple[np.ndarray, Grid]":
    """Resizes, pads and cuts an RGB image.

    Returns crops [h * w, S, S, 3] uint8, row-major, and the grid (h, w), h * w <= num_crops.
    """
    size = hd_size(image.width, image.height, num_crops, crop_size)
    h, w = size.grid
    if image.width >= image.height:
        resized = image.resize((size.width, size.height), Image.Resampling.BILINEAR)
    else:
        # The original transposes portraits, so that Pillow, which resizes rows first, resizes columns first.
        # Two one-dimensional resizes in that order give the same bits without turning the image.
        resized = image.resize((image.width, size.height), Image.Resampling.BILINEAR)
        resized = resized.resize((size.width, size.height), Image.Resampling.BILINEAR)
    canvas = np.full((h * crop_size, w * crop_size, 3), WHITE, np.uint8)
    canvas[size.top : size.top + size.height, size.left : size.left + size.width] = np.asarray(resized)
    crops = canvas.reshape(h, crop_size, w, crop_size, 3).swapaxes(1, 2)
    return np.ascontiguousarray(crops).reshape(h * w, crop_size, crop_size, 3), size.grid


def open_image(
    source: Any, *, name: str | None = None, max_pixels: int | None = None, formats: Sequence[str] | None = None
) -> Image.Image:
    """Opens an image without decoding it: only the header is read.

    source: a path, a PIL image, a numpy array [H, W, 3] (or 1 or 4 channels) of uint8, the bytes of an image file,
        or a data URI.
    max_pixels: the largest width times height; default MAX_PIXELS.
    formats: Pillow's names of the file formats that are accepted; default all but REFUSED_FORMATS.

    Raises InputError naming it.
    """
    name = name or image_name(source)
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, np.ndarray):
        image = _from_array(source, name)
    else:
        image = _from_file(source, name, formats)
    if image.width < 1 or image.height < 1:
        raise InputError(f"the image is empty ({image.width} x {image.height} pixels)", name=name)
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    pixels = image.width * image.height
    if pixels > limit:
        whose = " (minivlm2vec.images.MAX_PIXELS)" if max_pixels is None else ""
        raise InputError(
            f"{image.width} x {image.height} = {pixels:,} pixels are more than the {limit:,} allowed{whose}", name=name
        )
    return image


def read_data_uri(uri: str, *, name: str | None = None) -> bytes:
    """The bytes of data:…;base64,… Base64 may be wrapped in lines, without padding, or of the URL-safe alphabet, as
    encoders of many languages write it. Raises InputError."""
    name = name or image_name(uri)
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InputError("a data URI is data:image/…;base64,…", name=name)
    body = body.translate(_BASE64_SPELLINGS).rstrip("=")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError) as e:
        raise InputError(f"the data URI's base64 is damaged: {e}", name=name) from None


def to_rgb(image: Image.Image, *, name: str = "image", exif_transpose: bool = False) -> Image.Image:
    """Decodes an image and converts it as the original does: `convert("RGB")`, and nothing else.

    So the alpha channel is dropped, not composited, and the EXIF orientation is ignored unless `exif_transpose`.
    An animation gives its first frame. One difference: 16-bit greyscale is scaled to 8 bits, where Pillow's
    conversion alone would clip nearly everything to white. Raises InputError for damaged data.
    """
    try:
        with _LOAD_LOCKS[id(image) % len(_LOAD_LOCKS)]:  # one image may be an input twice
            image.load()
        if exif_transpose:
            image = ImageOps.exif_transpose(image)
        if image.mode == "I" or image.mode.startswith("I;16"):
            grey = np.asarray(image).astype(np.int64).clip(0, 65535)
            image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
        return image if image.mode == "RGB" else image.convert("RGB")
    except Image.DecompressionBombError as e:
        raise InputError(f"decompression bomb: {e}", name=name) from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as e:
        raise InputError(f"the image cannot be decoded: {_describe(e)}", name=name) from None


def image_size(image: Image.Image, *, exif_transpose: bool = False) -> tuple[int, int]:
    """Width and height of an opened image as `to_rgb` will return it; it is not decoded."""
    if exif_transpose and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
        return image.height, image.width
    return image.size


def image_crops(
    image: Image.Image,
    num_crops: int,
    crop_size: int = 336,
    *,
    name: str = "image",
    fast_decode: bool = False,
    exif_transpose: bool = False,
) -> "tuple[np.ndarray, Grid]":
    """Decodes and cuts an opened image: `to_rgb`, then `hd_crops`. fast_decode: JPEGs by `draft`."""
    if fast_decode:
        draft(image, num_crops, crop_size)
    return hd_crops(to_rgb(image, name=name, exif_transpose=exif_transpose), num_crops, crop_size)


def draft(image: Image.Image, num_crops: int, crop_size: int = 336) -> None:
    """Asks a JPEG's decoder for the smallest 1/2, 1/4 or 1/8 scale that still covers the resized image.

    Much cheaper, but not the same bits as decoding in full and resizing.
    """
    if image.format == "JPEG":
        size = hd_size(image.width, image.height, num_crops, crop_size)
        image.draft("RGB", (size.width, size.height))


def image_name(source: Any) -> str:
    """How messages call an image: its path, or what kind of thing it is."""
    if isinstance(source, str) and source.startswith("data:"):
        return source[:32] + "…"
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"numpy array {source.dtype}{list(source.shape)}"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"PIL image {source.mode} {source.width}x{source.height}"
    return type(source).__name__


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise InputError(f"a numpy image is uint8 [height, width, 3], got {array.dtype} {list(array.shape)}", name=name)
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def _from_file(source: Any, name: str, formats: Sequence[str] | None) -> Image.Image:
    if isinstance(source, str) and source.startswith("data:"):
        source = read_data_uri(source, name=name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        if len(source) == 0:
            raise InputError("zero bytes", name=name)
        source = io.BytesIO(source)
    elif not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"an image is a path, a PIL image, a numpy array, bytes or a data URI, got {type(source).__name__}",
            name=name,
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # open_image has its own limit
            return Image.open(source, formats=_known_formats(formats))
    except FileNotFoundError:
        raise InputError("no such file", name=name) from None
    except IsADirectoryError:
        raise InputError("is a folder, not an image", name=name) from None
    except UnidentifiedImageError:
        if not isinstance(source, io.BytesIO) and os.path.getsize(source) == 0:
            raise InputError("the file is empty (zero bytes)", name=name) from None
        known = f" ({', '.join(formats)})" if formats else ""
        raise InputError(f"not an image in a known format{known}", name=name) from None
    except Image.DecompressionBombError as e:
        raise InputError(f"decompression bomb: {e}", name=name) from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as e:
        raise InputError(f"the image cannot be opened: {_describe(e)}", name=name) from None


def _known_formats(formats: Sequence[str] | None) -> list[str]:
    """Those of the formats that this Pillow can open, frequent ones first."""
    Image.init()
    if formats is None:
        return [f for f in Image.ID if f not in REFUSED_FORMATS]
    return [f for f in formats if f in Image.OPEN]


def _describe(e: BaseException) -> str:
    return str(e) or type(e).__name__
