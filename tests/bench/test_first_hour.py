"""The first hour's order, state and resumption; what wins a sweep, and its way into the source."""

import ast
import json
import shutil

import pytest

from bench import first_hour, winners
from bench.first_hour import MORE, State, Step, work

SWEEP = [
    ("add_rms_norm", "1 x 3072", {"torch": 9, "triton": 2.0, "BM1 w4": 2.0, "BM2 w8": 1.0, "BM4 w2": 0.5}),
    ("add_rms_norm", "8 x 3072", {"torch": 9, "triton": 2.0, "BM1 w4": 2.0, "BM2 w8": 1.0}),  # BM4 was wrong here
    ("quick_gelu", "8 x 4096", {"torch": 9, "triton": 1.0, "BF1024 w2": 0.99}),  # too little
    ("linear_silu_mul", "8 x 8 x 8", {"torch": 9, "tma 128x128x64 w8 s3 r1": 1.0, "tma 256x64x64 w8 s3 r1": 0.5}),
    ("attention causal 96", "32x777", {"torch": 9, "triton": 1.0, "64x64 w4 s2 tma": 0.8}),
]
ROWS = [{"kernel": k, "case": c, "dtype": "bfloat16", "provider": p, "ms": str(ms)} for k, c, t in SWEEP for p, ms in t.items()]  # fmt: skip  # noqa: E501


def test_what_wins_is_right_and_fast_in_every_case():
    found = winners.find(ROWS)
    rows = {(w["table"], *(w["key"] if isinstance(w["key"], list) else [w["key"]])): w for w in found["rows"]}
    assert rows["ROW_SETTINGS", 4096]["value"] == [2, 8] and rows["ROW_SETTINGS", 4096]["gain"] > 1.9
    assert rows["CANDIDATES", "silu_mul", "tma"]["value"] == [256, 64, 64, 8, 3, 1]
    assert len(rows) == 2, "a gain of 1 % changes nothing"
    (by_hand,) = found["by hand"]
    assert by_hand["best"] == "64x64 w4 s2 tma" and by_hand["gain"] == pytest.approx(1.25)


def test_winners_are_put_into_the_source(tmp_path, capsys):
    """And nothing else is changed; a second time it changes nothing."""
    shutil.copytree(winners.KERNELS, tmp_path / "kernels")
    (tmp_path / "winners.json").write_text(json.dumps(winners.find(ROWS)))
    command = ["apply", "--results", str(tmp_path), "--kernels", str(tmp_path / "kernels")]
    before = (tmp_path / "kernels/launch.py").read_text()
    assert winners.main([*command, "--dry-run"]) == 0
    assert (tmp_path / "kernels/launch.py").read_text() == before and "would be [2, 8]" in capsys.readouterr().out
    assert winners.main(command) == winners.main(command) == 0
    assert "already" in capsys.readouterr().out
    after = (tmp_path / "kernels/launch.py").read_text()
    assert after.replace("4096: (2, 8)", "4096: (1, 4)") == before
    linear = (tmp_path / "kernels/linear_triton.py").read_text()
    first = winners._entry(linear, "CANDIDATES", ("silu_mul", "tma")).elts[0]
    assert [ast.literal_eval(a) for a in first.args] == [256, 64, 64, 8, 3, 1]
    old = (winners.KERNELS / "linear_triton.py").read_text()
    assert sorted(linear) == sorted(old) and linear != old


def test_every_table_that_a_winner_goes_to_is_there():
    for file, table, key, pattern in winners.TABLES.values():
        source = (winners.KERNELS / f"{file}.py").read_text()
        for full in [(key, "tma"), (key, "pointer")] if pattern is winners.TILES else [key]:
            assert winners._entry(source, table, full)


def python(code: str) -> tuple[str, ...]:
    return "-c", code


def test_it_goes_on_where_it_ended(tmp_path, capsys):
    """A step that does not fit waits; one that fails is named, and the rest goes on; nothing is done twice."""
    todo = [
        Step("one", python("print('1')")),
        Step("two", python("raise SystemExit(2)")),
        Step("three", python("0"), 1e6),
    ]
    state = State(tmp_path / "s.json")
    now = first_hour.time.monotonic()
    assert work(todo, state, now + 1000) == MORE
    assert [State(state.path).words(s.name) for s in todo] == ["done", "failed", "to come"]
    assert "three is for the next call" in capsys.readouterr().out
    assert state.log("one").read_text() == "1\n"
    assert work(todo, State(state.path), first_hour.time.monotonic() + 1000) == 1
    assert "All done. Wrong: two" in capsys.readouterr().out and state.log("one").read_text() == "1\n"


def test_a_step_that_is_cut_short_twice_is_left(tmp_path):
    todo = [Step("endless", python("import time; time.sleep(600)"))]
    state = State(tmp_path / "s.json")
    for code, words in ((MORE, "cut short"), (1, "failed")):
        assert work(todo, state, first_hour.time.monotonic() + first_hour.SPARE + 2) == code
        assert state.words("endless") == words


def test_the_order(tmp_path, capsys):
    names = [s.name for s in first_hour.steps(tmp_path, 400)]
    kinds = list(dict.fromkeys(n.split()[0] for n in names))
    assert kinds == ["doctor", "tests", "sweep", "winners", "bench", "report"]
    assert all(s.seconds < 9 * 60 for s in first_hour.steps(tmp_path, 450))
    assert first_hour.main(["--results", str(tmp_path), "--list"]) == 0 and "to come  doctor" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        first_hour.main(["--results", str(tmp_path), "--again", "lunch"])
    assert "no step is called lunch" in capsys.readouterr().err
