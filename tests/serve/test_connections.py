"""The server's own layer under HTTP: connections, heads, bodies and what clients do to them. Loopback only."""

import asyncio
import errno
import json
import resource
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from minivlm2vec.serve import Limits, ServeOptions, create_app
from minivlm2vec.serve.app import app_of
from minivlm2vec.serve.server import QuietExceptionHandler, default_max_connections
from minivlm2vec.serve.service import EmbeddingService
from tests.support.serving import call, connect, read_all, read_answer, running, wait_for


@pytest.fixture(scope="module")
def url(embedder):
    options = ServeOptions(names=("tiny",), limits=Limits(max_body_bytes=1 << 20))
    with running(create_app(embedder, options)) as server:
        yield server.url


BODY = json.dumps({"input": "a cat"}).encode()
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"


def head(*, extra: bytes = b"", length: int | None = len(BODY)) -> bytes:
    framing = b"Transfer-Encoding: chunked\r\n" if length is None else b"Content-Length: %d\r\n" % length
    return b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n" + extra + framing + b"\r\n"


def chunked(body: bytes, size: int = 7) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


# Upgrade


@pytest.mark.parametrize("offer", [H2C, b"connection: keep-alive, upgrade\r\nUPGRADE: websocket\r\n",
                                   b"Upgrade: TLS/1.0, h2c\r\nConnection: upgrade\r\n"])  # fmt: skip
@pytest.mark.parametrize("length", [len(BODY), None])
@pytest.mark.parametrize("split", [1, 30, 100, 10_000])
def test_an_offer_to_upgrade_is_ignored(url, offer, length, split):
    """The answer is the same as without it, however the request is cut, and the connection serves another one."""
    request = head(extra=offer, length=length) + (chunked(BODY) if length is None else BODY)
    expected = call(url, body=BODY).vectors
    with connect(url) as s:
        for _ in range(2):
            for i in range(0, len(request), split):
                s.sendall(request[i : i + split])
            answer = read_answer(s)
            assert answer.status == 200 and "upgrade" not in answer.headers
            assert (answer.vectors == expected).all()


def test_pipelined_requests_with_offers(url):
    request = head(extra=H2C) + BODY
    with connect(url) as s:
        s.sendall(request + head() + BODY + request + head(extra=b"Connection: close\r\n") + BODY)
        assert read_all(s).count(b"HTTP/1.1 200") == 4


def test_an_offer_without_a_body(url):
    with connect(url) as s:
        s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + H2C + b"\r\n")
        assert read_answer(s).json == {"status": "ok"}


def test_connect_is_refused(url):
    with connect(url) as s:
        s.sendall(b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n")
        assert read_all(s).startswith(b"HTTP/1.1 400")


@pytest.mark.skipif(shutil.which("java") is None, reason="java is not installed")
def test_javas_client_at_its_defaults(url, tmp_path):
    program = tmp_path / "Offer.java"
    program.write_text("""
        import java.net.URI; import java.net.http.*; import java.net.http.HttpRequest.BodyPublishers;
        public class Offer { public static void main(String[] a) throws Exception {
            HttpRequest request = HttpRequest.newBuilder(URI.create(a[0] + "/v1/embeddings"))
                .POST(BodyPublishers.ofString("{\\"input\\": \\"a\\"}")).build();
            HttpClient client = HttpClient.newHttpClient();
            System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).statusCode());
        } }""")
    run = subprocess.run(["java", str(program), url], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "200", run.stderr


# Heads and trailers


@pytest.mark.parametrize("kind", ["value", "name", "many", "path", "trailer"])
@pytest.mark.parametrize("size", [40_000, 70_000, 150_000])
def test_a_head_in_one_piece_is_bounded_too(url, kind, size):
    more = b"b" * size
    extra = {"value": b"X: %s\r\n" % more, "name": b"%s: x\r\n" % more, "many": b"X: yyyyy\r\n" * (size // 10)}
    if kind == "trailer":
        request = head(length=None) + chunked(BODY)[:-2] + b"X: %s\r\n\r\n" % more
    else:
        request = head(extra=extra.get(kind, b"")) + BODY
    if kind == "path":
        request = request.replace(b" HTTP", b"?" + more + b" HTTP", 1)
    with connect(url) as s:
        with suppress(ConnectionError):
            s.sendall(request)
        if size < 2**16:
            assert read_answer(s).status == 200
            return
        with suppress(ConnectionError):  # a reset, where some of it came after the answer
            answer = read_all(s)
            assert answer.startswith(b"HTTP/1.1 400") and answer.endswith(b"The headers are too large.")


def test_trailers_are_bounded(url):
    with connect(url) as s:
        s.sendall(head(length=None) + b"2\r\n{}\r\n0\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(2000):
                s.sendall(b"X-A: bbbbbbbbb\r\n" * 4096)
    assert call(url, body=BODY).status == 200


def test_some_trailers_are_fine(url):
    with connect(url) as s:
        s.sendall(head(length=None) + chunked(BODY)[:-2] + b"X-Checksum: 1\r\nX-Other: 2\r\n\r\n")
        assert read_answer(s).status == 200


# Bodies that are refused


@pytest.mark.parametrize("framing", ["content-length", "chunked"])
def test_413_is_read_by_a_client_that_sends_everything_first(url, framing):
    """The whole body is sent although the answer is there already, then the answer is read: nothing is reset."""
    body = b'{"input": "' + b"a" * (8 << 20) + b'"}'
    for _ in range(5):
        with connect(url) as s:
            if framing == "chunked":
                s.sendall(head(length=None) + chunked(body, 1 << 16))
            else:
                s.sendall(head(length=len(body)) + body)
            answer = read_all(s)
        assert answer.startswith(b"HTTP/1.1 413") and b"request_too_large" in answer
        assert b"connection: close" in answer.lower()


def test_413_comes_before_the_body_to_who_asks_first(url):
    with connect(url) as s:
        s.sendall(head(extra=b"Expect: 100-continue\r\n", length=100 << 20))
        answer = read_all(s)  # until the connection is closed
    assert answer.startswith(b"HTTP/1.1 413")


def test_an_endless_body_is_not_read_for_ever(url, monkeypatch):
    monkeypatch.setattr("minivlm2vec.serve.app.LINGER_SECONDS", 0.5)
    with connect(url) as s:
        s.sendall(head(length=None))
        start = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() - start < 60:
                s.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
    assert call(url, body=BODY).status == 200


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_413_reaches_node(url):
    code = """fetch(process.argv[1] + "/v1/embeddings", {method: "POST", headers: {"content-type": "application/json"},
        body: JSON.stringify({input: "a".repeat(8 << 20)})})
        .then(r => console.log(r.status)).catch(e => console.log(String(e.cause)))"""
    run = subprocess.run(["node", "-e", code, url], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "413", run.stderr


# Connections


def closed(s: socket.socket) -> bool:
    """Whether the server has ended the connection."""
    s.setblocking(False)
    try:
        return s.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    finally:
        s.setblocking(True)


def test_idle_connections_end(embedder):
    """Those that never sent anything, those that send a head byte by byte, and those that were answered."""
    with running(create_app(embedder), idle_seconds=1) as server:
        silent, slow, answered = connections = [connect(server.url) for _ in range(3)]
        answered.sendall(head() + BODY)
        assert read_answer(answered).status == 200
        start, request = time.monotonic(), iter((head() + BODY) * 100)
        while not closed(slow):
            assert time.monotonic() - start < 60
            with suppress(ConnectionError):
                slow.sendall(bytes([next(request)]))
            time.sleep(0.1)
        wait_for(lambda: closed(silent) and closed(answered), 60)
        for s in connections:
            s.close()
        assert call(server.url, body=BODY).status == 200


def test_a_request_in_work_is_not_idle(embedder):
    def launch(items):
        time.sleep(2.5 if any(len(x) == 7 for x in items) else 0)
        return embedder.embed(items).numpy()

    service = EmbeddingService(embedder, launch=launch)
    with running(app_of(service), idle_seconds=1) as server, connect(server.url) as s:
        s.sendall(head() + BODY)
        assert read_answer(s).status == 200


def test_a_half_closed_connection_counts_as_closed(embedder):
    """Its FIN is that of a client that left, whose work is taken back; the next client is served."""
    with running(create_app(embedder)) as server:
        with connect(server.url) as s:
            s.sendall(head(length=len(BODY)) + BODY[:-1])
            wait_for(lambda: any(c.cycle is not None for c in server.server.server_state.connections))
            s.shutdown(socket.SHUT_WR)
            assert read_all(s) == b""
        assert call(server.url, body=BODY).status == 200


def test_who_reads_no_answer_is_left(embedder):
    """Vectors of 2,048 texts do not fit into the buffers of a connection whose client does not read."""
    body = json.dumps({"input": ["a"] * 2048}).encode()
    with running(create_app(embedder), idle_seconds=1) as server:
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.connect((urlsplit(server.url).hostname, urlsplit(server.url).port))
            s.sendall((head(length=len(body)) + body) * 30)
            wait_for(lambda: server.server.server_state.total_requests)  # some are answered
            wait_for(lambda: not server.server.server_state.connections, 60)
        assert call(server.url, body=BODY).status == 200


def small_window(url: str) -> socket.socket:
    """A connection whose answers, each of 2,048 vectors, do not fit into the buffers, after the requests for them."""
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    s.connect((urlsplit(url).hostname, urlsplit(url).port))
    body = json.dumps({"input": ["a"] * 2048}).encode()
    s.sendall((head(length=len(body)) + body) * 8)
    return s


def has_unread(server) -> bool:
    return any(c.transport.get_write_buffer_size() for c in server.server.server_state.connections)


@pytest.mark.parametrize("stall", ["body", "refused body", "answer"])
def test_a_stop_does_not_wait_for_who_stalls(embedder, monkeypatch, stall):
    monkeypatch.setattr("minivlm2vec.serve.server.STOP_SECONDS", 0.2)
    monkeypatch.setattr("minivlm2vec.serve.app.LINGER_SECONDS", 300)
    app = create_app(embedder, ServeOptions(limits=Limits(request_timeout=300)))
    with running(app) as server, (small_window if stall == "answer" else connect)(server.url) as s:
        if stall == "answer":
            wait_for(lambda: has_unread(server))
        else:
            s.sendall(head(length=1000 if stall == "body" else 1 << 30) + b"{")
            wait_for(lambda: server.server.server_state.tasks)
        server.server.should_exit = True
        wait_for(lambda: not server.server.server_state.connections, 60)


def test_a_stop_waits_for_who_reads(embedder, monkeypatch):
    monkeypatch.setattr("minivlm2vec.serve.server.STOP_SECONDS", 3)
    with running(create_app(embedder)) as server, small_window(server.url) as s:
        wait_for(lambda: has_unread(server))
        server.server.should_exit = True
        wait_for(lambda: not server.server.servers[0].is_serving())
        assert read_all(s).count(b'"index":2047') == 8


def test_connections_are_bounded_and_idle_ones_make_room(embedder):
    with running(create_app(embedder), max_connections=20) as server:
        idle = [connect(server.url) for _ in range(50)]
        for _ in range(5):
            assert call(server.url, body=BODY).status == 200
        wait_for(lambda: sum(map(closed, idle)) >= 30)
        assert len(server.server.server_state.connections) <= 20
        assert not closed(idle[-1])  # the longest idle are the ones that went
        for s in idle:
            s.close()


def test_stalled_bodies_make_room(embedder):
    with running(create_app(embedder), max_connections=20) as server:
        stalled = [connect(server.url) for _ in range(20)]
        for s in stalled:
            s.sendall(head(length=1000) + b"{")
        wait_for(lambda: sum(c.cycle is not None for c in server.server.server_state.connections) == 20)
        for _ in range(5):
            assert call(server.url, body=BODY).status == 200
        wait_for(lambda: closed(stalled[0]))
        assert not closed(stalled[-1])
        for s in stalled:
            s.close()


def test_the_limit_of_files_leaves_room():
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 16 <= default_max_connections() < soft


def test_a_full_table_of_files_is_told_once(caplog):
    handler, loop = QuietExceptionHandler(), asyncio.new_event_loop()
    full = OSError(errno.EMFILE, "Too many open files")
    for _ in range(1000):
        handler(loop, {"message": "socket.accept() out of system resource", "exception": full})
    assert len(caplog.records) == 1 and "Too many open files" in caplog.text
    handler(loop, {"message": "something else", "exception": ValueError("x")})
    assert "something else" in caplog.text
    loop.close()
