"""Damaged images of every format, through all that opens or decodes one:

    python -m tests.support.fuzz_images --count 20000 --seed 0

Each is made of its seed and number alone, so one that failed can be run again (`--first N --count 1`). Nothing but
InputError may come out, within limits of time and memory for the pixels that are allowed.
"""

import argparse
import io
import random
import time
from collections.abc import Callable, Iterator
from unittest.mock import patch

import numpy as np
from PIL import Image, ImageFile

from minivlm2vec import images
from minivlm2vec.errors import InputError
from minivlm2vec.html import thumbnail
from minivlm2vec.image_files import FORMATS
from tests.support.fuzzing import Found, peak_megabytes
from tests.support.golden import synth_image

PIXELS = 4_000_000  # of an image, as a caller may set them; a mutated header asks for more often enough
SECONDS = 10.0  # for one image, on a busy machine
MEGABYTES = 600  # more than before, for the largest image
EXTREMES = (
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x80\0\0\0",
    b"\0\0\0\1",
    b"\1\0",
)


def originals() -> Iterator[tuple[str, bytes]]:
    """(name, file) of small images in every format that this Pillow writes, in several of its forms."""
    Image.init()
    rgb = Image.fromarray(synth_image(70, 50, 1))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", (72, 1)
    grey16 = Image.fromarray((np.arange(50 * 70).reshape(50, 70) * 18).astype(np.uint16))

    def film() -> dict:  # of fresh images, as Pillow's JPEG encoder leaves its settings in them
        return {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)], "duration": 40}

    forms: list[tuple[str, Image.Image, dict]] = [
        ("JPEG", rgb, {"exif": exif}), ("JPEG", rgb, {"progressive": True}), ("JPEG", rgb.convert("CMYK"), {}),
        ("JPEG", rgb.convert("L"), {"restart_marker_rows": 1}), ("MPO", rgb, film()),
        ("PNG", rgb, {"exif": exif}), ("PNG", rgb.convert("P"), {"transparency": 3}), ("PNG", grey16, {}),
        ("PNG", rgb.convert("RGBA"), film()), ("PNG", rgb.convert("1"), {}),
        ("WEBP", rgb, {"exif": exif}), ("WEBP", rgb.convert("RGBA"), {"lossless": True}), ("WEBP", rgb, film()),
        ("GIF", rgb.convert("P"), {}), ("GIF", rgb.convert("P"), film() | {"interlace": 1}),
        ("BMP", rgb, {}), ("BMP", rgb.convert("P"), {}), ("BMP", rgb.convert("1"), {}),
        ("TIFF", rgb, {"exif": exif}), ("TIFF", grey16, {}), ("TIFF", rgb.convert("F"), {}), ("TIFF", rgb, film()),
        *(("TIFF", rgb, {"compression": c}) for c in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
        ("TIFF", rgb.convert("1"), {"compression": "group4"}), ("TIFF", rgb, {"big_tiff": True}),
        ("AVIF", rgb, {"exif": exif}), ("AVIF", rgb.convert("RGBA"), {}), ("AVIF", rgb, film()),
        ("PPM", rgb, {}), ("PPM", rgb.convert("L"), {}), ("PPM", rgb.convert("1"), {}), ("PPM", rgb.convert("F"), {}),
        ("HEIF", rgb, {}), *((other, rgb, {}) for other in ("DDS", "ICO", "TGA", "PCX", "SGI", "EPS", "QOI")),
    ]  # fmt: skip
    for format, image, options in forms:
        if format in Image.SAVE:
            file = io.BytesIO()
            image.copy().save(file, format, **options)
            yield f"{format} {' '.join(sorted(options))}".strip(), file.getvalue()
    yield "PPM plain", b"P3\n3 2\n255\n" + b" ".join(b"%d" % i for i in range(18)) + b"\n"
    yield "PPM plain grey", b"P2 # a comment\n3 2 900\n" + b" ".join(b"%d" % (150 * i) for i in range(6))


def broken_avif() -> bytes:
    """Its header is whole, and where its pixels were to come are zeros: Pillow raises RuntimeError."""
    file = io.BytesIO()
    Image.fromarray(synth_image(64, 48, 1)).save(file, "AVIF")
    data = file.getvalue()
    start = data.find(b"mdat") + 4
    return data[:start] + bytes(len(data) - start)


def mutated(data: bytes, other: bytes, r: random.Random) -> bytes:
    """1 to 4 changes; half of them in the first 200 bytes, where headers are."""
    for _ in range(r.choice((1, 1, 2, 4))):
        i = r.randrange(min(len(data), 200) if r.random() < 0.5 else len(data)) if data else 0
        n = r.choice((1, 2, 4, 16, 300))
        data = r.choice((
            lambda d=data, i=i, n=n: d[:i] + r.randbytes(n) + d[i + n :],
            lambda d=data, i=i: d[:i] + (extreme := r.choice(EXTREMES)) + d[i + len(extreme) :],
            lambda d=data, i=i: d[:i] + bytes([d[i] ^ 1 << r.randrange(8)]) + d[i + 1 :] if d else d,
            lambda d=data, i=i, n=n: d[:i] + d[i + n :],
            lambda d=data, i=i, n=n: d[: i + n] + d[i:],
            lambda d=data, i=i, n=n: d[:i] + bytes(n) + d[i + n :],
            lambda d=data, i=i: d[:i],
            lambda d=data, i=i: d[:i] + other[i:],
        ))()  # fmt: skip
    return data


def uses(r: random.Random) -> dict[str, Callable[[bytes], object]]:
    """Everything that opens an image, by what it is."""
    turn, fast, num_crops = r.random() < 0.5, r.random() < 0.5, r.choice((1, 4))

    def library(data: bytes) -> None:
        image = images.open_image(data)
        images.image_size(image, exif_transpose=turn)
        images.image_crops(image, num_crops, 56, fast_decode=fast, exif_transpose=turn)

    def opened_by_the_caller(data: bytes) -> None:
        try:
            image = Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN])
            image.draft("L", (20, 20)) if fast else image.seek(r.randrange(2))
        except Exception:
            return  # his own affair
        images.to_rgb(images.open_image(image), exif_transpose=turn)

    return {"library": library, "page": lambda data: thumbnail(data, 64), "caller": opened_by_the_caller}


def fuzz(
    count: int, seed: int = 0, first: int = 0, each: Callable[[int, Found], object] = lambda i, found: None
) -> Found:
    """Runs images number `first` to `first + count - 1`."""
    files, found = list(originals()), Found()
    with patch.object(images, "MAX_PIXELS", PIXELS), patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", False):
        for i in range(first, first + count):
            r = random.Random(f"{seed} {i}")
            name, data = files[i % len(files)]
            data = mutated(data, r.choice(files)[1], r)
            peak = peak_megabytes()
            for what, use in uses(r).items():
                start = time.perf_counter()
                try:
                    shown = use(data)
                    found.outcomes[f"{what}: {'placeholder' if getattr(shown, 'missing', '') else 'read'}"] += 1
                except InputError:
                    found.outcomes[f"{what}: InputError"] += 1
                except Exception as e:
                    found.failures.append(f"number {i} ({name}), {what}: {type(e).__name__}: {e}")
                found.slowest = max(found.slowest, (time.perf_counter() - start, i, f"{name}, {what}"))
                if time.perf_counter() - start > SECONDS:
                    found.failures.append(f"number {i} ({name}), {what}: {time.perf_counter() - start:.1f} s")
            if peak_megabytes() > max(peak, found.before + MEGABYTES):
                found.failures.append(f"number {i} ({name}): {peak_megabytes():,} MB")
            each(i, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    found = fuzz(args.count, args.seed, args.first, lambda i, f: i % 1000 or print(i, len(f.failures), flush=True))
    print(found)
    raise SystemExit(bool(found.failures))


if __name__ == "__main__":
    main()
