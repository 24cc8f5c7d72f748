"""Helpers of the server's tests: a server in this process, one in its own, and a plain HTTP client. Loopback only."""

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    server: Any = None
    process: subprocess.Popen | None = None


@contextmanager
def running(app, **options):
    """Serves an app from a thread of this process, on a free port. options: more of the Server's."""
    from minivlm2vec.serve.server import Server

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = Server(app, drain_delay=0, log_level="critical", **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            wait_for(lambda: server.started or not thread.is_alive(), 30)
            assert server.started
            yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", server)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server did not stop"


@contextmanager
def serve_process(model: Path | str, *arguments: str, stderr: Any = subprocess.DEVNULL):
    """`minivlm2vec serve` in a process of its own, which is always ended."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "minivlm2vec", "serve", str(model), "--port", "0", "--device", "cpu", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True,
                               env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, f"no address in {line!r}"
        yield Running(found.group(), process=process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # no drain delay
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(15)
        process.stdout.close()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict:
        """The error, checked to be of OpenAI's shape."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str), error
        return error

    @property
    def vectors(self) -> np.ndarray:
        assert self.status == 200, self.body
        data = self.json["data"]
        assert [row["index"] for row in data] == list(range(len(data)))
        return np.array([floats(row["embedding"]) for row in data], np.float32)


def floats(embedding: list[float] | str) -> np.ndarray:
    """An embedding as it came: a list, or base64 of little-endian float32."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), "<f4")
    return np.array(embedding, np.float32)


def call(url: str, path: str = "/v1/embeddings", body: Any = None, *, method: str | None = None,
         headers: dict[str, str] | None = None, timeout: float = 120) -> Answer:  # fmt: skip
    """One request on a connection of its own. body: bytes as they are, everything else as JSON."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        method = method or ("GET" if data is None else "POST")
        connection.request(method, path, data, {"content-type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


def read_answer(s: socket.socket) -> Answer:
    """One answer on a connection that may serve more; to be used on connections that read nothing else."""
    response = http.client.HTTPResponse(s)
    response.begin()
    return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


def read_all(s: socket.socket) -> bytes:
    """Everything until the server closes the connection; head and body of an answer may come apart."""
    return b"".join(iter(lambda: s.recv(4096), b""))


def user(*content: Any) -> list[dict]:
    """A conversation: texts and PIL images (or image_url dicts) as one message."""
    return [{"role": "user", "content": [_part(part) for part in content]}]


def data_uri(image: Image.Image, format: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.005)


def resident(pid: int) -> int:
    """Bytes of memory of a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(map(_resident, [pid, *map(int, children)]))


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def _part(part: Any) -> dict:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Image.Image):
        return {"type": "image_url", "image_url": {"url": data_uri(part)}}
    return part
