"""The bench's own arithmetic: what it refuses to time, what it writes, and the report made from that."""

import argparse
import dataclasses
import importlib
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import common, machine, report, run
from bench.common import Case, Work

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
EXACT = torch.arange(1.0, 5.0)


def case(**providers):
    work = Work(providers, lambda: EXACT)
    return Case("op", "4", torch.float32, flops=8e9, bytes=4e6, build=lambda: work)


def off_by(error):
    return lambda: EXACT + error


def broken():
    raise RuntimeError("no such kernel\nand a trace")


def providers_timed(**providers):
    session = common.Session(CPU)
    session.run([case(**providers)])
    return [row.provider for row in session.finish()]


def test_wrong_output_is_not_timed(capsys):
    assert providers_timed(torch=off_by(0.1), triton=off_by(0.3), other=off_by(0.2)) == ["reference", "other"]
    assert "triton is wrong by 3.00e-01, limit 2.00e-01: not timed" in capsys.readouterr().out


def test_nan_is_not_timed():
    assert providers_timed(torch=off_by(0.1), triton=off_by(float("nan"))) == ["reference"]


def test_each_output_has_its_own_limit(capsys):
    """A wrong small output does not hide behind the rounding of a large one."""
    large, small = 1e4 * EXACT, EXACT
    outputs = {"torch": (large + 10, small), "triton": (large, small + 0.1), "other": (large + 15, small)}
    work = Work({name: lambda y=y: y for name, y in outputs.items()}, lambda: (large, small))
    errors = common.check(work, case(torch=broken))
    assert {name: timed for name, (_, timed) in errors.items()} == {"torch": True, "triton": False, "other": True}
    assert "triton is wrong by 1.00e-01, limit 4.00e-06: not timed" in capsys.readouterr().out


def test_the_way_back_is_run_again_and_again():
    tensors = (torch.randn(3, 4), torch.randn(4))
    ops = {"torch": lambda x, w: (x * w, x + w), "doubled": lambda x, w: (2 * x * w, x + w)}
    with torch.no_grad():  # as bench.run does
        work = common.backward_work(ops, tensors)
        first, again = (work.providers["torch"]() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and len(first) == 2
    assert {name: timed for name, (_, timed) in common.check(work, case(torch=broken)).items()} == {
        "torch": True,
        "doubled": False,
    }


def test_exact_reference_leaves_room_for_rounding():
    assert providers_timed(torch=off_by(0), triton=off_by(1e-6)) == ["reference", "triton"]


def test_missing_baseline_is_named_and_left_out(capsys):
    assert providers_timed(torch=off_by(0), other=broken) == ["reference"]
    assert "no other: RuntimeError: no such kernel" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_our_kernel_and_the_reference_must_run(name):
    with pytest.raises(RuntimeError, match="no such kernel"):
        providers_timed(**{"torch": off_by(0), name: broken})


def test_rates_and_ratios(monkeypatch):
    milliseconds = {"torch": [4.0, 4.0, 8.0], "triton": [1.0, 2.0, 3.0]}
    monkeypatch.setattr(common, "time_interleaved", lambda *_, **__: milliseconds)
    session = common.Session(CPU)
    session.run([case(torch=off_by(0), triton=off_by(0))])
    torchs, ours = session.finish()
    assert (ours.ms, ours.ms_p10, ours.ms_p90, ours.runs) == (2.0, 1.2, pytest.approx(2.8), 3)
    assert (ours.tflops, ours.gbs) == (4.0, 2.0)  # 8 GFLOP and 4 MB in 2 ms
    assert (ours.ratio, torchs.ratio) == (2.0, 0.5)


def test_budget_stops_further_cases():
    session = common.Session(CPU, budget=-1)
    session.run([case(torch=broken)])
    assert session.skipped == ["op 4"] and not session.rows


def test_providers_take_turns():
    calls = []
    providers = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = common.time_interleaved(providers, CPU, flush=True)
    assert calls == ["a", "b"] * (len(times["a"]) + 1)  # one warm-up
    assert len(times["a"]) == len(times["b"]) == common.REPETITIONS


def test_entry_is_put_back():
    table = {1: "before"}
    with pytest.raises(KeyError), common.entry(table, 1, "candidate"):
        assert table == {1: "candidate"}
        raise KeyError
    assert table == {1: "before"}


def row(provider, ms, **changes):
    """A csv line of an H100 that took `ms`."""
    empty = {f.name: "" for f in dataclasses.fields(common.Row)}
    known = {
        "date": "2030-01-01 10:00",
        "gpu": "NVIDIA H100",
        "kernel": "op",
        "case": "4 x 4",
        "dtype": "bfloat16",
    }
    known |= {"provider": provider, "ms": ms, "ms_p10": ms, "ms_p90": ms, "gbs": 1500.0, "pct_copy": 50.0}
    known |= {"ratio": 2.0, "matmul_peak": 700.0, "copy_peak": 3000.0}
    return common.Row(**(empty | known | changes))


def test_csv_is_appended_to(tmp_path):
    path = tmp_path / "gpu.csv"
    common.append_rows([row("triton", 1.0)], path)
    common.append_rows([row("torch", 2.0)], path)
    assert [(r["provider"], r["ms"], r["case"]) for r in common.read_rows(path)] == [
        ("triton", "1", "4 x 4"),
        ("torch", "2", "4 x 4"),
    ]


def test_csv_of_other_columns_is_refused(tmp_path, monkeypatch):
    """Before anything is timed, and both are named."""
    path = tmp_path / "cpu.csv"
    path.write_text("date,gpu,ms\n2030-01-01 10:00,H100,1\n")
    before = path.read_text()
    with pytest.raises(ValueError, match=r"cpu.csv has the columns date,gpu,ms, and not date,gpu,driver,torch.*away"):
        common.append_rows([row("triton", 1.0)], path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common.Session, "run", lambda *_: pytest.fail("timed"))
    with pytest.raises(ValueError, match="move it away"):
        run.run_all(["pooling"], CPU, options())
    assert path.read_text() == before


def options(**changes) -> argparse.Namespace:
    given = {"budget": float("inf"), "since": "", "case": "", "sweep": False, "save": True}
    return argparse.Namespace(**(given | changes))


def test_a_run_goes_on_where_another_ended(tmp_path, monkeypatch, capsys):
    """A case that raises is named, and the rest goes on; what has rows since a date is not run again."""
    broken_one = Case("op", "2", torch.float32, 1, 1, build=lambda: Work({"torch": broken}, lambda: EXACT))
    made = [case(torch=off_by(0)), broken_one, dataclasses.replace(case(torch=off_by(0)), name="8")]
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setitem(sys.modules, "bench.bench_made_up", SimpleNamespace(cases=lambda device: made))
    assert run.run_all(["made_up"], CPU, options()) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in printed and printed.rstrip().endswith("Failed: op 2")
    path = tmp_path / "cpu.csv"
    assert [r["case"] for r in common.read_rows(path)] == ["4", "8"]
    made[1] = dataclasses.replace(case(torch=off_by(0)), name="2")
    assert run.run_all(["made_up"], CPU, options(since="2000-01-01 00:00", budget=-1)) == run.MORE
    assert "Out of budget, not run: op 2\n" in capsys.readouterr().out
    assert run.run_all(["made_up"], CPU, options(since="2000-01-01 00:00")) == 0
    assert [r["case"] for r in common.read_rows(path)] == ["4", "8", "2"]
    assert run.run_all(["made_up"], CPU, options(since="2999-01-01 00:00")) == 0
    assert len(list(common.read_rows(path))) == 6


def test_csv_is_named_after_the_gpu():
    assert common.csv_path("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.csv"
    assert common.csv_path("CPU x86_64").name == "cpu.csv"


def test_report_shows_the_latest_run_of_each_case(tmp_path):
    path = tmp_path / "h100.csv"
    common.append_rows([row("triton", 9.0), row("torch", 9.5), row("gone", 1.0)], path)
    later = {"date": "2030-01-02 10:00"}
    common.append_rows([row("triton", 1.0, **later), row("torch", 2.0, **later)], path)
    table = report.table(report.latest(common.read_rows(path)))
    assert table.splitlines()[-1] == ("| op | 4 x 4 | 1 | 1 to 1 | 1500 GB/s | 50 % of copy | torch, 2 ms | 2.00x |")
    assert "9.5" not in table and "gone" not in table


def test_report_writes_between_the_markers(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["report", "--readme", str(readme), "--results", str(tmp_path)])
    report.main()
    expected = f"before\n{report.BEGIN}\nNot measured on a GPU yet.\n{report.END}\nafter\n"
    assert readme.read_text() == expected
    common.append_rows([row("triton", 1.0), row("torch", 2.0)], tmp_path / "h100.csv")
    common.append_rows([row("torch", 2.0)], tmp_path / "cpu.csv")
    report.main()
    assert "| op | 4 x 4 |" in readme.read_text() and "old" not in readme.read_text()


def test_report_needs_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match=r"needs the lines <!-- bench:begin -->"):
        report.write_between_markers(readme, "table")


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "h100.csv"
    common.append_rows([row("triton", 1.0), row("torch", 2.0)], path)
    report.plot(report.latest(common.read_rows(path)), tmp_path / "h100.png")
    assert (tmp_path / "h100.png").read_bytes().startswith(b"\x89PNG")


def test_every_kernel_file_has_a_bench():
    files = (ROOT / "kernels" / "minivlm2vec_kernels").glob("*_triton.py")
    missing = {f.name.removesuffix("_triton.py") for f in files} - set(run.bench_names())
    assert not missing


def test_every_memory_bound_kernel_has_a_case_that_exceeds_l2():
    """As bench/README.md says of the rows that decide: at least 200 MB, four times the L2 of an H100."""
    benches = [importlib.import_module(f"bench.bench_{name}") for name in run.bench_names() if name != "model"]
    cases = [c for b in benches if hasattr(b, "cases") for c in b.cases(torch.device("cuda")) if c.memory_bound]
    most = {c.kernel: max(x.bytes for x in cases if x.kernel == c.kernel) for c in cases}
    assert len(most) > 10 and {kernel for kernel, size in most.items() if size < 200e6} == {"pool_last_token"}
    names = {(c.kernel, c.name) for c in cases}
    assert {("quantize_rows", "24864 x 3072"), ("rms_norm_quantize", "24864 x 3072")} <= names  # README names them


def test_run_without_a_gpu_says_so_and_writes_nothing():
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    command = [sys.executable, "-m", "bench.run", "--only", "pooling"]
    before = set(common.RESULTS.iterdir())
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("No CUDA device") and "pool_last_token" in done.stdout
    assert set(common.RESULTS.iterdir()) == before


class FakeCard:
    """Writes down what a timed run queues, in order. A run takes 1 ms, of which the host takes `host_ms` to queue it;
    the card does nothing before it has slept, at 2 GHz."""

    def __init__(self, monkeypatch, host_ms=0.0):
        self.queue, self.host_ms, zeros = [], host_ms, torch.zeros
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue.append(("sleep", cycles)))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.queue.append("idle"))
        monkeypatch.setattr(common, "FLUSH_BYTES", 64)
        monkeypatch.setattr(torch, "zeros", lambda *shape, **kw: self.buffer(zeros(*shape, dtype=torch.uint8)))

    def buffer(self, x):
        card = self

        class Buffer(torch.Tensor):
            def zero_(self):
                card.queue.append("written")
                return self

            def sum(self, *args):
                card.queue.append("read")
                return torch.zeros(())

        return x.as_subclass(Buffer)

    def event(self, **_):
        card = self

        class Event:
            def record(self):
                card.queue.append("event")

            def query(self):
                """Whether the card has come to the first event of the last run when all of that is queued."""
                slept = max(i for i, x in enumerate(card.queue) if x[0] == "sleep")
                return card.host_ms * card.queue[slept:].count("run") > card.queue[slept][1] / 2e6

            def synchronize(self): ...

            def elapsed_time(self, end):
                return 1.0 * card.queue.count("run")

        return Event()

    def run(self):
        self.queue.append("run")


def test_what_a_timed_run_queues(monkeypatch):
    """L2 is emptied and its dirty lines are gone, and the card is busy, before the first event."""
    card = FakeCard(monkeypatch)
    read = common.cuda_timer(CPU, flush=True)(card.run, 3)
    assert card.queue == ["written", "read", ("sleep", common.SLEEP_CYCLES), "event", *["run"] * 3, "event"]
    assert read() == (1.0, False)  # of three calls, one's share
    assert common.SLEEP_CYCLES / 2e9 >= 0.5e-3  # at 2 GHz
    card.queue.clear()
    common.cuda_timer(CPU, flush=False)(card.run)
    assert card.queue == [("sleep", common.SLEEP_CYCLES), "event", "run", "event"]


def test_a_run_that_the_host_queued_too_late_is_repeated(monkeypatch):
    """Ten calls of 56 us each take longer to queue than the first sleep; the provider keeps the longer one."""
    card = FakeCard(monkeypatch, host_ms=0.056)
    queue, late = common.cuda_timer(CPU, flush=True), card.run
    once = lambda cycles: ["written", "read", ("sleep", cycles), "event", *["run"] * 10, "event"]  # noqa: E731
    assert queue(late, 10)()[1] is False
    assert card.queue == once(common.SLEEP_CYCLES) + once(2 * common.SLEEP_CYCLES)
    card.queue.clear()
    assert queue(late, 10)() == (1.0, False)
    assert card.queue == once(2 * common.SLEEP_CYCLES)
    card.queue.clear()
    queue(lambda: late(), 10)
    assert card.queue == once(common.SLEEP_CYCLES) + once(2 * common.SLEEP_CYCLES)  # another provider begins anew


def test_a_provider_that_waits_for_the_card_is_named(monkeypatch, capsys):
    """No sleep is long enough for it, so it is tried once, and is given the shortest from then on."""
    card = FakeCard(monkeypatch, host_ms=1e9)
    monkeypatch.setattr(common, "REPETITIONS", 3)
    common.time_interleaved({"waits": card.run}, torch.device("cuda"), flush=False)
    sleeps = [x[1] / common.SLEEP_CYCLES for x in card.queue if x[0] == "sleep"]
    assert sleeps == [1, 2, 4, 8, 16, 1, 1] and 16 * common.SLEEP_CYCLES == common.LONGEST_SLEEP
    assert capsys.readouterr().out == "waits: 3 of 3 runs waited for the host, whose time is in theirs\n"
    card.host_ms = 0
    common.time_interleaved({"runs": card.run}, torch.device("cuda"), flush=False)
    assert capsys.readouterr().out == ""


def test_where_the_host_counts_the_card_is_idle_before_a_run(monkeypatch, capsys):
    card = FakeCard(monkeypatch, host_ms=1e9)
    monkeypatch.setattr(common, "REPETITIONS", 2)
    monkeypatch.setattr(common, "WARM_UPS", 0)
    common.time_interleaved({"model": card.run}, torch.device("cuda"), flush=False, host_counts=True)
    assert card.queue == ["idle", "event", "run", "event"] * 2 and capsys.readouterr().out == ""


@pytest.mark.parametrize("memory_bound", [True, False])
def test_a_memory_bound_call_is_held_to_a_copy_as_large(monkeypatch, memory_bound):
    """Each of its calls finds L2 flushed, and so does the copy's; what is not memory-bound shares events."""
    given = {}

    def times(providers, device, *, flush, launches, host_counts, warm_ups):
        given.update(names=list(providers), flush=flush, launches=launches)
        return {name: [0.5 if name == common.COPY else 1.0] for name in providers}

    copied = []
    monkeypatch.setattr(common, "copy_of", lambda size, device: copied.append(size) or off_by(0))
    monkeypatch.setattr(common, "time_interleaved", times)
    monkeypatch.setattr(common, "launches_a_run", lambda *_: common.LAUNCHES)
    monkeypatch.setattr(common, "peak_memory", lambda *_: 0.0)
    monkeypatch.setattr(common, "Clock", lambda device: machine.Clock(CPU))
    monkeypatch.setattr(common, "peaks", lambda device: (800.0, 1000.0))
    session = common.Session(CPU)
    session.device = torch.device("cuda")
    session.run([dataclasses.replace(case(torch=off_by(0)), memory_bound=memory_bound)])
    (row,) = session.finish()
    assert (row.gbs, row.copy_peak, row.launches) == (4.0, 1000, 1 if memory_bound else common.LAUNCHES)
    assert given["launches"] == row.launches and given["flush"] is memory_bound
    if memory_bound:  # 4 MB, copied in 0.5 ms
        assert copied == [4e6] and (row.copy_gbs, row.pct_copy) == (8.0, 50.0)
    else:
        assert not copied and (row.copy_gbs, row.pct_copy) == ("", pytest.approx(0.4))
    assert given["names"] == ["torch", common.COPY][: 1 + memory_bound]


def test_a_copy_moves_as_many_bytes():
    y = common.copy_of(4e6, CPU)()
    assert y.numel() * y.element_size() == 2e6 and y.float().std() > 50  # read, and written; no zeros


@pytest.mark.parametrize("ms, launches", [(0.001, 10), (0.019, 10), (0.021, 1), (5.0, 1)])
def test_short_calls_share_a_pair_of_events(monkeypatch, ms, launches):
    times = {"torch": 3 * ms, "triton": ms}
    providers = {name: lambda name=name: name for name in times}
    monkeypatch.setattr(common, "cuda_timer", lambda *_, **__: lambda fn: lambda: (times[fn()], False))
    assert common.launches_a_run(providers, torch.device("cuda")) == launches
    assert common.launches_a_run(providers, CPU) == 1


def test_the_clock_is_sampled_while_the_block_runs(monkeypatch):
    readings, sampled, cards = iter(["1980", "1200", "[N/A]"]), threading.Event(), set()

    def nvidia_smi(query, gpu):
        cards.add(gpu)
        reading = next(readings, None)
        if reading is None:
            sampled.set()
        return reading or ""

    monkeypatch.setattr(machine, "nvidia_smi", nvidia_smi)
    monkeypatch.setattr(machine, "CLOCK_SECONDS", 0)
    uuids = lambda device: SimpleNamespace(uuid=f"5e2c-{device.index}")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", uuids)
    with machine.Clock(torch.device("cuda", 1)) as clock:
        assert sampled.wait(60)
    assert cards == {"GPU-5e2c-1"}
    assert clock.samples == [1980, 1200] and clock.median() == "1590" and clock.lowest() == "1200"
    with machine.Clock(CPU) as none:
        pass
    assert none.median() == none.lowest() == ""


def test_nvidia_smi_is_asked_about_one_card(tmp_path, monkeypatch):
    """Of two it would print a line each, and the first is not always the one that is timed."""
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\n[ "$1" = --id=GPU-b ] && echo 1200 || printf "1980\\n1200\\n"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert (machine.nvidia_smi("clocks.sm", "GPU-b"), machine.nvidia_smi("clocks.sm", "GPU-a")) == ("1200", "1980")


def test_the_reference_is_no_rival(monkeypatch):
    """Attention's holds a `.tolist()`: a ratio to it would flatter."""
    milliseconds = {"torch": [1.0], "triton": [2.0], "SDPA": [4.0]}
    monkeypatch.setattr(common, "time_interleaved", lambda *_, **__: milliseconds)
    session = common.Session(CPU)
    session.run([case(torch=off_by(0), triton=off_by(0), SDPA=off_by(0))])
    ratios = {r.provider: r.ratio for r in session.finish()}
    assert ratios == {"reference": 2.0, "triton": 2.0, "SDPA": 0.5}
    rows = [{"provider": name, "ms": ms} for name, (ms,) in {**milliseconds, "reference": [1.0]}.items()]
    assert report.best_baseline([r for r in rows if r["provider"] != "torch"])["provider"] == "SDPA"
    assert report.best_baseline(rows[-1:])["provider"] == "reference"
