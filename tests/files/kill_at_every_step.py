"""Run as a program: embeds as its arguments say, killed with SIGKILL at the n-th step that touches the disk, for
n = 1, 1 + STRIDE, 1 + 2 STRIDE, … until none is left; after every kill the same command finishes. A step is a flush or
a rename.

    kill_at_every_step.py STRIDE FOLDER SUFFIX embed ARGUMENTS…    writes FOLDER/<n>SUFFIX, prints each n
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

import torch._dynamo  # noqa: F401  (building a model imports it: once here, not in every child)

from minivlm2vec.cli import main
from minivlm2vec.files import embedding  # noqa: F401  (imported before the forks, which then start at once)

with contextlib.suppress(ImportError):
    import pyarrow.parquet  # noqa: F401


def kill_at(step: int) -> None:
    """Arms this process: it dies just before, or just after, its step-th flush or rename."""
    count = 0

    def armed(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step and step % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.fsync, os.replace = armed(os.fsync), armed(os.replace)


def in_child(argv: list[str], step: int | None) -> int:
    """Runs the command in a fork; returns its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        if step is not None:
            kill_at(step)
        os._exit(main(argv))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_everywhere(stride: int, folder: Path, suffix: str, argv: list[str]) -> list[int]:
    for step in range(1, 1000, stride):
        command = [*argv, "-o", str(folder / f"{step}{suffix}")]
        code = in_child(command, step)
        if code >= 0:
            return list(range(1, step, stride))
        assert code == -signal.SIGKILL, code
        code = in_child(command, None)
        assert code in (0, 3), f"after a kill at step {step}: exit code {code}"
    raise AssertionError("the run never ended by itself")


if __name__ == "__main__":
    print(*kill_everywhere(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]))
