"""Seconds that `tasks.ground` takes for one picture without boxes, with the bundled checkpoint on the CPU.

python -m bench.bench_ground [--size 1000] [--repeat 5]
"""

import argparse
import statistics
import time

import torch
from PIL import Image, ImageDraw

from minivlm2vec import Embedder
from minivlm2vec.tasks import ground


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1000, help="width and height of the picture, in pixels")
    parser.add_argument("--repeat", type=int, default=5, help="runs after the one that warms up")
    args = parser.parse_args()
    picture = Image.new("RGB", (args.size, args.size), "white")
    circle = [args.size * share for share in (0.6, 0.2, 0.9, 0.5)]
    ImageDraw.Draw(picture).ellipse(circle, fill="red")
    embedder = Embedder.from_pretrained("mini", device="cpu", show_progress=False)
    crops, seconds = ground(embedder, picture, "red circle").crops, []
    for _ in range(args.repeat):
        start = time.perf_counter()
        ground(embedder, picture, "red circle")
        seconds.append(time.perf_counter() - start)
    threads, median = torch.get_num_threads(), statistics.median(seconds)
    print(f"{args.size} x {args.size}, {crops} crops, {threads} threads: {median:.2f} s "
          f"({min(seconds):.2f} to {max(seconds):.2f}, {args.repeat} runs)")  # fmt: skip


if __name__ == "__main__":
    main()
