"""A request's way through the server, without HTTP.

EmbeddingRequest -> items (text | ids | parts) -> remote images fetched -> Planned -> admitted -> Loaded -> Batcher
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ..embedder import Embedder
from ..errors import InputError
from ..processor import Loaded, Planned
from .batching import Batcher, ModelError, Turn, launcher
from .errors import APIError, bad_request, busy
from .images import RemoteImages, decode_data_uri, open_image
from .metrics import Metrics
from .planning import plan_ids, plan_parts, plan_text
from .schema import EmbeddingRequest, ImagePart, Message, TextPart

INLINE_CHARACTERS = 4096  # texts up to here are tokenised in the event loop: a thread would cost more


@dataclass(frozen=True)
class Limits:
    """What a server takes. None: see `for_embedder`.

    Fields:
        max_inputs: in one request.
        max_input_tokens: of one input, image tokens included.
        queue_tokens: while so many are in the house, requests get a 429; one request has at most so many.
        max_requests: in the house; beyond it 429.
        max_body_bytes: of one request.
        max_image_pixels: width times height.
        max_num_crops: what mm_processor_kwargs.num_crops may ask for.
        request_timeout: seconds.
    """

    max_inputs: int = 2048
    max_input_tokens: int | None = None
    queue_tokens: int | None = None
    max_requests: int = 512
    max_body_bytes: int = 32 << 20
    max_image_pixels: int = 64_000_000
    max_num_crops: int = 16
    request_timeout: float = 60.0

    def for_embedder(self, embedder: Embedder, batch_tokens: int) -> "Limits":
        """Fills in what depends on the model: an input fits into one pack, the queue holds sixteen."""
        most = min(batch_tokens, embedder.model.config.decoder.max_position_embeddings)
        return replace(
            self,
            max_input_tokens=min(self.max_input_tokens or most, most),
            queue_tokens=self.queue_tokens or 16 * batch_tokens,
        )


@dataclass(frozen=True)
class ImageSource:
    """An image of a caller: where it stands in the request, and its URL or, once fetched, its bytes."""

    name: str
    url: str
    data: bytes | None = None


@dataclass(frozen=True)
class Item:
    """One input of a caller: where it stands in the request, and what it is."""

    name: str
    content: str | list[int] | list[str | ImageSource]


class Service:
    """Embeds requests.

    Args:
        embedder: the model; from `start` on it belongs to the batcher's thread.
        names: what the model is called; the first one is the default.
        limits: what is taken.
        remote: fetches http(s) images; with an empty allow-list none.
        matryoshka: sizes that `dimensions` may ask for beside the full one.
        batching: arguments of `Batcher`.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        names: Sequence[str] = (),
        limits: Limits | None = None,
        remote: RemoteImages | None = None,
        matryoshka: Sequence[int] = (),
        metrics: Metrics | None = None,
        launch: Callable | None = None,
        batch_tokens: int = 16384,
        **batching,
    ):
        self.embedder = embedder
        self.names = tuple(names) or (embedder.name,)
        self.limits = (limits or Limits()).for_embedder(embedder, batch_tokens)
        self.remote = remote or RemoteImages()
        self.matryoshka = frozenset(matryoshka) | {embedder.dimension}
        self.metrics = metrics or Metrics(embedder.device)
        self.tokenizer = embedder.processor.tokenizer.content_hash()
        vocabulary = embedder.processor.tokenizer.tokenizer.get_vocab()
        self.max_characters = max(map(len, vocabulary)) * self.limits.max_input_tokens
        self.batcher = Batcher(
            launch or launcher(embedder), batch_tokens=batch_tokens, observer=self.metrics, **batching
        )
        self.metrics.watch_queue(lambda: self.batcher.waiting)
        self.admitted_tokens = 0
        self._pool = ThreadPoolExecutor(embedder.num_workers, thread_name_prefix="minivlm2vec-images")

    async def start(self) -> None:
        """Starts the model's thread and embeds a text and an image, so that no caller waits for first-time costs."""
        self.batcher.start()
        embedder = self.embedder
        items = [embedder.load(embedder.plan(x)) for x in ("warm-up", Image.new("RGB", (336, 336)))]
        for _ in range(2):
            with self.batcher.request() as turn:
                await asyncio.gather(*turn.submit(items))
        self.batcher.probe = items[0]

    async def stop(self) -> None:
        """Finishes what waits."""
        await self.batcher.stop()
        self._pool.shutdown(cancel_futures=True)

    @property
    def delay(self) -> float:
        """Seconds that what is in the house will take."""
        return self.admitted_tokens / self.batcher.rate

    def check_room(self) -> None:
        """Raises APIError 429 where the queue is full, or so long that an answer would come too late."""
        if self.admitted_tokens >= self.limits.queue_tokens or self.delay > self.limits.request_timeout:
            raise busy(f"{self.admitted_tokens:,} tokens wait already; try again later", self.delay)

    async def embed(self, request: EmbeddingRequest) -> tuple[np.ndarray, int]:
        """Vectors float32 [B, D] of a request, and how many tokens it has. Raises APIError."""
        items = self._items(request)
        num_crops = self._num_crops(request)
        dimensions = self._dimensions(request)
        with self.batcher.request() as turn:
            items = await self._fetch(items)
            plans = await self._plan(items, request.truncate_prompt_tokens, num_crops)
            tokens = sum(map(len, plans))
            with self._admit(tokens):
                try:
                    vectors = np.stack(await self._run(turn, plans))
                except InputError as e:
                    raise bad_request(str(e), e.name, "invalid_image") from None
                except ModelError as e:
                    raise self._failure(e) from None
        if dimensions < vectors.shape[1]:
            vectors = vectors[:, :dimensions] / np.linalg.norm(vectors[:, :dimensions], axis=1, keepdims=True)
        return vectors, tokens

    # What is asked for

    def model_name(self, name: str | None) -> str:
        """The name to answer with. Raises APIError 404 for a model that is not here."""
        if name is None or name in self.names:
            return name or self.names[0]
        known = ", ".join(self.names)
        raise APIError(404, f"that model is not served here; there is {known}", param="model", code="model_not_found")

    def _items(self, request: EmbeddingRequest) -> list[Item]:
        if request.messages is not None:
            if request.input:
                raise bad_request("both `input` and `messages` are given; use one", "messages")
            return self._conversations("messages", request.messages)
        if request.input is None:
            raise bad_request("`input` or `messages` is missing", "input", "missing_required_parameter")
        values = request.input
        if isinstance(values, str):
            return [self._text("input", values)]
        if not values:
            raise bad_request("input is an empty list", "input")
        if isinstance(values[0], str):
            return [self._text(f"input[{i}]", text) for i, text in enumerate(self._count(values))]
        if isinstance(values[0], int):
            return [self._ids("input", values, request.tokenizer)]
        if isinstance(values[0][0] if isinstance(values[0], list) else values[0], int):
            return [self._ids(f"input[{i}]", ids, request.tokenizer) for i, ids in enumerate(self._count(values))]
        return self._conversations("input", values)

    def _count(self, values: Sequence) -> Sequence:
        if len(values) > self.limits.max_inputs:
            raise bad_request(
                f"{len(values)} inputs are more than the {self.limits.max_inputs} of one request", "input"
            )
        return values

    def _text(self, name: str, text: str) -> Item:
        if not text:
            raise bad_request(f"{name} is an empty string", name)
        return Item(name, text)

    def _ids(self, name: str, ids: list[int], tokenizer: str | None) -> Item:
        if tokenizer != self.tokenizer and tokenizer not in self.names:
            raise bad_request(
                f"{name} holds token ids. Another tokenizer's ids would give wrong vectors silently, so send strings "
                "(in LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False)), or, for ids of this model's own "
                f"tokenizer, add the field \"tokenizer\": \"{self.tokenizer}\"", name, "token_ids_not_accepted"
            )  # fmt: skip
        return Item(name, ids)

    def _conversations(self, name: str, value: list) -> list[Item]:
        if isinstance(value[0], Message):
            return [self._message(f"{name}[0]", value[0])]
        return [self._message(f"{name}[{i}][0]", messages[0]) for i, messages in enumerate(self._count(value))]

    def _message(self, name: str, message: Message) -> Item:
        if isinstance(message.content, str):
            return self._text(f"{name}.content", message.content)
        parts = [self._part(f"{name}.content[{i}]", part) for i, part in enumerate(message.content)]
        if not any(parts):
            raise bad_request(f"{name}.content has neither text nor image", f"{name}.content")
        return Item(f"{name}.content", parts)

    def _part(self, name: str, part: TextPart | ImagePart) -> str | ImageSource:
        if isinstance(part, TextPart):
            return part.text
        name, url = f"{name}.image_url", part.image_url.url
        if url.startswith("data:"):
            return ImageSource(name, url)
        if not url.lower().startswith(("http://", "https://")):
            raise bad_request(f"{name}: an image is a data URI or an http(s) URL", name, "invalid_image_url")
        if not self.remote.allow:
            raise bad_request(
                f"{name}: this server fetches no remote images; send a data URI", name, "remote_images_not_allowed"
            )
        return ImageSource(name, url)

    def _num_crops(self, request: EmbeddingRequest) -> int | None:
        asked = request.mm_processor_kwargs and request.mm_processor_kwargs.num_crops
        if asked and asked > self.limits.max_num_crops:
            name = "mm_processor_kwargs.num_crops"
            raise bad_request(f"{name} is {asked}; this server takes at most {self.limits.max_num_crops}", name)
        return asked

    def _dimensions(self, request: EmbeddingRequest) -> int:
        size = request.dimensions or self.embedder.dimension
        if size not in self.matryoshka:
            raise bad_request(
                f"dimensions is {size}, but the model's vectors have {self.embedder.dimension} and it was not trained "
                f"to have them cut (Matryoshka); sizes that are served: {sorted(self.matryoshka)}", "dimensions"
            )  # fmt: skip
        return size

    # Doing it

    async def _fetch(self, items: list[Item]) -> list[Item]:
        """Remote images' bytes in the place of their URLs; together no more than a body may have."""
        window, total = asyncio.Semaphore(8), 0

        async def fetch(source: str | ImageSource) -> str | ImageSource:
            nonlocal total
            if not isinstance(source, ImageSource) or source.url.startswith("data:"):
                return source
            async with window:
                data = await self.remote.fetch(source.url, source.name)
            total += len(data)
            if total > self.limits.max_body_bytes:
                raise APIError(413, f"the images are together larger than {self.limits.max_body_bytes:,} bytes")
            return replace(source, data=data)

        if not any(_is_remote(item) for item in items):
            return items
        contents = await _gather([_gather([fetch(s) for s in x.content]) for x in items if _is_remote(x)])
        fetched = iter(contents)
        return [Item(x.name, next(fetched)) if _is_remote(x) else x for x in items]

    async def _plan(self, items: list[Item], truncate: int | None, num_crops: int | None) -> list[Planned]:
        if all(isinstance(x.content, str) for x in items) and _characters(items) <= INLINE_CHARACTERS:
            return self._plan_all(items, truncate, num_crops)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._plan_all, items, truncate, num_crops)

    def _plan_all(self, items: list[Item], truncate: int | None, num_crops: int | None) -> list[Planned]:
        plans, total = [], 0
        for item in items:
            plans.append(self._plan_one(item, truncate, num_crops))
            total += len(plans[-1])
            if total > self.limits.queue_tokens:
                raise bad_request(f"the request has more than the {self.limits.queue_tokens:,} tokens that this server "
                                  "takes at once; send several requests", "input", "too_many_tokens")  # fmt: skip
        return plans

    def _plan_one(self, item: Item, truncate: int | None, num_crops: int | None) -> Planned:
        limit = self.limits.max_input_tokens
        if truncate == 0:
            raise bad_request("truncate_prompt_tokens is -1 or at least 1", "truncate_prompt_tokens")
        max_length = None if truncate is None else limit if truncate == -1 else min(truncate, limit)
        try:
            planned = self._planned(item, max_length, num_crops)
        except InputError as e:
            name = e.name if e.name.startswith(item.name) else item.name
            raise bad_request(f"{name}: {e.reason}", name) from None
        if len(planned) > limit:
            raise self._too_long(item.name, f"{len(planned)} tokens are more than the {limit} that this server takes")
        return planned

    def _planned(self, item: Item, max_length: int | None, num_crops: int | None) -> Planned:
        processor, content = self.embedder.processor, item.content
        if isinstance(content, str):
            return plan_text(processor, self._bounded(item.name, content, max_length), max_length)
        if isinstance(content[0], int):
            return plan_ids(processor, content, max_length)
        parts = [self._opened(p) if isinstance(p, ImageSource) else p for p in content]
        if all(isinstance(p, str) for p in parts):
            return plan_text(processor, self._bounded(item.name, " ".join(parts), max_length), max_length)
        for part in parts:
            if isinstance(part, str):
                self._bounded(item.name, part, None)
        return plan_parts(processor, parts, num_crops=num_crops)

    def _bounded(self, name: str, text: str, max_length: int | None) -> str:
        """The text, or what of it can matter, so that nobody makes the tokenizer read megabytes: `max_characters`
        characters are more tokens than an input may have, however long the tokens are."""
        if len(text) <= self.max_characters:
            return text
        if max_length is None:
            raise self._too_long(name, f"{len(text):,} characters are more than the {self.max_characters:,} that this "
                                       "server reads")  # fmt: skip
        return text[: self.max_characters]

    @staticmethod
    def _too_long(name: str, message: str) -> APIError:
        return bad_request(f"{name}: {message}; truncate_prompt_tokens cuts a text", name, "context_length_exceeded")

    def _opened(self, source: ImageSource) -> Image.Image:
        data = decode_data_uri(source.url, source.name) if source.data is None else source.data
        try:
            return open_image(data, source.name, max_pixels=self.limits.max_image_pixels)
        except InputError as e:
            raise bad_request(str(e), source.name, "invalid_image") from None

    @contextmanager
    def _admit(self, tokens: int):
        self.check_room()
        self.admitted_tokens += tokens
        try:
            yield
        finally:
            self.admitted_tokens -= tokens

    async def _run(self, turn: Turn, plans: list[Planned]) -> list[np.ndarray]:
        """A vector for each. Texts are handed in at once, images as they are decoded, a few of a request at a time."""
        if not any(plan.sources for plan in plans):
            return await _gather(turn.submit([Loaded(plan) for plan in plans]))
        window = asyncio.Semaphore(self.embedder.num_workers)
        loop, left = asyncio.get_running_loop(), len(plans)

        async def run(plan: Planned) -> np.ndarray:
            nonlocal left
            async with window:
                loaded = await loop.run_in_executor(self._pool, self._load, plan)
            left -= 1
            return await turn.submit([loaded], last=left == 0)[0]

        return await _gather([run(plan) for plan in plans])

    def _load(self, plan: Planned) -> Loaded:
        """Decodes the images and lets go of their files."""
        loaded = self.embedder.load(plan)
        return Loaded(replace(plan, sources=(), names=()), loaded.crops)

    def _failure(self, e: ModelError) -> APIError:
        if self.batcher.broken:
            return APIError(503, f"the model has failed and the server must be started again: {e}", code="model_failed")
        return APIError(
            500, f"the model could not embed an input: {e}", code="model_error", headers={"x-should-retry": "false"}
        )


async def _gather(awaitables: Sequence) -> list:
    """All results; where one fails or the caller is cancelled, the others are cancelled."""
    futures = [asyncio.ensure_future(x) for x in awaitables]
    try:
        return await asyncio.gather(*futures)
    finally:
        for future in futures:
            future.cancel()


def _is_remote(item: Item) -> bool:
    return isinstance(item.content, list) and any(
        isinstance(s, ImageSource) and not s.url.startswith("data:") for s in item.content
    )


def _characters(items: Sequence[Item]) -> int:
    return sum(len(item.content) for item in items)
