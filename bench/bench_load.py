"""Peak memory and time of loading a checkpoint: `python -m bench.bench_load [--preset full] [--dtype bfloat16]`.

Writes a randomly initialised checkpoint of the published size (8.3 GB of disk in bfloat16) into a temporary folder,
loads it in a process of its own on the CPU, and prints the largest resident set against the checkpoint's size.
`--checkpoint FOLDER` takes one that is there.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from minivlm2vec.new_checkpoint import new_checkpoint

from .bench_encode import commit, machine

LOAD = """
import re, sys, time
import torch
from minivlm2vec.inference import optimize
from minivlm2vec.weights import load_model
read = lambda key: int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024
before, start = read('VmRSS'), time.perf_counter()
model = load_model(sys.argv[1])
loaded, peak = time.perf_counter(), read('VmHWM')
size = sum(p.numel() * p.element_size() for p in model.parameters())
optimize(model)
print(before, peak, loaded - start, size, read('VmHWM'), time.perf_counter() - loaded)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="full")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--checkpoint", help="a folder that is there already")
    parser.add_argument("--folder", help="where to write the temporary checkpoint")
    args = parser.parse_args()
    if args.checkpoint:
        measure(Path(args.checkpoint))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(new_checkpoint(Path(folder) / "m", preset=args.preset, dtype=args.dtype, show_progress=True))


def measure(folder: Path) -> None:
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    out = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True).stdout
    before, peak, seconds, parameters, packed, packing = map(float, out.split())
    print(
        f"{machine()}, commit {commit()}: checkpoint {size / 1e9:.2f} GB, parameters {parameters / 1e9:.2f} GB; "
        f"largest resident set {peak / 1e9:.2f} GB while loading ({peak / size:.3f}x the checkpoint; "
        f"{before / 1e9:.2f} GB of it before), {packed / 1e9:.2f} GB with packing ({packed / size:.3f}x); "
        f"{seconds:.1f} s and {packing:.1f} s"
    )


if __name__ == "__main__":
    main()
