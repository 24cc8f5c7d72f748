"""Decodes images in processes of their own, which are killed where an image takes too long or crashes them.

Whatever a decoder does, the server goes on: texts never wait for images, and a stop does not either.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from ..errors import InputError
from ..processor import Processor
from .options import Limits

START_SECONDS = 60.0  # Python and Pillow are loaded in some tenths of a second, but the machine may be busy
BASE_MEMORY = 1 << 30  # bytes of addresses that a decoder has beside its image
BYTES_PER_PIXEL = 32  # of an image that is decoded, converted and resized, in whatever format


class DecodingPool:
    """Decoder processes, started when they are first needed.

    Args:
        processor: whose crops are made.
        limits: pixels of an image, and seconds for it.
        workers: processes at most.
    """

    def __init__(self, processor: Processor, limits: Limits, workers: int):
        self.timeout = limits.decode_timeout
        self._crop_size = processor.crop_size
        self._settings = {
            "max_pixels": limits.max_image_pixels,
            "crop_size": processor.crop_size,
            "fast_decode": processor.fast_decode,
            "exif_transpose": processor.exif_transpose,
            "memory_bytes": BASE_MEMORY + BYTES_PER_PIXEL * limits.max_image_pixels,
        }
        self._free = asyncio.Semaphore(workers)
        self._pixels = PixelBudget(2 * limits.max_image_pixels)
        self._idle: list[Decoder] = []
        self._all: set[Decoder] = set()
        self._exchanges: set[asyncio.Task] = set()

    async def start(self) -> None:
        """Starts the first process, so that the first image need not wait for it."""
        self._idle.append(await self._started())

    async def stop(self) -> None:
        """Kills all processes; what they decode is lost."""
        for exchange in self._exchanges:
            exchange.cancel()
        for decoder in list(self._all):
            await self._end(decoder)

    async def size(self, data: bytes, name: str) -> tuple[int, int]:
        """Width and height of an image file. Raises InputError."""
        answer, _ = await self._ask({"want": "size"}, data, name)
        width, height = answer["size"]
        return int(width), int(height)

    async def crops(self, data: bytes, name: str, num_crops: int, pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Crops [h * w, S, S, 3] uint8 of an image of so many pixels, and their grid (h, w). Raises InputError."""
        async with self._pixels.take(pixels):
            answer, raw = await self._ask({"want": "crops", "num_crops": num_crops}, data, name)
        h, w = answer["grid"]
        size = self._crop_size
        return np.frombuffer(bytearray(raw), np.uint8).reshape(h * w, size, size, 3), (h, w)

    async def _ask(self, request: dict[str, Any], data: bytes, name: str) -> tuple[dict[str, Any], bytes]:
        await self._free.acquire()
        # A caller that goes away leaves the exchange to its end: a decoder in the middle of one is of no use.
        exchange = asyncio.ensure_future(self._exchange(request, data, name))
        self._exchanges.add(exchange)
        exchange.add_done_callback(self._exchanged)
        return await asyncio.shield(exchange)

    def _exchanged(self, exchange: asyncio.Task) -> None:
        self._exchanges.discard(exchange)
        self._free.release()
        if not exchange.cancelled():
            exchange.exception()  # read here, since the caller may be gone

    async def _exchange(self, request: dict[str, Any], data: bytes, name: str) -> tuple[dict[str, Any], bytes]:
        decoder = self._idle.pop() if self._idle else await self._started()
        try:
            answer, raw = await asyncio.wait_for(decoder.ask(request, data), self.timeout)
        except asyncio.TimeoutError:
            await self._end(decoder)
            raise InputError(f"the image was not decoded within {self.timeout:g} s", name=name) from None
        except (EOFError, OSError, ValueError):
            await self._end(decoder)
            raise InputError("the image cannot be decoded: its decoder crashed", name=name) from None
        except BaseException:
            await self._end(decoder)
            raise
        self._idle.append(decoder)
        if "error" in answer:
            raise InputError(str(answer["error"]), name=name)
        return answer, raw

    async def _started(self) -> "Decoder":
        decoder = await Decoder.started(self._settings)
        self._all.add(decoder)
        return decoder

    async def _end(self, decoder: "Decoder") -> None:
        self._all.discard(decoder)
        await decoder.kill()


class Decoder:
    """One process of decoder_process.py."""

    def __init__(self, process: asyncio.subprocess.Process):
        assert process.stdin is not None and process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout

    @classmethod
    async def started(cls, settings: dict[str, Any]) -> "Decoder":
        """A process that is ready for images. Raises OSError."""
        command = [sys.executable, "-m", "minivlm2vec.serve.decoder_process", json.dumps(settings)]
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # libraries write a line for every damaged tag of an image
            env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OPENBLAS_NUM_THREADS": "1"},
            limit=1 << 20,
        )
        decoder = cls(process)
        try:
            await asyncio.wait_for(decoder._read(), START_SECONDS)
        except BaseException as e:
            await decoder.kill()
            if isinstance(e, (EOFError, ValueError, asyncio.TimeoutError)):
                raise OSError("the process that decodes images does not start") from e
            raise
        return decoder

    async def ask(self, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """The answer, and the bytes that follow it. Raises EOFError, OSError or ValueError where there is none."""
        self._stdin.write(json.dumps(request | {"length": len(data)}).encode() + b"\n")
        self._stdin.write(data)
        await self._stdin.drain()
        answer = await self._read()
        return answer, await self._stdout.readexactly(int(answer["length"]))

    async def _read(self) -> dict[str, Any]:
        line = await self._stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    async def kill(self) -> None:
        """Ends the process, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._stdin.close()
        await self._process.wait()


class PixelBudget:
    """Lets images be decoded that have together at most so many pixels; first come, first served."""

    def __init__(self, most: int):
        self._left = most
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def take(self, pixels: int) -> AsyncIterator[None]:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((pixels, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._left += pixels
            self._admit()

    def _admit(self) -> None:
        while self._waiting and (self._waiting[0][1].cancelled() or self._waiting[0][0] <= self._left):
            pixels, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._left -= pixels
                turn.set_result(None)
