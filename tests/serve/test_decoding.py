"""Images that are made to cost time and memory: decoded in processes that are limited and can be killed."""

import asyncio
import base64
import io
import os
import signal
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from PIL import Image

from minivlm2vec import InputError
from minivlm2vec.images import image_crops, open_image
from minivlm2vec.serve import Limits, ServeOptions, create_app, decoding
from minivlm2vec.serve.decoding import DecodingPool, PixelBudget
from tests.support.serving import call, data_uri, picture, running, user, wait_for


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def part(data: bytes, kind: str) -> dict:
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}


def webp(side: int) -> bytes:
    """Some tens of bytes for any number of pixels."""
    data = encoded(Image.new("RGBA", (side, side)), "WEBP", lossless=True, method=0)
    assert len(data) < 200
    return data


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan repeats: every scan costs the time of the whole image."""
    data = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True, quality=50)
    scan = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + scan * scans + data[-2:]


def tiny_tiles(side: int) -> bytes:
    """A TIFF of tiles of 1 x 1 pixels, which costs its time when it is opened."""
    n = side * side

    def short(value: int) -> bytes:
        return struct.pack("<H", value)

    def long(value: int) -> bytes:
        return struct.pack("<I", value)

    entries = [(256, 4, 1, long(side)), (257, 4, 1, long(side)), (258, 3, 1, short(8)), (259, 3, 1, short(1)),
               (262, 3, 1, short(1)), (277, 3, 1, short(1)), (322, 4, 1, long(1)), (323, 4, 1, long(1)),
               (324, 4, n, long(8) * n), (325, 4, n, long(1) * n)]  # fmt: skip
    head, rest = b"II*\0" + long(8) + short(len(entries)), b""
    start = len(head) + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        place = value.ljust(4, b"\0") if len(value) <= 4 else long(start + len(rest))
        head += struct.pack("<HHI", tag, kind, count) + place
        rest += value if len(value) > 4 else b""
    return head + long(0) + rest


@pytest.fixture
def stalls(monkeypatch):
    """A decoder does not come back from a file that ends in the name of what is wanted, as if its library looped."""
    ask = decoding.Decoder.ask

    async def stalling(self, request, data):
        if data.endswith(request["want"].encode()):
            os.kill(self._process.pid, signal.SIGSTOP)
        return await ask(self, request, data)

    monkeypatch.setattr(decoding.Decoder, "ask", stalling)


def stalling(width: int, height: int, want: str = "crops") -> bytes:
    return encoded(Image.new("L", (width, height)), "PNG") + want.encode()


# The pool


@asynccontextmanager
async def pool(embedder, workers: int = 2, **limits):
    decoders = DecodingPool(embedder.processor, Limits(**limits), workers)
    try:
        yield decoders
    finally:
        await decoders.stop()
        assert not decoders._all


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_the_crops_are_those_of_the_library(embedder, format):
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {format}")
    data, size = encoded(picture(200, 130), format), embedder.processor.crop_size
    expected, grid = image_crops(open_image(data), 4, size)

    async def body():
        async with pool(embedder) as decoders:
            assert await decoders.size(data, "p") == (200, 130)
            crops, got = await decoders.crops(data, "p", 4, 200 * 130)
            np.testing.assert_array_equal(crops, expected)
            assert got == grid and crops.flags.writeable

    asyncio.run(body())


def test_many_callers_share_a_few_processes(embedder):
    images = [encoded(picture(50 + n, 40), "PNG") for n in range(40)]

    async def body():
        async with pool(embedder) as decoders:
            sizes = await asyncio.gather(*(decoders.size(data, "p") for data in images))
            assert sizes == [(50 + n, 40) for n in range(40)]
            assert len(decoders._all) <= 2

    asyncio.run(body())


DAMAGED = {
    "nothing": (b"", "zero bytes"),
    "no image": (b"hello", "not an image in a known format"),
    "a format that is not accepted": (encoded(Image.new("L", (9, 9)), "EPS"), "it begins as EPS"),
    "tiny tiles": (tiny_tiles(700), "490,000 pieces; at most 65,536"),
    "too large": (webp(2001), "4,004,001 pixels are more than the 4,000,000 allowed"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_cannot_be_opened_says_why(embedder, kind):
    data, message = DAMAGED[kind]

    async def body():
        async with pool(embedder, max_image_pixels=4_000_000) as decoders:
            with pytest.raises(InputError, match=f"^here: .*{message}"):
                await decoders.size(data, "here")
            assert await decoders.size(webp(20), "here") == (20, 20)
            assert len(decoders._all) == 1  # the same process goes on

    asyncio.run(body())


def test_any_error_of_pillow_is_the_images(embedder):
    """One wrong byte of an AVIF raises RuntimeError, which is none of what Pillow documents."""
    data = bytearray(encoded(picture(64, 64), "AVIF"))
    data[data.find(b"pitm")] ^= 0x3F

    async def body():
        async with pool(embedder) as decoders:
            with pytest.raises(InputError, match=r"^here: "):
                await decoders.size(bytes(data), "here")
                await decoders.crops(bytes(data), "here", 4, 64 * 64)
            assert await decoders.size(webp(20), "here") == (20, 20)

    asyncio.run(body())


def test_scans_are_counted_before_they_are_decoded(embedder):
    async def body():
        async with pool(embedder) as decoders:
            assert await decoders.size(many_scans(3000, 1000), "here") == (3000, 3000)
            with pytest.raises(InputError, match=r"^here: .*the JPEG has 1,0\d\d scans; at most 100 are decoded"):
                await decoders.crops(many_scans(3000, 1000), "here", 4, 9_000_000)

    asyncio.run(body())


@pytest.mark.parametrize("want", ["size", "crops"])
def test_a_decoder_that_takes_too_long_is_killed(embedder, stalls, want):
    data = stalling(30, 30, want)

    async def body():
        async with pool(embedder, decode_timeout=3.0) as decoders:
            with pytest.raises(InputError, match=r"^here: the image was not decoded within 3 s"):
                await (decoders.size(data, "here") if want == "size" else decoders.crops(data, "here", 4, 900))
            assert not decoders._all
            assert await decoders.size(webp(20), "here") == (20, 20)

    asyncio.run(body())


def test_a_decoder_that_crashes_is_replaced(embedder, stalls):
    async def body():
        async with pool(embedder, workers=1) as decoders:
            await decoders.start()
            crops = asyncio.ensure_future(decoders.crops(stalling(30, 30), "here", 4, 900))
            await asyncio.sleep(0.2)
            (decoder,) = decoders._all
            os.kill(decoder._process.pid, signal.SIGSEGV)
            os.kill(decoder._process.pid, signal.SIGCONT)
            with pytest.raises(InputError, match=r"^here: .*its decoder crashed"):
                await crops
            assert await decoders.size(webp(20), "here") == (20, 20)

    asyncio.run(body())


def test_a_decoders_memory_is_limited(embedder, monkeypatch):
    """A decoder may use what its image can need, and no more."""
    monkeypatch.setattr(decoding, "BASE_MEMORY", 700 << 20)
    monkeypatch.setattr(decoding, "BYTES_PER_PIXEL", 0)

    async def body():
        async with pool(embedder) as decoders:
            assert (await decoders.crops(webp(2000), "here", 4, 4_000_000))[0].shape[0] == 4
            with pytest.raises(InputError, match=r"^here: the image cannot be"):
                await decoders.crops(webp(8000), "here", 4, 64_000_000)

    asyncio.run(body())


def test_the_largest_image_fits_into_the_memory_of_a_decoder(embedder):
    async def body():
        async with pool(embedder, max_image_pixels=16_000_000) as decoders:
            for data in (webp(4000), encoded(Image.new("CMYK", (4000, 4000)), "TIFF", compression="tiff_lzw")):
                assert (await decoders.crops(data, "here", 4, 16_000_000))[1] == (2, 2)

    asyncio.run(body())


def test_a_caller_that_goes_away_leaves_the_pool_working(embedder, stalls):
    slow, quick = stalling(2000, 2000), webp(20)

    async def body():
        async with pool(embedder, workers=1, decode_timeout=5) as decoders:
            calls = [asyncio.ensure_future(decoders.crops(slow, "here", 4, 4_000_000)) for _ in range(20)]
            await asyncio.sleep(0.3)
            for gone in calls:
                gone.cancel()
            assert await asyncio.wait_for(decoders.size(quick, "here"), 60) == (20, 20)
            assert decoders._pixels._left == 2 * 64_000_000 and not decoders._pixels._waiting

    asyncio.run(body())


def test_a_stop_does_not_wait_for_decoders(embedder, stalls):
    async def body():
        async with pool(embedder, decode_timeout=60) as decoders:
            await decoders.start()
            call = asyncio.ensure_future(decoders.crops(stalling(30, 30), "here", 4, 900))
            await asyncio.sleep(0.2)
            await asyncio.wait_for(decoders.stop(), 30)  # decoding takes a minute
            with pytest.raises((asyncio.CancelledError, InputError)):
                await call

    asyncio.run(body())


def test_pixels_that_are_decoded_at_a_time_are_bounded():
    most, now = 0, 0

    async def use(budget, pixels):
        nonlocal most, now
        async with budget.take(pixels):
            now += pixels
            most = max(most, now)
            await asyncio.sleep(0.001)
            now -= pixels

    async def body():
        budget = PixelBudget(10)
        uses = [asyncio.ensure_future(use(budget, n % 7 + 1)) for n in range(60)]
        await asyncio.sleep(0.005)
        for gone in uses[20::3]:
            gone.cancel()
        await asyncio.gather(*uses, return_exceptions=True)
        assert most <= 10 and budget._left == 10

    asyncio.run(body())
    assert most >= 7


def test_decoders_import_no_torch():
    code = "import sys, minivlm2vec.serve.decoder_process; assert not {'torch', 'fastapi'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


# The server


def test_a_request_and_the_server_have_limits_of_pixels(embedder):
    limits = Limits(max_image_pixels=1_000_000, max_request_pixels=2_500_000)
    with running(create_app(embedder, ServeOptions(limits=limits))) as server:
        two, three = ([user(part(webp(1000), "webp"))] * n for n in (2, 3))
        assert call(server.url, body={"messages": two}).status == 200
        answer = call(server.url, body={"messages": three})
        assert (answer.status, answer.error["code"]) == (400, "too_many_pixels")
        assert "3,000,000 pixels" in answer.error["message"]


def test_pixels_in_flight_are_bounded(embedder):
    limits = Limits(queue_pixels=10_000_000)
    slow = {"messages": user(part(many_scans(3000, 60), "jpeg"))}
    with running(create_app(embedder, ServeOptions(limits=limits))) as server, ThreadPoolExecutor(1) as clients:
        limiter = server.server.app.state.service.limiter
        first = clients.submit(call, server.url, body=slow)
        wait_for(lambda: limiter.pixels == 9_000_000)
        answer = call(server.url, body={"messages": user(part(webp(1100), "webp"))})
        assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
        assert call(server.url, body={"messages": user(picture(60, 60))}).status == 200
        assert first.result().status == 200
        wait_for(lambda: limiter.pixels == 0)


def test_texts_never_wait_for_images(embedder, stalls):
    """All decoders are busy; texts are answered, alone and beside an image that waits."""
    slow = {"messages": [user(part(stalling(3000, 3000), "png")), user("t")]}
    busy = embedder.num_workers
    limits = Limits(decode_timeout=8.0)
    with running(create_app(embedder, ServeOptions(limits=limits))) as server, ThreadPoolExecutor(busy) as clients:
        answers = [clients.submit(call, server.url, body=slow) for _ in range(busy)]
        service = server.server.app.state.service
        wait_for(lambda: service.limiter.pixels == 9_000_000 * busy)
        for text in ("a", ["word " * 500] * 3):  # the second is tokenised in a thread
            assert call(server.url, body={"input": text}).status == 200
        assert not any(a.done() for a in answers)
        server.server.should_exit = True  # the end of the server waits for no more than the deadline
        assert {a.result().status for a in answers} == {400}


def test_nothing_is_left_of_a_server(embedder):
    with running(create_app(embedder)) as server:
        assert call(server.url, body={"messages": user(picture(60, 60))}).status == 200
        processes = [d._process.pid for d in server.server.app.state.service.decoders._all]
    assert processes
    for pid in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not [t for t in threading.enumerate() if t.name.startswith("minivlm2vec")]


def test_data_uris_of_every_format_still_answer(embedder):
    with running(create_app(embedder)) as server:
        for format in ("JPEG", "PNG", "WEBP"):
            uri = {"type": "image_url", "image_url": {"url": data_uri(picture(60, 60), format)}}
            assert call(server.url, body={"messages": user(uri)}).status == 200
