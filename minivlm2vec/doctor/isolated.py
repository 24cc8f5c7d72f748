"""Runs the worker in processes of its own: a crash, or a compiler that hangs, costs one row and not the report."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import minivlm2vec_kernels

from .privacy import anonymous
from .report import Check, Timing
from .task import TIMED, Options, failure, is_fatal
from .worker import Key, Message, row_of

# Not the current folder, where any file may have the name of one of Python's modules
BEGIN = "import sys; sys.path = [p for p in sys.path if p]; from minivlm2vec.doctor.worker import main; main()"
COMMAND = [sys.executable, "-c", BEGIN]
PROCESS = ("device", "the process that examines", "", "")
MOST_STARTS = 12  # of the worker: so many rows may crash or hang
MOST_CRASHES = 2  # of one name
START_SECONDS = 300  # until the worker has imported torch and found its device

Progress = Callable[[int, int, str], Any]  # rows done, rows in all, what comes now
Messages = queue.Queue[Message | None]


class Ended(Exception):
    """The worker is no more; says how."""


def run(options: Options, state: "State", *, seconds: float) -> None:
    """Fills `state`. seconds: how long one task may take."""
    for _ in range(MOST_STARTS):
        with started(options, state.rows) as (messages, how_it_ended):
            try:
                for message in in_time(messages, state, seconds, how_it_ended):
                    state.take(message)
            except Ended as e:
                state.lost(str(e))
        if state.complete:
            break
    state.give_up(state.plan, f"the process of the examination ended {MOST_STARTS} times before")


class State:
    """What is known so far."""

    def __init__(self, options: Options, progress: Progress | None):
        self.options, self.backend = options, options.backend
        self.facts: list[dict[str, str]] = []
        self.plan: dict[Key, str] = {}  # what goes round each
        self.rows: dict[Key, Check | Timing] = {}
        self.begun: Key | None = None
        self.crashes: Counter[str] = Counter()  # by name
        self.progress, self.ended = progress, False

    @property
    def complete(self) -> bool:
        return self.ended or bool(self.plan and self.plan.keys() <= self.rows.keys())

    def take(self, message: Message) -> None:
        if "facts" in message:
            self.facts, self.backend = message["facts"], message["backend"]
        elif "plan" in message:
            self.plan = {tuple(key): way for *key, way in message["plan"]}  # type: ignore[misc]
        elif "begin" in message:
            self.begun = section, name, case, dtype = tuple(message["begin"])
            if self.progress:
                self.progress(len(self.rows), len(self.plan), ", ".join(x for x in (name or section, case, dtype) if x))
        elif "row" in message:
            assert self.begun is not None
            row = row_of(message["row"])
            self.rows[self.begun] = row
            if is_fatal(row):
                self.crashed(row.name)
            self.begun = None
        elif "end" in message:
            self.ended = True

    def lost(self, how: str) -> None:
        """The worker ended before its time: a row for what it was at."""
        if self.begun is not None:
            self.rows[self.begun] = failure(*self.begun, how, self.plan[self.begun])
            self.crashed(self.begun[1])
            self.begun = None
        elif not self.plan:
            self.rows[PROCESS] = failure(*PROCESS, f"the examination could not begin: {how}", self.options.elsewhere)
            self.ended = True

    def crashed(self, name: str) -> None:
        """Counts; what crashes again and again is not run again, so that the rest is."""
        self.crashes[name] += 1
        if self.crashes[name] == MOST_CRASHES:
            self.give_up([key for key in self.plan if key[1] == name], "it crashed or hung twice before")

    def give_up(self, keys: Iterable[Key], why: str) -> None:
        """Rows for those of these that have none."""
        for key in keys:
            if key not in self.rows:
                timed = key[0] in TIMED
                self.rows[key] = Timing(*key, reason=why) if timed else Check(*key, "not run", reason=why)
        self.rows = {key: self.rows[key] for key in (*self.plan, *self.rows) if key in self.rows}


def in_time(messages: Messages, state: State, seconds: float, how_it_ended: Callable[[], str]) -> Iterator[Message]:
    """Messages until there are no more. Raises Ended where one does not come in time, or the worker ends early."""
    while True:
        limit = START_SECONDS if not state.begun else seconds
        try:
            message = messages.get(timeout=limit)
        except queue.Empty:
            slow = ", or is slow: `seconds` gives it longer" if state.begun else ""
            raise Ended(f"no answer within {limit:g} s: a compiler or the device hangs{slow}") from None
        if message is None:
            if not state.ended:
                raise Ended(how_it_ended())
            return
        yield message


@contextmanager
def started(options: Options, done: dict[Key, Any]) -> Iterator[tuple[Messages, Callable[[], str]]]:
    """A worker, its messages (None: it is no more), and how it ended. It is gone afterwards."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment(options),
            start_new_session=True,
        )  # fmt: skip
        assert process.stdin and process.stdout
        with suppress(OSError):  # it is no more: the messages will tell
            process.stdin.write(json.dumps({"options": asdict(options), "done": list(done)}).encode() + b"\n")
            process.stdin.flush()  # and left open: its end is the worker's
        messages: Messages = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, messages), daemon=True)
        reader.start()
        try:
            yield messages, lambda: _how_it_ended(process, errors)
        finally:
            _end(process)
            reader.join()
            process.stdout.close()
            with suppress(OSError):
                process.stdin.close()


def _read(lines: IO[bytes], messages: Messages) -> None:
    with suppress(ValueError):  # a line that the worker could not finish
        for line in lines:
            messages.put(json.loads(line))
    messages.put(None)


def _end(process: subprocess.Popen) -> None:
    """With what it started: compilers too."""
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # it is the leader of its group
    else:
        process.kill()
    process.wait()


def _how_it_ended(process: subprocess.Popen, errors: IO[bytes]) -> str:
    code = process.wait()
    errors.seek(0)
    said = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    how = f"exit code {code}"
    if code < 0:
        with suppress(ValueError):
            how = signal.Signals(-code).name
    last = anonymous(said[-1], 200) if said else ""
    return f"the process crashed ({how})" + (f"; its last line: {last}" if last else "")


def environment(options: Options) -> dict[str, str]:
    """Of the worker: this package's folders, and Triton's interpreter where it is asked for and nowhere else."""
    folders = [str(Path(__file__).parents[2]), str(Path(minivlm2vec_kernels.__file__).parents[1])]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [env.get("PYTHONPATH")])])
    return env | ({"TRITON_INTERPRET": "1"} if options.interpret else {})
