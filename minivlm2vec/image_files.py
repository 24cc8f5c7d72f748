"""What the bytes of an image file tell before Pillow opens or decodes it: its format, and what it would cost."""

import importlib.util
import os
import re
import struct
from typing import IO

from PIL import Image

from .errors import InputError
from .extras import import_extra

MAX_SCANS = 100  # of a JPEG: each costs the time of the whole image; ten are usual
MAX_COMMENTS = 1000  # of a PPM in plain text, which are read in Python
MAX_PIECES = 1 << 16  # strips or tiles of a TIFF: each costs its time when the file is opened
MAX_TILE = 1 << 24  # pixels of a TIFF's tile, or as many as the image has: they are allocated whatever the image's size
STRIP_OFFSETS, TILE_OFFSETS, SIZE, TILE_SIZE = 273, 324, (256, 257), (322, 323)  # tags of TIFF
# The formats that are read, everywhere in this package, by Pillow's names, and how their files are called. Pillow or a
# library in its wheels decodes them; none is code, none runs another program (EPS would), none unpacks another file.
FORMATS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif",),
    "PPM": ("ppm", "pgm", "pbm"),
    "HEIF": ("heic", "heif"),  # where pillow-heif is installed
}
_HEVC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")


def suffixes() -> frozenset[str]:
    """How the files that can be read here are called, without the dot."""
    found = [f for f in FORMATS if f != "HEIF" or importlib.util.find_spec("pillow_heif")]
    return frozenset(suffix for format in found for suffix in FORMATS[format])


def format_of(head: bytes) -> str | None:
    """The format of a file by its first bytes, as Pillow's own plugins tell them apart."""
    Image.init()
    brands = head[8 : int.from_bytes(head[:4], "big")] if head[4:8] == b"ftyp" else b""
    if any(brands[i : i + 4] in _HEVC_BRANDS for i in range(0, len(brands), 4)):
        return "HEIF"  # Pillow's plugin for AVIF would claim some of them
    frequent_first = dict.fromkeys((*FORMATS, *Image.ID))
    accepts = {format: Image.OPEN[format][1] for format in frequent_first if format in Image.OPEN}
    return next((format for format, accept in accepts.items() if accept and accept(head[:16])), None)


def import_heif(name: str) -> None:
    try:
        import_extra("pillow_heif", extra="heif", why="to read HEIC").register_heif_opener(thumbnails=False)
    except ImportError:
        hint = "pip install 'minivlm2vec[heif]', or convert it to JPEG"
        raise InputError(f"HEIC is read where pillow-heif is installed: {hint}", name=name) from None


def check_tiff(file: IO[bytes]) -> None:
    """Refuses a TIFF of too many strips or tiles, or of a tile far larger than the picture, by its first directory."""
    try:
        entries, tags = _directory(file)
    except (struct.error, OverflowError):
        raise ValueError("the TIFF has no directory") from None
    pieces = max(entries, *(tags.get(tag, (0, 0))[0] for tag in (STRIP_OFFSETS, TILE_OFFSETS)))
    if pieces > MAX_PIECES:
        raise ValueError(f"the TIFF is cut into {pieces:,} pieces; at most {MAX_PIECES:,} are read")
    width, height, tile_width, tile_height = (tags.get(tag, (1, 0))[1] for tag in (*SIZE, *TILE_SIZE))
    if tile_width * tile_height > max(width * height, MAX_TILE):
        raise ValueError(f"the TIFF's tiles have {tile_width} x {tile_height} pixels, the image {width} x {height}")


def _directory(file: IO[bytes]) -> tuple[int, dict[int, tuple[int, int]]]:
    """How many entries a TIFF's first directory has; for each tag, as far as they go, (how many values, the value)."""
    file.seek(0)
    head = file.read(16)
    order, big = "<" if head[:2] == b"II" else ">", 43 in head[2:4]
    offset, count, entry = ("Q", "Q", "HHQ8s") if big else ("I", "H", "HHI4s")
    file.seek(struct.unpack_from(order + offset, head, 8 if big else 4)[0])
    (entries,) = struct.unpack(order + count, file.read(struct.calcsize(order + count)))
    size = struct.calcsize(order + entry)
    directory = file.read(size * min(entries, MAX_PIECES))
    tags: dict[int, tuple[int, int]] = {}
    for tag, kind, values, value in struct.iter_unpack(order + entry, directory[: len(directory) // size * size]):
        (number,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), value)
        tags.setdefault(tag, (values, number))
    return entries, tags


def check_decoding(data: bytes) -> None:
    """Refuses what would cost far more than its pixels: a JPEG of too many scans, a PPM of comments."""
    if data[:2] == b"\xff\xd8" and (scans := _scans(data)) > MAX_SCANS:
        raise ValueError(f"the JPEG has {scans:,} scans; at most {MAX_SCANS} are decoded")
    if data[:2] in (b"P1", b"P2", b"P3") and (comments := data.count(b"#")) > MAX_COMMENTS:
        raise ValueError(f"the PPM has {comments:,} comments; at most {MAX_COMMENTS:,} are read")


def _scans(jpeg: bytes) -> int:
    """How many the first picture of the file has; others, or a film, may follow it."""
    scans, place = 0, 2
    while (marker := _JPEG_MARKER.search(jpeg, place)) and marker[0] != b"\xff\xd9":  # the end
        scans += marker[0] == b"\xff\xda"
        place = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    return scans


def png_exif(file: IO[bytes]) -> bytes:
    """EXIF that stands behind the pixels."""
    place, exif = file.tell(), b""
    file.seek(8)
    while not exif and len(chunk := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", chunk)
        exif = file.read(length) if kind == b"eXIf" else b""
        file.seek(length + 4 - len(exif), os.SEEK_CUR)
    file.seek(place)
    return exif
