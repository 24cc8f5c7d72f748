"""All three fuzzes, one after the other: `python -m tests.support.fuzz [--share 1.0] [--seed 0]`.

20,000 mutated images, 2,000 configurations and headers, 5,000 bodies for the server; `--share 0.01` for a hundredth of
each. Ends with 1 where one of them found something.
"""

import argparse
import subprocess
import sys

COUNTS = {"fuzz_images": 20_000, "fuzz_configs": 2_000, "fuzz_bodies": 5_000}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failed = []
    for name, count in COUNTS.items():
        options = ["--count", str(max(1, int(count * args.share))), "--seed", str(args.seed)]
        print(f"{name}: {' '.join(options)}", flush=True)
        if subprocess.run([sys.executable, "-m", f"tests.support.{name}", *options]).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "nothing found")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
