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
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, TypeGuard
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from .errors import InputError, at_least_one
from .image_files import FORMATS, check_decoding, check_tiff, format_of, import_heif, png_exif

if TYPE_CHECKING:
    from .batch import Grid  # not imported: processes that only decode images need no torch

MAX_PIXELS = 2 * 89_478_485  # what Pillow calls a decompression bomb
LONGEST_PATH = 4096  # characters, of Linux
WHITE = 255
DARKEST = 16  # the maximum of float pixels in 0 .. 255: below it they might be in 0 .. 1 and overshoot, or HDR
_BASE64_SPELLINGS = str.maketrans("-_", "+/", " \t\r\n")  # URL-safe to standard; white space dropped
_CALLERS = threading.Lock()  # while files of callers' images are read: one image may be an input twice
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
SIDEWAYS = (5, 6, 7, 8)

# Pillow warns of every damaged tag, thousands of them in one file; what matters, it raises. Once and here, as
# catch_warnings around each image is not safe in threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, module=r"PIL\.")  # MAX_PIXELS is the limit


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


def open_image(source: Any, *, name: str | None = None, max_pixels: int | None = None) -> Image.Image:
    """Opens an image without decoding it: only the header is read.

    source: a path, a PIL image, a numpy array [H, W, 3] (or 1 or 4 channels) of uint8, the bytes of an image file,
        or a data URI. Files are of FORMATS, whatever their names. A PIL image that was opened and not decoded is
        opened again, so that the caller's does not keep its pixels.
    max_pixels: the largest width times height; default MAX_PIXELS.

    Raises InputError naming it.
    """
    name = name or image_name(source)
    if isinstance(source, Image.Image):
        image = _from_image(source, name)
    elif isinstance(source, np.ndarray):
        image = _from_array(source, name)
    else:
        image = _from_file(source, name)
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


def is_data_uri(source: Any) -> TypeGuard[str]:
    """Whether it begins as a data URI, in letters of any case."""
    return isinstance(source, str) and source[:5].lower() == "data:"


def read_data_uri(uri: str, *, name: str | None = None) -> bytes:
    """The bytes of data:…;base64,… or, percent-encoded, of data:…,… (RFC 2397). Base64 may be wrapped in lines, without
    padding, percent-encoded, or of the URL-safe alphabet, as encoders of many languages write it. Raises InputError."""
    name = name or image_name(uri)
    head, comma, body = uri.partition(",")
    if not comma:
        raise InputError("a data URI is data:image/…;base64,…", name=name)
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body.encode(errors="replace"))
    body = unquote(body).translate(_BASE64_SPELLINGS).rstrip("=")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError) as e:
        raise InputError(f"the data URI's base64 is damaged: {e}", name=name) from None


class PixelBudget:
    """Lets images be decoded in threads that have together at most so many pixels; one that has more goes alone.
    (The server's own, in serve/decoding.py, is for its event loop.)"""

    def __init__(self, most: int):
        self.most = self._left = most
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self.most)
        with self._changed:
            self._changed.wait_for(lambda: pixels <= self._left)
            self._left -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._left += pixels
                self._changed.notify_all()


_BUDGET = PixelBudget(MAX_PIXELS)  # 16 threads, each with an image of the largest size, would take 50 GB


@contextmanager
def decoding(image: Image.Image, name: str = "image") -> Iterator[None]:
    """Around all that decodes an image or works on its pixels: waits while others decode too many of them, and turns
    whatever Pillow raises (its plugins raise all kinds) into an InputError with this name."""
    with _naming(name, "decoded"), _BUDGET.take(image.width * image.height):
        yield


def decoded(image: Image.Image, *, exif_transpose: bool = False) -> Image.Image:
    """The image with its pixels, of 8 bits; upright if `exif_transpose`. To be called within `decoding`."""
    orientation = _orientation(image) if exif_transpose else 1
    if image.format in ("JPEG", "MPO", "PPM") and _is_undecoded(image):
        check_decoding(_contents(image.fp))
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def to_rgb(image: Image.Image, *, name: str = "image", exif_transpose: bool = False) -> Image.Image:
    """Decodes an image and converts it as the original does: `convert("RGB")`, and nothing else.

    So the alpha channel is dropped, not composited, and the EXIF orientation is ignored unless `exif_transpose`.
    An animation gives its first frame. One difference: greyscale of more than 8 bits is scaled to 8 bits, where
    Pillow's conversion alone would clip nearly everything to white. Raises InputError for damaged data, and where the
    range of greyscale does not tell how to scale it.
    """
    with decoding(image, name):
        return _rgb(image, exif_transpose)


def image_size(image: Image.Image, *, exif_transpose: bool = False) -> tuple[int, int]:
    """Width and height of an opened image as `to_rgb` will return it; it is not decoded."""
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # turned when it is decoded; before Pillow 11 `size` is not
        turned = image.tag_v2.get(ExifTags.Base.Orientation) in SIDEWAYS and _is_undecoded(image)
        return (image.tag_v2[257], image.tag_v2[256]) if turned else (width, height)
    return (height, width) if exif_transpose and _orientation(image) in SIDEWAYS else (width, height)


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
    with decoding(image, name):
        if fast_decode:
            draft(image, num_crops, crop_size)
        return hd_crops(_rgb(image, exif_transpose), num_crops, crop_size)


def draft(image: Image.Image, num_crops: int, crop_size: int = 336) -> None:
    """Asks a JPEG's decoder for the smallest 1/2, 1/4 or 1/8 scale that still covers the resized image.

    Much cheaper, but not the same bits as decoding in full and resizing.
    """
    if image.format == "JPEG":
        size = hd_size(image.width, image.height, num_crops, crop_size)
        image.draft("RGB", (size.width, size.height))


def image_name(source: Any) -> str:
    """How messages call an image: its path, or what kind of thing it is."""
    if is_data_uri(source):
        return source[:32] + "…"
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        return path if len(path) <= LONGEST_PATH else path[:32] + "…"
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


def _from_image(image: Image.Image, name: str) -> Image.Image:
    """A caller's image. One that is not decoded yet is opened again from its file; where that does not give the same
    (it was drafted, or is at another frame), it is decoded here."""
    with _CALLERS:
        if not _is_undecoded(image):
            return image
        closed = image.fp is None or image.fp.closed
        again = None if closed else _opened_again(image)
    if again is None:
        with decoding(image, name), _CALLERS:
            try:
                decoded(image)
            except Exception as e:
                raise ValueError("it was closed before") if closed else e from None
    return again or image


def _opened_again(image: ImageFile.ImageFile) -> Image.Image | None:
    try:
        again = _from_file(_contents(image.fp), "")
    except Exception:
        return None
    same = type(again) is type(image) and (again.size, again.mode) == (image.size, image.mode)
    return again if same and image.tell() == 0 else None


def _is_undecoded(image: Image.Image) -> TypeGuard[ImageFile.ImageFile]:
    """Whether an image was opened from a file and has no pixels yet (Pillow keeps them in `_im`, before 11 in `im`)."""
    pixels = image.__dict__.get("_im", image.__dict__.get("im", image))
    return isinstance(image, ImageFile.ImageFile) and pixels is None


def _contents(file: IO[bytes] | None) -> bytes:
    assert file is not None, "its file is closed"
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    return data


def _from_file(source: Any, name: str) -> Image.Image:
    if is_data_uri(source):
        source = read_data_uri(source, name=name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        file = io.BytesIO(source)
        with _naming(name, "opened"):
            return _opened(file, file, name)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"an image is a path, a PIL image, a numpy array, bytes or a data URI, got {type(source).__name__}",
            name=name,
        )
    if (length := len(os.fspath(source))) > LONGEST_PATH:
        raise InputError(f"no path has {length:,} characters; data:image/…;base64, is missing before base64", name=name)
    with _naming(name, "opened"):
        mode = os.stat(source).st_mode
        if not stat.S_ISREG(mode):  # a pipe would be waited for
            raise InputError(f"is a {'folder' if stat.S_ISDIR(mode) else 'pipe or device'}, not an image", name=name)
        with open(source, "rb") as opened:
            return _opened(opened, source, name)


def _opened(file: IO[bytes], source: Any, name: str) -> Image.Image:
    """Opens `source`, which can be read in `file`, once its format is known and opening it is known to be cheap."""
    head = file.read(64)
    if not head:
        raise InputError("the file is empty (zero bytes)", name=name)
    format = format_of(head)
    if format == "HEIF":
        import_heif(name)
    elif format not in FORMATS:
        begins = f" (it begins as {format})" if format else ""
        raise InputError(f"not an image in a known format{begins}; {', '.join(FORMATS)} are read", name=name)
    if format == "TIFF":
        check_tiff(file)
    try:
        return Image.open(source, formats=[format])
    except UnidentifiedImageError:
        raise InputError(f"not an image: it begins as {format}, but has no valid header", name=name) from None


def _rgb(image: Image.Image, exif_transpose: bool) -> Image.Image:
    image = decoded(image, exif_transpose=exif_transpose)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 16 or 32 bits, or of floats, in 8 bits. Values that fit into 8 bits are taken as they are, as the
    original takes them; others are scaled where their range tells how. Raises ValueError where it does not."""
    grey = np.asarray(image)
    low, high = grey.min(), grey.max()
    if image.mode == "F":
        if not (low >= 0 and (high <= 1 or DARKEST <= high <= 255)):  # NaN neither
            raise ValueError(f"its float pixels go from {low:g} to {high:g}; 0 to 1 and 0 to 255 (at least {DARKEST} "
                             "somewhere) can be told apart")  # fmt: skip
        return image.convert("L") if high > 1 else Image.fromarray((grey * 255 + 0.5).astype(np.uint8))
    if low < -65535 or high > 65535:
        raise ValueError(f"its pixels go from {low} to {high}; greyscale of 0 to 65535 can be scaled to 8 bits")
    grey = grey.astype(np.int32).clip(0)
    return Image.fromarray((grey if high <= 255 else (grey + 128) // 257).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """What EXIF says, 1 where it says nothing or cannot be read. Nothing is decoded."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow turns it when it decodes it
        return 1
    try:
        exif = Image.Image.getexif(image)  # that of a PNG would decode it
        if image.format == "PNG" and not exif and _is_undecoded(image) and image.fp is not None:
            exif.load(png_exif(image.fp))
        return exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises all kinds here too
        return 1


@contextmanager
def _naming(name: str, done: str) -> Iterator[None]:
    """Turns what Pillow and the file system raise into InputError."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError("no such file", name=name) from None
    except Image.DecompressionBombError as e:
        raise InputError(f"decompression bomb: {e}", name=name) from None
    except (struct.error, AssertionError, IndexError, KeyError, TypeError, AttributeError, EOFError) as e:
        raise InputError(f"the image cannot be {done}: it is damaged ({type(e).__name__})", name=name) from None
    except Exception as e:
        raise InputError(f"the image cannot be {done}: {str(e) or type(e).__name__}", name=name) from None
