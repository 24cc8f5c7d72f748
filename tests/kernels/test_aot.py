"""Kernels compile for every capability of aot/cards.py: no spill, wgmma where promised, no fewer blocks than before."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import aot
from tests.kernels.aot import ahead, cards
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
    missing = [s.key(arch) for s in aot.all_specs(quick=True) for arch in s.archs if s.key(arch) not in table[version]]
    assert not missing, "run python -m tests.kernels.aot --write"


def test_table_is_what_write_table_writes(tmp_path, monkeypatch):
    before = json.loads(aot.TABLE.read_text())
    copy = tmp_path / "table.json"
    copy.write_text(aot.TABLE.read_text())
    monkeypatch.setattr(aot, "TABLE", copy)
    aot.write_table(before.get(aot.triton_version(), {}), only="")
    assert json.loads(copy.read_text()) == before | {aot.triton_version(): before.get(aot.triton_version(), {})}


SPEC = aot.Spec("x.y", "c", {}, {}, num_warps=8, archs=(90, 100), wgmma=True, blocks=2, ahead=1)
GOOD = {"registers": 120, "shared": 1024, "spills": 0, "wgmma": 8, "blocks": 2, "built": 0, "ahead": 1, "chained": 0}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"registers": 128}, None),
        ({"blocks": 1}, "1 blocks a multiprocessor, 2 promised"),
        ({"blocks": 1}, "blocks a multiprocessor fell from 2 to 1"),
        ({"blocks": 0}, "does not fit"),
        ({"ahead": 0}, "loads are 0 iterations ahead of their waits, 1 promised"),
        ({"built": 4}, "descriptors are made in every program: 4"),
        ({"chained": 1}, "sm_100: dots are chained"),
        ({"spills": 3}, "3 spill instructions"),
        ({"wgmma": 4}, "wgmma fell from 8 to 4"),
        ({"wgmma": 0}, "no wgmma"),
    ],
)
def test_problems_are_named(change, complaint):
    keys = [SPEC.key(arch) for arch in SPEC.archs]
    found = aot.problems([SPEC], dict.fromkeys(keys, GOOD | change), dict.fromkeys(keys, GOOD))
    assert bool(found) == (complaint is not None)
    assert complaint is None or any(complaint in f for f in found)


@pytest.mark.parametrize("card", ["sm_75", *(pytest.param(c, marks=pytest.mark.slow) for c in ("sm_120", "gfx90a"))])
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
        "spec = e.aot.in_dtype(e.attention._spec(96, True, Tile(128, 64, 8, 2), one_block=False), 'fp16')\n"
        "print(e.problem(spec, e.CARDS['sm_75']))"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, env=compiling_environment(), capture_output=True, text=True)
    said = out.stdout + out.stderr
    assert re.search(r"attention_kernel\[fp16 H96 .*\] sm_75: 98304 bytes of 65536", said), said


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [
        (128, 99_328, 8, 2),
        (129, 99_328, 8, 1),
        (127, 116_000, 8, 1),
        (96, 7_168, 2, 10),
        (32, 0, 1, 32),
        (64, 240_000, 4, 0),
    ],
)
def test_blocks_of_sm_90(registers, shared, warps, blocks):
    assert cards.LIMITS[90].blocks(registers, shared, warps) == blocks


LOADS, WAITS = (
    "  cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier [%r1];",
    "  mbarrier.try_wait.parity.shared.b64 %p1;",
)


@pytest.mark.parametrize(
    ("before", "body", "expected"),
    [(1, [WAITS, LOADS], 0), (2, [WAITS, LOADS], 1), (1, [LOADS, WAITS], 1), (0, [LOADS, WAITS], 0)],
)
def test_how_far_loads_are_ahead_of_their_waits(before, body, expected):
    ptx = [*before * [LOADS], "$L__BB0_1:", *body, "  @%p2 bra $L__BB0_1;"]
    assert ahead.least("\n".join(ptx)) == expected


def test_dots_chained_through_a_loop_carried_accumulator_are_found():
    command = [sys.executable, "-m", "tests.kernels.aot.chained_example"]
    done = subprocess.run(command, cwd=ROOT, env=compiling_environment(), capture_output=True, text=True)
    assert done.stdout.split() == ["1", "0"], done.stderr


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
    found, _ = instructions("quantize_rows", "--config", "K3072", "--arch", "90")  # of bfloat16, of float32
    elements = 4096 // 128  # a thread; a program takes one row
    assert found["FCHK"] <= 2 and found["FMUL"] >= elements  # its scale, and what that is the reciprocal of
