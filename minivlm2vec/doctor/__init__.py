"""Whether this package is right on this machine, and how fast: the first thing to run on a new one.

    report = examine()
    print(report.text())            # 0 user names, 0 paths: to be pasted into an issue
    report.passed, report.failed    # checks that are wrong, each with a way round it

report.py    what comes out            machine.py   versions, processor, card, clocks
kernels.py   every kernel              model.py     the bundled checkpoint in every form, against recorded.py's vectors
speed.py     peaks, times              isolated.py, worker.py, task.py   a process that may crash without a loss
"""

import os
import time

import torch

from .. import __version__
from ..embedder import default_device
from ..errors import Option, OptionError
from . import isolated, worker
from .isolated import Progress
from .model import ways_round
from .report import Check, Fact, Report, Timing
from .task import TIMED, Options

SECONDS = 180.0  # that one row may take, compiling included
DAY = 86400.0  # seconds: the most that may be asked for


def examine(
    *,
    quick: bool = False,
    device: torch.device | str | None = None,
    interpret: bool = False,
    seconds: float = SECONDS,
    isolate: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Examines every kernel, the whole model and the machine's speed on one device, and never raises for what it finds.

    Args:
        quick: no times of kernels; the machine's peaks are measured all the same.
        device: default CUDA where there is one, else MPS, else the CPU, on which it examines the torch path.
        interpret: on a CPU, the Triton kernels in Triton's interpreter, at small sizes, in float32 and float16.
        seconds: that one row may take, compiling included, a day at most; what takes longer is ended and failed.
        isolate: in a process of its own, so that what crashes or hangs is a row too. False: in this process.
        progress: called with (rows done, rows in all, what comes now).

    On KeyboardInterrupt it returns what it has found until then, with `stopped`.

    Raises ValueError for a device that torch has not got, for `interpret` on another than a CPU or in a process without
    TRITON_INTERPRET=1, and for `seconds` out of range.
    """
    start = time.monotonic()
    if not seconds > 0:
        raise OptionError(Option("seconds"), f" is {seconds:g}; more than 0 is needed")
    if seconds > DAY:
        raise OptionError(Option("seconds"), f" is {seconds:g}; the most is {DAY:g}, a day")
    if interpret and not isolate and os.environ.get("TRITON_INTERPRET") != "1":
        raise OptionError(
            Option("interpret"), " with ", Option("isolate"), " off needs TRITON_INTERPRET=1 before Triton is imported"
        )
    options = Options(str(_device(device, interpret)), quick, interpret)
    state, stopped = isolated.State(options, progress), False
    try:
        if isolate:
            isolated.run(options, state, seconds=seconds)
        else:
            worker.work(options, set(), state.take)
    except KeyboardInterrupt:
        stopped = True
        state.give_up(state.plan, "the examination was stopped")
    rows = list(state.rows.values())
    checks = [r for r in rows if isinstance(r, Check)]
    timings = [r for r in rows if isinstance(r, Timing)]
    return Report(
        version=__version__,
        device=options.device,
        backend=state.backend,
        environment=tuple(Fact(**f) for f in state.facts),
        kernels=tuple(c for c in checks if c.section != "model"),
        model=ways_round([c for c in checks if c.section == "model"]),
        peaks=tuple(t for t in timings if t.section == TIMED[0]),
        speed=tuple(t for t in timings if t.section == TIMED[1]),
        seconds=round(time.monotonic() - start, 1),
        stopped=stopped,
    )


def _device(device: torch.device | str | None, interpret: bool) -> torch.device:
    try:
        found = torch.device(device) if device is not None else torch.device("cpu") if interpret else default_device()
    except RuntimeError as e:
        raise OptionError(Option("device"), f" is {device!r}: {str(e).splitlines()[0]}") from None
    if interpret and found.type != "cpu":
        raise OptionError(Option("interpret"), " is for a CPU, and ", Option("device"), f" is {found}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(Option("device"), f" is {found}, and torch {torch.__version__} finds no such device")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise OptionError(Option("device"), f" is {found}, and there are {torch.cuda.device_count()}")
    if found.type in ("cpu", "mps") and found.index:
        raise OptionError(Option("device"), f" is {found}, and there is one {found.type}")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise OptionError(Option("device"), f" is {found}, and torch {torch.__version__} finds no such device")
    if found.type not in ("cuda", "cpu", "mps"):
        raise OptionError(Option("device"), f" is {found}; cuda, mps and cpu can be examined")
    return found


__all__ = ["Check", "Fact", "Report", "Timing", "examine"]
