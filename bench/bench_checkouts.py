"""Is this checkout slower than another? `python -m bench.bench_checkouts OTHER [mixed] [text] [image] [plain]`.

mixed    8 short texts, 4 images at 4 crops and 2 long texts at the `small` sizes, by the fast model
text     64 short texts and 8 long ones at the `small` sizes, by the fast model
image    one 4-crop image with 20 tokens of text at the published sizes, by the fast model (9 GB a process in bfloat16)
plain    `mixed` by the plain model here, against the fast one here without prepack (OTHER is not run)

Each side is a process of its own, with its checkout's code and random weights of the same seed; they compute in turn,
A B A B …, while the other waits. MALLOC_MMAP_THRESHOLD_ and its kin, where set, hold for both. Prints both medians, the
ratio pair by pair (above 1: this one is faster) and the greatest difference of the vectors.
"""

import argparse
import base64
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from .bench_encode import commit, machine

ROOT = Path(__file__).parents[1]
PARTS = ("mixed", "text", "image", "plain")

# Runs in either checkout, so it knows both ways to make a model fast. Answers each line with seconds and vectors.
WORKER = """
import base64, io, sys, time
import numpy as np, torch
from PIL import Image
from minivlm2vec import Embedder, VLM2VecConfig
from minivlm2vec.info import empty_model
from minivlm2vec.new_checkpoint import base_config

part, folder, dtype, way, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
dtype = getattr(torch, dtype)


def full_model():
    model = empty_model(VLM2VecConfig.from_dict(base_config("full")))
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    for key, p in list(model.named_parameters()):
        value = torch.empty(p.shape, dtype=dtype)
        for start in range(0, p.numel(), block.numel()):
            rows = value.view(-1)[start : start + block.numel()]
            rows.copy_(block[: len(rows)])
        if "norm" in key and key.endswith("weight"):
            value.fill_(1)
        owner, _, leaf = key.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    return model.eval()


def fast(model):
    try:
        from minivlm2vec.inference import optimize
        return optimize(model)
    except ImportError:
        from minivlm2vec.prepack import can_prepack, prepack
        return prepack(model) if can_prepack(model) else model


if part == "image":
    from minivlm2vec.processor import Processor
    from bench.bench_encode import _InMemory
    model = fast(full_model())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (672, 672, 3), np.uint8))
    text = "<|image_1|>" + "x" * 16
    batch = Processor(_InMemory(), model.config)([{"text": text, "image": image}])
else:
    from bench.bench_encode import mixed_inputs
    options = {"": {}, "plain": {"optimize": False}, "unpacked": {"prepack": False}}[way]
    e = Embedder.from_pretrained(folder, device="cpu", dtype=dtype, show_progress=False, **options)
    items = mixed_inputs()
    if part == "text":
        items = [f"a picture of {i} dogs" for i in range(64)] + [x for x in items if isinstance(x, str)][-2:] * 4
    model, batch = e.model, e.processor.pack([e.load(e.plan(x)) for x in items])
print("ready", flush=True)
for _ in sys.stdin:
    with torch.inference_mode():
        start = time.perf_counter()
        out = model(batch)
        seconds = time.perf_counter() - start
    print(seconds, base64.b64encode(out.float().numpy().tobytes()).decode(), flush=True)
"""


class Side:
    """A process that computes when asked."""

    def __init__(self, checkout: Path, *arguments: str):
        path = os.pathsep.join([str(checkout), str(checkout / "kernels")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *arguments], cwd=checkout, env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def __call__(self) -> tuple[float, np.ndarray]:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        seconds, data = self._answer().split()
        return float(seconds), np.frombuffer(base64.b64decode(data), np.float32)

    def _answer(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"a side ended with {self.process.wait()}")
        return line

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout's folder")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=9, help="pairs of runs")
    parser.add_argument(
        "--restarts", type=int, default=1, help="new processes so often: where memory lies moves a few %%"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    other = commit(args.other)
    print(f"{machine()}, {args.threads} threads; this checkout {commit()}, the other {other}")
    from minivlm2vec.new_checkpoint import new_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        new_checkpoint(folder, preset="small", seed=1)
        for part in args.parts or ("mixed", "text", "plain"):
            for dtype in args.dtypes:
                compare(part, folder, dtype, args)


def compare(part: str, folder: str, dtype: str, args: argparse.Namespace) -> None:
    if part == "plain":
        names, checkouts, ways = ("plain", "fast, not packed"), (ROOT, ROOT), ("plain", "unpacked")
    else:
        names, checkouts, ways = ("this", "other"), (ROOT, args.other.resolve()), ("", "")
    work = "mixed" if part == "plain" else part
    pairs: list[list[float]] = []
    for _ in range(args.restarts):
        sides = []
        try:
            for checkout, way in zip(checkouts, ways, strict=True):
                sides.append(Side(checkout, work, folder, dtype, way, str(args.threads)))
            warm = [side()[1] for side in sides]
            pairs += [[side()[0] for side in sides] for _ in range(args.repeat)]
        finally:
            for side in sides:
                side.close()
    a, b = (statistics.median(p[i] for p in pairs) for i in range(2))
    ratios = sorted(p[1] / p[0] for p in pairs)
    print(f"{part}, {dtype}: {names[0]} {a * 1e3:.0f} ms, {names[1]} {b * 1e3:.0f} ms; ratio "
          f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}, {len(pairs)} pairs); greatest "
          f"difference of the vectors {abs(warm[0] - warm[1]).max():.1e}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
