"""Images to crops in one thread and in two: `python -m bench.bench_decode [OTHER] [--formats JPEG]`.

Each side (this checkout, another one, Pillow's decoder and resize alone) is a process of its own; they work in turn on
the same files, so a busy machine slows all alike. Prints images a second with one worker, and how many times as many
two workers make; what Pillow alone gains is what the machine has to give. On Linux also how many of the two were able
to run at a time, as its process table says every 2 ms: a worker that waits for a core counts, one that waits for a lock
does not, so other load does not matter.
"""

import argparse
import io
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
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
from minivlm2vec.images import hd_crops, hd_size, open_image, to_rgb

def ours(data):
    return hd_crops(to_rgb(open_image(data)), 4)

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
            [sys.executable, "-c", WORKER, kind], cwd=checkout, env=os.environ | {"PYTHONPATH": path}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stdin is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.stdout.readline()

    def run(self, path: Path, workers: int) -> tuple[float, float]:
        """Images a second, and how many threads were able to run, on average."""
        print(path, workers, IMAGES, file=self.stdin, flush=True)
        samples, ended = [], threading.Event()
        with ThreadPoolExecutor(1) as pool:
            sampling = pool.submit(lambda: samples.extend(iter(lambda: self._sample(ended), None)))
            seconds = float(self.stdout.readline())
            ended.set()
            sampling.result()
        return IMAGES / seconds, statistics.mean(samples or [math.nan])

    def _sample(self, ended: threading.Event) -> int | None:
        if ended.wait(0.002):
            return None
        stats = Path(f"/proc/{self.process.pid}/task").glob("*/stat")
        return sum(path.read_text().rpartition(") ")[2][0] == "R" for path in stats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", nargs="?", type=Path, help="another checkout's folder")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    print(f"{machine()}, commit {commit()}, load {os.getloadavg()[0]:.1f}")
    sides = {"this": Side(ROOT, "ours"), "Pillow alone": Side(ROOT, "pillow")}
    if args.other:
        sides[f"other ({commit(args.other)})"] = Side(args.other.resolve(), "ours")
    try:
        with tempfile.TemporaryDirectory() as folder:
            for format in args.formats:
                image = Image.open(io.BytesIO(jpeg(4000, 3000) if format == "JPEG" else jpeg(2000, 1500)))
                path = Path(folder) / format
                image.save(path, format, **FORMATS[format])
                compare(f"{format} {image.width} x {image.height}, {path.stat().st_size / 1e6:.1f} MB", path, sides,
                        args.repeat)  # fmt: skip
    finally:
        for side in sides.values():
            side.process.kill()


def compare(name: str, path: Path, sides: dict[str, Side], repeat: int) -> None:
    rounds = [{(s, n): side.run(path, n) for s, side in sides.items() for n in (1, 2)} for _ in range(repeat)]
    for s in sides:
        one = statistics.median(r[s, 1][0] for r in rounds)
        gains = sorted(r[s, 2][0] / r[s, 1][0] for r in rounds)
        able = statistics.median(r[s, 2][1] for r in rounds)
        print(f"{name}: {s} {one:.1f} images/s with one worker, {statistics.median(gains):.2f}x with two "
              f"({gains[0]:.2f} to {gains[-1]:.2f}, {repeat} rounds); {able:.2f} able to run", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
