"""What a training batch costs in memory, with and without GradCache: `python -m bench.bench_gradcache`.

Each case is a process of its own: forward and backward of the bundled checkpoint, in float32, on pairs of a bundled
picture and its name. Printed is the largest resident set (on CUDA: the largest allocation) beyond what is held before.
GradCache's promise is that its memory depends on the chunk and hardly on the batch.
"""

import argparse
import json
import subprocess
import sys

import torch

from minivlm2vec import Embedder
from minivlm2vec.mini import bundled
from minivlm2vec.rows import Images, read_jsonl
from minivlm2vec.train.gradcache import cached_backward
from minivlm2vec.train.loss import Targets, contrastive_loss

from .bench_encode import commit, machine

CASES = ((8, 0), (8, 8), (1024, 8), (1024, 64), (1024, 0))  # pairs a batch, inputs a chunk (0: all at once)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", type=int, nargs=2, metavar=("PAIRS", "CHUNK"), help="one, in this process, as JSON")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(*args.case, args.device)))
        return
    print(f"{machine()}, commit {commit()}, {args.device}")
    for case in CASES:
        command = [sys.executable, "-m", "bench.bench_gradcache", "--device", args.device, "--case", *map(str, case)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory, loss = json.loads(done.stdout.splitlines()[-1])
        chunk = f"chunks of {case[1]}" if case[1] else "all at once"
        print(f"{case[0]:5} pairs, {chunk:12}: {memory / 1e6:8.0f} MB, loss {loss:.6f}", flush=True)


def measure(pairs: int, chunk: int, device: str) -> tuple[float, float]:
    """Bytes beyond what is held before, and the loss (which the chunk does not change)."""
    e = Embedder.from_pretrained("mini", device=device, dtype=torch.float32, optimize=False, show_progress=False)
    e.model.requires_grad_(True)
    inputs = _inputs(e, pairs)
    size = chunk or len(inputs)
    chunks = [inputs[i : i + size] for i in range(0, len(inputs), size)]
    about = Targets(torch.arange(pairs), torch.ones(pairs, dtype=torch.bool), torch.arange(pairs))
    about = Targets(*(x.to(device) for x in (about.owner, about.positive, about.content)))
    for p in e.model.parameters():
        p.grad = torch.zeros_like(p)
    before = _held(device)
    loss, _ = cached_backward(
        lambda part: e.model(e.processor.pack(part).to(device), normalize=False), chunks,
        lambda v: contrastive_loss(v[:pairs], v[pairs:], about, temperature=0.05), device=device,
    )  # fmt: skip
    return _peak(device) - before, float(loss)


def _inputs(e: Embedder, pairs: int) -> list:
    rows = list(read_jsonl(bundled() / "MMEB-eval/pictures_seen.jsonl"))
    rows = [rows[i % len(rows)] for i in range(pairs)]
    images = Images(bundled() / "MMEB-eval/images.zip")
    items = [{"image": images.source(row["path"])} for row in rows] + [{"text": row["label"]} for row in rows]
    return [e.processor.load(e.processor.plan(item)) for item in items]


def _held(device: str) -> int:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the largest resident set is counted anew
    return _status("VmRSS")


def _peak(device: str) -> int:
    return _status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated(device)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":")) * 1024


if __name__ == "__main__":
    main()
