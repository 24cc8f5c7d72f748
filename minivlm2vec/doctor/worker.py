"""The process that examines. What crashes or hangs here ends this process alone, and `isolated` names it.

A line of JSON a message, on what was stdout when it began: {"facts": …}, {"plan": …}, then {"begin": key} and
{"row": …} of each task. What Triton, a compiler or torch print goes to stderr.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from . import kernels, machine, model, speed
from .privacy import anonymous
from .report import Check, Timing
from .task import TIMED, NotRun, Options, Task, is_fatal, numbered, outcome, unable

Key = tuple[str, str, str, str]
Message = dict[str, Any]
DEVICE = ("device", "torch alone: sums and products", "", "")


def main() -> None:
    """Reads its options from the first line of stdin: {"options": …, "done": keys that are not wanted}."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(message: Message) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    work(Options(**asked["options"]), {tuple(key) for key in asked["done"]}, send)


def _end_with_parent() -> None:
    """Waits for the end of stdin, which the parent keeps open, and ends this process and the compilers it started."""
    os.read(0, 1)
    if os.name == "posix":
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def work(options: Options, done: Collection[Key], send: Callable[[Message], None]) -> None:
    """Sends facts, the plan and the rows; ends early after an error that leaves the device unusable."""
    device = torch.device(options.device)
    options = replace(options, refused=machine.refusal(device))
    if not done:
        send({"facts": [asdict(f) for f in machine.facts(device)], "backend": options.backend})
    tasks = planned(options)
    send({"plan": [[*t.key, t.way_round] for t in tasks]})
    for task in tasks:
        if task.key in done:
            continue
        send({"begin": task.key})
        start = time.monotonic()
        with torch.no_grad():
            row = outcome(task)
        send({"row": asdict(replace(row, seconds=round(time.monotonic() - start, 3)))})
        if is_fatal(row):
            return
    send({"end": True})


def planned(options: Options) -> list[Task]:
    """All tasks. Where torch alone is wrong on the device nothing is compared: kernels are still compiled and launched,
    unless torch could not even do that."""
    device = torch.device(options.device)
    dtypes, without = machine.dtypes(device)
    wrong, launches = "", True
    try:
        wrong = machine.computes(device)
    except Exception as e:
        wrong, launches = anonymous(f"{type(e).__name__}: {e}"), False
    forms = list(model.tasks(options, dtypes))
    tasks = [t for t in forms if t.name == model.PLAIN]  # before anything that may crash
    tasks += kernels.tasks(options, dtypes, machine.capability(device))
    tasks += [t for t in forms if t.name != model.PLAIN]
    tasks += speed.tasks(options)
    if wrong:
        why = "torch is wrong on this device" if launches else "torch fails on this device"
        tasks = [unable(t, why, launches) for t in tasks]
    first = [Task(*DEVICE, partial(_device_check, wrong, options.elsewhere), options.elsewhere)]
    for dtype, why in without.items():
        first.append(Task("kernels", "every kernel", "", kernels.spelled(dtype), partial(_not_run, why)))
    if options.refused:
        first.append(Task("kernels", "every Triton kernel", "", "", partial(_not_run, options.refused)))
    return numbered(first + tasks)


def _device_check(wrong: str, elsewhere: str) -> Check:
    if wrong:
        return Check(*DEVICE, "failed", reason=wrong, way_round=elsewhere)
    return Check(*DEVICE, "passed", 0.0, 0.0)


def _not_run(why: str) -> Check:
    raise NotRun(why)


def row_of(data: Message) -> Check | Timing:
    return Timing(**data) if data["section"] in TIMED else Check(**data)
