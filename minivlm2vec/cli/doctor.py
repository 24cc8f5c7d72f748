"""`minivlm2vec doctor`: whether everything is right on this machine, and how fast."""

import argparse
import shutil
import signal
import sys

PASTE = "May be pasted into an issue as it is: no names of users, hosts or folders are in it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Examines this machine: every kernel against float64, the bundled model against recorded vectors in every form "
        "(optimised, CUDA graphs, shared prefixes, fp8), the machine's peaks and the kernels' times beside torch's. "
        "What fails is named, with the argument or variable that goes round it. Exit code 0: all is right; 1: not. "
        "Ctrl-C or SIGTERM: the report of what is known by then."
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--quick", action="store_true", help="without the kernels' times")
    parser.add_argument("--device", help="cuda, cuda:1, mps, cpu (default: the best there is)")
    parser.add_argument("--interpret", action="store_true", help="on a CPU: the kernels, in Triton's interpreter")
    parser.add_argument("--seconds", type=float, default=180.0, metavar="N",
                        help="what takes longer is ended and counts as failed (%(default)g)")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..doctor import examine
    from .messages import visible

    show = Line(sys.stderr) if sys.stderr.isatty() else None
    options = {name: getattr(args, name) for name in ("quick", "device", "interpret", "seconds")}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = examine(**options, progress=show)
    finally:
        signal.signal(signal.SIGTERM, before)
    if show:
        show.clear()
    if args.json:
        print(report.as_json())
    else:
        width = shutil.get_terminal_size((80, 24)).columns
        text = visible(f"minivlm2vec doctor. {PASTE}\n\n{report.text(width)}")
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding))
    return 0 if report.passed else 1


class Line:
    """One line that is written over again and again."""

    def __init__(self, stream):
        self.stream = stream

    def __call__(self, done: int, total: int, what: str) -> None:
        width = shutil.get_terminal_size((80, 24)).columns
        self.stream.write(f"\r\x1b[K{f'{done + 1} of {total}: {what}'[: width - 1]}")
        self.stream.flush()

    def clear(self) -> None:
        self.stream.write("\r\x1b[K")
        self.stream.flush()
