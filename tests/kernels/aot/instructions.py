"""Count what a kernel was compiled to, instruction by instruction. Needs no GPU.

    python -m tests.kernels.aot.instructions linear_quick_gelu --config '128x256x64 w8 s3 r1' --arch 90

Counts are of the code, not of its execution: loops once, both sides of each branch. Of an instruction its name and, for
the special functions (MUFU), which: MUFU.EX2 is 2^x, MUFU.RCP 1/x, MUFU.RSQ 1/sqrt(x). FCHK begins an exact division.
"""

import argparse
import json
import re
from collections import Counter

from tests.kernels import aot

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+(?:\.[A-Z0-9_]+)*)", re.MULTILINE)


def instructions(spec: aot.Spec, arch: int) -> Counter[str]:
    """How often each instruction is in the kernel's code; "total" without the padding behind it."""
    sass = aot.dump(aot.compile_kernel(spec, arch).asm["cubin"], "--dump-sass")
    names = (".".join(name.split(".")[: 2 if name.startswith("MUFU") else 1]) for name in INSTRUCTION.findall(sass))
    found = Counter(name for name in names if name != "NOP")
    return found + Counter(total=found.total())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("only", help="kernels whose name contains this")
    parser.add_argument("--config", default="", help="configurations that contain this")
    parser.add_argument("--arch", type=int, default=90)
    args = parser.parse_args()
    for spec in aot.all_specs(args.only):
        if args.config in spec.config and args.arch in spec.archs:
            found = dict(instructions(spec, args.arch).most_common())
            print(json.dumps({"kernel": spec.key(args.arch), **found}))


if __name__ == "__main__":
    main()
