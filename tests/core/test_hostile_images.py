"""Images that are damaged, or made to cost time, memory or more."""

import io
import os
import struct
import subprocess
import sys
import threading
import time
import types
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from minivlm2vec import images
from minivlm2vec.errors import InputError
from minivlm2vec.html import thumbnail
from minivlm2vec.image_files import FORMATS, MAX_COMMENTS, MAX_PIECES, MAX_SCANS, suffixes
from minivlm2vec.images import PixelBudget, image_crops, image_size, open_image, to_rgb
from minivlm2vec.rows import Images
from tests.support.fuzz_images import fuzz, originals
from tests.support.golden import synth_image


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photo(width=64, height=48, seed=0) -> Image.Image:
    return Image.fromarray(synth_image(width, height, seed))


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pytest undoes the filter of images.py


# Whatever Pillow raises


ERRORS = [RuntimeError("Failed to decode"), NotImplementedError("Unimplemented pixel format"), AttributeError("seek"),
          AssertionError(), MemoryError(), KeyError(7), IndexError("out"), struct.error("unpack"), EOFError(),
          SyntaxError("broken"), RecursionError("deep"), OverflowError("large"), zlib.error("-3")]  # fmt: skip
STAGES = {"open": (PngImagePlugin.PngImageFile, "_open"), "load": (ImageFile.ImageFile, "load"),
          "convert": (Image.Image, "convert"), "resize": (Image.Image, "resize"),
          "transpose": (Image.Image, "transpose"), "thumbnail": (Image.Image, "thumbnail")}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_whatever_pillow_raises_is_the_images(error, stage, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / "x.png"
    path.write_bytes(encoded(photo().convert("L"), "PNG", exif=exif))
    monkeypatch.setattr(*STAGES[stage], fail)
    if stage != "resize":
        assert thumbnail(path, 30).missing
    if stage != "thumbnail":
        with pytest.raises(InputError, match=r"x\.png: ") as e:
            image_crops(open_image(path), 4, 56, name=str(path), exif_transpose=True)
        assert e.value.name == str(path) and e.value.reason.strip()


def test_an_image_that_was_closed_before(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(photo(), "PNG"))
    with Image.open(tmp_path / "x.png") as image:
        pass
    with pytest.raises(InputError, match="it was closed before"):
        open_image(image)
    file = io.BytesIO(encoded(photo(), "JPEG"))
    image = Image.open(file)
    file.close()
    with pytest.raises(InputError, match="it was closed before"):
        open_image(image)
    with Image.open(tmp_path / "x.png") as image:
        image.load()
    np.testing.assert_array_equal(to_rgb(open_image(image)), photo())


def test_damaged_images_of_every_format():
    """A slice of `python -m tests.support.fuzz_images`."""
    found = fuzz(1500, seed=11)
    assert not found.failures, found.failures
    assert {name.split()[0] for name, _ in originals()} >= {f for f in FORMATS if f in Image.SAVE}
    assert found.outcomes["library: read"] > 150 < found.outcomes["library: InputError"]


# One list of formats


CLOSED = ["EPS", "DDS", "ICO", "TGA", "PCX", "SGI", "QOI", "JPEG2000", "ICNS", "BLP", "MSP"]
HEADS = {"FITS": b"SIMPLE  =                    T", "FLI": b"\0\1\0\0\x11\xaf\1\0\x10\0\x10\0\x08\0\3\0",
         "PSD": b"8BPS\0\1",
         "WMF": b"\xd7\xcd\xc6\x9a\0\0"}  # fmt: skip


def closed_files():
    for format in CLOSED:
        Image.init()
        if format in Image.SAVE:
            mode = {"MSP": "1", "BLP": "P"}.get(format, "RGB")
            yield format, encoded(photo(64, 64).convert(mode), format)
    yield from ((format, head.ljust(64, b"\0")) for format, head in HEADS.items())


@pytest.mark.parametrize(("format", "data"), [*closed_files()], ids=lambda x: x if isinstance(x, str) else "")
def test_other_formats_are_closed_by_name(format, data, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)  # Ghostscript
    begins = "CUR" if format == "TGA" else format  # it has no signature
    named = rf"not an image in a known format \(it begins as {begins}\);"
    (tmp_path / "a.png").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    for read in (
        lambda: open_image(data),
        lambda: open_image(tmp_path / "a.png"),
        lambda: Images(tmp_path).check("a.png", thoroughly=True),
        lambda: Images(tmp_path / "images.zip").check("a.png", thoroughly=True),
    ):
        with pytest.raises(InputError, match=f"{named}.* JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, PPM, HEIF are read"):
            read()
    assert f"begins as {begins}" in thumbnail(data, 30).missing


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "HEIF"])
def test_the_accepted_formats_are_read_whatever_their_name(format, tmp_path):
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {format}")
    for name in ("a.png", "b.jpg", "c"):
        (tmp_path / name).write_bytes(encoded(photo(), format))
        assert to_rgb(open_image(tmp_path / name)).size == (64, 48)


def heic(*brands: bytes) -> bytes:
    box = b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
    return struct.pack(">I", len(box) + 4) + box + b"\0\0\0\x08mdat"


HEICS = [heic(b"heic", b"mif1", b"heic"), heic(b"mif1", b"miaf", b"heix"), heic(b"hevc"), heic(b"msf1", b"hevc")]


@pytest.mark.parametrize("data", HEICS)
def test_heic_says_what_reads_it(data, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "x.jpg").write_bytes(data)
    for source in (data, tmp_path / "x.jpg"):
        with pytest.raises(InputError, match=r"pillow-heif.*pip install 'minivlm2vec\[heif\]'"):
            open_image(source)


@pytest.mark.parametrize("data", HEICS)
def test_heic_is_read_where_pillow_heif_is_installed(data, monkeypatch):
    """With a stand-in that gives a red picture for every HEIC."""

    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode = (20, 10), "RGB"

        def load(self):
            return Image.Image.load(Image.new("RGB", self.size, "red"))

        def convert(self, *args):
            return Image.new("RGB", self.size, "red")

    Image.init()
    for name in ("OPEN", "ID"):
        monkeypatch.setattr(Image, name, getattr(Image, name).copy())
    fake = types.SimpleNamespace(
        register_heif_opener=lambda thumbnails: Image.register_open("HEIF", Heif, lambda prefix: prefix[4:8] == b"ftyp")
    )
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    image = open_image(data)
    assert image.format == "HEIF" and image.size == (20, 10)


def test_the_names_of_files_follow_the_formats_that_can_be_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert suffixes() == {s for format, names in FORMATS.items() for s in names if format != "HEIF"} >= {"jpg", "avif"}
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(__spec__=1))
    assert suffixes() >= {"heic", "heif", "jpg"}


def test_heic_with_the_real_pillow_heif():
    heif = pytest.importorskip("pillow_heif", reason="needs the extra `heif`")
    heif.register_heif_opener()
    image = to_rgb(open_image(encoded(Image.new("RGB", (64, 48), "red"), "HEIF")))
    assert image.size == (64, 48) and image.getpixel((9, 9))[0] > 250


def test_an_accepted_format_with_a_broken_header_is_named():
    with pytest.raises(InputError, match="begins as PNG, but has no valid header"):
        open_image(b"\x89PNG\r\n\x1a\n" + bytes(60))
    with pytest.raises(InputError, match="the TIFF has no directory"):
        open_image(b"II*\0\xff\xff\0\0")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", "/dev/zero"):
        with pytest.raises(InputError, match="is a pipe or device, not an image"):
            open_image(path)


# The price, before it is paid


def many_scans(scans: int) -> bytes:
    data = encoded(Image.new("L", (640, 640), 128), "JPEG", progressive=True, quality=50)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + data[-2:]


def test_a_jpeg_of_many_scans():
    assert to_rgb(open_image(many_scans(MAX_SCANS))).size == (640, 640)
    for fast_decode in (False, True):
        with pytest.raises(InputError, match=r"the JPEG has 101 scans; at most 100 are decoded"):
            image_crops(open_image(many_scans(MAX_SCANS + 1)), 1, 56, fast_decode=fast_decode)
    assert "101 scans" in thumbnail(many_scans(MAX_SCANS + 1), 64).missing
    with pytest.raises(InputError, match="101 scans"):
        to_rgb(open_image(Image.open(io.BytesIO(many_scans(MAX_SCANS + 1)))))


def test_what_only_looks_like_scans_is_read():
    """In a film behind the picture (phones write them), in a segment of its own."""
    data = encoded(photo(), "JPEG", progressive=True)
    segment = b"\xff\xe5" + struct.pack(">H", 602) + b"\xff\xda\0" * 200
    for harmless in (data + b"\xff\xda\0\x08" * 5000, data[:2] + segment + data[2:]):
        np.testing.assert_array_equal(to_rgb(open_image(harmless)), to_rgb(open_image(data)))


def tiff(side: int, tile: int = 1, *, big: bool = False, order: str = "<", strips: bool = False) -> bytes:
    """Uncompressed greyscale, all of whose pieces are the same bytes."""
    n = side if strips else (side // tile) ** 2
    offset, count = ("Q", "Q") if big else ("I", "H")
    width = struct.calcsize(order + offset)
    pieces = [(273, n, 8), (278, 1, 1), (279, n, side)] if strips else [(322, 1, tile), (323, 1, tile), (324, n, 8),
              (325, n, tile * tile)]  # fmt: skip
    entries = [(256, 1, side), (257, 1, side), (258, 1, 8), (259, 1, 1), (262, 1, 1), (277, 1, 1), *pieces]
    entries.sort()
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    head += struct.pack(order + "HHQ", 8, 0, 16) if big else struct.pack(order + "I", 8)
    start = len(head) + struct.calcsize(order + count) + len(entries) * (20 if big else 12) + width
    table, rest = struct.pack(order + count, len(entries)), b""
    for tag, number, value in entries:
        values = struct.pack(order + "I", value) * number
        place = values.ljust(width, b"\0") if len(values) <= width else struct.pack(order + offset, start + len(rest))
        rest += values if len(values) > width else b""
        table += struct.pack(order + "HH" + offset, tag, 4, number) + place
    return head + table + bytes(width) + rest + bytes(tile * tile)


@pytest.mark.parametrize("form", [{}, {"big": True}, {"order": ">"}, {"big": True, "order": ">"}])
def test_a_tiff_of_tiny_tiles(form):
    if form != {"big": True, "order": ">"}:  # Pillow itself does not read these
        assert to_rgb(open_image(tiff(64, 16, **form))).size == (64, 64)
    start = time.process_time()
    with pytest.raises(InputError, match=f"the TIFF is cut into 360,000 pieces; at most {MAX_PIECES:,} are read"):
        open_image(tiff(600, **form))
    assert time.process_time() - start < 1  # Pillow alone takes some seconds for it
    with pytest.raises(InputError, match="cut into 70,000 pieces"):
        open_image(tiff(70_000, strips=True, **form))


def test_a_tiff_of_a_huge_tile():
    """Of a small image: it would take 1.6 GB."""
    plain = tiff(64, 64)
    assert to_rgb(open_image(plain)).size == (64, 64)
    huge = plain.replace(struct.pack("<HHII", 322, 4, 1, 64), struct.pack("<HHII", 322, 4, 1, 40_000))
    huge = huge.replace(struct.pack("<HHII", 323, 4, 1, 64), struct.pack("<HHII", 323, 4, 1, 40_000))
    with pytest.raises(InputError, match="tiles have 40000 x 40000 pixels, the image 64 x 64"):
        open_image(huge)


def test_a_ppm_of_comments():
    for kind in (b"P2", b"P3"):
        with pytest.raises(InputError, match=f"2,000 comments; at most {MAX_COMMENTS:,}"):
            to_rgb(open_image(kind + b" 2 2 255\n" + b"#\n" * 2000 + b"0 " * 12))
    assert to_rgb(open_image(b"P5 64 64 255\n" + b"#" * 4096)).size == (64, 64)


def test_pixels_that_are_decoded_at_a_time_are_bounded():
    budget, now, most = PixelBudget(10), [], 0

    def use(pixels: int) -> None:
        nonlocal most
        with budget.take(pixels):
            now.append(pixels)
            most = max(most, sum(now))
            time.sleep(0.001)
            now.remove(pixels)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, [1, 3, 7, 2, 5, 10, 4] * 20))
        assert 7 <= most <= 10
        pool.submit(use, 25).result(timeout=30)  # more than there is: alone
    assert budget._left == 10


def test_the_first_frame_is_all_that_is_decoded(monkeypatch):
    frames = [photo(40, 30, seed) for seed in range(60)]
    for format in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        if format not in Image.SAVE:
            continue
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        monkeypatch.setattr(ImageFile.ImageFile, "seek", None)
        first = to_rgb(open_image(data))
        monkeypatch.undo()
        np.testing.assert_array_equal(first, to_rgb(Image.open(io.BytesIO(data))), err_msg=format)


# Callers' own images


def test_a_callers_image_keeps_no_pixels(tmp_path):
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        path = tmp_path / f"x.{format}"
        path.write_bytes(encoded(photo(), format))
        lazy = Image.open(path)
        got = to_rgb(open_image(lazy))
        assert images._is_undecoded(lazy), format
        np.testing.assert_array_equal(got, lazy.convert("RGB"), err_msg=format)
        assert open_image(lazy) is lazy and not images._is_undecoded(lazy)


def test_what_a_caller_did_to_his_image_counts():
    jpeg = Image.open(io.BytesIO(encoded(photo(640, 480), "JPEG")))
    jpeg.draft("L", (80, 60))
    assert to_rgb(open_image(jpeg)).size == (80, 60)
    gif = Image.open(io.BytesIO(encoded(photo(), "GIF", save_all=True, append_images=[photo(seed=1)])))
    gif.seek(1)
    second = to_rgb(open_image(gif))
    assert not np.array_equal(second, to_rgb(open_image(encoded(photo(), "GIF"))))
    np.testing.assert_array_equal(second, gif.convert("RGB"))
    changed = Image.open(io.BytesIO(encoded(photo(), "PNG")))
    changed.putpixel((0, 0), (1, 2, 3))
    assert to_rgb(open_image(changed)).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("kind", ["files", "images of the caller"])
def test_two_images_are_decoded_at_a_time(kind, monkeypatch):
    """Both are in their decoders at once; with a lock around them the first would wait in vain for the other."""
    meeting, load = threading.Barrier(2), ImageFile.ImageFile.load

    def loading(self):
        if self.tile:
            meeting.wait(timeout=30)
        return load(self)

    data = [encoded(photo(seed=n), "PNG") for n in range(2)]
    sources = data if kind == "files" else [Image.open(io.BytesIO(d)) for d in data]
    monkeypatch.setattr(ImageFile.ImageFile, "load", loading)
    with ThreadPoolExecutor(2) as pool:
        for n, image in enumerate(pool.map(lambda source: to_rgb(open_image(source)), sources)):
            np.testing.assert_array_equal(image, photo(seed=n))


# Values, orientation, words


GREY = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_eight_bits_in_a_wider_image_stay_as_they_are(dtype):
    """As the original has them."""
    wide = Image.fromarray(GREY.astype(dtype))
    assert wide.mode in ("I", "I;16")
    for image in (wide, open_image(encoded(wide, "TIFF" if dtype == np.int32 else "PNG"))):
        np.testing.assert_array_equal(to_rgb(image), Image.fromarray(GREY).convert("RGB"))
    assert (np.asarray(to_rgb(Image.fromarray(-GREY.astype(np.int32)))) == 0).all()
    scaled = np.asarray(to_rgb(Image.fromarray(GREY.astype(dtype) * 257)))
    np.testing.assert_array_equal(scaled, Image.fromarray(GREY).convert("RGB"))


@pytest.mark.parametrize("kind", ["TIFF", "PIL"])
def test_float_greyscale_is_read_by_its_range(kind):
    grey = GREY.astype(np.float32)
    for floats, expected in ((grey / 255, GREY), (grey, GREY), (grey + 0.9, GREY), (grey / 252, GREY / 252 * 255),
                             (grey * 0, GREY * 0), (np.minimum(grey, 16), np.minimum(GREY, 16))):  # fmt: skip
        image = Image.fromarray(floats)
        image = open_image(encoded(image, "TIFF")) if kind == "TIFF" else image
        assert image.mode == "F"
        expected = Image.fromarray(np.floor(expected + 0.5).astype(np.uint8))
        np.testing.assert_array_equal(to_rgb(image), expected.convert("RGB"))


UNSCALED = {
    "65536": np.array([[0, 1 << 16]], np.int32),
    "2040000000": GREY.astype(np.int32) * 8_000_000 + 24_000_000,
    "-2147483648": np.array([[1 << 31, 9]], np.uint32).view(np.int32),  # as Pillow reads unsigned ones
    "65535": GREY.astype(np.float32) * 257 + 771,
    "1.02": GREY.astype(np.float32) / 252 * 1.02,
    "255.5": GREY.astype(np.float32) + 3.5,
    "-0.5": np.array([[-0.5, 1]], np.float32),
    "nan": np.array([[np.nan, 7]], np.float32),
    "inf": np.array([[np.inf, 7]], np.float32),
    "-inf": np.array([[-np.inf, 7]], np.float32),
}


@pytest.mark.parametrize("number", UNSCALED)
def test_greyscale_that_cannot_be_scaled_is_refused_with_its_range(number):
    image = Image.fromarray(UNSCALED[number])
    for one in (image, open_image(encoded(image, "TIFF"))):
        with pytest.raises(InputError, match=rf"^here: .*from .*(?<![\d.-]){number}\b"):
            to_rgb(one, name="here")


def exif(*tags: bytes, head: bytes = b"II*\0\x08\0\0\0") -> bytes:
    return head + struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)


TURNED = struct.pack("<HHIHH", 274, 3, 1, 6, 0)
MALFORMED = {
    "a rational without a divisor": exif(TURNED, struct.pack("<HHII", 282, 10, 1, 38)) + struct.pack("<ii", -1, 0),
    "a width in words": exif(struct.pack("<HHI4s", 0x100, 2, 4, b"640"), TURNED),
    "a value that is not there": exif(TURNED, struct.pack("<HHII", 315, 2, 1000, 1 << 30)),
    "an unknown type": exif(struct.pack("<HHII", 271, 77, 1, 0), TURNED),
    "a wrong count": exif(struct.pack("<HHII", 256, 3, 9, 8), TURNED),
    "3,000 bad tags": exif(TURNED, *(struct.pack("<HHII", 40_000 + n, 2, 999, 1 << 30) for n in range(3000))),
}
UNREADABLE = {
    "no header": b"XX*\0" + bytes(30),
    "far away": b"II*\0\xff\xff\xff\x7f",
    "a list": exif(struct.pack("<HHII", 274, 3, 3, 26)) + bytes(9),
    "empty": b"",
    "number 99": exif(struct.pack("<HHIHH", 274, 3, 1, 99, 0)),
}


def with_exif(format: str, data: bytes) -> bytes:
    """As an encoder would write it, which looks at nothing."""
    return encoded(photo(60, 40), format, exif=b"Exif\0\0" + data)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_exif_does_not_hide_the_orientation(format, kind):
    data = with_exif(format, MALFORMED[kind])
    upright = to_rgb(open_image(data), exif_transpose=True)
    assert image_size(open_image(data), exif_transpose=True) == upright.size == (40, 60)
    np.testing.assert_array_equal(upright, to_rgb(open_image(data)).transpose(Image.Transpose.ROTATE_270))
    assert thumbnail(data, 30).uri


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_without_a_readable_orientation_an_image_is_upright(format, kind):
    data = with_exif(format, UNREADABLE[kind])
    assert image_size(open_image(data), exif_transpose=True) == (60, 40)
    assert to_rgb(open_image(data), exif_transpose=True).size == (60, 40)
    assert thumbnail(data, 30).uri


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_in_every_place(orientation):
    tag, plain = Image.Exif(), photo(60, 40)
    tag[274] = orientation
    method = images._TURNS.get(orientation)
    upright = np.asarray(plain.transpose(method) if method is not None else plain)
    png = encoded(plain, "PNG")
    chunk = b"eXIf" + tag.tobytes()[6:]
    late = png[:-12] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[-12:]
    files = [encoded(plain, "PNG", exif=tag), late, encoded(plain, "TIFF", exif=tag),
             encoded(plain, "WEBP", exif=tag, lossless=True)]  # fmt: skip
    for data in files:
        opened = open_image(data)
        size = image_size(opened, exif_transpose=True)
        assert images._is_undecoded(opened)
        got = to_rgb(opened, exif_transpose=True)
        assert got.size == size
        np.testing.assert_array_equal(got, upright)
        lazy = Image.open(io.BytesIO(data))
        np.testing.assert_array_equal(to_rgb(open_image(lazy), exif_transpose=True), upright)


def test_a_damaged_png_is_an_input_error_where_exif_is_asked_for():
    data = encoded(photo(300, 300), "PNG")[:-500]
    assert image_size(open_image(data), exif_transpose=True) == (300, 300)
    with pytest.raises(InputError):
        to_rgb(open_image(data), exif_transpose=True)


def test_bad_tags_write_no_log(tmp_path):
    plain = encoded(photo(), "TIFF")
    (start,) = struct.unpack("<I", plain[4:8])
    (count,) = struct.unpack("<H", plain[start : start + 2])
    bad = b"".join(struct.pack("<HHII", 40_000 + n, 2, 100_000, (1 << 29) + n) for n in range(3000))
    table = struct.pack("<H", count + 3000) + plain[start + 2 : start + 2 + 12 * count] + bad + bytes(4)
    (tmp_path / "x.tiff").write_bytes(plain[:4] + struct.pack("<I", len(plain)) + plain[8:] + table)
    (tmp_path / "x.jpg").write_bytes(with_exif("JPEG", MALFORMED["3,000 bad tags"]))
    code = (
        "import sys; from minivlm2vec.images import *; from minivlm2vec.html import thumbnail\n"
        "for path in sys.argv[1:]: image_size(open_image(path), exif_transpose=True), thumbnail(path, 30)\n"
        "for path in sys.argv[1:]: to_rgb(open_image(path), exif_transpose=True)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""
