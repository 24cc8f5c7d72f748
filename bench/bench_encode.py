"""Cost of encoding on a CPU: `python -m bench.bench_encode [mixed] [image] [prepare]`.

mixed    a mixed batch at the `small` sizes, against the same weights run the original's way; ratio and floor
image    one 4-crop image at full size (16 GB of memory in float32); share of the floor that is reached
prepare  a 12-megapixel JPEG to crops: images per second and core, exact and `fast_decode`

The floor is the FLOPs that are really needed (causal half, no padding, no unused layer, last layer for last tokens
alone) over the machine's matmul rate, measured in the same run. Medians of interleaved repetitions.
"""

import argparse
import io
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from minivlm2vec import Embedder, VLM2VecConfig
from minivlm2vec.inference import optimize
from minivlm2vec.info import image_flops, text_flops
from minivlm2vec.new_checkpoint import base_config, byte_tokenizer, new_checkpoint
from minivlm2vec.processor import Processor
from minivlm2vec.weights import empty_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["mixed", "image", "prepare", []], default=[])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{machine()}, {args.threads} threads, torch {torch.__version__}, commit {commit()}")
    parts = args.parts or ["mixed", "image", "prepare"]
    for dtype in args.dtypes if {"mixed", "image"} & set(parts) else ():
        if "mixed" in parts:
            mixed(getattr(torch, dtype), args.repeat)
        if "image" in parts:
            one_image(getattr(torch, dtype), args.repeat)
    if "prepare" in parts:
        prepare(args.repeat)


def mixed(dtype: torch.dtype, repeat: int) -> None:
    """8 short texts, 4 images of different aspect ratios at 4 crops, 2 texts of about 280 words."""
    from .original_way import OriginalWay

    with tempfile.TemporaryDirectory() as folder:
        new_checkpoint(folder, preset="small", seed=1)
        e = Embedder.from_pretrained(folder, device="cpu", dtype=dtype, show_progress=False)
        plain = Embedder.from_pretrained(folder, device="cpu", dtype=dtype, optimize=False, show_progress=False)
        theirs = OriginalWay(plain.model)
    items = mixed_inputs()
    loaded = [e.load(e.plan(x)) for x in items]
    batch = e.processor.pack(loaded)
    with torch.inference_mode():
        ours, original = e.model(batch), theirs(batch, 4)
        cosine = torch.cosine_similarity(ours, original.float()).min().item()
        if cosine < (0.999 if dtype == torch.float32 else 0.99):
            raise SystemExit(f"the two disagree (cosine {cosine:.5f}): no time is reported")
        times = interleave({"ours": lambda: e.model(batch), "original": lambda: theirs(batch, 4)}, repeat)
    flops = sum(text_flops(e.model.config, n) for n in batch.lengths)
    flops += sum(image_flops(e.model.config, g) for g in batch.grids)
    rate = matmul_rate(dtype)
    floor = flops / rate
    a, b = times["ours"], times["original"]
    print(f"mixed, small, {name(dtype)}: {batch.num_tokens} tokens, {len(batch.grids)} images; ours {a * 1e3:.0f} ms, "
          f"the original's way {b * 1e3:.0f} ms, ratio {b / a:.2f}x; floor {floor * 1e3:.0f} ms at {rate / 1e9:.0f} "
          f"GFLOP/s, {100 * floor / a:.0f}% of it reached; smallest cosine {cosine:.5f}")  # fmt: skip


def one_image(dtype: torch.dtype, repeat: int) -> None:
    """One square image at 4 crops with 20 tokens of text, at the published sizes."""
    config = VLM2VecConfig.from_dict(base_config("full"))
    model = optimize(random_model(config, dtype))
    processor = Processor(_InMemory(), config)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (672, 672, 3), np.uint8))
    batch = processor([{"text": "<|image_1|>" + "x" * 16, "image": image}])
    with torch.inference_mode():
        if not model(batch).isfinite().all():
            raise SystemExit("the vector is not finite: no time is reported")
        rates = [matmul_rate(dtype)]
        seconds = interleave({"ours": lambda: model(batch)}, max(3, repeat // 2))["ours"]
        rates.append(matmul_rate(dtype))
    flops = sum(text_flops(config, n) for n in batch.lengths) + sum(image_flops(config, g) for g in batch.grids)
    rate = statistics.median(rates)
    print(f"one image, full, {name(dtype)}: {batch.num_tokens} tokens, {flops / 1e12:.2f} TFLOP in {seconds:.2f} s; "
          f"floor {flops / rate:.2f} s at {rate / 1e9:.0f} GFLOP/s, "
          f"{100 * flops / rate / seconds:.0f}% of it reached")  # fmt: skip


def prepare(repeat: int) -> None:
    """Crops of a 12-megapixel JPEG, one thread and two, against JPEG decoding plus Pillow's resize alone."""
    data = jpeg(4000, 3000)
    config = VLM2VecConfig.from_dict(base_config("small"))
    for num_crops in (4, 16):
        exact, fast = (Processor(_InMemory(), config, num_crops=num_crops, fast_decode=f) for f in (False, True))
        plan = exact.plan({"image": data})
        _, w = plan.grids[0]
        size = (w * 336, int(w * 336 / (4 / 3)))

        def pillow(size=size):
            return Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.Resampling.BILINEAR)

        def gain(work: Callable, n: int = 8) -> float:
            """How much faster two threads are than one; Pillow's own tells what the machine has to give."""
            ratios = []
            for _ in range(3):
                times = []
                for workers in (1, 2):
                    with ThreadPoolExecutor(workers) as pool:
                        times.append(seconds(lambda pool=pool: list(pool.map(lambda _: work(), range(n)))))
                ratios.append(times[0] / times[1])
            return statistics.median(ratios)

        times = interleave(
            {"pillow": pillow, "exact": lambda e=exact, p=plan: e.load(p), "fast": lambda f=fast, p=plan: f.load(p)},
            repeat,
        )
        ours, theirs = gain(lambda e=exact, p=plan: e.load(p)), gain(pillow)
        a, b = (x.load(plan).crops[0].astype(np.int64) for x in (exact, fast))
        print(f"prepare, 12 megapixels in {len(data) / 1e6:.1f} MB, {num_crops} crops: "
              f"{1 / times['exact']:.1f} images/s and core exact ({times['exact'] / times['pillow']:.3f}x decoding "
              f"plus resize alone), two workers {ours:.2f}x one (Pillow alone {theirs:.2f}x); "
              f"fast_decode {times['exact'] / times['fast']:.2f}x the exact path, mean pixel difference "
              f"{abs(a - b).mean():.2f}; cosine to the exact vector {fast_cosine(data, num_crops):.6f}")  # fmt: skip


def fast_cosine(data: bytes, num_crops: int) -> float:
    """Cosine of the vectors of the exact and the fast path, at the `small` sizes with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        new_checkpoint(folder, preset="small", seed=1)
        vectors = [
            Embedder.from_pretrained(
                folder, device="cpu", num_crops=num_crops, fast_decode=fast, show_progress=False
            ).encode([{"text": "<|image_1|>\nRepresent the given image.\n", "image": data}])[0]
            for fast in (False, True)
        ]
    return float(vectors[0] @ vectors[1])


def mixed_inputs() -> list:
    rng = np.random.default_rng(0)
    shapes = [(640, 480), (480, 640), (1200, 500), (500, 500)]  # 2x2, 2x2, 1x2 and 2x2 crops
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in shapes]
    short = [f"a picture of {i} dogs" for i in range(8)]
    words = ["river", "stone", "lamp", "cloud", "tree"]
    # About 280 words are 380 tokens of the published tokenizer; here a byte is a token.
    long = [" ".join(words[(i * k) % 5] for i in range(68)) for k in (2, 3)]
    return [*short, *({"text": "<|image_1|>\nRepresent the given image.\n", "image": i} for i in images), *long]


def random_model(config: VLM2VecConfig, dtype: torch.dtype):
    """The model with weights cut from one block of random numbers: quick to make, right for timing."""
    model = empty_model(config)
    block = torch.randn(1 << 20) * 0.02
    for key, p in list(model.named_parameters()):
        value = torch.empty(p.shape, dtype=dtype)
        flat = value.view(-1)
        for start in range(0, flat.numel(), block.numel()):
            part = flat[start : start + block.numel()]
            part.copy_(block[: part.numel()])
        if "norm" in key and key.endswith("weight"):
            value.fill_(1)
        module, _, leaf = key.rpartition(".")
        setattr(model.get_submodule(module), leaf, torch.nn.Parameter(value, requires_grad=False))
    return model.eval()


def matmul_rate(dtype: torch.dtype, n: int = 2048, k: int = 4096) -> float:
    """FLOP/s of the best of several [n, k] x [k, k] products."""
    a, b = torch.randn(n, k).to(dtype), torch.randn(k, k).to(dtype)
    out = torch.empty(n, k, dtype=dtype)
    best = min(seconds(lambda: torch.mm(a, b.t(), out=out)) for _ in range(6))
    return 2 * n * k * k / best


def interleave(functions: dict[str, Callable], repeat: int) -> dict[str, float]:
    """Median seconds of each, one after the other, round after round, after a warm-up."""
    for f in functions.values():
        f()
    rounds = [{key: seconds(f) for key, f in functions.items()} for _ in range(repeat)]
    return {key: statistics.median(r[key] for r in rounds) for key in functions}


def seconds(f: Callable) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def jpeg(width: int, height: int) -> bytes:
    """A photograph-like JPEG: smooth shapes and some grain."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), np.uint8))
    image = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    image += rng.integers(-8, 9, image.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class _InMemory:
    """A tokenizer for benches: one token a byte."""

    def __init__(self):
        self.tokenizer = byte_tokenizer(32064)

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def machine() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            model = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{model}, {os.cpu_count()} cores"


def commit(folder: str | os.PathLike = ".") -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return "unknown"


if __name__ == "__main__":
    main()
