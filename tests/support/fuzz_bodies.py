"""Bodies that no client should send: `python -m tests.support.fuzz_bodies [--count 5000] [--seed 0]`.

Half are good bodies with bytes changed, half are JSON with odd values in every place. Each is answered with 200 or 4xx,
nothing is logged with a traceback, and the server's memory stays within bounds. Ends with 1 otherwise.
"""

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from tests.support.serving import call, data_uri, picture, resident, serve_process, user

FINE = {200, 400, 404, 413, 429}
ALLOWED = 1.2  # how much memory may grow in the second half of the bodies
PIECES = [b"null", b"[]", b"{}", b'"', b"-1", b"1e9", b"true", b"\\u0000", b"<|image_1|>", b",", b"]"]
NAMES = [
    "model", "input", "messages", "encoding_format", "dimensions", "user", "tokenizer", "mm_processor_kwargs",
    "truncate_prompt_tokens", "truncation_side", "add_special_tokens", "add_generation_prompt",
    "continue_final_message", "chat_template", "chat_template_kwargs", "normalize", "use_activation", "embed_dtype",
    "endianness", "request_id",
    "query", "documents", "labels", "template", "top_n", "return_documents", "instruction", "document", "text_1",
    "text_2",
    "queries", "items", "image", "max_tokens_per_doc", "rank_fields", "store",
    "priority", "cache_salt", "role", "content", "type", "text", "image_url", "url", "num_crops", "detail", "name",
]  # fmt: skip
SCALARS = [
    None, True, False, 0, 1, -1, 2, 63, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, "", "a", "a cat",
    "mini", "user", "system", "assistant", "text", "image_url", "base64", "float", "right", "float32", "data:",
    "data:,", "data:image/png;base64,", "data:image/png;base64,AAAA", "http://localhost/", "https://[::1", "file:///etc/passwd",
    "\0", "\ud800", "\u202e", "<|image_1|>", "<|end|></s><s>", "é" * 1000, "🙂" * 300, " " * 5000, "9" * 4000,
    "x" * 20000,
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryFile("w+") as log:
        with serve_process("mini", stderr=log) as server:
            bodies = fuzzed(args.seed)
            statuses = send(server.url, islice(bodies, args.count // 2))
            before = resident(server.process.pid)
            statuses += send(server.url, islice(bodies, args.count - args.count // 2))
            growth = resident(server.process.pid) / before
            assert call(server.url, "/health").status == 200
        log.seek(0)
        tracebacks = log.read().count("Traceback")
    print(f"{statuses.total():,} bodies, seed {args.seed}: {dict(statuses)}, {tracebacks} tracebacks in the log, "
          f"resident set {growth:.2f} times the {before >> 20} MB after half of them")  # fmt: skip
    return int(not set(statuses) <= FINE or tracebacks > 0 or growth > ALLOWED)


def send(url: str, bodies: Iterable[bytes], clients: int = 8) -> Counter:
    """How often each status came. Raises AssertionError for an error that is not of OpenAI's shape."""

    def status(body: bytes) -> int:
        answer = call(url, path_of(body), body, timeout=60)
        if answer.status not in FINE:
            print(f"{answer.status} for {body[:2000]!r}", file=sys.stderr)
        assert answer.status == 200 or answer.error["message"]
        return answer.status

    with ThreadPoolExecutor(clients) as pool:
        return Counter(pool.map(status, bodies))


def path_of(body: bytes) -> str:
    """Where a body of its kind is sent: by a field that is left of it."""
    fields = ((b'"documents"', "rerank"), (b'"query"', "rerank"), (b'"labels"', "classify"), (b'"text_', "score"))
    return next((f"/v1/{path}" for field, path in fields if field in body), "/v1/embeddings")


def fuzzed(seed: int) -> Iterator[bytes]:
    """Bodies without end."""
    rng = random.Random(seed)
    good = [json.dumps(body).encode() for body in good_bodies()]
    while True:
        yield mutated(rng, rng.choice(good))
        yield json.dumps(odd(rng, rng.choice(good_bodies()))).encode()


def good_bodies() -> list[dict[str, Any]]:
    url = data_uri(picture(60, 40))
    image = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    return [
        {"model": "mini", "input": ["a cat", "a dog"], "encoding_format": "base64", "dimensions": None},
        {"messages": user(picture(60, 40), "text"), "mm_processor_kwargs": {"num_crops": 4}},
        {"messages": [[{"role": "system", "content": "Be brief."}, *user(image, "text")], user("b")]},
        {"input": [[1, 2], [3]], "tokenizer": "mini", "truncate_prompt_tokens": -1, "user": "x"},
        {"input": "a text", "add_special_tokens": True, "chat_template_kwargs": {}, "normalize": True},
        {
            "query": "a cat",
            "documents": ["a", {"image": url, "text": "b"}, {"content": [image]}],
            "top_n": 2,
            "return_documents": True,
            "max_tokens_per_doc": 5,
            "instruction": "t2i",
        },
        {"input": [{"image": url}, image], "labels": ["a", "b", "c"], "template": ["{}", "a {}"], "top_n": 0},
        {"text_1": ["a", {"text": "b"}], "text_2": [image, "c"], "instruction": {"query": "a {text}", "document": "b"}},
    ]


def odd(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """The value with about one of its parts replaced, lost, doubled, wrapped or joined by another."""
    if rng.random() < 0.12:
        return anything(rng, depth)
    if rng.random() < 0.04:
        return [value] * rng.choice([1, 2, 70])
    if isinstance(value, dict):
        parts = {key: odd(rng, part, depth + 1) for key, part in value.items() if rng.random() > 0.04}
        return parts | ({rng.choice(NAMES): anything(rng, depth)} if rng.random() < 0.15 else {})
    if isinstance(value, list):
        return [odd(rng, part, depth + 1) for part in value if rng.random() > 0.04]
    return value


def anything(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8)
    if kind == 0 and depth < 6:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 1 and depth < 6:
        return {rng.choice(NAMES): anything(rng, depth + 1) for _ in range(rng.randrange(4))}
    if kind == 2:
        return rng.choice(
            [[0] * 5000, [[1]] * 3000, ["a"] * 2100, {str(n): n for n in range(100)}, deep(rng.randrange(400))]
        )
    return rng.choice(SCALARS)


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def mutated(rng: random.Random, body: bytes) -> bytes:
    """A body with a few bytes or pieces changed, lost, doubled or moved."""
    out = bytearray(body)
    for _ in range(rng.randrange(1, 6)):
        i, j = sorted((rng.randrange(len(out) + 1), rng.randrange(len(out) + 1)))
        j = min(j, i + rng.choice([1, 2, 20, 2000]))
        kind = rng.randrange(4)
        if kind == 0:
            out[i:j] = rng.randbytes(rng.randrange(4))
        elif kind == 1:
            out[i:j] = rng.choice(PIECES)
        elif kind == 2:
            out[i:i] = out[i:j]
        else:
            del out[i:j]
        out = out or bytearray(b"{")
    return bytes(out)


if __name__ == "__main__":
    sys.exit(main())
