"""Counts what is in flight, and refuses with a 429 what would be too much."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi import Request

from .errors import BodyTooLarge, busy
from .options import Limits

BODIES_IN_FLIGHT = 16  # bodies of the largest size that may be held at a time
SHORT_TOKENS = 64  # a request is short if it has at most this part of the queue's tokens
SHORT_BODY = 256 << 10  # and, as long as its tokens are not known, a body of at most so many bytes
RESERVED = 8  # this part of the queue, the bodies and the requests is kept for short ones


class InFlight:
    """What the body of one request holds."""

    body_bytes = 0


class RequestLimiter:
    """The requests in flight, the bytes of their bodies, their tokens and pixels.

    Short requests have room of their own, so that a few clients with long ones do not shut everybody else out.

    Args:
        limits: the most of each.
        queue_tokens: the most tokens, where `limits` leaves it open.
        tokens_per_second: the speed of the model, as measured.
    """

    def __init__(self, limits: Limits, queue_tokens: int, tokens_per_second: Callable[[], float]):
        self.limits, self.queue_tokens = limits, queue_tokens
        self._tokens_per_second = tokens_per_second
        self.requests = self.body_bytes = self.pixels = 0
        self.long_tokens = self.short_tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens in flight."""
        return self.long_tokens + self.short_tokens

    @property
    def delay(self) -> float:
        """Seconds that the work in flight will take."""
        return self.tokens / self._tokens_per_second()

    @contextmanager
    def body(self, request: Request) -> Iterator[InFlight]:
        """Gives back what a body holds once its request is answered. Raises APIError 429 where it would be refused
        anyway."""
        self._check(int(request.headers.get("content-length", SHORT_BODY + 1)) <= SHORT_BODY)
        held = InFlight()
        try:
            yield held
        finally:
            self.body_bytes -= held.body_bytes

    @contextmanager
    def request(self, body: bytes) -> Iterator[None]:
        """One request is in flight from when its body is there, so that stalled ones shut nobody out, until it is
        answered. Raises APIError 429."""
        self._check(len(body) <= SHORT_BODY)
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def _check(self, short: bool) -> None:
        if self.requests >= _room(self.limits.max_requests, short):
            raise busy(f"{self.requests} requests are being answered already; try again later", self.delay)
        self._check_queue(short)

    async def read_body(self, request: Request, held: InFlight) -> bytes:
        """The body, which counts until the request is answered. Raises APIError 413 and 429."""
        limit = self.limits.max_body_bytes
        if int(request.headers.get("content-length", 0)) > limit:
            raise BodyTooLarge(limit)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            held.body_bytes += len(chunk)
            self.body_bytes += len(chunk)
            if len(body) > limit:
                raise BodyTooLarge(limit)
            if self.body_bytes > _room(BODIES_IN_FLIGHT * limit, len(body) <= SHORT_BODY):
                raise busy("the bodies of other requests fill the memory; try again later", self.delay)
        return bytes(body)

    @contextmanager
    def admit(self, tokens: int, pixels: int) -> Iterator[None]:
        """So many tokens and pixels are in flight. Raises APIError 429."""
        short = tokens <= self.queue_tokens // SHORT_TOKENS
        self._check_queue(short)
        if self.pixels and self.pixels + pixels > self.limits.queue_pixels:
            raise busy(f"{self.pixels:,} pixels wait already; try again later", self.delay)
        self._add(tokens, pixels, short)
        try:
            yield
        finally:
            self._add(-tokens, -pixels, short)

    def _add(self, tokens: int, pixels: int, short: bool) -> None:
        self.pixels += pixels
        if short:
            self.short_tokens += tokens
        else:
            self.long_tokens += tokens

    def _check_queue(self, short: bool) -> None:
        """Refuses where the queue is full, or so long that an answer would come too late. Short requests overtake
        long ones, so only other short ones count for them."""
        if short:
            full = self.short_tokens >= max(1, self.queue_tokens // RESERVED)
            waiting = self.short_tokens
        else:
            full = self.long_tokens >= _room(self.queue_tokens, short)
            waiting = self.tokens
        if full or waiting / self._tokens_per_second() > self.limits.request_timeout:
            raise busy(f"{waiting:,} tokens wait already; try again later", self.delay)


def _room(most: int, short: bool) -> int:
    """What all requests together may have, for one that is short or not."""
    return most if short else most - most // RESERVED
