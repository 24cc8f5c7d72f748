"""Requests that are made to be slow to read: refused at their first error, off the event loop."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from minivlm2vec import Embedder
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.serve import ServeOptions, create_app, schema
from minivlm2vec.serve.errors import APIError
from tests.support.serving import call, running

N = 300_000
FEW = 60_000  # containers; more are refused by their number
MESSAGE = b'{"role":"user","content":"x"%s}'
FIELDS = b"".join(b',"f%d":1' % i for i in range(N))
LARGE = {
    "parts that are numbers": (b'{"messages":[{"role":"u","content":[1%s]}]}' % (b",1" * N), "messages[0].content[0]"),
    "texts that are numbers": (b'{"input":["a"%s]}' % (b",1" * N), "input[1]"),
    "negative ids": (b'{"input":[1%s]}' % (b",-1" * N), "input[1]"),
    "lists of negative ids": (b'{"input":[[1]%s]}' % (b",[-1]" * FEW), "input[1][0]"),
    "conversations of numbers": (b'{"messages":[[1]%s]}' % (b",[1]" * FEW), "messages[0][0]"),
    "messages that are numbers": (b'{"messages":[1%s]}' % (b",1" * N), "messages"),
    "unknown fields": (b'{"input":"a"%s}' % FIELDS, None),
    "unknown fields of a message": (b'{"messages":[%s]}' % (MESSAGE % FIELDS), "messages[0]"),
    "unknown fields of all messages": (b'{"messages":[%s]}' % b",".join([b"[%s]" % (MESSAGE % b',"f":1')] * 2048),
                                       "messages[0][0].f"),
    "empty parts": (b'{"messages":[{"role":"user","content":[{}%s]}]}' % (b",{}" * FEW), "messages[0].content[0]"),
    "more values than are read": (b'{"input":[1%s]}' % (b",[]" * schema.MAX_VALUES), None),
    "lists of ids": (b'{"input":[[1]%s],"tokenizer":"tiny"}' % (b",[1]" * 500_000), None),
    "nested lists": (b'{"input":"a","x":[1%s]}' % (b',{"a":[[]]}' * 250_000), None),
    "nested lists without commas": (b'{"input":"a","x":%s}' % (b"[" * 199 + b"]" * 199 + b"," + b"[" * 10**6), None),
}  # fmt: skip


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_body_fails_at_its_first_error(kind):
    body, param = LARGE[kind]
    start = time.thread_time()
    with pytest.raises(APIError) as e:
        schema.parse(body)
    assert time.thread_time() - start < 2  # the list of all errors took some ten seconds
    assert (e.value.status, e.value.param) == (400, param), e.value.message


def test_a_bound_of_values_leaves_room_for_every_request_that_can_be_answered():
    ids = [[1] * 128] * 2048  # as many tokens as 16 batches have
    assert len(schema.parse(json.dumps({"input": ids}).encode()).input) == 2048


@pytest.mark.parametrize("more", [0, 1])
def test_containers_are_counted_before_they_are_parsed(more, monkeypatch):
    body = b'{"input":"a","x":[%s]}' % b",".join([b'{"[":"]"}'] * (schema.MAX_CONTAINERS - 2 + more))
    parsed = []
    monkeypatch.setattr(schema, "from_json", lambda *_, **__: parsed.append(1) or {"input": "a"})
    if more:
        with pytest.raises(APIError) as e:
            schema.parse(body)
        assert e.value.code == "too_many_values" and "65,536" in e.value.message
    else:
        schema.parse(body)
    assert len(parsed) == 1 - more


@pytest.mark.parametrize("text", ["[" * 100_000, '"[{' * 50_000, '\\"[' * 50_000, "\\[" * 100_000, '[\\\\"' * 100_000])
def test_brackets_of_a_text_are_no_containers(text):
    body = json.dumps({"input": [text, text]}).encode()
    assert schema.parse(body).input == [text, text]
    deep = json.dumps({"input": [text, text], "user": [[]] * schema.MAX_CONTAINERS}).encode()
    with pytest.raises(APIError, match="lists and objects"):
        schema.parse(deep)


def test_the_event_loop_answers_while_bodies_are_read(tmp_path):
    embedder = Embedder.from_pretrained(new_checkpoint(tmp_path / "tiny"), device="cpu", show_progress=False)
    with running(create_app(embedder, ServeOptions(names=("tiny",)))) as server, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(call, server.url, body=body) for body, _ in LARGE.values()]
        slowest = 0.0
        while not all(a.done() for a in answers):
            start = time.monotonic()
            assert call(server.url, "/health").status == 200
            slowest = max(slowest, time.monotonic() - start)
        assert {a.result().status for a in answers} == {400}
    assert slowest < 20, slowest  # it was 50 s


@pytest.mark.parametrize("kind", ["input_text", "x" * 500, "\x1b[31m"])
def test_a_part_of_another_type_is_named(kind):
    body = {"messages": [{"role": "user", "content": [{"type": kind, "text": "a"}]}]}
    with pytest.raises(APIError, match=r"content\[0\]\.type is '.*'; it is one of 'text', 'image_url'") as e:
        schema.parse(json.dumps(body).encode())
    assert e.value.param == "messages[0].content[0]" and "\x1b" not in e.value.message and len(e.value.message) < 300
