"""The command line of `tests/kernels/aot`."""

import argparse
import sys

from tests.kernels import aot


def _print(key: str, values: aot.Measured, done: int, count: int) -> None:
    print(f"{done:4d}/{count} {key:90s}", " ".join(f"{k} {v:6d}" for k, v in values.items()), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=aot.__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--quick", action="store_true", help="only the specs of the default tests")
    args = parser.parse_args()
    specs = aot.all_specs(args.only, args.quick)
    measured = aot.measure_all(specs, _print)
    table = {} if args.write else aot.read_table().get(aot.triton_version(), {})
    found = aot.problems(specs, measured, table)
    print(*found, sep="\n")
    if args.write and not found:
        aot.write_table(measured, args.only)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
