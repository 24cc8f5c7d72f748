"""Memory of a server that runs for long: `python -m bench.soak_server [MODEL]`.

Sends mixed requests to `minivlm2vec serve`: texts of all lengths, token ids, images of many sizes, and bad ones. Prints
the resident set of the server with its decoders after the first 200 and every 500; ends with 1 where the last is more
than 1.2 times the first.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from tests.support.serving import call, data_uri, picture, resident, serve_process

from .bench_encode import commit, machine

WARM, STEP, ALLOWED = 200, 500, 1.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="mini", help="a folder or Hub name (%(default)s)")
    parser.add_argument("--requests", type=int, default=5000, help="(%(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="requests under way at a time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args()
    print(f"{machine()}, commit {commit()}")
    with serve_process(args.model) as server:
        steps = [WARM, *range(STEP, args.requests, STEP), args.requests]
        statuses, sizes = soak(server.url, server.process.pid, requests(args.seed), steps, args.clients, print)
    growth = sizes[-1] / sizes[0]
    print(f"statuses {dict(statuses)}; resident set {growth:.2f} times that after {WARM} requests")
    return int(growth > ALLOWED or set(statuses) > {200, 400})


def soak(
    url: str, pid: int, bodies: Iterator[dict], steps: list[int], clients: int, report: Callable[[str], object]
) -> tuple[Counter, list[int]]:
    """Sends bodies until `steps[-1]` are sent. Returns how often each status came, and the resident set in bytes after
    each of the steps."""
    statuses: Counter = Counter()
    sizes, sent = [], 0
    with ThreadPoolExecutor(clients) as pool:
        for step in steps:
            statuses.update(
                pool.map(lambda body: call(url, body=body, timeout=120).status, islice(bodies, step - sent))
            )
            sent = step
            sizes.append(resident(pid))
            report(f"{sent:>6,} requests: {sizes[-1] >> 20} MB")
    return statuses, sizes


def requests(seed: int) -> Iterator[dict]:
    """Bodies without end: 14 of 20 are texts, 4 images, one token ids, one a mistake."""
    rng = random.Random(seed)
    while True:
        kind = rng.randrange(20)
        if kind < 14:
            texts = [words(rng, rng.randrange(1, 80)) for _ in range(rng.randrange(1, 8))]
            yield {"input": texts, "encoding_format": rng.choice(["float", "base64"])}
        elif kind < 18:
            yield {"messages": [message(rng) for _ in range(rng.randrange(1, 3))]}
        elif kind == 18:
            ids = [rng.randrange(1, 300) for _ in range(rng.randrange(1, 400))]
            yield {"input": ids, "tokenizer": "mini", "truncate_prompt_tokens": -1}
        else:
            yield rng.choice([{"input": ""}, {"input": [1, "a"]}, {"messages": [[]]}, {"x" * rng.randrange(9999): 1}])


def words(rng: random.Random, n: int) -> str:
    return " ".join(f"w{rng.randrange(10**6)}" for _ in range(n))


def message(rng: random.Random) -> list[dict]:
    image = picture(rng.randrange(20, 900), rng.randrange(20, 900), rng.randrange(1000))
    url = data_uri(image, rng.choice(["PNG", "JPEG", "WEBP"]))
    text = {"type": "text", "text": words(rng, rng.randrange(1, 30))}
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, text]}]


if __name__ == "__main__":
    sys.exit(main())
