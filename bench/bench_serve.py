"""The server against calling the Embedder directly: `python -m bench.bench_serve [MODEL]`.

direct       Embedder.encode over the same inputs in one list: what the server cannot beat
server       `minivlm2vec serve`, 1, 8 and 64 clients, each with one request under way at a time
unbatched    the same with --max-batch-inputs 1
overload     requests at twice the rate that 64 clients reached, whatever comes back: 429s, the accepted ones' p99,
             and whether every request got an answer

Server, clients and model share the machine, on loopback. Without MODEL a random checkpoint is made (--preset).
"""

import argparse
import base64
import csv
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minivlm2vec import Embedder
from minivlm2vec.new_checkpoint import new_checkpoint

from .bench_encode import commit, machine
from .http_load import Load

ROOT = Path(__file__).parents[1]
WORDS = (
    "a the cat dog of in red street bicycle near house what is shown two people water sky train sign under one who "
    "stands with large green tree on"
)


@dataclass
class Row:
    """One measurement. Times in milliseconds; ratio: of the direct call's inputs per second."""

    mode: str
    mix: str
    clients: int
    inputs_per_second: float
    ratio: float = 1.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    requests: int = 0
    statuses: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder or Hub name")
    parser.add_argument("--preset", default="small", help="of the random checkpoint (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=list(MIXES))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--inputs-per-request", type=int, default=1)
    parser.add_argument("--inputs", type=int, default=256, help="different ones in a mix (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement (%(default)s)")
    parser.add_argument("--skip", nargs="*", default=[], choices=["unbatched", "overload"])
    parser.add_argument("--serve-args", default="", help="more arguments of `minivlm2vec serve`, in one string")
    parser.add_argument("--output", metavar="CSV")
    args = parser.parse_args()
    print(f"{machine()}, {device_name(args.device)}, torch {torch.__version__}, commit {commit()}, "
          f"load average before: {os.getloadavg()[0]:.2f}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args.model = args.model or str(new_checkpoint(Path(folder) / args.preset, preset=args.preset))
        rows = measure(args)
    if args.output:
        write_csv(args, rows)


def measure(args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    items = {mix: MIXES[mix](args.inputs) for mix in args.mixes}
    direct = measure_direct(args, items)
    for mix in args.mixes:
        rows.append(show(Row("direct", mix, 0, direct[mix])))
    with server(args) as url:
        for mix, clients in itertools.product(args.mixes, args.clients):
            rows.append(show(closed_loop(args, url, "server", mix, items[mix], clients, direct[mix])))
    if "unbatched" not in args.skip:
        with server(args, "--max-batch-inputs", "1") as url:
            for mix in args.mixes:
                row = closed_loop(args, url, "unbatched", mix, items[mix], max(args.clients), direct[mix])
                rows.append(show(row))
    if "overload" not in args.skip:
        for mix in args.mixes:
            fastest = max(r.inputs_per_second for r in rows if r.mode == "server" and r.mix == mix)
            rows.append(show(overload(args, mix, items[mix], fastest, direct[mix])))
    return rows


def measure_direct(args: argparse.Namespace, items: dict[str, list]) -> dict[str, float]:
    """Inputs per second of Embedder.encode, by mix."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    embedder = Embedder.from_pretrained(args.model, device=args.device, dtype=dtype, show_progress=False)
    speeds = {}
    for mix, inputs in items.items():
        embedder.encode(inputs[: len(inputs) // 4])
        count, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < args.seconds or count == 0:
            embedder.encode(inputs)
            count += len(inputs)
        speeds[mix] = count / seconds if seconds else 0.0
    del embedder
    if args.device.startswith("cuda"):
        torch.cuda.empty_cache()
    return speeds


@contextmanager
def server(args: argparse.Namespace, *more: str):
    """`minivlm2vec serve` on a free port; yields its URL."""
    command = [sys.executable, "-m", "minivlm2vec", "serve", args.model, "--port", "0", "--device", args.device,
               *(["--dtype", args.dtype] if args.dtype else []), *args.serve_args.split(), *more]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               env=os.environ | {"PYTHONPATH": path})  # fmt: skip
    try:
        found = re.search(r"http://\S+", process.stdout.readline())
        if not found:
            raise RuntimeError(f"the server did not start: {' '.join(command)}")
        yield found.group()
        if process.poll() is not None:
            raise RuntimeError(f"the server ended by itself with {process.returncode}")
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def closed_loop(args, url: str, mode: str, mix: str, items: list, clients: int, direct: float) -> Row:
    load = run_clients(url, items, args.inputs_per_request, clients=clients, seconds=args.seconds)
    return as_row(mode, mix, clients, load, direct)


def overload(args, mix: str, items: list, fastest: float, direct: float) -> Row:
    """Twice what the server answered before, by time and not by answers."""
    rate = 2 * fastest / args.inputs_per_request
    most = str(max(8, int(rate / 2)))  # a second of work, so that the server is full soon
    with server(args, "--max-requests", most) as url:
        run_clients(url, items, args.inputs_per_request, clients=8, seconds=min(args.seconds, 3))  # it knows its speed
        load = run_clients(url, items, args.inputs_per_request, rate=rate, seconds=args.seconds)
        after = run_clients(url, items, args.inputs_per_request, clients=1, seconds=1)
    row = as_row("overload", mix, 0, load, direct)
    lost = load.statuses["lost"]
    row.statuses += f"; lost {lost}; answers afterwards: {after.statuses[200] > 0}"
    return row


def as_row(mode: str, mix: str, clients: int, load: Load, direct: float) -> Row:
    speed = load.inputs / load.wall
    ms = [1000 * s for s in sorted(load.seconds)] or [float("nan")]
    p50, p95, p99 = (ms[min(len(ms) - 1, int(len(ms) * p))] for p in (0.5, 0.95, 0.99))
    statuses = ", ".join(f"{k} x {v}" for k, v in sorted(load.statuses.items(), key=str) if k != "lost")
    return Row(mode, mix, clients, speed, speed / direct, p50, p95, p99, sum(load.statuses.values()), statuses)


# Clients, in a process of their own


def run_clients(url: str, items: list, inputs_per_request: int, **how) -> Load:
    """how: clients=N, each with one request at a time, or rate=R requests per second; seconds."""
    bodies = [json.dumps(body) for body in as_bodies(items, inputs_per_request)]
    task = json.dumps({"url": url, "bodies": bodies, "inputs": inputs_per_request, **how})
    command = [sys.executable, "-m", "bench.http_load"]
    result = subprocess.run(command, input=task, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
                            timeout=how["seconds"] * 3 + 120)  # fmt: skip
    out = json.loads(result.stdout)
    statuses = Counter({int(k) if k.isdigit() else k: v for k, v in out["statuses"].items()})
    return Load(out["seconds"], statuses, out["inputs"], out["wall"])


def as_bodies(items: list, inputs_per_request: int) -> list[dict]:
    """Requests; a text goes as a message too, so that a request can hold both."""
    bodies = []
    for i in range(0, len(items) - inputs_per_request + 1, inputs_per_request):
        group = items[i : i + inputs_per_request]
        if all(isinstance(x, str) for x in group):
            bodies.append({"input": group, "encoding_format": "base64"})
        else:
            bodies.append({"messages": [as_message(x) for x in group], "encoding_format": "base64"})
    return bodies


def as_message(item: str | dict) -> list[dict]:
    if isinstance(item, str):
        return [{"role": "user", "content": item}]
    uri = "data:image/jpeg;base64," + base64.b64encode(item["image"]).decode()
    text = item["text"].removeprefix("<|image_1|> ")
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


# Inputs


def texts(n: int) -> list[str]:
    """5 to 40 words."""
    rng = random.Random(0)
    return [f"{i} " + " ".join(rng.choices(WORDS.split(), k=rng.randint(5, 40))) for i in range(n)]


def images(n: int) -> list[dict]:
    """JPEGs of 640 x 480 pixels with an instruction; 16 different ones."""
    files = [jpeg(640, 480, seed) for seed in range(min(n, 16))]
    return [{"text": "<|image_1|> Represent the given image.", "image": files[i % len(files)]} for i in range(n)]


def mixed(n: int) -> list[str | dict]:
    """Three texts for an image."""
    return [image if i % 4 == 3 else text for i, (text, image) in enumerate(zip(texts(n), images(n), strict=True))]


MIXES = {"text": texts, "image": images, "mixed": mixed}


def jpeg(width: int, height: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# Output


def show(row: Row) -> Row:
    print(
        f"{row.mode:<9} {row.mix:<5} clients {row.clients:>2}  {row.inputs_per_second:>9.1f} inputs/s  "
        f"{100 * row.ratio:>5.1f}% of direct  p50 {row.p50:>8.1f}  p95 {row.p95:>8.1f}  p99 {row.p99:>8.1f} ms  "
        f"{row.statuses}",
        flush=True,
    )
    return row


def write_csv(args: argparse.Namespace, rows: list[Row]) -> None:
    about = {"machine": machine(), "device": device_name(args.device), "torch": torch.__version__, "commit": commit(),
             "model": Path(args.model).name, "inputs_per_request": args.inputs_per_request}  # fmt: skip
    with open(args.output, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*about, *asdict(rows[0])])
        writer.writeheader()
        writer.writerows(about | asdict(row) for row in rows)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


if __name__ == "__main__":
    main()
