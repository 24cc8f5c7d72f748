"""Kernels compile for sm_80, sm_90 and sm_100: no spill, wgmma where promised, no drift from the table."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import aot
from tests.support.helpers import compiling_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def output() -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.kernels.aot", "--quick"]
    return subprocess.run(command, cwd=ROOT, env=compiling_environment(), capture_output=True, text=True)


def test_kernels_compile_without_spills_and_as_the_table_says(output):
    print(output.stdout)
    assert output.returncode == 0, output.stdout + output.stderr


def test_table_covers_every_spec_of_this_triton(output):
    table = aot.read_table()
    version = aot.triton_version()
    if version not in table:
        pytest.skip(f"no table for Triton {version}; have {', '.join(table)}")
    missing = [s.key(arch) for s in aot.all_specs() for arch in s.archs if s.key(arch) not in table[version]]
    assert not missing, "run python -m tests.kernels.aot --write"


def test_table_is_what_write_table_writes(tmp_path, monkeypatch):
    before = json.loads(aot.TABLE.read_text())
    copy = tmp_path / "table.json"
    copy.write_text(aot.TABLE.read_text())
    monkeypatch.setattr(aot, "TABLE", copy)
    aot.write_table(before.get(aot.triton_version(), {}), only="")
    assert json.loads(copy.read_text()) == before | {aot.triton_version(): before.get(aot.triton_version(), {})}


SPEC = aot.Spec("x.y", "c", {}, {}, archs=(90,), wgmma=True)
GOOD = {"registers": 100, "shared": 1024, "spills": 0, "wgmma": 8}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"registers": 100 + aot.REGISTER_SLACK}, None),
        ({"registers": 101 + aot.REGISTER_SLACK}, "registers grew from 100"),
        ({"shared": 2048}, "shared memory grew from 1024 to 2048"),
        ({"spills": 3}, "3 spill instructions"),
        ({"wgmma": 4}, "wgmma fell from 8 to 4"),
        ({"wgmma": 0}, "no wgmma"),
    ],
)
def test_problems_are_named(change, complaint):
    key = SPEC.key(90)
    found = aot.problems([SPEC], {key: GOOD | change}, {key: GOOD})
    assert bool(found) == (complaint is not None)
    assert complaint is None or any(complaint in f for f in found)


@pytest.mark.parametrize("card", ["sm_75", "sm_120", "gfx90a"])
def test_what_a_card_gets_fits_there(card):
    """The model's own shapes; `python -m tests.kernels.aot.every_card` compiles for all cards, head dims and dtypes."""
    command = [sys.executable, "-m", "tests.kernels.aot.every_card", "--quick", "--cards", card]
    out = subprocess.run(command, cwd=ROOT, env=compiling_environment(), capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    assert int(re.search(r"(\d+) compiled, 0 cannot", out.stdout)[1]) > 15


def test_a_tile_that_does_not_fit_is_named():
    """The tile that sm_75 would get from the table of larger cards."""
    code = (
        "from tests.kernels.aot import every_card as e; from minivlm2vec_kernels.attention_triton import Tile\n"
        "spec = e._in(e.attention._spec(96, True, Tile(128, 64, 8, 2), one_block=False), 'fp16')\n"
        "print(e.problem(spec, e.CARDS['sm_75']))"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, env=compiling_environment(), capture_output=True, text=True)
    said = out.stdout + out.stderr
    assert re.search(r"attention_kernel\[fp16 H96 .*\] sm_75: 98304 bytes of 65536", said), said


def instructions(*arguments: str) -> list[dict[str, int]]:
    """Of each configuration, as tests/kernels/aot/instructions.py counts them."""
    command = [sys.executable, "-m", "tests.kernels.aot.instructions", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=compiling_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_sigmoid_is_two_special_functions_and_no_division():
    """In products' epilogues, which nothing hides: division would bring a reciprocal and its care for denormals."""
    (found,) = instructions("linear_quick_gelu", "--config", "pointer 64x64x32", "--arch", "90")
    elements = 64 * 64 // 128  # a thread
    assert found["MUFU.EX2"] == found["MUFU.RSQ"] == elements
    assert found.get("MUFU.RCP", 0) < elements and found.get("FSETP", 0) < elements and "FCHK" not in found


def test_rows_are_quantised_by_one_division_a_row():
    (found,) = instructions("quantize_rows", "--config", "K3072", "--arch", "90")
    elements = 4096 // 128  # a thread; a program takes one row
    assert found["FCHK"] <= 2 and found["FMUL"] >= elements  # its scale, and what that is the reciprocal of
