"""Images to crops in one thread and in two: `python -m bench.bench_decode [OTHER] [--repeat 5]`.

Each side (this checkout, another one, Pillow's decoder and resize alone) is a process of its own; they work in turn on
the same files, so a busy machine slows all alike. Prints images a second with one worker, and how many times as many
two workers make; what Pillow alone gains is what the machine has to give.
"""

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from .bench_encode import commit, jpeg, machine

ROOT = Path(__file__).parents[1]
IMAGES = 6  # a run
FORMATS = {"JPEG": {"quality": 90}, "PNG": {"compress_level": 1}, "WEBP": {"quality": 90, "method": 0}}

WORKER = """
import io, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from PIL import Image
from minivlm2vec.images import hd_size, image_crops, open_image

def ours(data):
    return image_crops(open_image(data), 4)

def pillow(data):
    image = Image.open(io.BytesIO(data)).convert("RGB")
    size = hd_size(*image.size, 4)
    return image.resize((size.width, size.height), Image.Resampling.BILINEAR)

work = pillow if sys.argv[1] == "pillow" else ours
print("ready", flush=True)
for line in sys.stdin:
    path, workers, images = line.split()
    data = Path(path).read_bytes()
    with ThreadPoolExecutor(int(workers)) as pool:
        start = time.perf_counter()
        list(pool.map(work, [data] * int(images)))
        print(time.perf_counter() - start, flush=True)
"""


class Side:
    """A process that decodes when asked."""

    def __init__(self, checkout: Path, kind: str):
        path = os.pathsep.join([str(checkout), str(checkout / "kernels")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, kind], env=os.environ | {"PYTHONPATH": path}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stdin is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.stdout.readline()

    def rate(self, path: Path, workers: int) -> float:
        """Images a second."""
        print(path, workers, IMAGES, file=self.stdin, flush=True)
        return IMAGES / float(self.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", nargs="?", type=Path, help="another checkout's folder")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    print(f"{machine()}, commit {commit()}, load {os.getloadavg()[0]:.1f}")
    sides = {"this": Side(ROOT, "ours"), "Pillow alone": Side(ROOT, "pillow")}
    if args.other:
        sides[f"other ({commit(args.other)})"] = Side(args.other.resolve(), "ours")
    try:
        with tempfile.TemporaryDirectory() as folder:
            for format, options in FORMATS.items():
                image = Image.open(io.BytesIO(jpeg(4000, 3000) if format == "JPEG" else jpeg(2000, 1500)))
                path = Path(folder) / format
                image.save(path, format, **options)
                compare(f"{format} {image.width} x {image.height}, {path.stat().st_size / 1e6:.1f} MB", path, sides,
                        args.repeat)  # fmt: skip
    finally:
        for side in sides.values():
            side.process.kill()


def compare(name: str, path: Path, sides: dict[str, Side], repeat: int) -> None:
    rounds = [{(s, n): side.rate(path, n) for s, side in sides.items() for n in (1, 2)} for _ in range(repeat)]
    for s in sides:
        one = statistics.median(r[s, 1] for r in rounds)
        gains = sorted(r[s, 2] / r[s, 1] for r in rounds)
        print(f"{name}: {s} {one:.1f} images/s with one worker, {statistics.median(gains):.2f}x with two "
              f"({gains[0]:.2f} to {gains[-1]:.2f}, {repeat} rounds)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
