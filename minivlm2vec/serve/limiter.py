"""Counts what is in flight, and refuses with a 429 what would be too much."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi import Request

from .errors import BodyTooLarge, busy
from .options import Limits

BODIES_IN_FLIGHT = 16  # bodies of the largest size that may be held at a time


class RequestLimiter:
    """The requests in flight, the bytes of their bodies, their tokens and pixels.

    Args:
        limits: the most of each.
        queue_tokens: the most tokens, where `limits` leaves it open.
        tokens_per_second: the speed of the model, as measured.
    """

    def __init__(self, limits: Limits, queue_tokens: int, tokens_per_second: Callable[[], float]):
        self.limits, self.queue_tokens = limits, queue_tokens
        self._tokens_per_second = tokens_per_second
        self.requests = self.body_bytes = self.tokens = self.pixels = 0

    @property
    def delay(self) -> float:
        """Seconds that the work in flight will take."""
        return self.tokens / self._tokens_per_second()

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request is in flight. Raises APIError 429."""
        if self.requests >= self.limits.max_requests:
            raise busy(f"{self.requests} requests are being answered already; try again later", self.delay)
        self._check_queue()
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @contextmanager
    def admit(self, tokens: int, pixels: int) -> Iterator[None]:
        """So many tokens and pixels are in flight. Raises APIError 429."""
        self._check_queue()
        if self.pixels and self.pixels + pixels > self.limits.queue_pixels:
            raise busy(f"{self.pixels:,} pixels wait already; try again later", self.delay)
        self.tokens += tokens
        self.pixels += pixels
        try:
            yield
        finally:
            self.tokens -= tokens
            self.pixels -= pixels

    async def read_body(self, request: Request) -> bytes:
        """The body. Raises APIError 413 and 429."""
        limit = self.limits.max_body_bytes
        if int(request.headers.get("content-length", 0)) > limit:
            raise BodyTooLarge(limit)
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                self.body_bytes += len(chunk)
                if len(body) > limit:
                    raise BodyTooLarge(limit)
                if self.body_bytes > BODIES_IN_FLIGHT * limit:
                    raise busy("the bodies of other requests fill the memory; try again later", self.delay)
        finally:
            self.body_bytes -= len(body)
        return bytes(body)

    def _check_queue(self) -> None:
        """Refuses where the queue is full, or so long that an answer would come too late."""
        if self.tokens >= self.queue_tokens or self.delay > self.limits.request_timeout:
            raise busy(f"{self.tokens:,} tokens wait already; try again later", self.delay)
