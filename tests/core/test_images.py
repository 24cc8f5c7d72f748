"""HD crops: sizes, pixels, and every kind of image that a user may bring."""

import base64
import io
import struct
import zlib
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlm2vec.batch import num_image_tokens
from minivlm2vec.errors import InputError
from minivlm2vec.images import WHITE, hd_crops, hd_size, image_name, open_image, read_data_uri, to_rgb
from minivlm2vec.serve.inputs import ImageSource
from tests.support.golden import synth_image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width=64, height=48, seed=0) -> Image.Image:
    return Image.fromarray(synth_image(width, height, seed))


def original_hd_transform(image: Image.Image, num_crops: int, crop_size: int) -> np.ndarray:
    """The canvas [H, W, 3], made the original's way: portraits are transposed, resized, padded, transposed back."""
    turned = image.width < image.height
    if turned:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    size = hd_size(*image.size, num_crops, crop_size)
    pixels = np.asarray(image.resize((size.width, size.height), Image.Resampling.BILINEAR))
    rows = -(-size.height // crop_size) * crop_size
    top = int((rows - size.height) / 2)
    canvas = np.full((rows, size.width, 3), WHITE, np.uint8)
    canvas[top : top + size.height] = pixels
    return canvas.swapaxes(0, 1) if turned else canvas


def canvas_of(crops: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    h, w = grid
    S = crops.shape[1]
    return crops.reshape(h, w, S, S, 3).swapaxes(1, 2).reshape(h * S, w * S, 3)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), num_crops=st.integers(1, 16), seed=st.integers(0, 99))
def test_crops_are_the_originals_to_the_bit(width, height, num_crops, seed):
    assume(max(width / height, height / width) <= 56)
    image = photo(width, height, seed)
    crops, grid = hd_crops(image, num_crops, 56)
    assert crops.dtype == np.uint8 and crops.shape == (grid[0] * grid[1], 56, 56, 3)
    np.testing.assert_array_equal(canvas_of(crops, grid), original_hd_transform(image, num_crops, 56))


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 30_000), height=st.integers(1, 30_000), num_crops=st.integers(1, 40))
def test_sizes_keep_their_promises(width, height, num_crops):
    try:
        size = hd_size(width, height, num_crops)
    except ValueError as e:
        assert max(width / height, height / width) > 336, str(e)
        return
    h, w = size.grid
    assert 1 <= h * w <= num_crops
    assert 0 < size.width <= w * 336 and 0 < size.height <= h * 336
    assert w * 336 - size.width < 336 and h * 336 - size.height < 336  # no crop is white alone
    assert 0 <= size.left <= w * 336 - size.width and 0 <= size.top <= h * 336 - size.height
    turned = hd_size(height, width, num_crops)
    if width != height:
        assert (turned.width, turned.height, turned.left, turned.top) == (size.height, size.width, size.top, size.left)
    assert num_image_tokens(size.grid, 12) == (h * w + 1) * 144 + 1 + (h + 1) * 12


def test_num_crops_must_be_positive():
    with pytest.raises(ValueError, match="num_crops is 0"):
        hd_size(10, 10, 0)


@pytest.mark.parametrize("shape", [(20_000, 10), (10, 20_000)])
def test_too_thin_names_the_ratio(shape):
    with pytest.raises(ValueError, match=rf"{shape[0]} x {shape[1]} pixels.* 2000 times .* at most 1344"):
        hd_size(*shape, 4)


def test_one_pixel_is_enlarged():
    crops, grid = hd_crops(Image.new("RGB", (1, 1), (7, 8, 9)), 4)
    assert grid == (2, 2) and (crops == np.array([7, 8, 9], np.uint8)).all()


SOURCES = {
    "path": lambda image, tmp: _saved(image, tmp / "a b ü.png"),
    "str path": lambda image, tmp: str(_saved(image, tmp / "x.png")),
    "bytes": lambda image, tmp: encoded(image, "PNG"),
    "bytearray": lambda image, tmp: bytearray(encoded(image, "PNG")),
    "pil": lambda image, tmp: image,
    "numpy": lambda image, tmp: np.asarray(image),
    "data uri": lambda image, tmp: "data:image/png;base64," + base64.b64encode(encoded(image, "PNG")).decode(),
}


def _saved(image, path):
    image.save(path)
    return path


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_pixels(kind, tmp_path):
    image = photo()
    opened = to_rgb(open_image(SOURCES[kind](image, tmp_path)))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(image))


def test_modes_are_converted_as_the_original_converts_them():
    rgb = photo()
    alpha = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1)))
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    assert np.array_equal(to_rgb(open_image(encoded(rgba, "PNG"))), rgb), "alpha is dropped, hidden colours show"
    for mode in ("L", "LA", "1", "P", "CMYK", "YCbCr", "HSV"):
        image = rgb.convert("L").convert(mode) if mode in ("LA", "1") else rgb.convert(mode)
        assert np.array_equal(to_rgb(image), image.convert("RGB")), mode
    palette = rgb.convert("P")
    palette.info["transparency"] = 0
    assert np.array_equal(to_rgb(open_image(encoded(palette, "PNG"))), palette.convert("RGB"))


def test_exif_orientation_is_ignored_unless_asked_for():
    image = photo(24, 14)
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(image, "PNG", exif=exif)
    assert to_rgb(open_image(data)).size == (24, 14)
    turned = to_rgb(open_image(data), exif_transpose=True)
    assert turned.size == (14, 24)
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


def test_sixteen_bits_are_scaled_not_clipped():
    grey = (np.arange(64 * 48).reshape(48, 64) * 21).astype(np.uint16)
    image = to_rgb(open_image(encoded(Image.fromarray(grey), "PNG")))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], (grey.astype(int) + 128) // 257)


def test_an_animation_gives_its_first_frame():
    frames = [photo(seed=s).convert("P") for s in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(np.asarray(to_rgb(open_image(data))), np.asarray(frames[0].convert("RGB")))


BROKEN = {
    "zero bytes": (b"", "zero bytes"),
    "no image": (b"hello, world", "not an image"),
    "missing file": ("/no/such/file.png", "no such file"),
    "a folder": ("/", "is a folder"),
    "data uri without base64": ("data:image/png", "data URI"),
    "damaged base64": ("data:image/png;base64,$$$", "base64"),
    "float array": (np.zeros((4, 4, 3)), "float64"),
    "flat array": (np.zeros((4, 4), np.uint8), r"\[4, 4\]"),
    "empty array": (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
    "bare base64": ("A" * 3_000_000, r"^A{32}…: no path has 3,000,000 characters; data:image/…;base64, is missing"),
    "a number": (7, "int"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_opened_says_why(kind):
    source, message = BROKEN[kind]
    with pytest.raises(InputError, match=message) as e:
        open_image(source)
    assert e.value.name in str(e.value)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(InputError, match=r"empty\.jpg: the file is empty \(zero bytes\)"):
        open_image(tmp_path / "empty.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_data(kind):
    data = encoded(photo(200, 200), kind)
    with pytest.raises(InputError, match=r"truncated|decoded|opened|not an image"):
        to_rgb(open_image(data[: len(data) // 2]))


def test_decompression_bomb(monkeypatch):
    from minivlm2vec import images

    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(InputError, match=r"64 x 48 = 3,072 pixels are more than the 1,000"):
        open_image(encoded(photo(), "PNG"))


def test_a_real_bomb_is_refused_by_its_header():
    """20,000 x 20,000 pixels in a few hundred kilobytes: nothing is decoded."""
    header = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(InputError, match=r"bomb|pixels"):
        open_image(header)


def test_data_uri():
    data = encoded(photo(20, 10), "PNG")
    assert read_data_uri("data:image/png;base64," + base64.b64encode(data).decode()) == data
    assert read_data_uri("data:image/png;charset=utf-8;base64,AAAA") == b"\0\0\0"


@pytest.mark.parametrize("length", [1, 2, 3, 57, 58, 1000])
def test_spellings_of_base64(length):
    data = bytes(range(256)) * 4
    data = (b"\xfb\xef\xff" + data)[:length]  # "++//" or "--__"
    standard, url_safe = base64.b64encode(data), base64.urlsafe_b64encode(data)
    wrapped = base64.encodebytes(data)
    for body in (standard, url_safe, wrapped, wrapped.replace(b"\n", b"\r\n"), b" " + wrapped + b"\t"):
        for spelled in (body, body.replace(b"=", b"")):
            assert read_data_uri("data:image/png;base64," + spelled.decode()) == data
            assert read_data_uri("Data:;BASE64," + spelled.decode()) == data
            assert read_data_uri("data:;base64," + quote(spelled.decode(), safe="")) == data
    assert read_data_uri("data:application/octet-stream," + quote(data)) == data


def test_a_data_uri_in_any_case_is_one_wherever_an_image_is_given():
    data = encoded(photo(20, 10), "PNG")
    for uri in ("DATA:image/png;base64," + base64.b64encode(data).decode(), "Data:image/png," + quote(data)):
        assert np.array_equal(to_rgb(open_image(uri)), photo(20, 10))
        assert not ImageSource("image", uri).is_remote
        assert len(image_name(uri)) == 33


@pytest.mark.parametrize("uri", ["data:", "data:image/png", "data:image/png;base64", "data:;base64,@@@@",
                                 "data:;base64,AAAAA", "data:;base64,AA==AA==", "data:;base64,ÄAAA"])  # fmt: skip
def test_bad_data_uri(uri):
    with pytest.raises(InputError, match=r"^here: ") as e:
        read_data_uri(uri, name="here")
    assert e.value.name == "here"


def test_a_caller_sets_the_most_pixels():
    data = encoded(Image.new("1", (6000, 6000)), "PNG")  # 36 M pixels in some KB
    assert len(data) < 10_000
    assert open_image(data, max_pixels=36_000_000).size == (6000, 6000)
    with pytest.raises(InputError, match=r"36,000,000 pixels are more than the 35,999,999 allowed$"):
        open_image(data, max_pixels=35_999_999)
    with pytest.raises(InputError, match="decompression bomb"):
        open_image(png_header(2**31 - 1, 2**31 - 1), max_pixels=1000)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and ends where its pixels would begin."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def test_one_lazy_image_in_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    data = encoded(photo(640, 480), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)))
    for _ in range(5):
        lazy = Image.open(io.BytesIO(data))
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda _, im=lazy: np.asarray(to_rgb(im)), range(8)):
                np.testing.assert_array_equal(got, expected)
