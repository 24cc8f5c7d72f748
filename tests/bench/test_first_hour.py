"""The first hour's order, state and resumption, and a short one on a pretended card."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import common, first_hour, run
from bench.first_hour import BENCHES, MORE, ROOT, State, Step, work
from tests.support.helpers import compiling_environment


def python(code: str) -> tuple[str, ...]:
    return "-c", code


def minutes(n: float) -> float:
    return time.monotonic() + 60 * n


def test_it_goes_on_where_it_ended(tmp_path, capsys):
    """A step that does not fit waits; one that fails is named, and the rest goes on; nothing is done twice."""
    todo = [
        Step("one", python("print('1')")),
        Step("two", python("raise SystemExit(2)")),
        Step("three", python("0"), 1e6),
    ]
    state = State(tmp_path / "s.json")
    assert work(todo, state, minutes(10)) == MORE
    assert [State(state.path).words(s.name) for s in todo] == ["done", "failed", "to come"]
    assert "three is for the next call" in capsys.readouterr().out
    assert state.log("one").read_text() == "1\n"
    assert work(todo, State(state.path), minutes(10)) == 1
    assert "All done. Wrong: two" in capsys.readouterr().out and state.log("one").read_text() == "1\n"


def test_a_step_that_is_cut_short_twice_is_left(tmp_path):
    """And interrupted, so that it can write down what it has."""
    code = "import time\ntry: time.sleep(600)\nfinally: print('kept', flush=True)"
    todo = [Step("endless", python(code)), Step("next", python("0"), 1e6)]
    state = State(tmp_path / "s.json")
    start = time.monotonic()
    for times, words in ((1, "to go on"), (2, "failed")):
        assert work(todo, state, time.monotonic() + first_hour.SPARE + 2) == MORE
        assert state.words("endless") == words
        assert state.log("endless").read_text().count("kept") == times
    assert time.monotonic() - start < 2 * first_hour.SPARE


def test_a_bench_is_done_in_parts(tmp_path):
    """What is left is asked for with the date of its first call; pytest's exit code 3 is a failure."""
    code = "import sys; print(sys.argv[1:]); sys.exit(3)"
    state = State(tmp_path / "s.json")
    todo = [Step("bench", python(code), in_parts=True), Step("pytest", python(code))]
    state.begin("bench")
    state.end("bench", None, 1.0)
    assert state.steps["bench"]["cut"] == 1
    assert work(todo, state, minutes(9)) == MORE and state.steps["bench"]["cut"] == 0
    begun = state.steps["bench"]["begun"] = "2030-01-01 10:00"
    assert state.words("bench") == "to go on" and state.words("pytest") == "to come"
    while not state.done("bench"):
        work(todo[:1], state, minutes(9))
    assert state.words("bench") == "failed"
    lines = state.log("bench").read_text().splitlines()
    assert len(lines) == first_hour.MOST_TRIES - 1 and f"'--since', '{begun}', '--budget', '4" in lines[-1]
    assert work(todo, state, minutes(9)) == 1 and state.words("pytest") == "failed"
    assert state.log("pytest").read_text() == "[]\n"


DRIVER = """
import sys
from pathlib import Path
from bench import first_hour
from bench.first_hour import Step

folder = Path(sys.argv[1])
slow = f"import time; print('begun', flush=True); time.sleep(0 if Path({str(folder / 'go')!r}).exists() else 600)"
slow = "from pathlib import Path; " + slow
interrupted = f"try: exec({slow!r})\\nexcept KeyboardInterrupt: time.sleep(1); print('kept', flush=True)"
first_hour.steps = lambda results: [
    Step("before", ("-c", "print('once')")), Step("half", ("-c", interrupted)), Step("after", ("-c", "print('once')"))
]
sys.exit(first_hour.main(["--results", str(folder)]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_call_that_is_killed(tmp_path, how):
    """Its step ends with it and keeps what it has; the next call waits for that, repeats that step and no other."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    if how == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent was killed")
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    log = tmp_path / "first_hour" / "half.txt"
    call = subprocess.Popen(command, cwd=ROOT, env=env)
    try:
        wait_for(lambda: log.exists() and "begun" in log.read_text())
        call.send_signal(how)
        assert call.wait(60) != 0
    finally:
        call.kill()
    state = json.loads((tmp_path / "first_hour.json").read_text())
    assert state["before"]["code"] == 0 and state["half"]["code"] is None and "after" not in state
    (tmp_path / "go").touch()
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert log.read_text() == "begun\nkept\nbegun\n"
    assert {p.stem: p.read_text() for p in log.parent.iterdir() if p != log} == {"before": "once\n", "after": "once\n"}


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("more", [[], ["--list", "--again", "doctor"]])
def test_two_at_a_time_are_refused(tmp_path, monkeypatch, capsys, more):
    monkeypatch.setattr(first_hour, "alone", lambda lock, plain=first_hour.alone: plain(lock, 0.3))
    State(tmp_path / "first_hour.json").begin("doctor")
    with (tmp_path / "first_hour.lock").open("w") as lock:
        assert first_hour.alone(lock)
        with pytest.raises(SystemExit):
            first_hour.main(["--results", str(tmp_path), *more])
        assert "another first hour is at work" in capsys.readouterr().err
        assert first_hour.main(["--results", str(tmp_path), "--list"]) == 0, "reading takes no lock"
    assert "to go on  doctor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--minutes", "0"], "--minutes 0 leaves no time"),
        (["--minutes", "-1"], "--minutes -1 leaves no time"),
        (["--minutes", "nan"], "--minutes nan leaves no time"),
        (["--through", "no.such"], "--through no.such: python -m finds no such module"),
        (["--through", "tests.bench"], "--through tests.bench: python -m finds no such module"),
        (["--through", ""], "--through : python -m finds no such module"),
    ],
)
def test_what_cannot_work_is_refused_before_any_step(tmp_path, capsys, options, words):
    with pytest.raises(SystemExit) as stopped:
        first_hour.main(["--results", str(tmp_path), *options])
    assert stopped.value.code == 2 and words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_modules_that_python_m_runs():
    assert all(map(first_hour.can_run, ("tests.bench.on_pretended_card", "minivlm2vec", "bench.run")))


@pytest.mark.parametrize(
    "text", ["{", "", "[]", "3", '{"doctor": 1}', '{"doctor": {}}', '{"doctor": {"begun": "", "code": "0"}}', "\xff"]
)
def test_a_damaged_state_is_named(tmp_path, capsys, text):
    path = tmp_path / "first_hour.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(SystemExit) as stopped:
        first_hour.main(["--results", str(tmp_path), "--list"])
    assert stopped.value.code == 2 and f"{path} is damaged: delete it" in capsys.readouterr().err
    assert path.read_text(encoding="latin-1") == text


@pytest.mark.parametrize("name", ["", "below", "first_hour", "first_hour.json", "first_hour.lock"])
def test_what_is_in_the_way_is_named(tmp_path, capsys, name):
    """A file where a folder should be, and the other way round."""
    results = wrong = tmp_path / "results"
    if name in ("", "below"):
        results.write_text("")
        results = wrong = results / name
    else:
        wrong = results / name
        results.mkdir()
        wrong.mkdir() if "." in name else wrong.write_text("")
    with pytest.raises(SystemExit) as stopped:
        first_hour.main(["--results", str(results), "--through", "tests.bench.on_pretended_card"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and str(wrong) in said and "Traceback" not in said


def test_a_list_of_which_little_is_read(tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "bench.first_hour", "--results", str(tmp_path), "--list"]
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (first_hour.PIPE_CLOSED, "")


def test_the_order(tmp_path, capsys):
    todo = first_hour.steps(tmp_path)
    kinds = list(dict.fromkeys(s.name.split()[0] for s in todo))
    assert kinds == ["doctor", "tests", "sweep", "winners", "bench", "report"]
    assert all(s.seconds <= 60 * first_hour.MINUTES - first_hour.SPARE for s in todo)
    kernels = {name for name in run.bench_names() if (ROOT / f"kernels/minivlm2vec_kernels/{name}_triton.py").exists()}
    assert set(BENCHES) == kernels, "each kernel is swept and timed"
    assert first_hour.main(["--results", str(tmp_path), "--list"]) == 0 and "to come  doctor" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        first_hour.main(["--results", str(tmp_path), "--again", "lunch"])
    assert "no step is called lunch" in capsys.readouterr().err


def test_every_folder_with_tests_for_a_card_is_run():
    asked = [p for arguments in first_hour.TESTS.values() for p in arguments if not p.startswith("-")]
    for file in (ROOT / "tests").rglob("test_*.py"):
        if "pytest.mark.gpu" in file.read_text() and file.name != Path(__file__).name:
            assert any(file.is_relative_to(ROOT / p) for p in asked if p.startswith("tests")), file


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.slow
def test_a_short_one_on_a_pretended_card(tmp_path, monkeypatch):
    """A sweep, its winners, a bench, the report; then the sweep as if it had been stopped after a case."""
    for name, value in compiling_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    short = ("sweep pooling", "winners", "bench pooling", "report")
    todo = [s for s in first_hour.steps(tmp_path) if s.name in short]
    state = State(tmp_path / "first_hour.json")
    first_hour._readme(tmp_path)
    assert work(todo, state, minutes(9), "tests.bench.on_pretended_card") == 0, logs(state)
    (winner,) = json.loads((tmp_path / "winners.json").read_text())
    assert (winner["file"], winner["row"], winner["value"]) == ("pooling_triton", "SETTINGS[8192]", "16")
    (swept,) = tmp_path.glob("*-sweep.csv")
    assert {r["provider"] for r in common.read_rows(swept)} == {"reference", "triton", "w1", "w8", "w16"}
    assert "pool_last_token | 32 of 777" in (tmp_path / "README.md").read_text()
    state.steps["sweep pooling"] |= {"begun": "2000-01-01 00:00", "code": None}
    assert work(todo, state, minutes(9), "tests.bench.on_pretended_card") == 0, logs(state)
    cases = [r["case"] for r in common.read_rows(swept)]
    assert cases == 5 * ["1 of 30"] + 5 * ["64 of 30"], "what has rows is not run again"


def logs(state: State) -> str:
    return "\n".join(p.read_text()[-3000:] for p in state.logs.iterdir())
