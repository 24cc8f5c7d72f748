"""uvicorn, as `minivlm2vec serve` runs it: with a drain, and with bounded headers.

The drain: SIGTERM -> /ready answers 503, answers say "Connection: close" -> the port closes -> requests in flight are
finished, clients that stall in a body or an answer are left -> the server ends.
"""

import asyncio
import errno
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
STOP_SECONDS = 5.0  # for the rest of a body, or between two pieces that are read of an answer, once the server stops
IDLE_SECONDS = 75  # longer than the pools of clients and proxies keep a connection
RESERVED_FILES = 128  # descriptors for the model, the decoders and remote images

log = logging.getLogger("minivlm2vec.serve")


class Server(uvicorn.Server):
    """Serves an app of `create_app`.

    Args:
        drain_delay: seconds between SIGTERM and the closing of the port, in which a load balancer finds another
            server.
        max_connections: beyond them the one is closed that has waited longest for a request or the rest of one; default
            what the limit of open files leaves.
        idle_seconds: a connection is closed that sends no complete head, or reads nothing of its answer, for so long.
        on_listening: called with the URL once the model is warm and connections are accepted.
        options: more of `uvicorn.Config`.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        drain_delay: float = 1.0,
        access_log: bool = False,
        max_connections: int | None = None,
        idle_seconds: int = IDLE_SECONDS,
        on_listening: Callable[[str], None] | None = None,
        **options: Any,
    ):
        self.app, self.drain_delay, self.on_listening = app, drain_delay, on_listening
        super().__init__(
            Config(
                app,
                max_connections=max_connections or default_max_connections(),
                http=BoundedProtocol,
                ws="none",
                lifespan="on",
                access_log=access_log,
                server_header=False,
                timeout_keep_alive=idle_seconds,
                timeout_graceful_shutdown=int(app.state.service.limits.request_timeout) + 5,
                **options,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Warms the model up, listens, and says so."""
        asyncio.get_running_loop().set_exception_handler(QuietExceptionHandler())
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            if self.on_listening is not None and self.started:
                self.on_listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains (SIGINT without delay), the second ends at once."""
        if self.app.state.draining:
            self.should_exit = self.force_exit = True
        elif sig == signal.SIGTERM and self.drain_delay:
            self.app.state.draining = True
            timer = threading.Timer(self.drain_delay, setattr, (self, "should_exit", True))
            timer.daemon = True
            timer.start()
        else:
            self.app.state.draining = self.should_exit = True


class Config(uvicorn.Config):
    """uvicorn's settings; how many connections there may be, and those that wait for a request or the rest of one,
    longest first."""

    def __init__(self, *args: Any, max_connections: int, **options: Any):
        super().__init__(*args, **options)
        self.max_connections = max_connections
        self.idle: dict[BoundedProtocol, None] = {}


def default_max_connections() -> int:
    """What the limit of open files leaves, so that accepting never fails."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 4096
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(65536, soft if soft > 0 else 65536) - RESERVED_FILES)


class QuietExceptionHandler:
    """asyncio's handler, but a table of files that is full is told once in ten seconds: asyncio reports each of the
    thousands of tries to accept, with a traceback."""

    last = float("-inf")

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        e = context.get("exception")
        if not (isinstance(e, OSError) and e.errno in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)
        elif time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            log.error("connections are refused for a moment: %s", e)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds: a request's line, headers and trailers have at most MAX_HEAD_BYTES; idle
    connections end, and there is a most of them; an offer to change the protocol is ignored.

    httptools has no such settings of its own. uvicorn's other parser, h11, has one for the head, but spends tens of
    microseconds of Python on every chunk of a body, which a client can make one byte long.
    """

    config: Config
    _timer: asyncio.TimerHandle | None = None  # for the next head
    _write_timer: asyncio.TimerHandle | None = None
    head_bytes = 0  # that were read since the last byte of a body or the end of a head: a part of one may be kept
    field_bytes = 0  # of the head or the trailers that are parsed

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()
        if len(self.connections) > self.config.max_connections:
            longest_idle = next(iter(self.config.idle))
            self.config.idle.pop(longest_idle)
            self.connections.discard(longest_idle)
            longest_idle.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.config.idle.pop(self, None)
        self._resumed()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self.head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as e:
            self._ignore_upgrade(data[e.args[0] :])
        except httptools.HttpParserError:
            if self.field_bytes <= MAX_HEAD_BYTES:
                self._refuse("Invalid HTTP request received.")
        if max(self.head_bytes, self.field_bytes) > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse("The headers are too large.")

    def on_message_begin(self) -> None:
        self.field_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)  # ": " and the end of the line
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        """Ends the parsing of a head or of trailers that came in one piece and are too large."""
        self.field_bytes += size
        if self.field_bytes > MAX_HEAD_BYTES:
            raise httptools.HttpParserError

    def on_headers_complete(self) -> None:
        self.head_bytes = self.field_bytes = 0
        if not self.parser.should_upgrade():
            self._stop_timer()
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.head_bytes = 0
        if not self.parser.should_upgrade():
            if not self.cycle.response_complete:
                self.config.idle.pop(self, None)
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._wait_for_head()

    def shutdown(self) -> None:
        super().shutdown()
        self._stop_soon()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._resumed()

    def _stop_soon(self, more_body: bool = False, unread: int = 0) -> None:
        """Ends the connection if its client has not sent a body, or read anything of an answer, since the last look,
        when it lacked the body or had so many bytes unread."""
        left = self.transport.get_write_buffer_size()
        if (more_body and self._lacks_body()) or 0 < unread <= left:
            self.transport.abort()
        elif self in self.connections:
            self.loop.call_later(STOP_SECONDS, self._stop_soon, self._lacks_body(), left)

    def _lacks_body(self) -> bool:
        return self.cycle is not None and not self.pipeline and self.cycle.more_body

    def _wait_for_head(self) -> None:
        """The client has so long for a complete head; slow bytes do not prolong it, as they do in uvicorn."""
        self._stop_timer()
        self._timer = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        self.config.idle.pop(self, None)
        self.config.idle[self] = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _resumed(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Reads the request again as if it had not offered another protocol (RFC 9110, 7.8). Every Java client offers
        HTTP/2 with its first request; the parser would take the body for that protocol's bytes."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            return self._refuse("Invalid HTTP request received.")
        lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(x for x in options if x.lower() not in (b"upgrade", b"http2-settings"))
            if name not in (b"upgrade", b"http2-settings"):
                lines.append(name + b": " + value)
        self.parser = new_parser(self)
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _refuse(self, message: str) -> None:
        """400 and the end of the connection; only the end where an answer has begun."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()
        else:
            self.send_400_response(message)


def new_parser(protocol: HttpToolsProtocol) -> httptools.HttpRequestParser:
    """A parser that is set up as uvicorn does it."""
    parser = httptools.HttpRequestParser(protocol)
    if hasattr(parser, "set_dangerous_leniencies"):  # from httptools 0.6.3 on
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser
