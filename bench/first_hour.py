"""The first hour on a card, in calls of at most nine minutes, each of which goes on where the last one ended:

    until python -m bench.first_hour; do [ $? = 3 ] || break; done

In this order: doctor; the tests that need a card; the sweeps; their winners (`python -m bench.winners apply` puts
them into the source, which is left to you); all benches with their peers; the report. Exit code 0: all done and right;
1: all done, some wrong, which are named; 3: there is more to do. bench/results/first_hour.json says what was done, and
bench/results/first_hour/ has what each step printed. Rehearsed on a pretended card (no numbers):

    python -m bench.first_hour --through tests.bench.on_pretended_card --results /tmp/rehearsal
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
MINUTES, SPARE = 9.0, 20.0  # of a call; seconds in which nothing is begun
MOST_TRIES = 2  # of a step that a call cuts short
MORE = 3
SWEEPS = ("linear", "attention", "attention_backward", "rms_norm", "layer_norm", "activation")
BENCHES = ("attention", "linear", "rms_norm", "layer_norm", "activation", "rope", "image_patches", "merge_crops",
           "pooling", "quantize_rows", "attention_backward")  # fmt: skip
MODEL = ("model a", "model b", "model c", "model d", "model_", "tower")
TESTS = ("tests/kernels", "tests/inference", "tests/core", "tests/train tests/serve tests/files tests/mmeb tests/bench")


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]  # arguments of python
    seconds: float = 60.0  # less than so many are left: it waits for the next call


def steps(results: Path, budget: float) -> list[Step]:
    """budget: seconds after which a bench begins no further case."""
    found = [Step("doctor", ("-m", "minivlm2vec", "doctor"), 120)]
    for folders in TESTS:
        name = f"tests {folders.split()[0].removeprefix('tests/')}"
        found.append(Step(name, ("-m", "pytest", "-q", "-m", "gpu", *folders.split()), 240))
    bench = ("-m", "bench.run", "--results", str(results), "--budget", f"{budget:g}")
    found += [Step(f"sweep {name}", (*bench, "--sweep", "--only", name), budget) for name in SWEEPS]
    found.append(Step("winners", ("-m", "bench.winners", "find", "--results", str(results))))
    found += [Step(f"bench {name}", (*bench, "--only", name), budget) for name in BENCHES]
    found += [Step(f"bench {case}", (*bench, "--only", "model", "--case", case), budget) for case in MODEL]
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
    results = args.results.resolve()
    todo = steps(results, max(10.0, 60 * args.minutes - 90))
    if unknown := set(args.again) - {s.name for s in todo}:
        parser.error(f"no step is called {', '.join(sorted(unknown))}; --list names them")
    state = State(results / "first_hour.json")
    for name in args.again:
        state.forget(name)
    if args.list:
        print("\n".join(f"{state.words(s.name):>12}  {s.name}" for s in todo))
        return 0
    if args.results != RESULTS:
        _readme(results)
    return work(todo, state, time.monotonic() + 60 * args.minutes, args.through)


class State:
    """Of each step its exit code and seconds, in a file that is always whole."""

    def __init__(self, path: Path):
        self.path, self.logs = path, path.with_suffix("")
        self.logs.mkdir(parents=True, exist_ok=True)
        self.steps: dict[str, dict] = json.loads(path.read_text()) if path.is_file() else {}

    def done(self, name: str) -> bool:
        found = self.steps.get(name)
        return found is not None and (found["code"] is not None or found["tries"] >= MOST_TRIES)

    def right(self, name: str) -> bool:
        return self.done(name) and self.steps[name]["code"] in (0, 5)  # 5: pytest found nothing to run

    def words(self, name: str) -> str:
        if not self.done(name):
            return "cut short" if name in self.steps else "to come"
        return "done" if self.right(name) else "failed"

    def write(self, name: str, code: int | None, seconds: float) -> None:
        tries = self.steps.get(name, {}).get("tries", 0) + 1
        self.steps[name] = {"code": code, "seconds": round(seconds, 1), "tries": tries}
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


def work(todo: list[Step], state: State, end: float, through: str | None = None) -> int:
    begun = 0
    for step in todo:
        if state.done(step.name):
            continue
        left = end - time.monotonic() - SPARE
        if begun and left < step.seconds:
            print(f"{step.name} is for the next call: {left:.0f} s are left", flush=True)
            return MORE
        begun += 1
        print(f"{step.name}: python {' '.join(step.command)}", flush=True)
        start = time.monotonic()
        code = run(step, state.log(step.name), max(left, 1.0), through)
        state.write(step.name, code, time.monotonic() - start)
        print(f"{step.name}: {state.words(step.name)} in {time.monotonic() - start:.0f} s, {state.log(step.name).name}",
              flush=True)  # fmt: skip
    wrong = [s.name for s in todo if not state.right(s.name)]
    if any(not state.done(s.name) for s in todo):
        return MORE
    print(
        f"All done. Wrong: {', '.join(wrong)}"
        if wrong
        else "All done, nothing wrong. Next: python -m bench.winners apply"
    )
    return 1 if wrong else 0


def run(step: Step, log: Path, seconds: float, through: str | None = None) -> int | None:
    """Exit code; None where it was cut short. What it prints is added to the log."""
    command = [sys.executable, *(("-m", through) if through else ()), *step.command]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # a bench keeps what it has measured
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=SPARE / 2)
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _readme(results: Path) -> None:
    """The report writes between two lines of a README: of a rehearsal another one."""
    from bench.report import BEGIN, END

    path = results / "README.md"
    if not path.is_file():
        path.write_text(f"{BEGIN}\n{END}\n")


if __name__ == "__main__":
    sys.exit(main())
