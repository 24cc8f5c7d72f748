"""The first hour on a card, in calls of at most nine minutes, each of which goes on where the last one ended:

    until python -m bench.first_hour; do [ $? = 3 ] || break; done

In this order: doctor; the tests that need a card; the sweeps; their winners (`python -m bench.winners apply` puts
them into the source, which is left to you); all benches with their peers; the report. Exit code 0: all done and right;
1: all done, some wrong, which are named; 3: there is more to do. bench/results/first_hour.json says what was done, and
bench/results/first_hour/ has what each step printed. A call may be stopped in any way: the next one repeats the step
that was going on, a bench only those of its cases that have no rows yet. Rehearsed on a pretended card (no numbers):

    until python -m bench.first_hour --through tests.bench.on_pretended_card --results /tmp/rehearsal; do
        [ $? = 3 ] || break; done
"""

import argparse
import ctypes
import datetime
import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bench.run import MORE, ROOT

RESULTS = Path(__file__).with_name("results")
MINUTES, SPARE = 9.0, 20.0  # of a call; seconds in which nothing is begun
LAST_CASE = 90.0  # seconds that the case may take which a bench is at when its budget ends
MOST_CUT, MOST_TRIES = 2, 12  # how often in a row a step may be cut short; how often it may be run
KEPT = {"begun": str, "code": (int, type(None)), "seconds": (int, float), "tries": int, "cut": int}  # of each step
PIPE_CLOSED = 141  # what a shell gives a command that SIGPIPE ends
BENCHES = ("linear", "attention", "rms_norm", "layer_norm", "activation", "rope", "image_patches", "merge_crops",
           "pooling", "quantize_rows", "attention_backward")  # fmt: skip
MODEL = ("model a", "model b", "model c", "model d", "model_", "tower")
SANITIZER = "tests/kernels/test_sanitizer.py"
TESTS = {
    "kernels": ("tests/kernels", f"--ignore={SANITIZER}"),
    "inference": ("tests/inference",),
    "core": ("tests/core",),
    **{tool: (SANITIZER, "-k", tool) for tool in ("memcheck", "racecheck", "initcheck")},
}


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]  # arguments of python
    seconds: float = 60.0  # less than so many are left: it waits for the next call
    in_parts: bool = False  # takes --since and --budget, and exits with MORE


def steps(results: Path) -> list[Step]:
    found = [Step("doctor", ("-m", "minivlm2vec", "doctor"), 240)]
    for name, arguments in TESTS.items():
        found.append(Step(f"tests {name}", ("-m", "pytest", "-q", "-m", "gpu", *arguments), 240))
    bench = ("-m", "bench.run", "--results", str(results))
    found += [Step(f"sweep {name}", (*bench, "--sweep", "--only", name), 2 * LAST_CASE, True) for name in BENCHES]
    found.append(Step("winners", ("-m", "bench.winners", "find", "--results", str(results))))
    found += [Step(f"bench {name}", (*bench, "--only", name), 2 * LAST_CASE, True) for name in BENCHES]
    model = (*bench, "--only", "model", "--case")
    found += [Step(f"bench {case}", (*model, case), 2 * LAST_CASE, True) for case in MODEL]
    readme = () if results == RESULTS else ("--readme", str(results / "README.md"))
    return [*found, Step("report", ("-m", "bench.report", "--results", str(results), *readme))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where everything is written")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of this call (%(default)g)")
    parser.add_argument("--through", metavar="MODULE", help="run every command through this module")
    parser.add_argument("--again", action="append", default=[], metavar="STEP", help="forget that this was done")
    parser.add_argument("--list", action="store_true", help="what is done and what is to come")
    args = parser.parse_args(argv)
    if not args.minutes > SPARE / 60:
        parser.error(f"--minutes {args.minutes:g} leaves no time: a call needs more than {SPARE:g} seconds")
    if args.through is not None and not can_run(args.through):
        parser.error(f"--through {args.through}: python -m finds no such module")
    end = time.monotonic() + 60 * args.minutes
    results = args.results.resolve()
    todo = steps(results)
    if unknown := set(args.again) - {s.name for s in todo}:
        parser.error(f"no step is called {', '.join(sorted(unknown))}; --list names them")
    try:
        results.mkdir(parents=True, exist_ok=True)
        opened = (results / "first_hour.lock").open("w")
    except OSError as error:
        parser.error(f"--results: {error}")
    with opened as lock:
        if (args.again or not args.list) and not alone(lock):
            parser.error(f"another first hour is at work in {results}")
        try:
            state = State(results / "first_hour.json")
        except (OSError, ValueError) as error:
            parser.error(str(error))
        for name in args.again:
            state.forget(name)
        if args.list:
            print("\n".join(f"{state.words(s.name):>12}  {s.name}" for s in todo))
            return 0
        if results != RESULTS:
            _readme(results)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what runs is then ended as well
        return work(todo, state, end, args.through, lock.fileno())


def can_run(module: str) -> bool:
    """Whether python -m finds it."""
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
    except (ImportError, ValueError):
        return False
    return spec is not None


def alone(lock: IO[str], seconds: float = SPARE) -> bool:
    """Waits for a step that outlives the call which began it: steps inherit the lock."""
    last = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > last:
                return False
            time.sleep(0.2)


class State:
    """Of each step when it began, its exit code and seconds, in a file that is always whole.

    Raises ValueError where something else has damaged the file, OSError where it or its folder cannot be read or made.
    """

    def __init__(self, path: Path):
        self.path, self.logs = path, path.with_suffix("")
        self.logs.mkdir(parents=True, exist_ok=True)
        self.steps: dict[str, dict[str, Any]] = self._read() if path.exists() else {}

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self.path.read_bytes())
        except ValueError:
            found = None
        steps = found.values() if isinstance(found, dict) else [None]
        if all(isinstance(s, dict) and all(isinstance(s.get(k, ...), t) for k, t in KEPT.items()) for s in steps):
            return found
        raise ValueError(f"{self.path} is damaged: delete it, and every step is run again")

    def done(self, name: str) -> bool:
        found = self.steps.get(name)
        return found is not None and (
            found["code"] is not None or found["cut"] >= MOST_CUT or found["tries"] >= MOST_TRIES
        )

    def right(self, name: str) -> bool:
        return self.done(name) and self.steps[name]["code"] == 0

    def words(self, name: str) -> str:
        if not self.done(name):
            return "to go on" if name in self.steps else "to come"
        return "done" if self.right(name) else "failed"

    def begin(self, name: str) -> str:
        """Returns the date at which it was begun for the first time, as a csv has it."""
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
        step = self.steps.setdefault(name, {"begun": now, "code": None, "seconds": 0.0, "tries": 0, "cut": 0})
        step["tries"] += 1
        self._save()
        return step["begun"]

    def end(self, name: str, code: int | None, seconds: float, more: bool = False) -> None:
        """code: None where it was cut short; more: it says that something is left, which is no end, but progress."""
        step = self.steps[name]
        cut = 0 if more else step["cut"] + (code is None)
        step |= {"code": None if more else code, "seconds": round(step["seconds"] + seconds, 1), "cut": cut}
        self._save()

    def forget(self, name: str) -> None:
        self.steps.pop(name, None)
        self._save()

    def _save(self) -> None:
        new = self.path.with_suffix(".tmp")
        new.write_text(json.dumps(self.steps, indent=2) + "\n")
        new.replace(self.path)

    def log(self, name: str) -> Path:
        return self.logs / f"{name.replace(' ', '-').replace('/', '-')}.txt"


def work(todo: list[Step], state: State, end: float, through: str | None = None, lock: int | None = None) -> int:
    begun = 0
    for step in todo:
        if state.done(step.name):
            continue
        left = end - time.monotonic() - SPARE
        if begun and left < step.seconds:
            print(f"{step.name} is for the next call: {left:.0f} s are left", flush=True)
            return MORE
        begun += 1
        since = state.begin(step.name)
        parts = ("--since", since, "--budget", f"{max(left - LAST_CASE, 1):.0f}") if step.in_parts else ()
        command = [sys.executable, *(("-m", through) if through else ()), *step.command, *parts]
        print(f"{step.name}: {' '.join(['python', *command[1:]])}", flush=True)
        start = time.monotonic()
        code = run(command, state.log(step.name), max(left, 1.0), lock)
        more = step.in_parts and code == MORE
        state.end(step.name, code, time.monotonic() - start, more)
        print(f"{step.name}: {state.words(step.name)} in {time.monotonic() - start:.0f} s, {state.log(step.name).name}",
              flush=True)  # fmt: skip
        if more and not state.done(step.name):
            return MORE
    if any(not state.done(s.name) for s in todo):
        return MORE
    if wrong := [s.name for s in todo if not state.right(s.name)]:
        print(f"All done. Wrong: {', '.join(wrong)}")
        return 1
    print("All done, nothing wrong. Next: python -m bench.winners apply")
    return 0


def run(command: list[str], log: Path, seconds: float, lock: int | None = None) -> int | None:
    """Exit code; None where it was cut short. What it prints is added to the log. It is interrupted, so that a bench
    keeps what it has measured, where it takes too long and where this process is stopped or killed."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            pass_fds=() if lock is None else (lock,), preexec_fn=_interrupted_with_its_parent,
        )  # fmt: skip
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=SPARE / 2)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _interrupted_with_its_parent() -> None:
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def _readme(results: Path) -> None:
    """The report writes between two lines of a README: of a rehearsal another one."""
    from bench.report import BEGIN, END

    path = results / "README.md"
    if not path.is_file():
        path.write_text(f"{BEGIN}\n{END}\n")


if __name__ == "__main__":
    try:
        exit_code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes
        exit_code = PIPE_CLOSED
    sys.exit(exit_code)
