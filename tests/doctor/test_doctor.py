"""`minivlm2vec doctor` on a CPU, with what is wrong on purpose, and on a pretended card of every capability."""

import getpass
import inspect
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minivlm2vec_kernels
from minivlm2vec import cli, doctor
from minivlm2vec.doctor import isolated, kernels, machine, model, recorded, speed, task, worker
from minivlm2vec.doctor.privacy import anonymous
from minivlm2vec.doctor.report import Check, Fact, Report, Timing
from minivlm2vec.doctor.task import Options, Task
from minivlm2vec.inference.graphs import PaddedModel, TowerPrograms
from minivlm2vec_kernels import ops, torch_ops
from tests.support.helpers import ROOT, compiling_environment

CPU = Options("cpu", quick=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def torch_path(monkeypatch):
    """The other tests run Triton's interpreter in this process."""
    monkeypatch.setattr(kernels, "_backend", lambda x: "torch")


def rows(tasks) -> list[Check]:
    with torch.no_grad():
        return [task.outcome(t) for t in tasks]


def few(name: str, *dtypes: torch.dtype) -> list[Check]:
    """The awkward sizes of a kernel, which are small."""
    return rows(t for t in kernels.tasks(CPU, dtypes or DTYPES, None) if t.name == name and "3 x " in t.case)


# ---------------------------------------------------------------------------------------------------- kernels


def test_every_op_is_examined():
    """By its name, at the model's shapes and at awkward ones, in every dtype."""
    found = list(kernels.tasks(Options("cuda"), DTYPES, (9, 0)))
    names = {t.name for t in found}
    assert names >= set(minivlm2vec_kernels.__all__) - {"choose_backend"}
    for name in names:
        assert {t.dtype for t in found if t.name == name} == {"float32", "float16", "bfloat16"}, name
        assert all(t.way_round for t in found)
    assert {"attention backward", "rms_norm backward", "rope backward", "silu_mul backward"} <= names


def test_rows_of_torch_are_right_on_a_cpu(torch_path):
    names = (
        "rms_norm",
        "add_layer_norm",
        "layer_norm_shift_",
        "quantize_rows",
        "rms_norm_quantize",
        "rope",
        "silu_mul",
    )
    for row in [row for name in names for row in few(name)]:
        assert row.verdict == "passed" and 0 <= row.error <= row.tolerance, row


def test_attention_is_first_where_triton_has_a_known_fault():
    """Two products into one accumulator in a loop: Triton issue 10821."""
    first = list(kernels.tasks(Options("cuda"), DTYPES, (10, 0)))
    attention = [t for t in first if t.name.startswith("attention")]
    assert first[: len(attention)] == attention and all("10821" in t.case for t in attention)
    assert {t.name for t in attention} == {"attention", "attention backward"}
    others = list(kernels.tasks(Options("cuda"), DTYPES, (9, 0)))
    assert not others[0].name.startswith("attention") and not any("10821" in t.case for t in others)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda x, *_: x * 0.99, ""),
        (lambda x, *_: torch.full_like(x, float("nan")), "300 of 300 numbers are NaN or infinite"),
        (lambda x, *_: x[:2], "the output is [2, 100], it should be [3, 100]"),
        (lambda x, *_: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["wrong", "NaN", "shape", "crash"],
)
def test_a_broken_kernel_is_named(torch_path, monkeypatch, broken, words):
    """Of the kernels only it fails, in a row with its name."""
    monkeypatch.setattr(torch_ops, "rms_norm", broken)
    for row in few("rms_norm"):
        assert (row.verdict, row.name, row.reason) == ("failed", "rms_norm", words)
        if not words:
            assert row.error > row.tolerance
    assert all(row.verdict == "passed" for row in few("silu_mul"))


@pytest.mark.parametrize(
    ("name", "broken", "words"),
    [
        ("rms_norm", lambda op, x, *a: op(x, *a).double(), "the output is float64, it should be"),
        ("rms_norm", lambda op, x, *a: _after(op(x, *a), x.zero_()), "it writes into its input 1, where it should not"),
        ("rms_norm", lambda op, x, w, eps: _after(op(x, w, eps), w.mul_(2)), "it writes into its input 2, where it sh"),
        ("rope_", lambda op, q, k, *a: op(q.clone(), k.clone(), *a), "it writes nothing in place"),
        ("rope_", lambda op, q, k, *a: _after(op(q, k, *a), q.as_strided((9,), (1,), 2 * q[0].numel()).zero_()),
         "it writes into its input 1, where it should not"),
        ("silu_mul", lambda op, x: op(x) * (x[..., : x.shape[-1] // 2].abs() < 20).to(x.dtype), ""),
        ("rms_norm", lambda op, x, w, eps: op(x, w, eps) / x.float().abs().amax(-1, True).bool(), "numbers are NaN"),
    ],
    ids=["dtype", "input", "weight", "elsewhere", "beyond", "large", "zeros"],
)  # fmt: skip
def test_what_a_kernel_does_beside_its_values_is_seen(torch_path, monkeypatch, name, broken, words):
    """The dtype, what is written, and numbers that random ones do not reach."""
    plain = getattr(torch_ops, name)
    cases = [t for t in kernels.tasks(CPU, DTYPES, None) if t.name == name and ("3 x " in t.case or name == "rope_")]
    assert all(row.verdict == "passed" for row in rows(cases))
    monkeypatch.setattr(torch_ops, name, lambda *a: broken(plain, *a))
    found = rows(cases)
    for dtype in ("float32", "float16", "bfloat16"):
        wrong = [r for r in found if r.dtype == dtype and r.verdict == "failed" and r.name == name]
        assert wrong and all(words in r.reason for r in wrong), found


def _after(result, _):
    return result


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("wrong", ["exact", "same"])
def test_nothing_is_compared_with_a_reference_that_is_not_finite(number, wrong):
    """A tolerance that is infinite would let anything pass, and one that is NaN too."""
    case = next(kernels.row_cases(CPU))
    tensors = {name: [torch.ones(2, 3)] for name in ("outputs", "exact", "same")} | {
        wrong: [torch.full((2, 3), number)]
    }
    row = kernels.compared(case, "", torch.float32, **tensors, options=CPU)
    assert (row.verdict, row.reason) == ("not run", "the reference is not finite")


def test_a_broken_triton_kernel_is_named_with_the_way_round(monkeypatch):
    """In the interpreter: a wrong scale in the launcher of rms_norm."""
    from minivlm2vec_kernels import rms_norm_triton

    plain = rms_norm_triton.rms_norm
    monkeypatch.setattr(rms_norm_triton, "rms_norm", lambda x, weight, eps: plain(x, weight, eps) * 1.01)
    options = Options("cpu", interpret=True)
    found = rows(t for t in kernels.tasks(options, [torch.float32], None) if t.name in ("rms_norm", "pool_last_token"))
    assert {(r.name, r.verdict) for r in found} == {("rms_norm", "failed"), ("pool_last_token", "passed")}
    assert all(r.way_round == "MINIVLM2VEC_BACKEND=torch" for r in found if r.verdict == "failed")


def test_what_the_interpreter_cannot_tell_is_not_run():
    tasks = list(kernels.tasks(Options("cpu", interpret=True), DTYPES, None))
    found = rows(t for t in tasks if t.dtype == "bfloat16" or t.name in kernels.EIGHT_BITS)
    assert found and all(r.verdict == "not run" and "interpreter" in r.reason for r in found)


# ------------------------------------------------------------------------------------------------------ model


def forms(*names: str) -> list[Check]:
    return rows(t for t in model.tasks(CPU, [torch.float32]) if t.name in names)


def test_the_recorded_vectors_are_what_the_plain_model_gives(tmp_path):
    recorded.record(tmp_path / "again.safetensors")
    assert recorded.PATH.stat().st_size < 20_000
    again = recorded.compute().numpy()
    assert model.relative_error(again, recorded.vectors().numpy()) < 2e-5
    assert (tmp_path / "again.safetensors").stat().st_size == recorded.PATH.stat().st_size


def test_every_form_of_the_model_is_right():
    found = rows(model.tasks(CPU, [torch.float32, torch.bfloat16]))
    assert all(r.verdict == "passed" or "packs no" in r.reason for r in found), [r for r in found if r.reason]
    assert {"plain, torch alone", "optimised", "shared prefixes", "fp8", "as it comes"} <= {r.name for r in found}


@pytest.mark.parametrize("programs, part", [(PaddedModel, "decoder"), (TowerPrograms, "tower")])
def test_a_graph_that_is_captured_wrong_is_dropped_and_named(monkeypatch, programs, part):
    """The model drops it; the report says so, and of which part it was."""
    monkeypatch.setattr(programs, "_make", lambda self, run: lambda: run().roll(1, dims=-1))
    (row,) = forms("padded as for CUDA graphs")
    assert row.verdict == "failed" and part in row.reason and "is dropped" in row.reason, row


@pytest.mark.parametrize("programs", [PaddedModel, TowerPrograms])
def test_a_graph_that_replays_wrong_numbers_later_is_named(monkeypatch, programs):
    """Right when it is captured, so that the model keeps it; wrong afterwards."""

    def make(self, run):
        calls = iter(range(10**6))
        return lambda: run() if next(calls) == 0 else run().roll(1, dims=-1)

    monkeypatch.setattr(programs, "_make", make)
    (row,) = forms("padded as for CUDA graphs")
    assert row.verdict == "failed" and row.error > row.tolerance and row.name == "padded as for CUDA graphs"
    assert forms("optimised")[0].verdict == "passed"


def test_a_model_that_is_wrong_is_named_with_the_way_round(monkeypatch):
    monkeypatch.setattr(recorded, "vectors", lambda: torch.ones(len(recorded.inputs()), 192))
    (row,) = forms("optimised")
    assert row.verdict == "failed" and row.way_round == "optimize=False" and row.error > row.tolerance


def test_the_way_round_is_that_of_the_plainest_form_that_fails(monkeypatch):
    """optimize=False goes round no kernel that is wrong in the plain model too."""

    def row(name: str, dtype: str, verdict: str, way: str) -> Check:
        return Check("model", name, "", dtype, verdict, way_round=way if verdict == "failed" else "")

    found = [
        row(name, dtype, "passed" if name == passes else "failed", way)
        for dtype, passes in (("float32", "none"), ("float16", "plain"))
        for name, way in (("plain", "A=torch"), ("optimised", "optimize=False"), ("graphs", "graphs=False"))
    ]
    monkeypatch.setattr(isolated, "run", lambda options, state, *, seconds: state.rows.update(enumerate(found)))
    report = doctor.examine(device="cpu")
    assert [c.way_round for c in report.model] == ["A=torch"] * 3 + ["", "optimize=False", "optimize=False"]


def test_a_variable_that_names_no_backend_is_gone_round_by_one_that_does(monkeypatch):
    monkeypatch.setattr(ops, "BACKEND", "garbage")
    (row,) = forms("as it comes")
    assert row.verdict == "failed" and "got 'garbage'" in row.reason and row.way_round == "MINIVLM2VEC_BACKEND=torch"


def test_in_the_interpreter_few_inputs_are_taken():
    """All of them take longer there than a row may."""
    taken = []

    def vectors(e, inputs):
        taken.extend(inputs)
        return [recorded.vectors()[list(model.FEW)].numpy()]

    form = model.Form("plain", "", {"optimize": False}, vectors)
    row = model.examined(form, torch.float32, Options("cpu", interpret=True))
    assert row.verdict == "passed" and row.error == 0
    few = [recorded.inputs()[i] for i in model.FEW]
    assert [str(x) for x in taken] == [str(x) for x in few] and any("image" in x for x in taken)
    assert sum(isinstance(x, str) and x.startswith(recorded.COMMON) for x in few) == 2, "for shared prefixes"
    assert sum(len(x) for x in few if isinstance(x, str)) < 300


def test_texts_that_share_nothing_are_noticed(monkeypatch):
    monkeypatch.setattr(model, "share_prefixes", lambda batch, *_, **__: batch)
    (row,) = forms("shared prefixes")
    assert row.verdict == "failed" and "share nothing" in row.reason and row.way_round == "share_prefixes=False"


# ---------------------------------------------------------------------------------------- a process of its own

STUB = """
import os, sys, time, signal
import torch
from minivlm2vec.doctor import worker, task, report
from minivlm2vec.doctor.task import Task

def good(name): return Task("kernels", name, "3 x 4", "float32",
    lambda: report.Check("kernels", name, "3 x 4", "float32", "passed", 0.0, 1.0), "way of " + name)
def bad(name, run): return Task("kernels", name, "3 x 4", "float32", run, "way of " + name)
def crash(): print("ptxas died", flush=True); os.kill(os.getpid(), signal.SIGSEGV)
def poison(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
worker.planned = lambda options: [good("one"), bad("crashes", crash), good("two"),
    bad("hangs", lambda: time.sleep(600)), bad("poisons", poison), good("three")]
worker.main()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_what_crashes_or_hangs_is_one_row(monkeypatch):
    """A segmentation fault, a compiler that never returns and an error that poisons the device: the rest goes on."""
    monkeypatch.setattr(isolated, "COMMAND", [sys.executable, "-c", STUB])
    seen = []
    report = doctor.examine(device="cpu", seconds=8, progress=lambda *a: seen.append(a))
    by_name = {c.name: c for c in report.kernels}
    assert [c.name for c in report.kernels] == ["one", "crashes", "two", "hangs", "poisons", "three"]
    assert all(by_name[name].verdict == "passed" for name in ("one", "two", "three"))
    assert by_name["crashes"].reason == "the process crashed (SIGSEGV); its last line: ptxas died"
    slow = "no answer within 8 s: a compiler or the device hangs, or is slow: `seconds` gives it longer"
    assert by_name["hangs"].reason == slow
    assert "illegal memory access" in by_name["poisons"].reason
    assert all(c.verdict == "failed" and c.way_round == f"way of {c.name}" for c in report.failed)
    assert not report.passed and report.verdict.startswith("FAILED: 3 of 6 checks wrong") and len(seen) == 6


@pytest.mark.parametrize(
    ("said", "fatal"),
    [
        ("an illegal memory access was encountered", True),
        ("an illegal instruction was encountered", True),
        ("the launch timed out and was terminated", True),
        ("hardware stack error", True),
        ("invalid program counter", True),
        ("operation not supported on global/shared address space", True),
        ("uncorrectable ECC error encountered", True),
        ("out of memory", False),
        ("invalid argument", False),
    ],
)
def test_what_leaves_a_card_unusable_ends_the_process(said, fatal):
    """As Triton tells of it, without torch's "CUDA error": else the next kernel would get the blame."""
    row = Check("kernels", "rms_norm", "", "", "failed", reason=f"RuntimeError: Triton Error [CUDA]: {said}")
    assert task.is_fatal(row) == fatal


def test_a_process_that_cannot_begin_is_a_row_too(monkeypatch):
    monkeypatch.setattr(isolated, "COMMAND", [sys.executable, "-c", "raise SystemExit('no torch here')"])
    report = doctor.examine(device="cpu")
    (row,) = report.failed
    assert row.name == "the process that examines" and not row.way_round, "a CPU is not the way round a CPU"
    assert "could not begin" in row.reason and "no torch here" in row.reason and not report.passed


TELLING = """
import json, os, signal, sys, time
asked = json.loads(sys.stdin.readline())
def send(**message): print(json.dumps(message), flush=True)
def key(row): return [row[0], row[1], row[2], "float32"]
rows = ROWS
send(plan=[[*key(row), ""] for row in rows])
for row in rows:
    if key(row) in asked["done"]:
        continue
    send(begin=key(row))
    if row[3] == "stops":
        time.sleep(0.5)  # until what came before is read
        os.kill(os.getppid(), getattr(signal, row[2]))
        time.sleep(600)
    if row[3] == "crashes":
        os._exit(3)
    numbers = {} if row[3] else {"error": 0.0, "tolerance": 1.0}
    fields = numbers | dict(zip(("section", "name", "case", "dtype"), key(row)), reason=row[3])
    send(row=fields | {"verdict": "failed" if row[3] else "passed"})
    if row[3]:
        sys.exit()
send(end=True)
"""


def telling(monkeypatch, rows: list[tuple[str, str, str, str]]) -> None:
    """A worker that imports nothing and tells of these: section, name, case, how it fails."""
    monkeypatch.setattr(isolated, "COMMAND", [sys.executable, "-c", TELLING.replace("ROWS", repr(rows))])


def test_what_crashes_twice_is_not_run_again(monkeypatch):
    """So that its many rows do not use up the starts of the others."""
    monkeypatch.setattr(isolated, "MOST_STARTS", 5)
    cases = [str(n) for n in range(9)]
    many = [("kernels", "dies", n, "crashes") for n in cases]
    poison = [("kernels", "poisons", n, "CUDA error: misaligned address") for n in cases]
    telling(monkeypatch, [*many, *poison, ("kernels", "good", "", ""), ("speed", "dies", "", "crashes")])
    report = doctor.examine(device="cpu")
    for name in ("dies", "poisons"):
        verdicts = [c.verdict for c in report.kernels if c.name == name]
        assert verdicts == ["failed"] * 2 + ["not run"] * 7, name
    assert [c.verdict for c in report.kernels if c.name == "good"] == ["passed"]
    assert {c.reason for c in report.checks if c.verdict == "not run"} == {"it crashed or hung twice before"}
    assert [t.reason for t in report.speed] == ["it crashed or hung twice before"]


def test_a_process_that_always_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(isolated, "MOST_STARTS", 2)
    telling(monkeypatch, [("kernels", str(n), "", "crashes") for n in range(4)])
    verdicts = [c.verdict for c in doctor.examine(device="cpu").kernels]
    assert verdicts == ["failed", "failed", "not run", "not run"]


def test_the_plain_model_is_examined_before_what_may_crash():
    names = [t.name for t in worker.planned(CPU)]
    assert names[:5] == [worker.DEVICE[1], *[model.PLAIN] * 3, "rms_norm"]


def test_files_in_the_current_folder_do_not_break_the_process(tmp_path):
    """A file of the name of one of Python's modules is not imported, and Python says nothing of its own."""
    package = tmp_path / "package" / "minivlm2vec" / "doctor"
    package.mkdir(parents=True)
    for folder in (package, package.parent):  # without it, the installed package would come first
        (folder / "__init__.py").touch()
    (package / "worker.py").write_text("import queue\ndef main(): print('begun')")
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong queue')")
    env = os.environ | {"PYTHONPATH": str(tmp_path / "package")}
    done = subprocess.run(isolated.COMMAND, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("begun\n", "")


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_the_process_ends_with_its_parent():
    """Though it computes: the end of its stdin is the end of it and of what it started, which holds its stdout too."""
    command = f"""
import os, signal, subprocess, time
{inspect.getsource(worker._end_with_parent)}
subprocess.Popen(["sleep", "600"])
print("begun", flush=True)
_end_with_parent()
"""
    process = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               start_new_session=True)  # fmt: skip
    assert process.stdout.readline() == b"begun\n" and process.poll() is None
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


# ------------------------------------------------------------------------------------------------ pretended cards


CARDS = ["7.5", "9.0", "12.0", *(pytest.param(c, marks=pytest.mark.slow) for c in ("8.0", "8.6", "8.9", "10.0"))]


@pytest.fixture(scope="module", params=CARDS)
def on_card(request) -> tuple[str, str]:
    """Kernels that compile quickly; quantize_rows where it is refused, and once where it is not."""
    names = "rms_norm" if request.param in ("8.9", "10.0", "12.0") else "rms_norm,quantize_rows"
    command = [sys.executable, "-m", "tests.doctor.on_pretended_card", request.param, names]
    done = subprocess.run(command, cwd=ROOT, env=compiling_environment(), capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-3000:]
    return request.param, " ".join(done.stdout.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_on_a_pretended_card_it_says_what_it_could_not_run(on_card):
    """Nothing computes there, which is the one failure: all kernels compile, and none is called right."""
    capability, text = on_card
    assert f"compute capability {capability}" in text and "FAILED: 1 of 1 check wrong" in text
    assert "torch alone: sums and products: 1 + 2 + … + 64 is 0 on cuda, it should be 2080" in text
    assert "torch is wrong on this device; compiled and launched: rms_norm float32, rms_norm float16" in text
    no_bf16 = "this device has no bfloat16 (compute capability 7.5, it begins with 8.0)"
    assert (no_bf16 in text) == (capability == "7.5")
    no_fp8 = f"8-bit floats need capability 8.9, this device has {capability}: quantize_rows"
    assert (no_fp8 in text) == (capability in ("7.5", "8.0", "8.6"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_on_a_card_that_triton_does_not_know_torchs_operators_are_examined():
    """A V100: they are what is taken there, so that no kernel fails for being refused."""
    command = [sys.executable, "-m", "tests.doctor.on_pretended_card", "7.0", "pool_last_token,quantize_rows"]
    done = subprocess.run(command, cwd=ROOT, env=compiling_environment(), capture_output=True, text=True)
    text = " ".join(done.stdout.split())
    assert "FAILED: 1 of 1 check wrong" in text and "with torch kernels on cuda" in text, done.stderr[-3000:]
    assert "sm_70 is older than what Triton compiles for; torch's operators are examined instead: every Triton" in text
    launched = text.split("compiled and launched: ")[1]
    assert "quantize_rows float32, quantize_rows float16, pool_last_token float32, pool_last_token float16" in launched


def test_on_a_card_that_triton_does_not_know_nothing_of_tritons_is_planned(monkeypatch):
    options = Options("cuda", quick=True, refused="too old")
    assert options.backend == "torch" and Options("cuda").backend == "triton"
    names = [form.name for form in model.forms(options)]
    assert {"plain, torch alone", "optimised", "as it comes"} <= set(names)
    assert not any("Triton" in name or "graphs" in name for name in names)
    assert not any(t.way_round for t in kernels.tasks(options, DTYPES, (7, 0)))
    for capability, refused in ({(7, 0): True, (7, 5): False, (9, 0): False, (13, 0): False}).items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, own=capability: own)
        assert bool(machine.refusal(torch.device("cuda"))) == refused
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 0))
    assert not machine.refusal(torch.device("cuda"))


# ------------------------------------------------------------------------------------------------------- the report


def a_report(**changes) -> Report:
    check = Check("kernels", "attention", "causal, 32 heads of 96", "float16", "failed", 0.5, 0.002, "", "A=torch")
    good = Check("kernels", "rms_norm", "3 x 4", "float32", "passed", 1e-7, 1e-6)
    left = Check("kernels", "quantize_rows", "3 x 4", "bfloat16", "not run", reason="no 8-bit floats here")
    fields = {
        "version": "1.0", "device": "cuda", "backend": "triton", "environment": (Fact("torch", "2.13 " * 40),),
        "kernels": (check, good, left),
        "model": (Check("model", "CUDA graphs", "", "bfloat16", "passed", 0.01, 0.08),),
        "peaks": (Timing("peaks", "matmul", "8192 x 8192 x 8192", "bfloat16", 1.4, rate=780.0, unit="TFLOP/s"),),
        "speed": (Timing("speed", "attention", "causal 32 x 777", "bfloat16", 0.35, 0.42, "SDPA", 345, "TFLOP/s", 0.44),
                  Timing("speed", "rope", "8192 x 64 x 96", "bfloat16", reason="crashed")),
        "seconds": 12.0,
    }  # fmt: skip
    return Report(**(fields | changes))


@pytest.mark.parametrize("width", [20, 80, 100, 120, 300])
def test_no_line_of_the_text_is_wider_than_the_terminal(width):
    text = a_report().text(width)
    assert max(map(len, text.splitlines())) <= max(60, min(width, 120))
    assert "A=torch" in text and "not timed" in text and text.splitlines()[-1]
    assert "\n  crashed: time of rope\n" in text, "why it was not timed"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_numbers_of_small_and_long_named_rows_stand_apart(width):
    slow = Timing(
        "speed", "linear_quick_gelu", "577 x 4096 x 1024", "float32", 12.5, 12.5, "eager", 0.00153, "GB/s", 0.01
    )
    tiny = replace(slow, name="rope", case="1", ms=0.001, rate=1.234e-5, unit="TFLOP/s")
    text = a_report(speed=(slow, tiny)).text(width)
    assert "linear_quick_gelu, 577 x 4096 x 1024" in text
    assert re.search(r"12\.5 +12\.5 +1\.00x +1\.53 MB/s +1%", text)
    assert re.search(r"rope, 1 +0\.001 +12\.5 +12500\.00x +12\.3 MF/s +1%", text)
    assert max(map(len, text.splitlines())) <= width


def test_the_verdict():
    wrong, right = a_report(), a_report(kernels=a_report().kernels[1:])
    assert wrong.verdict == (
        "FAILED: 1 of 3 checks wrong, 1 not run. minivlm2vec 1.0 with triton kernels on cuda, 12 s"
    )
    assert right.passed and right.verdict.startswith("PASSED: 2 checks right, 1 not run.")
    nothing = a_report(kernels=a_report().kernels[2:], model=())
    assert not nothing.passed and nothing.verdict.startswith("FAILED: nothing could be compared, 1 not run.")
    data = json.loads(wrong.as_json())
    assert data["passed"] is False and data["kernels"][0]["way_round"] == "A=torch" and data["verdict"] == wrong.verdict


def test_reports_name_nobody():
    user, host = getpass.getuser(), platform.node()
    said = anonymous(
        f"\x1b[31merror\x1b[0m in {Path.home()}/secret/cache/x.cubin, /home/alice/work/kernel.py:3 "
        f"and C:\\Users\\bob\\a.dll on {host or 'nowhere'}: 1/2 of and/or, 3 / 4"
    )
    assert not any(word in said for word in ("alice", "bob", "secret", "\x1b", str(Path.home()) + "/"))
    assert "kernel.py" in said and "x.cubin" in said and "1/2 of and/or, 3 / 4" in said
    for name in (user, host):
        if len(name) > 2 and name not in ("root", "localhost"):
            assert name not in said
    assert len(anonymous("x" * 999)) == 400


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("at https://jane:p/w@d@proxy.example:80/x, retry", "at https://…@proxy.example:80/x, retry"),
        ("at https://token@example.org/a and me@example.org", "at https://…@example.org/a and me@example.org"),
        ("https://example.org/a@b http://example.org:80/x", "https://example.org/a@b http://example.org:80/x"),
        ("in /srv/jane/My Secret Project/app.py:3", "in …/app.py:3"),
        ("C:\\Users\\Jane Doe\\My Files\\a.dll is missing", "…/a.dll is missing"),
        ("No such file: '/srv/jane/My, Secret (old)/app.py'", "No such file: '…/app.py'"),
        ("\"/srv/My, Secret/\" and '/'", "\"…\" and '…'"),
        ("/srv/a.so needs /srv/b.so", "…/a.so needs …/b.so"),
        ("1/2 of and/or, 3 / 4", "1/2 of and/or, 3 / 4"),
    ],
)
def test_passwords_and_folders_with_spaces_are_hidden(said, shown):
    assert anonymous(said) == shown


def test_a_user_without_a_home_is_anonymous_too(monkeypatch):
    def nobody(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.setattr(getpass, "getuser", lambda: {}["no passwd entry"])
    assert anonymous("in /srv/jane/app.py") == "in …/app.py"


def test_facts_of_this_machine():
    facts = {f.name: f.value for f in machine.facts(torch.device("cpu"))}
    assert torch.__version__ in facts["torch"] and {"triton", "numpy", "processor", "its features"} <= facts.keys()
    assert not any(str(Path.home()) + "/" in value for value in facts.values())


@pytest.mark.parametrize(
    "name", ["MINIVLM2VEC_API_KEY", "TORCH_HUB_TOKEN", "cuda_password", "OMP_SECRET", "HIP_CREDENTIALS", "TORCH_AUTH"]
)
def test_secrets_in_variables_are_not_shown(monkeypatch, name):
    """The server's keys stand in a variable of ours."""
    monkeypatch.setattr(machine, "VARIABLES", (*machine.VARIABLES, "cuda_"))
    monkeypatch.setenv(name, "sk-1234")
    monkeypatch.setenv("MINIVLM2VEC_BACKEND", "torch")
    facts = {f.name: f.value for f in machine.facts(torch.device("cpu"))}
    assert facts[name] == "set, not shown" and facts["MINIVLM2VEC_BACKEND"] == "torch"
    assert not any("sk-1234" in value for value in facts.values())


def test_a_fact_that_cannot_be_read_costs_itself_alone(monkeypatch):
    """As cuDNN's version, which raises where the library that is found is not the one torch was built with."""

    def broken(*_, **__):
        raise RuntimeError("built with (9, 1, 0), found (8, 9, 7) in /srv/jane/lib")

    plain = {f.name: f.value for f in machine.facts(torch.device("cpu"))}
    monkeypatch.setattr(machine, "features", broken)
    monkeypatch.setattr(machine.metadata, "version", lambda package: None)
    facts = {f.name: f.value for f in machine.facts(torch.device("cpu"))}
    assert facts["its features"] == "not read: RuntimeError: built with (9, 1, 0), found (8, 9, 7) in …/lib"
    assert facts["numpy"] == "not read" and facts.keys() == plain.keys()


def test_a_card_that_nothing_is_read_of_is_a_card(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("driver mismatch")

    names = ("get_device_name", "get_device_properties", "mem_get_info", "clock_rate")
    for name in names:
        monkeypatch.setattr(torch.cuda, name, broken)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", broken)
    facts = {f.name: f.value for f in machine.facts(torch.device("cuda"))}
    for name in ("device", "architecture", "cuDNN"):
        assert facts[name] == "not read: RuntimeError: driver mismatch"


def test_clocks_are_not_read_where_nothing_reads_them(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no NVML")

    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "clock_rate", broken)
    assert machine.clocks(torch.device("cuda")) == "not read"


# ---------------------------------------------------------------------------------------------------------- times


def test_times_stand_beside_torchs(monkeypatch):
    monkeypatch.setattr(speed, "HOST", speed.Size(4, 577, 1, 2, 4, 64, 1 << 20))
    monkeypatch.setattr(speed, "RUNS", 2)
    found = rows(t for t in speed.tasks(Options("cpu")) if not t.name.startswith(("linear", "attention", "image")))
    peaks = [t for t in found if t.section == "peaks"]
    assert [t.name for t in peaks] == ["matmul", "copy", "read"] and all(t.rate > 0 for t in peaks)
    for t in found:
        assert t.ms is not None and t.ms > 0, t
        assert t.section == "peaks" or (t.torch_ms > 0 and t.torch_name and t.share > 0), t
    assert all(t.section == "peaks" for t in speed.tasks(CPU)), "quick"
    assert not list(speed.tasks(Options("cpu", interpret=True)))


# -------------------------------------------------------------------------------------------------------- the command


def small_plan(options: Options) -> list[Task]:
    check = Check("kernels", "rms_norm", "3 x 4", "float32", "passed", 0.0, 1e-6)
    return [Task("kernels", "rms_norm", "3 x 4", "float32", lambda: check)]


@pytest.fixture
def quickly(monkeypatch):
    def run(options, state, *, seconds):
        worker.work(options, set(), state.take)

    monkeypatch.setattr(worker, "planned", small_plan)
    monkeypatch.setattr(isolated, "run", run)


def test_the_command(quickly, capsys, monkeypatch):
    assert cli.main(["doctor", "--device", "cpu", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "ENVIRONMENT" in said and said.splitlines()[-1].strip() and "PASSED: 1 check right" in said
    assert cli.main(["doctor", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    wrong = Check("kernels", "rms_norm", "3 x 4", "float32", "failed", 1.0, 1e-6, way_round="MINIVLM2VEC_BACKEND=torch")
    monkeypatch.setattr(worker, "planned", lambda o: [Task("kernels", "rms_norm", "3 x 4", "float32", lambda: wrong)])
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    assert "until it is mended: MINIVLM2VEC_BACKEND=torch" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stopped_command_says_what_it_knows(monkeypatch, capsys, name):
    telling(monkeypatch, [("kernels", "good", "", ""), ("kernels", "long", name, "stops"), ("model", "later", "", "")])
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "STOPPED before its end: 0 of 1 check wrong, 2 not run." in said
    assert "the examination was stopped: long float32, later float32" in said and "good 0.0e+00" in said
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_report_is_printed_where_only_ascii_can_be(quickly, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(machine, "processor", lambda: "Prozessor für …")
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    out.flush()
    said = out.buffer.getvalue().decode()
    assert "Prozessor f?r ?" in said and "PASSED" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "toaster"], "--device is 'toaster'"),
        (["--device", "meta"], "--device is meta; cuda, mps and cpu can be examined"),
        (["--device", "cpu:5"], "--device is cpu:5, and there is one cpu"),
        (["--seconds", "0"], "--seconds is 0; more than 0 is needed"),
        (["--seconds", "nan"], "--seconds is nan; more than 0 is needed"),
        (["--seconds", "inf"], "--seconds is inf; the most is 86400, a day"),
        (["--seconds", "1e12"], "--seconds is 1e+12; the most is 86400, a day"),
        (["--interpret", "--device", "meta"], "--interpret is for a CPU, and --device is meta"),
    ],
)
def test_bad_arguments_are_named(arguments, words, capsys):
    assert cli.main(["doctor", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_kernels_are_not_interpreted_in_a_process_without_the_interpreter(monkeypatch):
    """They would be torch's, and be called right."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="interpret with isolate off needs TRITON_INTERPRET=1"):
        doctor.examine(interpret=True, isolate=False)


def test_ops_that_are_examined_are_the_public_ones(torch_path, monkeypatch):
    """A wrong public op is seen, so none is reached around."""
    monkeypatch.setattr(ops, "silu_mul", lambda x, backend=None: x[..., : x.shape[-1] // 2])
    assert {r.verdict for r in few("silu_mul")} == {"failed"}
