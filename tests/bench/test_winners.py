"""What wins a sweep, and its way into the source."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest

from bench import bench_attention_backward, run, winners
from bench.bench_attention import GPU_PROBLEMS
from bench.winners import KERNELS, Place
from minivlm2vec_kernels import attention_backward_triton, attention_triton
from minivlm2vec_kernels.attention_triton import Tile
from tests.kernels.aot import changed

SWEEP = [
    ("add_rms_norm", "1 x 3072", {"torch": 9, "triton": 2.0, "BM1 w4": 2.0, "BM2 w8": 1.0, "BM4 w2": 0.5}),
    ("add_rms_norm", "8 x 3072", {"torch": 9, "triton": 2.0, "BM1 w4": 2.0, "BM2 w8": 1.0}),  # BM4 was wrong here
    ("quick_gelu", "8 x 4096", {"torch": 9, "triton": 1.0, "BF1024 w2": 0.99}),  # too little
    ("rope", "8 x (32+32) x 96", {"torch": 9, "triton": 1.0, "w8": 1.0, "w4": 0.5}),
    ("linear_silu_mul", "8 x 8 x 8", {"torch": 9, "tma 128x128x64 w8 s3 r1": 1.0, "tma 256x64x64 w8 s3 r1": 0.5}),
    ("attention causal 96 tma", "32x777", {"triton": 1.0, "128x64 w8 s3 tma (as triton)": 1.0, "64x64 w4 s2 tma": 0.8}),
    ("attention causal 96 tma", "4x4096", {"triton": 1.0, "128x64 w8 s3 tma (as triton)": 1.0, "64x64 w4 s2 tma": 0.9,
                                           "64x64 w4 s2 pointers": 0.1}),  # does not work for 777
    ("attention causal 96 tma", "64x30", {"triton": 1.0, "32x32 w2 s1 pointers (as triton)": 1.0,
                                          "32x32 w4 s1 pointers": 0.5}),
    ("attention causal 96 pointers", "32x777", {"triton": 1.0, "64x64 w4 s2 pointers": 0.5}),
    ("attention full 64 small", "5 crops x 577", {"triton": 1.0, "32x32 w4 s1 pointers": 0.5}),
    ("attention_backward causal 96 tma", "32x777", {"triton": 2.0, "dq 64x32 w4 s2": 2.0, "dq 64x64 w8 s2": 1.0,
                                                    "dkv 32x64 w4 s2": 2.0, "dkv 32x64 w8 s1": 1.5}),
    ("attention_backward full 64 small", "5 crops x 577", {"triton": 2.0, "both 16x32 w4 s1": 1.0}),
]  # fmt: skip
ROWS = [{"kernel": k, "case": c, "dtype": "bfloat16", "provider": p, "ms": str(ms)} for k, c, t in SWEEP for p, ms in t.items()]  # fmt: skip  # noqa: E501
EXPECTED = {
    "launch.ROW_SETTINGS[4096]": "(2, 8)",
    "rope_triton.SETTINGS[16384]": "4",
    "linear_triton.CANDIDATES['silu_mul', 'tma']": "Tiles(256, 64, 64, 8, 3, 1)",
    "attention_triton.TILES[True, True][ANY, ANY]": "Tile(64, 64, 4, 2, True)",
    "attention_triton.TILES[True, True][32, 32]": "Tile(32, 32, 4, 1)",
    "attention_triton.TILES[True, False][1024, ANY]": "Tile(64, 64, 4, 2)",
    "attention_triton.SMALL_TILES[128][ANY, ANY]": "Tile(32, 32, 4, 1)",
    "attention_backward_triton.TILES['dq'][160]": "Tile(64, 64, 8, 2)",
    "attention_backward_triton.TILES['dkv'][128]": "Tile(32, 64, 8, 1)",
    "attention_backward_triton.SMALL_TILES[96]": "Tile(16, 32, 4, 1)",
}


def test_what_wins_is_right_and_fast_in_every_case():
    found = winners.find(ROWS)
    assert {f"{w['file']}.{w['row']}": w["value"] for w in found} == EXPECTED
    gains = {w["row"]: w["gain"] for w in found}
    assert gains["ROW_SETTINGS[4096]"] == 2 and gains["TILES[True, True][ANY, ANY]"] == pytest.approx(1.1785, abs=1e-4)
    assert gains["TILES['dq'][160]"] == 2 and gains["TILES['dkv'][128]"] == pytest.approx(1.3333, abs=1e-4)


@pytest.fixture
def copy(tmp_path):
    """Of the kernels, and a file of winners beside it."""
    shutil.copytree(KERNELS, tmp_path / "minivlm2vec_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "winners.json").write_text(json.dumps(winners.find(ROWS)))
    return tmp_path / "minivlm2vec_kernels"


def command(copy, *more: str) -> int:
    return winners.main(["apply", "--results", str(copy.parent), "--kernels", str(copy), *more])


def imported(copy, file: str, name: str):
    """A table of the copy, whose module is loaded as one of the package."""
    spec = importlib.util.spec_from_file_location(f"minivlm2vec_kernels.copy_of_{file}", copy / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def test_winners_are_put_into_the_source(copy, monkeypatch, capsys):
    """Each into its row and nothing else; a second time they change nothing; the files stay formatted."""
    monkeypatch.setattr(changed, "compile_all_but", lambda known, kernels: ([], []))
    before = {file.name: file.read_text() for file in copy.glob("*.py")}
    assert command(copy, "--dry-run") == 0
    assert {file.name: file.read_text() for file in copy.glob("*.py")} == before
    assert "launch.ROW_SETTINGS[4096]: would be (2, 8) (2.00x)" in capsys.readouterr().out
    assert command(copy) == 0 and capsys.readouterr().out.count(": now ") == len(EXPECTED)
    assert command(copy) == 0 and capsys.readouterr().out.count(": already ") == len(EXPECTED)

    tiles, small = imported(copy, "attention_triton", "TILES"), imported(copy, "attention_triton", "SMALL_TILES")
    ANY = attention_triton.ANY
    old = attention_triton.TILES
    assert tiles[True, True] == old[True, True] | {(32, 32): Tile(32, 32, 4, 1), (ANY, ANY): Tile(64, 64, 4, 2, True)}
    assert list(tiles[True, True]) == list(old[True, True])
    assert tiles[True, False] == old[True, False] | {(1024, ANY): Tile(64, 64, 4, 2)}
    assert all(tiles[False, tma] == old[False, tma] for tma in (True, False))
    assert small[128][ANY, ANY] == (32, 32, 4, 1, False) and small[192] == attention_triton.SMALL_TILES[192]
    backward = imported(copy, "attention_backward_triton", "TILES")
    assert backward == {
        "dq": {160: (64, 64, 8, 2, False), 192: (32, 32, 8, 2, False)},
        "dkv": {128: (32, 64, 8, 1, False), 144: (16, 32, 8, 1, False), 192: (32, 16, 8, 1, False)},
    }
    assert imported(copy, "launch", "ROW_SETTINGS")[4096] == (2, 8)
    candidates = imported(copy, "linear_triton", "CANDIDATES")["silu_mul", "tma"]
    assert (candidates[0].BM, candidates[0].BN) == (256, 64) and len(candidates) == 6
    assert ast.unparse(ast.parse((copy / "linear_triton.py").read_text())).count("Tiles(256, 64, 64, 8, 3, 1)") == 1

    lines = lambda text: text.splitlines()  # noqa: E731
    differ = {
        n: sum(a != b for a, b in zip(lines(t), lines((copy / n).read_text()), strict=True)) for n, t in before.items()
    }
    assert differ.pop("linear_triton.py") == 4, "three candidates make room for the fourth"
    assert {n: count for n, count in differ.items() if count} == {
        "attention_triton.py": 4, "attention_backward_triton.py": 3, "launch.py": 1, "rope_triton.py": 1}  # fmt: skip
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "--config", str(run.ROOT / "pyproject.toml")]
    formatted = subprocess.run([*ruff, str(copy)], capture_output=True, text=True)
    if "No module named ruff" not in formatted.stderr:
        assert formatted.returncode == 0, formatted.stdout


@pytest.mark.slow
def test_what_cannot_run_is_refused_by_name(copy, capsys):
    """Compiled in earnest: what spills or wants too much shared memory, what is no setting; the rest is applied."""
    silu = {"file": "activation_triton", "row": "SETTINGS['silu_mul_backward']", "gain": 2.0}
    small = {"file": "attention_triton", "row": "SMALL_TILES[128][32, 32]", "gain": None}
    tiles = {"file": "linear_triton", "row": "CANDIDATES['silu_mul', 'tma']", "gain": 1.5}
    rows = [
        silu | {"value": "(4096, 1)"},
        small | {"value": "Tile(16, 256, 4, 1)"},
        small | {"value": "Tile(64)"},
        silu | {"row": "SETTINGS['gelu']", "value": "4"},
        tiles | {"value": "Tiles(1, 1, 1, 1, 1, 1)"},
        silu | {"value": "(1024, 4)"},
    ]
    (copy.parent / "winners.json").write_text(json.dumps(rows))
    assert command(copy) == 1
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert "SETTINGS['silu_mul_backward'] = (4096, 1) is refused" in lines[0] and "spill instr" in lines[0], said
    assert "Tile(16, 256, 4, 1) is refused" in lines[1] and re.search("bytes of 65536|spill", lines[1]), said
    assert "Tile(64) is refused" in lines[2] and "missing 3 required positional arguments" in lines[2], said
    assert "is refused: there is no SETTINGS['gelu']" in lines[3], said
    assert "none of the candidates Tiles(128, 128, 64, 8, 3, 1), " in lines[4], said
    assert lines[5:] == ["activation_triton.SETTINGS['silu_mul_backward']: now (1024, 4) (2.00x)"], said
    assert imported(copy, "activation_triton", "SETTINGS")["silu_mul_backward"] == (1024, 4)
    assert (copy / "attention_triton.py").read_text() == (KERNELS / "attention_triton.py").read_text()


def sweep_csv(folder, *rows: str, header: str = "date,kernel,case,dtype,provider,ms") -> str:
    path = folder / "card-sweep.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="latin-1")
    return str(path)


RIGHT = "2030-01-01 10:00,rope,8 x (32+32) x 96,bfloat16"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], " has no rows"),
        ([f"{RIGHT},w4,1.0", f"{RIGHT},w8,"], ", row 2: ms is empty"),
        ([f"{RIGHT},w4"], ", row 1: ms is empty"),
        ([f",{RIGHT.partition(',')[2]},w4,1.0"], ", row 1: date is empty"),
        ([f"{RIGHT},w4,0"], ", row 1: ms is 0, which is no time"),
        ([f"{RIGHT},w4,fast"], ", row 1: ms is fast, which is no time"),
        ([f"{RIGHT},w4,nan"], ", row 1: ms is nan, which is no time"),
        (["2030,attention causal 96 tma,lunch,bf,triton,1"], ": no table has a row for attention causal 96 tma, lunch"),
        (["2030,attention_backward full 999 small,x,bf,triton,1"], ": no table has a row for attention_backward full"),
        (["\xff"], " is no csv file: "),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be_read_is_named(tmp_path, capsys, rows, words):
    path = sweep_csv(tmp_path, *rows)
    assert winners.main(["find", "--results", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}{words}" in line and not (tmp_path / "winners.json").exists()


def test_a_sweep_without_a_column_and_a_folder_that_is_not_there(tmp_path, capsys):
    path = sweep_csv(tmp_path, "rope,1", header="kernel,ms")
    assert winners.main(["find", "--results", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"bench.winners: {path} has no column case, date, dtype, provider\n"
    assert winners.main(["find", "--results", str(tmp_path / "no")]) == 1
    assert capsys.readouterr().err == f"bench.winners: there is no folder {tmp_path / 'no'}\n"


def test_of_several_sweeps_the_latest_is_taken(tmp_path):
    for name, date, best in (("a", "2030-01-02", 4), ("b", "2030-01-01", 2)):
        rows = [f"{date}{RIGHT[10:]},{p},{ms}" for p, ms in (("triton", 2), ("w8", 2), (f"w{best}", 1))]
        (tmp_path / f"{name}-sweep.csv").write_text("\n".join(["date,kernel,case,dtype,provider,ms", *rows]))
    assert winners.main(["find", "--results", str(tmp_path)]) == 0
    assert [w["value"] for w in json.loads((tmp_path / "winners.json").read_text())] == ["4"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no {}: "),
        ("{", "{} is no JSON: "),
        ("{}", "{} is no list of winners"),
        ("[1]", "{} is no list of winners"),
        ('[{"file": "launch", "row": "ROW_SETTINGS[4096]", "value": 4}]', "{} is no list of winners"),
        ('[{"file": "a", "row": "B[1]", "value": "4", "gain": "2"}]', "{}: the gain of B[1] is '2', "),
    ],
)
def test_winners_that_cannot_be_read_are_named(tmp_path, capsys, text, words):
    path = tmp_path / "winners.json"
    if text is not None:
        path.write_text(text)
    assert winners.main(["apply", "--results", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"bench.winners: {words.replace('{}', str(path))}" in line


def test_a_row_keeps_its_kind(copy, monkeypatch, capsys):
    """Another would be read when a kernel is launched, or, instead of a whole table, when the package is imported."""
    monkeypatch.setattr(changed, "compile_all_but", lambda known, kernels: pytest.fail("it was to be compiled"))
    before = {file: file.read_text() for file in copy.glob("*.py")}
    rows = [("launch", "ROW_SETTINGS[4096]", v) for v in ("Tile(1, 2)", "4", "(0, 4)", "(1.5, 4)", "(1, 4, 4)")]
    rows += [
        ("launch", "ROW_SETTINGS", "(2, 4)"),
        ("launch", "ROW_SETTINGS", "0"),
        ("rope_triton", "SETTINGS[1024]", "0"),
    ]
    rows += [("attention_backward_triton", "SMALL_TILES[96]", "(32, 32, 4, 1)")]
    wrong = [dict(zip(("file", "row", "value"), row, strict=True)) for row in rows]
    (copy.parent / "winners.json").write_text(json.dumps(wrong))
    assert command(copy) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(wrong) and all("is refused: it is of another kind" in line for line in lines), lines
    assert {file: file.read_text() for file in before} == before


def test_nothing_but_settings_reaches_the_source_and_no_other_file_is_changed(copy, monkeypatch, capsys):
    monkeypatch.setattr(changed, "compile_all_but", lambda known, kernels: pytest.fail("it was to be compiled"))
    (copy.parent / "setup.py").write_text("ROW_SETTINGS = {4096: (1, 4)}\n")
    before = {file: file.read_text() for file in [copy.parent / "setup.py", *copy.glob("*.py")]}
    row = {"file": "launch", "row": "ROW_SETTINGS[4096]", "value": "(2, 8)", "gain": None}
    wrong = [row | {"file": file} for file in ("../setup", str(copy / "launch"), "no", "", "\0")]
    values = ["print(1)", "Tile(f())", "Tile(BM=1)", "Tile(*a)", "a.b(1)", "True", "'4'", "(1, a)", "[1]", "1 +", "\0"]
    wrong += [row | {"value": value} for value in values]
    wrong.append(row | {"row": "ROW_SETTINGS["})
    (copy.parent / "winners.json").write_text(json.dumps(wrong))
    assert command(copy) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all("is no file of the kernels" in line for line in lines[:5]), lines
    assert all("it is no number, no tuple" in line for line in lines[5:-1]), lines
    assert "ROW_SETTINGS[ is no row of a table" in lines[-1] and len(lines) == len(wrong)
    assert {file: file.read_text() for file in before} == before
    for value in ("4", "(2, 8)", "Tile(64, 64, 4, 2, True)", "Tiles(256, 64, 64, 8, 3, 1)"):
        assert winners.checked(value) == value
    assert winners.checked("(2,8)  # and more") == "(2, 8)", "a comment would swallow what follows"


@pytest.mark.parametrize(("table", "rows"), [("tma", {"dq": 160, "dkv": 128}), ("small", {"both": 96})])
def test_a_sweep_backward_puts_tiles_where_their_winner_goes(monkeypatch, table, rows):
    """On a pretended card there are no gradients, so that this is not rehearsed."""
    monkeypatch.setattr(bench_attention_backward, "table", lambda: table)
    source = attention_backward_triton
    tables = {"both": source.SMALL_TILES} if table == "small" else source.TILES
    before = {pass_: dict(tables[pass_]) for pass_ in rows}
    providers = bench_attention_backward.tile_providers(lambda: {p: dict(tables[p]) for p in rows}, 96)
    for name, call in providers.items():
        pass_, key = name.split()[0], rows[name.split()[0]]
        ((place, values),) = winners.settings(f"attention_backward causal 96 {table}", "32x777", {name: 1.0}).items()
        (value,) = values
        assert call() == before | {pass_: before[pass_] | {key: eval(value, {"Tile": Tile})}}
        assert place.row.endswith(f"[{key}]") and place.row.startswith("SMALL" if table == "small" else "TILES")
    assert {pass_: dict(tables[pass_]) for pass_ in rows} == before and len(providers) == 24 * len(rows)


def test_every_row_that_a_sweep_is_for_is_there():
    places = {place for each in winners.TABLES.values() for place, *_ in each}
    for table in ("tma", "pointers", "small"):
        for problem in GPU_PROBLEMS:
            causal = "causal" if problem.causal else "full"
            for kernel in ("attention", "attention_backward"):
                found = winners.ATTENTION.fullmatch(f"{kernel} {causal} {problem.head_dim} {table}")
                places |= {place for place, *_ in winners._attention(found, problem.name)}
    assert all(winners.in_use(place) for place in places)
    swept = {place.row.partition("[")[0] for place in places if place.file.startswith("attention")}
    assert swept == {"TILES", "SMALL_TILES"}
    rows = {place for place in places if place.row.startswith("TILES[True, True]")}
    assert len(rows) == len(attention_triton.TILES[True, True]), "each has a problem"


def test_every_settings_table_is_swept():
    """A table is what has one of these names at the top of a file of kernels."""
    names = {"SETTINGS", "ROW_SETTINGS", "BACKWARD_SETTINGS", "TILES", "SMALL_TILES", "CANDIDATES"}
    tables = set()
    for file in KERNELS.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names:
                tables.add((file.stem, ast.unparse(node.targets[0])))
    swept = {(place.file, place.row.partition("[")[0]) for each in winners.TABLES.values() for place, *_ in each}
    swept |= {(f"attention{way}_triton", table) for way in ("", "_backward") for table in ("TILES", "SMALL_TILES")}
    assert tables == swept


def test_a_table_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"there is no TILES\[0\]"):
        winners.entry("SMALL_TILES = {0: 1}", "TILES[0]")
    assert ast.unparse(winners.entry("A = {(1, B): {'c': f(2)}}", "A[1, B]['c']")) == "f(2)"
    assert str(Place("launch", "A[1]")) == "launch.A[1]"
