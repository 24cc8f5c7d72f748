"""Run the benches: python -m bench.run --all

    python -m bench.run --only rms_norm --only linear   some bench files (the x of bench_x.py)
    python -m bench.run --sweep --only linear           all candidate launch settings instead of all providers
    python -m bench.run --all --budget 400              start no case after 400 seconds: exit code 3 if any is left
    python -m bench.run --all --since '2030-01-01 10:00'   leave out what the csv has from then on

On a CUDA device results are appended to bench/results/<gpu>.csv. Without one, the references run on small CPU
cases, and nothing is written unless --save is given.
"""

import argparse
import importlib
import pkgutil
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "kernels")) if p not in sys.path]

import torch  # noqa: E402

from bench import common  # noqa: E402

MORE = 3  # exit code: cases are left


def main() -> int:
    names = bench_names()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every bench file")
    parser.add_argument("--only", action="append", default=[], choices=names, help="this one; may be repeated")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no case after so many seconds")
    parser.add_argument("--since", default="", help="leave out cases with rows of this date (UTC) or later in the csv")
    parser.add_argument("--case", default="", help="only cases whose kernel and name hold this, e.g. 'model b'")
    parser.add_argument("--sweep", action="store_true", help="time all candidate launch settings")
    parser.add_argument("--results", type=Path, help="the folder of the csv files, instead of bench/results")
    parser.add_argument("--save", action="store_true", help="without a GPU: append to bench/results/cpu.csv")
    args = parser.parse_args()
    if args.all == bool(args.only):
        parser.error("give either --all or --only")
    chosen = names if args.all else args.only
    if args.results is not None:
        common.RESULTS = args.results

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("No CUDA device: torch references on small CPU cases, which say nothing about the kernels.")
        if args.sweep:
            parser.error("--sweep needs a CUDA device")
    return run_all(chosen, device, args)


def bench_names() -> list[str]:
    found = (m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]))
    own_commands = {"bench_encode", "bench_launch", "bench_load"}  # of whole programs on a CPU
    return sorted(x.removeprefix("bench_") for x in found if x.startswith("bench_") and x not in own_commands)


@torch.no_grad()
def run_all(names: list[str], device: torch.device, args: argparse.Namespace) -> int:
    """Exit code: MORE where cases were not begun within the budget, 1 where one raised, which is named."""
    failed = []
    session = common.Session(device, args.budget)
    path = common.csv_path(session.machine["gpu"], "-sweep" if args.sweep else "")
    common.check_columns(path)
    there = list(common.read_rows(path)) if args.since and path.exists() else []
    done = {(row["kernel"], row["case"]) for row in there if row["date"] >= args.since}
    try:
        for name in names:
            module = importlib.import_module(f"bench.bench_{name}")
            cases = getattr(module, "sweep" if args.sweep else "cases", None)
            if cases:
                for case in cases(device):
                    if args.case in f"{case.kernel} {case.name}" and (case.kernel, case.name) not in done:
                        try:
                            session.run([case])
                        except Exception:
                            failed.append(f"{case.kernel} {case.name}")
                            print(f"{failed[-1]}: {traceback.format_exc()}", flush=True)
    finally:  # an interrupted run keeps what it has measured
        rows = session.finish()
        if session.skipped:
            print(f"Out of budget, not run: {', '.join(session.skipped)}")
        if rows and (device.type == "cuda" or args.save):
            common.append_rows(rows, path)
            print(f"{len(rows)} rows appended to {path.parent.name}/{path.name}")
        if failed:
            print(f"Failed: {', '.join(failed)}")
    return MORE if session.skipped else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
