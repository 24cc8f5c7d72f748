"""What is to be examined: one thing at a time, each with a name, so that what goes wrong has one."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .privacy import anonymous
from .report import Check, Timing

PEAKS, SPEED = "peaks", "speed"
TIMED = (PEAKS, SPEED)


@dataclass(frozen=True)
class Options:
    """What the worker is asked for.

    Fields:
        device: as torch spells it.
        quick: no timing of kernels.
        interpret: kernels in Triton's interpreter, on a CPU.
        refused: why the kernels cannot run on this device, where torch's operators are examined instead.
    """

    device: str
    quick: bool = False
    interpret: bool = False
    refused: str = ""

    @property
    def triton(self) -> bool:
        """Whether the kernels that are examined are Triton's."""
        return self.interpret or (torch.device(self.device).type == "cuda" and not self.refused)

    @property
    def backend(self) -> str:
        return "triton" if self.triton else "torch"

    @property
    def elsewhere(self) -> str:
        """The way round a device that does not work; "" of the CPU."""
        return "" if torch.device(self.device).type == "cpu" else 'device="cpu"'


@dataclass(frozen=True)
class Task:
    """One check or timing. `run` returns its row, or raises: `outcome` makes a row of that too."""

    section: str
    name: str
    case: str
    dtype: str
    run: Callable[[], Check | Timing]
    way_round: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.section, self.name, self.case, self.dtype


class NotRun(Exception):
    """Raised by a task that cannot run here; says why."""


def failure(section: str, name: str, case: str, dtype: str, reason: str, way_round: str = "") -> Check | Timing:
    """The row of what crashed, hung or raised: a failed check, a timing that was not taken."""
    reason = anonymous(reason)
    if section in TIMED:
        return Timing(section, name, case, dtype, reason=reason)
    return Check(section, name, case, dtype, "failed", reason=reason, way_round=way_round)


def outcome(task: Task) -> Check | Timing:
    """The row of a task, whatever happens in it."""
    try:
        return task.run()
    except NotRun as e:
        if task.section in TIMED:
            return Timing(*task.key, reason=str(e))
        return Check(*task.key, "not run", reason=str(e))
    except Exception as e:
        return failure(*task.key, f"{type(e).__name__}: {_message(e)}", task.way_round)


def _message(e: Exception) -> str:
    """What it says, without a stack: the first two lines that say something."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return " ".join(lines[:2]) or "no message"


def is_fatal(row: Check | Timing) -> bool:
    """Whether the process that made it can compute no more: an error of CUDA's stays until it ends."""
    words = ("CUDA error", "HIP error", "illegal memory access", "device-side assert", "unspecified launch failure",
             "misaligned address", "AcceleratorError", "illegal instruction", "launch timed out", "stack error",
             "invalid program counter", "global/shared address space", "ECC error")  # fmt: skip
    return any(word in row.reason for word in words)


def unable(task: Task, reason: str, launches: bool = True) -> Task:
    """The task on a device that gives no right numbers: what it launches is compiled, what comes out is not compared.
    launches: False does not even run it."""

    def run() -> Check | Timing:
        if task.section in TIMED or not launches:
            raise NotRun(reason)
        try:
            row = task.run()
        except NotImplementedError as e:
            raise NotRun(anonymous(f"{reason}; {_message(e)}")) from None
        if isinstance(row, Check) and row.error is None and row.verdict == "failed":
            return row
        raise NotRun(f"{reason}; compiled and launched")

    return replace(task, run=run)


def numbered(tasks: list[Task]) -> list[Task]:
    """All tasks; two of one name would hide each other."""
    keys = [t.key for t in tasks]
    assert len(set(keys)) == len(keys), [k for k in keys if keys.count(k) > 1]
    return tasks
