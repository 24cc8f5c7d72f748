"""How long the model waits for its input while `embed` runs, and how fast exact search is.

    python bench/bench_embed_pipeline.py pipeline --model PATH --workers 1 2 4 8 16
    python bench/bench_embed_pipeline.py search --rows 10000 100000          (1000000 needs 6.2 GB of disk and memory)

`pipeline` embeds JPEGs made for the purpose, once for each number of threads, after a warm-up run. `search` looks for
the 10 nearest of N random vectors [N, 3072] float16, the same vectors and query for everyone, best of several runs:
  floor      reading the same bytes once (a sum)                      what memory allows
  ours       minivlm2vec.files.retrieval.top_k, vectors in memory
  ours-file  the same over the .npy, mapped; it is in the page cache by then
  numpy      chunks to float32, a matrix product, argpartition
  faiss      IndexScalarQuantizer, fp16, inner product (faiss-cpu, where installed)
All find the same rows, or the bench stops. Every line says the device, the threads, and the load of the machine.
"""

import argparse
import csv
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minivlm2vec import Embedder, prompts
from minivlm2vec.files import open_vectors
from minivlm2vec.files.pipeline import Pipeline
from minivlm2vec.files.retrieval import top_k
from minivlm2vec.files.rows import Columns, Row

DIMENSION, TOP, CHUNK = 3072, 10, 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pipeline", "search"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", metavar="FILE", help="append the lines to it")
    parser.add_argument("--model", help="checkpoint (pipeline)")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 768], metavar=("W", "H"))
    parser.add_argument("--num-crops", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = bench_pipeline if args.what == "pipeline" else bench_search
        write(args.csv, bench(args, Path(folder)))


def bench_pipeline(args: argparse.Namespace, folder: Path) -> list[dict]:
    if args.model is None:
        raise SystemExit("--model is needed")
    rows = [Row(i, None, {"image": save_picture(folder / f"{i}.jpg", args.size, i)}) for i in range(args.images)]
    embedder = Embedder.from_pretrained(args.model, device=args.device, num_crops=args.num_crops)
    lines = []
    run_pipeline(embedder, rows[:8], folder, 2)  # kernels compile, the page cache fills
    for workers in args.workers:
        watch = run_pipeline(embedder, rows, folder, workers)
        lines.append({
            "bench": "pipeline", **machine(args.device), "workers": workers, "images": len(rows),
            "size": "x".join(map(str, args.size)), "num_crops": args.num_crops,
            "images_per_s": round(len(rows) / watch.elapsed, 2), "waits": round(watch.waited / watch.elapsed, 4),
        })  # fmt: skip
        print(lines[-1], file=sys.stderr)
    return lines


def run_pipeline(embedder: Embedder, rows: list[Row], folder: Path, workers: int):
    columns = Columns(None, "image", folder)
    pipeline = Pipeline(embedder, columns, prompt=prompts.IMAGE, num_workers=workers)
    parts = ((n, rows[start : start + 512]) for n, start in enumerate(range(0, len(rows), 512)))
    for result in pipeline.run(parts):
        assert not result.errors
    return pipeline.watch


def save_picture(path: Path, size: list[int], seed: int) -> str:
    """A JPEG with detail at every scale, as photographs have."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((size[1], size[0], 3), np.float32)
    for scale in (4, 32, 256):
        noise = rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8)
        picture += np.asarray(Image.fromarray(noise).resize(tuple(size), Image.Resampling.BICUBIC), np.float32) / 3
    Image.fromarray(picture.astype(np.uint8)).save(path, quality=90)
    return path.name


def bench_search(args: argparse.Namespace, folder: Path) -> list[dict]:
    lines = []
    query = torch.nn.functional.normalize(torch.randn(DIMENSION, generator=torch.Generator().manual_seed(1)), dim=0)
    for n in args.rows:
        path = write_vectors(folder / "vectors.npy", n)
        found = {}
        for name, run, prepare in contestants(args.device, path, n, query):
            state = prepare()
            seconds, found[name] = best_of(args.repeat, lambda run=run, state=state: run(state))
            del state
            size = n * DIMENSION * 2
            lines.append({"bench": "search", **machine("cpu" if name in ("numpy", "faiss") else args.device), "rows": n,
                          "who": name, "ms": round(seconds * 1e3, 3),
                          "GB_per_s": round(size / seconds / 1e9, 2)})  # fmt: skip
            print(lines[-1], file=sys.stderr)
        check(found)
        path.unlink()
    return lines


def contestants(device: str, path: Path, n: int, query: torch.Tensor) -> list[tuple[str, Callable, Callable]]:
    """(name, run(state) -> rows found, prepare() -> state)."""

    def in_memory():
        x = torch.empty(n, DIMENSION, dtype=torch.float16, device=device)
        for start, chunk in open_vectors(path).chunks():
            x[start : start + len(chunk)] = chunk.to(device)
        return x

    def ours(x):
        chunks = ((s, x[s : s + CHUNK * 16]) for s in range(0, n, CHUNK * 16))
        return top_k(query.to(device), chunks, TOP)[1].tolist()

    def ours_file(vectors):
        return top_k(query.to(device), ((s, c.to(device)) for s, c in vectors.chunks()), TOP)[1].tolist()

    def with_numpy(x):
        scores = np.concatenate([x[s : s + CHUNK].astype(np.float32) @ query.numpy() for s in range(0, n, CHUNK)])
        top = np.argpartition(-scores, TOP)[:TOP]
        return top[np.argsort(-scores[top])].tolist()

    everyone = [
        ("floor", lambda x: x.view(torch.float32).sum().item() and None, in_memory),
        ("ours", ours, in_memory),
        ("ours-file", ours_file, lambda: open_vectors(path)),
        ("numpy", with_numpy, lambda: np.load(path)),
    ]
    try:
        import faiss
    except ImportError:
        print("faiss-cpu is not installed: left out", file=sys.stderr)
        return everyone

    def build():
        index = faiss.IndexScalarQuantizer(DIMENSION, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        index.train(np.zeros((1, DIMENSION), np.float32))
        for _, chunk in open_vectors(path).chunks():
            index.add(chunk.float().numpy())
        return index

    return [*everyone, ("faiss", lambda index: index.search(query[None].numpy(), TOP)[1][0].tolist(), build)]


def write_vectors(path: Path, n: int) -> Path:
    """Random float16 vectors of length 1, a few thousand in memory at a time."""
    out = np.lib.format.open_memmap(path, "w+", np.float16, (n, DIMENSION))
    rng = np.random.default_rng(0)
    for start in range(0, n, CHUNK):
        x = rng.standard_normal((min(CHUNK, n - start), DIMENSION), np.float32)
        out[start : start + CHUNK] = x / np.linalg.norm(x, axis=1, keepdims=True)
    out.flush()
    return path


def best_of(repeat: int, run: Callable) -> tuple[float, list[int] | None]:
    best, found = float("inf"), run()
    for _ in range(repeat):
        start = time.perf_counter()
        found = run()  # ends with the rows on the host, so a GPU is done
        best = min(best, time.perf_counter() - start)
    return best, found


def check(found: dict[str, list[int] | None]) -> None:
    rows = {name: set(r) for name, r in found.items() if r is not None}
    if any(r != rows["ours"] for r in rows.values()):
        raise SystemExit(f"different rows were found: {found}")


def machine(device: str) -> dict:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    load = round(os.getloadavg()[0], 1)
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": load}


def write(path: str | None, lines: list[dict]) -> None:
    if path is None or not lines:
        return
    new = not Path(path).exists()
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, lines[0].keys())
        if new:
            writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
