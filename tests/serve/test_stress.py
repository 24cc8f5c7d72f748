"""The server under what it will meet: overload, clients that leave, bodies that are none, signals."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from bench.soak_server import requests, soak
from minivlm2vec import Embedder
from minivlm2vec.cli import main
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.serve import Batching, Limits, ServeOptions, create_app
from minivlm2vec.serve.app import app_of
from minivlm2vec.serve.service import EmbeddingService
from tests.support.fuzz_bodies import FINE, fuzzed, send
from tests.support.serving import (
    call,
    connect,
    floats,
    picture,
    read_all,
    resident,
    running,
    serve_process,
    user,
    wait_for,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return new_checkpoint(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def embedder(model):
    return Embedder.from_pretrained(model, device="cpu", show_progress=False)


@pytest.fixture(scope="module")
def process(model):
    with serve_process(model, "--served-model-name", "tiny", "--max-body-mb", "4") as server:
        yield server


class Slow:
    """A model that takes its time for a pack, or waits for `gate`."""

    def __init__(self, embedder, seconds: float = 0.0):
        self.embedder, self.seconds, self.packs = embedder, seconds, []
        self.before = lambda: None  # called at the start of every pack
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items):
        self.before()
        assert self.gate.wait(120)
        time.sleep(self.seconds)
        self.packs.append(len(items))
        return self.embedder.embed(items).numpy()


# In this process


def test_overload_gets_429_and_loses_nothing(embedder):
    """Many more requests than the model can take: some are refused at once, the others answered in time."""
    slow = Slow(embedder, 0.02)
    limits = Limits(queue_tokens=200)
    service = EmbeddingService(
        embedder, ServeOptions(limits=limits, batching=Batching(batch_tokens=50)), launch=slow
    )  # 2500 tokens per second
    slow.before = lambda: waiting.append(service.limiter.tokens)
    waiting, statuses = [], []

    def client(n: int) -> None:
        for i in range(6):
            answer = call(server.url, body={"input": f"{n:03d} {i:020d}"})
            statuses.append(answer.status)
            if answer.status != 200:
                assert answer.error["code"] == "rate_limit_exceeded"
                assert 1 <= int(answer.headers["retry-after"]) <= 60

    with running(app_of(service)) as server:
        with ThreadPoolExecutor(40) as pool:
            list(pool.map(client, range(40)))
        assert len(statuses) == 240 and set(statuses) == {200, 429}
        assert statuses.count(200) >= 20
        assert 100 < max(waiting) <= 200 + 26  # tokens: the queue, and the one request that crosses its end
        assert call(server.url, body={"input": "a"}).status == 200
        assert service.limiter.tokens == 0


def test_what_could_not_be_finished_in_time_is_refused_at_once(embedder):
    slow = Slow(embedder)
    service = EmbeddingService(embedder, ServeOptions(limits=Limits(request_timeout=60)), launch=slow)
    with running(app_of(service)) as server, ThreadPoolExecutor(2) as pool:
        slow.gate.clear()
        first = pool.submit(call, server.url, body={"input": "a" * 100})
        wait_for(lambda: service.limiter.tokens == 102)
        service.batcher.rate = 1  # token per second: 102 s for what is there
        answer = call(server.url, body={"input": "b"})
        assert (answer.status, answer.headers["retry-after"]) == (429, "60")
        slow.gate.set()
        assert first.result().status == 200


def test_greedy_clients_do_not_shut_out_short_requests(embedder):
    """16 clients ask for as much as they can, again and again; one client's short requests are all answered."""
    slow = Slow(embedder, 0.01)
    options = ServeOptions(limits=Limits(queue_tokens=6400), batching=Batching(batch_tokens=400))
    service = EmbeddingService(embedder, options, launch=slow)
    stop, greedy = threading.Event(), []

    def ask_for_much(n: int) -> None:
        while not stop.is_set():
            answer = call(server.url, body={"input": [f"{n} {i} " + "x" * 90 for i in range(30)]})
            greedy.append(answer.status)

    with running(app_of(service)) as server, ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(ask_for_much, n) for n in range(16)]
        wait_for(lambda: 429 in greedy)
        statuses = [call(server.url, body={"input": f"{i}"}).status for i in range(40)]
        stop.set()
        for client in clients:
            client.result()
    assert statuses == [200] * 40
    assert 200 in greedy and set(greedy) == {200, 429}
    assert service.limiter.tokens == 0


def test_short_requests_have_bounds_too(embedder):
    slow = Slow(embedder)
    options = ServeOptions(limits=Limits(queue_tokens=6400))  # 800 of them for requests of at most 100
    with running(app_of(EmbeddingService(embedder, options, launch=slow))) as server, ThreadPoolExecutor(32) as pool:
        slow.gate.clear()
        answers = [pool.submit(call, server.url, body={"input": "a" * 78}) for _ in range(32)]  # 80 tokens
        wait_for(lambda: sum(a.done() for a in answers) == 22)
        slow.gate.set()
        assert sorted(a.result().status for a in answers) == [200] * 10 + [429] * 22


def test_bodies_count_until_their_answer(embedder):
    """Otherwise any number of large bodies would be held while their requests wait."""
    slow = Slow(embedder)
    options = ServeOptions(limits=Limits(max_body_bytes=1 << 20))
    service = EmbeddingService(embedder, options, launch=slow)
    large = {"input": "a", "user": "x" * (1000 << 10)}
    size = len(json.dumps(large))  # 14 fit beside what is kept for short requests
    with running(app_of(service)) as server, ThreadPoolExecutor(20) as pool:
        slow.gate.clear()
        answers = []
        for n in range(1, 15):
            answers.append(pool.submit(call, server.url, body=large))
            wait_for(lambda n=n: service.limiter.body_bytes == n * size)
        assert call(server.url, body=large).error["code"] == "rate_limit_exceeded"
        small = pool.submit(call, server.url, body={"input": "a"})
        wait_for(lambda: service.limiter.requests == 15)
        slow.gate.set()
        assert [a.result().status for a in [*answers, small]] == [200] * 15
        wait_for(lambda: service.limiter.body_bytes == 0)


def test_too_many_requests(embedder):
    slow = Slow(embedder)
    with running(
        app_of(EmbeddingService(embedder, ServeOptions(limits=Limits(max_requests=3)), launch=slow))
    ) as server:
        slow.gate.clear()
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(call, server.url, body={"input": "a"}) for _ in range(8)]
            wait_for(lambda: sum(a.done() for a in answers) == 5)
            slow.gate.set()
            assert sorted(a.result().status for a in answers) == [200] * 3 + [429] * 5


def test_stalled_bodies_are_no_requests_in_flight(embedder):
    """They hold a connection and their bytes; whoever sends a whole request is answered."""
    app = create_app(embedder, ServeOptions(limits=Limits(max_requests=3)))
    with running(app) as server, ExitStack() as stack:
        for _ in range(10):
            s = stack.enter_context(connect(server.url))
            s.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        wait_for(lambda: app.state.service.limiter.body_bytes == 10)
        assert call(server.url, body={"input": "a"}).status == 200
        assert app.state.service.limiter.requests == 0
    assert app.state.service.limiter.body_bytes == 0


def test_timeout_is_504_and_takes_the_work_back(embedder):
    slow = Slow(embedder)
    service = EmbeddingService(embedder, ServeOptions(limits=Limits(request_timeout=0.3)), launch=slow)
    with running(app_of(service)) as server:
        slow.gate.clear()
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(call, server.url, body={"input": "a"})]
            wait_for(lambda: service.batcher._launched)
            answers += [pool.submit(call, server.url, body={"input": "a"}) for _ in range(3)]
            for answer in answers:
                assert answer.result().status == 504
                assert answer.result().error["code"] == "request_timeout"
        wait_for(lambda: service.batcher.waiting == (0, 0))
        slow.gate.set()
        wait_for(lambda: sum(slow.packs) == 5)  # the warm-up's four, and the one that was being computed
        wait_for(lambda: call(server.url, body={"input": "a"}).status == 200)  # 0.3 s are little on a busy machine


def test_a_body_that_does_not_come_is_408(embedder):
    app = create_app(embedder, ServeOptions(limits=Limits(request_timeout=0.3)))
    with running(app) as server, connect(server.url) as s:
        s.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = read_all(s)
        assert answer.startswith(b"HTTP/1.1 408") and b'"request_timeout"' in answer
        assert b"connection: close" in answer.lower()


def test_a_client_that_leaves_takes_its_work_back(embedder):
    slow = Slow(embedder)
    service = EmbeddingService(embedder, launch=slow)
    body = json.dumps({"input": ["a", "b", "c"]}).encode()
    with running(app_of(service)) as server, ThreadPoolExecutor(2) as pool:
        slow.gate.clear()
        busy = pool.submit(call, server.url, body={"input": "x"})
        wait_for(lambda: service.batcher._launched)
        with connect(server.url) as s:
            s.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            wait_for(lambda: service.batcher.waiting[0] == 3)
        wait_for(lambda: service.batcher.waiting == (0, 0))
        wait_for(lambda: "minivlm2vec_disconnects_total 1.0" in call(server.url, "/metrics").body.decode())
        slow.gate.set()
        assert busy.result().status == 200
        assert sum(slow.packs) == 5  # the warm-up's four and x


def test_a_thousand_images_do_not_hold_up_one(embedder):
    service = EmbeddingService(embedder, ServeOptions(batching=Batching(batch_tokens=1000)))
    many = {"messages": [user(picture(60, 60, n % 7)) for n in range(300)]}
    with running(app_of(service)) as server, ThreadPoolExecutor(1) as pool:
        long = pool.submit(call, server.url, body=many)
        wait_for(lambda: service.limiter.tokens > 1000)
        assert call(server.url, body={"messages": user(picture(60, 60), "t")}).status == 200
        assert not long.done()
        assert len(long.result().json["data"]) == 300


def test_drain(embedder):
    """SIGTERM's way, step by step: told to the balancer, still answering, connections ended, port closed."""
    slow = Slow(embedder)
    with running(app_of(EmbeddingService(embedder, launch=slow))) as server, ThreadPoolExecutor(8) as pool:
        slow.gate.clear()
        answers = [pool.submit(call, server.url, body={"input": "a" * n}) for n in range(1, 5)]
        wait_for(lambda: server.server.app.state.service.batcher._in_flight == 4)
        server.server.drain_delay = 0.5
        server.server.handle_exit(signal.SIGTERM, None)
        ready = call(server.url, "/ready")
        assert (ready.status, ready.error["code"]) == (503, "not_ready")
        assert ready.headers["connection"] == "close"
        assert call(server.url, "/health").status == 200
        late = pool.submit(call, server.url, body={"input": "late"})
        wait_for(lambda: not server.server.servers[0].is_serving())
        with pytest.raises(ConnectionError):
            call(server.url, "/health")
        slow.gate.set()
        assert [a.result().status for a in [*answers, late]] == [200] * 5


# In a process of its own


def test_sigterm_finishes_what_is_in_flight(model, embedder):
    texts = [f"{n} " + "word " * 300 for n in range(48)]
    options = ("--batch-tokens", "2000", "--queue-tokens", "1000000", "--drain-delay", "0.2")
    with serve_process(model, *options) as server:
        with ThreadPoolExecutor(48) as pool:
            answers = [pool.submit(call, server.url, body={"input": text}) for text in texts]
            wait_for(lambda: in_flight(server.url) >= 20)
            server.process.send_signal(signal.SIGTERM)
            got = np.concatenate([answer.result().vectors for answer in answers])
        assert server.process.wait(10) == 0
    assert np.abs(got - embedder.encode(texts)).max() <= 2e-6


def in_flight(url: str) -> float:
    lines = call(url, "/metrics").body.decode().splitlines()
    return float(next(line for line in lines if line.startswith("minivlm2vec_requests_in_flight ")).split()[1])


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(process, embedder, tmp_path):
    def curl(*arguments: str) -> str:
        command = ["curl", "--silent", "--show-error", "--max-time", "20", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    answer = curl(f"{process.url}/v1/embeddings", "-d", '{"model": "tiny", "input": "A cat"}')  # with curl's own type
    expected = embedder.encode(["A cat"])[0]
    assert np.abs(floats(json.loads(answer)["data"][0]["embedding"]) - expected).max() <= 2e-6
    image = picture(300, 200)
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"model": "tiny", "messages": user(image, "Represent the given image.")}))
    header = ("-H", "Content-Type: application/json")
    answer = curl(f"{process.url}/v1/embeddings", *header, "-d", f"@{body}")
    expected = embedder.encode([{"text": "<|image_1|> Represent the given image.", "image": image}])[0]
    assert np.abs(floats(json.loads(answer)["data"][0]["embedding"]) - expected).max() <= 2e-6
    assert curl("-o", "/dev/null", "-w", "%{http_code}", f"{process.url}/health") == "200"
    assert "minivlm2vec_batch_tokens_bucket" in curl(f"{process.url}/metrics")


LEAK = 32 << 20


def test_malformed_bodies_neither_break_nor_fill_the_server(process):
    no_image = {"type": "image_url", "image_url": {"url": "data:;base64," + "A" * 3_000_000}}
    no_url = {"type": "image_url", "image_url": {"url": "\n\r" * 1000}}
    handmade = [
        b"", b"\0" * 1000, b"[" * 100_000, b'{"input":' * 50_000, b'{"input": ' + b"9" * 100_000 + b"}",
        b'{"input": "\\ud800"}', b'{"\\udfff": 1, "input": "a"}', b'{"input": 1e999}', b"\xff\xfe\xfd",
        json.dumps({"x" * 3_000_000: 1}).encode(), json.dumps({"input": ["a" * 100] * 30_000}).encode(),
        json.dumps({"input": list(range(500_000))}).encode(), b'{"input": "a"}' * 100,
        json.dumps({"messages": user(no_image)}).encode(), json.dumps({"messages": user(no_url)}).encode(),
    ]  # fmt: skip

    bodies = fuzzed(seed=0)

    def round_of(n: int) -> set[int]:
        return set(send(process.url, [*handmade, *islice(bodies, n)]))

    for _ in range(3):
        round_of(100)  # what the first uses of anything keep
    statuses, grown = set(), []
    while len(grown) < 3 and min(grown, default=LEAK) >= LEAK:  # pools may grow once more, a leak always
        before = resident(process.process.pid)
        statuses |= set().union(*(round_of(200) for _ in range(4)))
        grown.append(resident(process.process.pid) - before)
    assert statuses <= FINE, statuses
    assert call(process.url, "/health").status == 200
    assert call(process.url, body={"input": "a"}).status == 200
    assert in_flight(process.url) == 0
    assert min(grown) < LEAK, grown


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells the memory")
def test_a_short_soak(model):
    """`python -m bench.soak_server` in small: memory after 120 mixed requests is that after 60."""
    with serve_process(model, "--served-model-name", "mini") as server:
        statuses, sizes = soak(server.url, server.process.pid, requests(0), [60, 120], 4, str)
    assert set(statuses) == {200, 400} and sizes[1] < 1.2 * sizes[0] + LEAK, (statuses, sizes)


def test_malformed_http(process):
    """What is no HTTP at all, or too much of it: a 4xx or a closed connection, and the server goes on."""
    post = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n"
    for data in (
        b"\0" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", post + b"Content-Length: -1\r\n\r\n",
        post + b"Content-Length: x\r\n\r\n", post + b"Content-Length: 99999999999999999999\r\n\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhi",
        post + b"X: " + b"y" * 200_000 + b"\r\n\r\n", post + b"X: y\r\n" * 30_000 + b"\r\n",
        post + b"Content-Length: 5000000\r\n\r\n" + b"x" * 100,
    ):  # fmt: skip
        with connect(process.url) as s:
            try:
                s.sendall(data)
                answer = s.recv(4096)  # its beginning: not every such answer closes the connection
            except ConnectionError:  # closed before all was sent
                continue
            assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413")), (data[:80], answer)
    assert call(process.url, body={"input": "a"}).status == 200


def test_a_chunked_body_is_bounded_too(process):
    with connect(process.url) as s:
        s.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(100):
                s.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
            answer = s.recv(4096)
        except ConnectionError:  # closed before all was sent, or with some of it unread
            pass
        else:
            assert answer == b"" or answer.startswith(b"HTTP/1.1 413")
    assert call(process.url, body={"input": "a"}).status == 200


def test_schemathesis(process):
    """Requests made from the OpenAPI document: no 5xx, and every answer as the document says."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    schema = schemathesis.openapi.from_url(f"{process.url}/openapi.json")
    seen = set()

    @settings(max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def test(case):
        if case.meta.generation.mode.is_positive and isinstance(case.body, dict):  # what no schema can tell
            case.body |= {"model": "tiny", "truncate_prompt_tokens": None}
            if case.operation.path != "/v1/embeddings":
                case.body["instruction"] = "none"
            elif case.body.get("input") or not case.body.get("messages"):
                case.body.pop("messages", None)
                case.body["input"] = case.body.get("input") or "a"
            case.body |= {"dimensions": None} if "dimensions" in case.body else {}
        response = case.call_and_validate(checks=checks, timeout=60)
        seen.add((case.operation.path, response.status_code))

    for result in schema.get_all_operations():
        operation = result.ok()
        has_input = bool(len(operation.body) or len(operation.path_parameters))
        for mode in list(schemathesis.GenerationMode) if has_input else [schemathesis.GenerationMode.POSITIVE]:
            given(case=operation.as_strategy(generation_mode=mode))(test)()
    assert ("/v1/embeddings", 200) in seen and ("/v1/embeddings", 400) in seen, seen
    assert {(f"/v1/{path}", 400) for path in ("classify", "rerank", "score")} <= seen, seen
    assert call(process.url, "/health").status == 200


# The command


@pytest.mark.parametrize(("arguments", "message"), [
    (["--batch-tokens", "0"], "--batch-tokens is 0"),
    (["--request-timeout", "-1"], "--request-timeout is -1"),
    (["--drain-delay", "-1"], "--drain-delay is -1"),
    (["--host", "no such host"], "cannot listen on no such host"),
    (["--port", "99999"], "--port is 99999"),
])  # fmt: skip
def test_wrong_arguments(model, capsys, arguments, message):
    assert main(["serve", str(model), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_port_in_use_is_told_before_the_model_is_loaded(capsys):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        assert main(["serve", "no/such/model", "--port", str(s.getsockname()[1])]) == 1
    assert "cannot listen" in capsys.readouterr().err


def test_a_missing_checkpoint(tmp_path, capsys):
    assert main(["serve", str(tmp_path), "--port", "0"]) == 1
    assert "config.json" in capsys.readouterr().err


def test_without_the_extra(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(model)]) == 1
    assert "pip install 'minivlm2vec[serve]'" in capsys.readouterr().err
