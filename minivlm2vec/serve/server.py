"""uvicorn, as `minivlm2vec serve` runs it: with a drain, and with bounded headers.

The drain: SIGTERM -> /ready answers 503, answers say "Connection: close" -> the port closes -> requests in flight are
finished -> the server ends.
"""

import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10


class Server(uvicorn.Server):
    """Serves an app of `create_app`.

    Args:
        drain_delay: seconds between SIGTERM and the closing of the port, in which a load balancer finds another
            server.
        on_listening: called with the URL once the model is warm and connections are accepted.
        options: more of `uvicorn.Config`.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        drain_delay: float = 1.0,
        access_log: bool = False,
        on_listening: Callable[[str], None] | None = None,
        **options: Any,
    ):
        self.app, self.drain_delay, self.on_listening = app, drain_delay, on_listening
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                lifespan="on",
                access_log=access_log,
                server_header=False,
                timeout_keep_alive=75,  # longer than the pools of clients and proxies keep a connection
                timeout_graceful_shutdown=int(app.state.service.limits.request_timeout) + 5,
                **options,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Warms the model up, listens, and says so."""
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


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, but a request's line, headers and trailers have at most MAX_HEAD_BYTES, and an offer to
    change the protocol is ignored.

    httptools has no such setting of its own. uvicorn's other parser, h11, has one, but spends tens of microseconds of
    Python on every chunk of a body, which a client can make one byte long.
    """

    head_bytes = 0  # since the last byte of a body or the end of a head

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self.head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as e:
            self._ignore_upgrade(data[e.args[0] :])
        except httptools.HttpParserError:
            self._refuse("Invalid HTTP request received.")
        if self.head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse("The headers are too large.")

    def on_headers_complete(self) -> None:
        self.head_bytes = 0
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.head_bytes = 0
        if not self.parser.should_upgrade():
            super().on_message_complete()

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
