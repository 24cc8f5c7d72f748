"""uvicorn, with a drain: SIGTERM -> /ready says 503, answers say "Connection: close" -> the port closes -> requests
in flight are finished -> the process ends with 0."""

import signal
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10


class Server(uvicorn.Server):
    """Serves an app of `create_app`.

    drain_delay: seconds between SIGTERM and the closing of the port, in which a load balancer finds another server.
    """

    def __init__(self, app: FastAPI, *, drain_delay: float = 1.0, access_log: bool = False, **options):
        self.app, self.service, self.drain_delay = app, app.state.service, drain_delay
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                lifespan="on",
                access_log=access_log,
                server_header=False,
                timeout_keep_alive=75,  # longer than the pools of clients and proxies keep a connection
                timeout_graceful_shutdown=int(self.service.limits.request_timeout) + 5,
                **options,
            )
        )

    async def startup(self, sockets=None) -> None:
        """Warms the model up, listens, and says so on stdout."""
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"serving {', '.join(self.service.names)} on http://{host}:{port}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain (SIGINT without delay). Second: end at once."""
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
    """uvicorn's protocol, but a request's line and headers have at most MAX_HEAD_BYTES."""

    head_bytes = 0

    def data_received(self, data: bytes) -> None:
        self.head_bytes += len(data)
        super().data_received(data)
        if self.head_bytes > MAX_HEAD_BYTES and self._in_head() and not self.transport.is_closing():
            self.send_400_response("The headers are too large.")

    def on_headers_complete(self) -> None:
        self.head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.head_bytes = 0
        super().on_message_complete()

    def _in_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete or not self.cycle.more_body
