"""A request's way through the server, without HTTP.

EmbeddingRequest -> inputs -> images fetched and measured -> Planned -> admitted -> Loaded -> Batcher -> vectors
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from ..embedder import Embedder, truncated
from ..errors import InputError
from ..images import read_data_uri
from ..processor import Loaded, Planned
from .batching import Batcher, Launch, ModelError, RequestJobs, launcher
from .decoding import DecodingPool
from .errors import APIError, bad_request
from .inputs import IdsInput, ImageSource, Input, PartsInput, RequestReader, TextInput
from .limiter import RequestLimiter
from .metrics import Metrics
from .options import ServeOptions
from .planning import Planner
from .remote import ImageFetcher
from .schema import EmbeddingRequest

T = TypeVar("T")

INLINE_CHARACTERS = 4096  # texts up to here are tokenised in the event loop: a thread would cost more
FETCHES = 8  # remote images of a request that are fetched at a time


class EmbeddingService:
    """Embeds requests.

    Args:
        embedder: the model; from `start` on it belongs to the batcher's thread.
        options: see `ServeOptions`.
        launch: computes loaded inputs; default the embedder does.
        fetcher: fetches remote images; default from the hosts that the options name.
    """

    def __init__(
        self,
        embedder: Embedder,
        options: ServeOptions | None = None,
        *,
        launch: Launch | None = None,
        fetcher: ImageFetcher | None = None,
    ):
        self.embedder = embedder
        self.options = options = options or ServeOptions()
        self.limits, batching = options.limits, options.batching
        self.names = options.names or (embedder.name,)
        # An input fits into one batch and into the model; the queue holds sixteen batches.
        most = min(batching.batch_tokens, embedder.model.config.decoder.max_position_embeddings)
        self.max_input_tokens = min(self.limits.max_input_tokens or most, most)
        self.queue_tokens = self.limits.queue_tokens or 16 * batching.batch_tokens
        self.tokenizer = embedder.processor.tokenizer.content_hash()
        trained = embedder.model.config.trained.dims
        self.reader = RequestReader(self.names, self.tokenizer, embedder.dimension, options, trained)
        self.planner = Planner(embedder.processor, self.max_input_tokens, self.queue_tokens)
        self.decoders = DecodingPool(embedder.processor, self.limits, embedder.num_workers)
        self.fetcher = fetcher or ImageFetcher(options.remote_images)
        self.metrics = Metrics(embedder.device)
        self.batcher = Batcher(
            launch or launcher(embedder),
            batch_tokens=batching.batch_tokens,
            max_batch_inputs=batching.max_batch_inputs,
            max_wait=batching.max_wait,
            observer=self.metrics,
        )
        self.metrics.watch_queue(lambda: self.batcher.waiting)
        self.limiter = RequestLimiter(self.limits, self.queue_tokens, lambda: self.batcher.rate)
        self.metrics.watch_requests(lambda: self.limiter.requests)
        self._texts = ThreadPoolExecutor(embedder.num_workers, thread_name_prefix="minivlm2vec-texts")

    async def start(self) -> None:
        """Starts the model's thread and embeds a text and an image, so that no caller waits for first-time costs."""
        self.batcher.start()
        await self.decoders.start()
        embedder = self.embedder
        items = [embedder.load(embedder.plan(x)) for x in ("warm-up", Image.new("RGB", (336, 336)))]
        for _ in range(2):
            with self.batcher.request() as jobs:
                await asyncio.gather(*jobs.submit(items))
        self.batcher.probe = items[0]

    async def stop(self) -> None:
        """Finishes what waits."""
        await self.batcher.stop()
        await self.decoders.stop()
        self.fetcher.stop()
        self._texts.shutdown(cancel_futures=True)

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Runs what would hold up the event loop: reading, tokenising and writing large texts."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, function, *args)

    async def embed(self, request: EmbeddingRequest) -> tuple[np.ndarray, int]:
        """Vectors float32 [B, D] of a request, and how many tokens it has. Raises APIError."""
        inputs = self.reader.inputs(request)
        num_crops = self.reader.num_crops(request)
        size = self.reader.vector_size(request)
        vectors, tokens = await self.embed_inputs(inputs, request.truncate_prompt_tokens, num_crops)
        if size < vectors.shape[1]:
            vectors = truncated(torch.from_numpy(vectors), size).numpy()
        return vectors, tokens

    async def embed_inputs(
        self, inputs: list[Input], truncate: int | None, num_crops: int | None
    ) -> tuple[np.ndarray, int]:
        """Vectors float32 [B, D] of the inputs of a request, and how many tokens they have. Raises APIError.

        truncate: as truncate_prompt_tokens of the request. num_crops: the most crops of an image; None: the model's."""
        with self.batcher.request() as jobs:
            try:
                inputs = await self._measure(await self._fetch(inputs))
                plans = await self._plan(inputs, truncate, num_crops)
                tokens = sum(map(len, plans))
                with self.limiter.admit(tokens, self._pixels(inputs)):
                    vectors = np.stack(await self._run(jobs, plans))
            except InputError as e:
                raise bad_request(str(e), e.name, "invalid_image") from None
            except ModelError as e:
                raise self._model_failed(e) from None
        return vectors, tokens

    async def _fetch(self, inputs: list[Input]) -> list[Input]:
        """Puts the bytes of remote images beside their URLs; together no more than a body may have."""
        window, total = asyncio.Semaphore(FETCHES), 0

        async def fetch(image: ImageSource) -> ImageSource:
            nonlocal total
            if not image.is_remote:
                return image
            async with window:
                data = await self.fetcher.fetch(image.url, image.name)
            total += len(data)
            if total > self.limits.max_body_bytes:
                raise APIError(413, f"the images are together larger than {self.limits.max_body_bytes:,} bytes")
            return replace(image, data=data)

        return await _each_image(inputs, fetch)

    async def _measure(self, inputs: list[Input]) -> list[Input]:
        """Puts bytes and size beside every image, without decoding it. Raises InputError."""
        window = asyncio.Semaphore(self.embedder.num_workers)

        async def measure(image: ImageSource) -> ImageSource:
            async with window:
                data = image.data if image.is_remote else await self.in_thread(_read_data_uri, image)
                size = await self.decoders.size(data, image.name)
            return ImageSource(image.name, "", data, size)

        return await _each_image(inputs, measure)

    def _pixels(self, inputs: list[Input]) -> int:
        """Pixels of all images of a request. Raises APIError 400."""
        pixels = sum(image.pixels for image in _images(inputs))
        most = self.limits.max_request_pixels
        if pixels > most:
            message = f"the images have together {pixels:,} pixels; this server takes {most:,} in a request"
            raise bad_request(message, code="too_many_pixels")
        return pixels

    async def _plan(self, inputs: list[Input], truncate: int | None, num_crops: int | None) -> list[Planned]:
        if sum(map(_inline_cost, inputs)) <= INLINE_CHARACTERS:
            return self.planner.plan(inputs, truncate, num_crops)
        return await self.in_thread(self.planner.plan, inputs, truncate, num_crops)

    async def _run(self, jobs: RequestJobs, plans: list[Planned]) -> list[np.ndarray]:
        """A vector for each. Texts are submitted at once, images as they are decoded, a few of a request at a time."""
        if not any(plan.sources for plan in plans):
            return await _gather(jobs.submit([Loaded(plan) for plan in plans]))
        window, left = asyncio.Semaphore(self.embedder.num_workers), len(plans)

        async def run(plan: Planned) -> np.ndarray:
            nonlocal left
            async with window if plan.sources else nullcontext():
                loaded = await self._load(plan)
            left -= 1
            return await jobs.submit([loaded], last=left == 0)[0]

        return await _gather(map(run, plans))

    async def _load(self, plan: Planned) -> Loaded:
        """Decodes the images and lets go of their files."""
        crops = []
        for source, grid in zip(plan.sources, plan.grids, strict=True):
            pixels, got = await self.decoders.crops(source.data, source.name, plan.num_crops, source.pixels)
            if got != grid:
                raise InputError(f"the image changed while it was read: grid {grid}, then {got}", name=source.name)
            crops.append(pixels)
        return Loaded(replace(plan, sources=(), names=()), crops)

    def _model_failed(self, e: ModelError) -> APIError:
        if self.batcher.broken:
            return APIError(503, f"the model has failed and the server must be started again: {e}", code="model_failed")
        return APIError(
            500, f"the model could not embed an input: {e}", code="model_error", headers={"x-should-retry": "false"}
        )


async def _gather(awaitables: Iterable[Awaitable[T]]) -> list[T]:
    """All results; where one fails or the caller is cancelled, the others are cancelled."""
    futures = [asyncio.ensure_future(x) for x in awaitables]
    try:
        return await asyncio.gather(*futures)
    finally:
        for future in futures:
            future.cancel()


def _images(inputs: Iterable[Input]) -> list[ImageSource]:
    return [image for x in inputs if isinstance(x, PartsInput) for image in x.images]


async def _each_image(inputs: list[Input], change: Callable[[ImageSource], Awaitable[ImageSource]]) -> list[Input]:
    """The inputs, with what `change` makes of every image; texts cost nothing."""
    changed = iter(await _gather(map(change, _images(inputs))))
    return [
        replace(x, parts=[part if isinstance(part, str) else next(changed) for part in x.parts])
        if isinstance(x, PartsInput)
        else x
        for x in inputs
    ]


def _read_data_uri(source: ImageSource) -> bytes:
    try:
        return read_data_uri(source.url, name=source.name)
    except InputError as e:
        raise bad_request(str(e), source.name, "invalid_image_url") from None


def _inline_cost(x: Input) -> int:
    """Characters to tokenise; an input with images is never planned in the event loop."""
    if isinstance(x, TextInput):
        return len(x.text)
    if isinstance(x, IdsInput):
        return len(x.ids)
    return sum(len(part) if isinstance(part, str) else INLINE_CHARACTERS + 1 for part in x.parts)
