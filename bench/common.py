"""How a case is checked, timed and written down. A bench file only says what to run.

A bench file `bench_x.py` has `cases(device)` and may have `sweep(device)`, both yielding `Case`s. A case
builds its tensors when its turn comes and names its providers: callables without arguments, on those tensors.
"triton" is ours, "torch" is torch_ops.py; the others are further baselines. All are checked before any is
timed: no time is reported for an output whose error against float32 is more than twice the reference's.
"""

import csv
import functools
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch._functorch.config
from torch import Tensor

from bench.machine import Clock, describe_machine

RESULTS = Path(__file__).with_name("results")
OURS, REFERENCE = "triton", "torch"
SHOWN = {REFERENCE: "reference"}  # what the csv calls it: attention's reads lengths back from the card, so no rival
WARM_UPS, REPETITIONS, SECONDS = 25, 100, 1.0  # of each provider: so many runs, or so many seconds of them
FEWEST = 10  # runs that a median, a 10th and a 90th percentile need in any case
FLUSH_BYTES = 256 << 20  # several times the L2 of any card
SLEEP_CYCLES, LONGEST_SLEEP = 1_000_000, 16_000_000  # about 0.5 and 8 ms; doubled until the host has queued the run
SHORT, LAUNCHES = 0.02, 10  # ms; of what is shorter so many calls share a pair of events
COPY = "copy of as many bytes"

Outputs = Tensor | tuple[Tensor, ...]
Provider = Callable[[], Outputs]


@dataclass(frozen=True)
class Work:
    """The first call of each provider is checked: an op in place may change what later calls see."""

    providers: dict[str, Provider]
    exact: Provider  # the reference in float32 on the upcast tensors


@dataclass(frozen=True)
class Case:
    kernel: str
    name: str  # the shape, in words
    dtype: torch.dtype
    flops: float  # useful ones
    bytes: float  # that have to move: each input and each output once
    build: Callable[[], Work]
    memory_bound: bool = True  # L2 is flushed before each call, and a copy of as many bytes is timed too
    host_counts: bool = False  # the time to queue the launches is part of a run's, as in the whole model
    check: Callable[[Work, "Case"], dict[str, tuple[float, bool]]] | None = None  # instead of `check` below
    warm_ups: int | None = None  # instead of WARM_UPS
    items: dict[str, int] | None = None  # how many tokens, images, crops a run takes: for rates a second


@dataclass
class Row:
    """One line of the csv: what was run on what, and what came out. Empty: does not apply."""

    date: str
    gpu: str
    driver: str
    torch: str
    triton: str
    cudnn: str
    commit: str
    sm_mhz: str  # median while the case was timed
    kernel: str
    case: str
    dtype: str
    provider: str
    ms: float  # median
    ms_p10: float
    ms_p90: float
    runs: int
    tflops: float | str
    pct_matmul: float | str
    gbs: float
    pct_copy: float | str
    ratio: float | str  # time of the best other provider / time of this one; the reference where there is no other
    peak_mib: float | str  # allocated during a run, beyond what was there before
    error: float  # largest absolute error against float32
    error_torch: float  # of the reference
    matmul_peak: float | str  # TFLOP/s of 8192^3, mean of before and after this session of runs
    copy_peak: float | str  # GB/s of a copy of 1 GiB, read and written, likewise
    tokens_s: float | str = ""
    images_s: float | str = ""
    crops_s: float | str = ""
    launches: int = 1  # calls in each run, of whose time `ms` is one's share
    sm_mhz_min: str = ""  # the lowest clock while the case was timed
    copy_gbs: float | str = ""  # of a copy of as many bytes, timed by turns with a memory-bound case


class Session:
    """The cases of one run of the bench, between two measurements of the card's peaks."""

    def __init__(self, device: torch.device, budget: float = float("inf")):
        self.device, self.end = device, time.monotonic() + budget
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self.machine = describe_machine(device)
        self.before = peaks(device)

    def run(self, cases: Iterable[Case]) -> None:
        for case in cases:
            if time.monotonic() > self.end:
                self.skipped.append(f"{case.kernel} {case.name}")
                continue
            rows = self._rows(case)
            self.rows += rows
            print_rows(rows)

    def _rows(self, case: Case) -> list[Row]:
        work = case.build()
        errors = (case.check or check)(work, case)
        providers = {name: work.providers[name] for name in errors if errors[name][1]}
        memory = {name: peak_memory(fn, self.device) for name, fn in providers.items()}
        launches = 1 if case.memory_bound else launches_a_run(providers, self.device)
        copies = {COPY: copy_of(case.bytes, self.device)} if case.memory_bound and self.device.type == "cuda" else {}
        with Clock(self.device) as clock:
            times = time_interleaved(
                providers | copies,
                self.device,
                flush=case.memory_bound,
                warm_ups=case.warm_ups,
                launches=launches,
                host_counts=case.host_counts,
            )
        copy_gbs = case.bytes / percentile(times.pop(COPY), 50) / 1e6 if copies else ""
        medians = {name: percentile(t, 50) for name, t in times.items()}
        rows = []
        for name, t in times.items():
            others = [ms for other, ms in medians.items() if other not in (name, REFERENCE)]
            others = others or [ms for other, ms in medians.items() if other != name]
            rows.append(
                Row(
                    **self.machine,
                    sm_mhz=clock.median(),
                    sm_mhz_min=clock.lowest(),
                    launches=launches,
                    kernel=case.kernel,
                    case=case.name,
                    dtype=str(case.dtype).removeprefix("torch."),
                    provider=SHOWN.get(name, name),
                    ms=medians[name],
                    ms_p10=percentile(t, 10),
                    ms_p90=percentile(t, 90),
                    runs=len(t),
                    tflops=case.flops / medians[name] / 1e9 if case.flops else "",
                    pct_matmul="",
                    gbs=case.bytes / medians[name] / 1e6,
                    pct_copy="",
                    ratio=min(others) / medians[name] if others else "",
                    peak_mib=memory[name],
                    error=errors[name][0],
                    error_torch=errors[REFERENCE][0] if REFERENCE in errors else "",
                    matmul_peak="",
                    copy_peak="",
                    copy_gbs=copy_gbs,
                    **{f"{item}_s": n / medians[name] * 1e3 for item, n in (case.items or {}).items()},
                )
            )
        return rows

    def finish(self) -> list[Row]:
        """Measures the peaks again and fills in what depends on them."""
        after = peaks(self.device)
        if after is None:
            return self.rows
        matmul, copy = ((a + b) / 2 for a, b in zip(self.before, after, strict=True))
        print(
            f"\nmatmul 8192^3: {self.before[0]:.0f} TFLOP/s before, {after[0]:.0f} after; "
            f"copy: {self.before[1]:.0f} GB/s before, {after[1]:.0f} after"
        )
        for row in self.rows:
            row.matmul_peak, row.copy_peak = matmul, copy
            row.pct_matmul = 100 * row.tflops / matmul if row.tflops != "" else ""
            row.pct_copy = 100 * row.gbs / (row.copy_gbs or copy)
        return self.rows


# Checking


def check(work: Work, case: Case) -> dict[str, tuple[float, bool]]:
    """Largest error of each provider against float32, and whether it may be timed.

    The limit of each output is twice the reference's error, and at least a millionth of its largest value, as the
    reference may be exact; of several outputs the error furthest from its limit is reported. The reference and our
    kernel must run; a baseline that cannot is named and left out.
    """
    exact = as_tuple(work.exact())
    errors = {}
    for name, provider in work.providers.items():
        try:
            errors[name] = [largest_error(y, z) for y, z in zip(as_tuple(provider()), exact, strict=True)]
        except Exception as error:
            if name in (OURS, REFERENCE):
                raise
            print(f"{case.kernel} {case.name}: no {name}: {type(error).__name__}: {first_line(error)}")
    torchs = errors.get(REFERENCE, [0.0] * len(exact))
    limits = [max(2 * error, 1e-6 * largest(z)) for error, z in zip(torchs, exact, strict=True)]
    found = {}
    for name, each in errors.items():
        error, limit = max(zip(each, limits, strict=True), key=lambda pair: _share(*pair))
        found[name] = error, error <= limit
        if not error <= limit:
            print(f"{case.kernel} {case.name}: {name} is wrong by {error:.2e}, limit {limit:.2e}: not timed")
    return found


def _share(error: float, limit: float) -> float:
    """How much of its limit an error takes; NaN is worse than any other."""
    return error / limit if limit and error == error else (0.0 if error == 0 else float("inf"))


def largest_error(output: Tensor, exact: Tensor) -> float:
    return (output.float() - exact.float()).abs().max().item() if exact.numel() else 0.0


def largest(x: Tensor) -> float:
    return x.float().abs().max().item() if x.numel() else 0.0


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:200]


def upcast(*tensors: Tensor) -> list[Tensor]:
    return [t.float() if t.is_floating_point() else t for t in tensors]


def compiled(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """torch.compile for the one shape of a case; anew for each, so that none runs out of recompiles."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def when_called(build: Callable[[], Provider]) -> Provider:
    """The provider that `build` makes at the first call: where a baseline cannot be made, `check` says so."""
    made = functools.cache(build)
    return lambda: made()()


# Gradients


def backward_work(
    ops: dict[str, Callable[..., Outputs]], tensors: Sequence[Tensor], exact_tensors: Sequence[Tensor] | None = None
) -> Work:
    """The way back through each op alone, for random gradients of its outputs: an output is the gradient of every
    tensor. The graphs are made here and kept. exact_tensors: of which "torch" in float32 is exact; upcast ones."""
    with torch.no_grad():
        seeds = [torch.randn_like(y) for y in as_tuple(ops[REFERENCE](*tensors))]
    providers = {name: backward(op, tensors, seeds) for name, op in ops.items()}
    wide = exact_tensors or upcast(*tensors)
    return Work(providers, lambda: backward(ops[REFERENCE], wide, upcast(*seeds))())


def backward(op: Callable[..., Outputs], tensors: Sequence[Tensor], seeds: Sequence[Tensor]) -> Provider:
    """The forward runs at the first call, which is not timed: where a baseline cannot run, `check` says so."""

    @functools.cache
    def graph() -> tuple[tuple[Tensor, ...], list[Tensor]]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        keeps_buffers = torch._functorch.config.patch(donated_buffer=False)  # of torch.compile, for many ways back
        with torch.enable_grad(), keeps_buffers:
            return as_tuple(op(*leaves)), leaves

    return lambda: torch.autograd.grad(*graph(), seeds, retain_graph=True)


# Timing


def time_interleaved(
    providers: dict[str, Provider],
    device: torch.device,
    *,
    flush: bool,
    warm_ups: int | None = None,
    launches: int = 1,
    host_counts: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds of each run of each provider, by turns, so that drifting clocks hit all alike. launches: calls that
    share a run, whose time is divided by them. Names each provider whose times have the host's in them unasked."""
    timer = cuda_timer(device, flush, host_counts) if device.type == "cuda" else cpu_time
    for _ in range((warm_ups or WARM_UPS) if device.type == "cuda" else 1):
        for provider in providers.values():
            provider()
    times: dict[str, list[float]] = {name: [] for name in providers}
    late = dict.fromkeys(providers, 0)
    start = time.monotonic()
    for run in range(REPETITIONS):
        pending = {name: timer(provider, launches) for name, provider in providers.items()}
        for name, read in pending.items():
            ms, was_late = read()
            times[name].append(ms)
            late[name] += was_late
        if run + 1 >= FEWEST and time.monotonic() - start > SECONDS * len(providers):
            break
    for name, runs in late.items():
        if runs:
            print(f"{name}: {runs} of {len(times[name])} runs waited for the host, whose time is in theirs")
    return times


def launches_a_run(providers: dict[str, Provider], device: torch.device) -> int:
    """How many calls share a pair of events: LAUNCHES where one of the providers takes less than SHORT ms, as events
    are read to 0.5 us and what lies between two is some 2 us. All but the first of them find L2 as they left it, so
    this is nothing for memory-bound cases."""
    if device.type != "cuda":
        return 1
    timer = cuda_timer(device, flush=False)
    for provider in providers.values():
        provider()  # compiled by then
    fastest = min((min(timer(p)()[0] for _ in range(3)) for p in providers.values()), default=SHORT)
    return LAUNCHES if fastest < SHORT else 1


def cuda_timer(
    device: torch.device, flush: bool, host_counts: bool = False
) -> Callable[..., Callable[[], tuple[float, bool]]]:
    """A function that queues one timed run of so many calls and returns a function that waits for a call's time in ms,
    and says whether the card had begun before all were queued.

    The card sleeps while the host queues. A run that it begins too early is queued again after twice the sleep, which
    the provider keeps. One that waits for the card is too late after any: it goes back to the shortest, as a card that
    sleeps long is cool and fast. host_counts: the card does not sleep, and has nothing else to do.
    """
    written, read_after = (torch.zeros(FLUSH_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    sleeps: dict[Provider, int] = {}
    waiting: set[Provider] = set()

    def queue_once(provider: Provider, calls: int, sleep: int) -> tuple[torch.cuda.Event, torch.cuda.Event, bool]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if flush:
            written.zero_()  # out go the inputs from L2, which is now full of lines that have to be written back
            read_after.view(torch.int64).sum()  # they are, before the run: what is read takes their place
        if host_counts:
            torch.cuda.synchronize(device)
        else:
            torch.cuda._sleep(sleep)
        start.record()
        for _ in range(calls):
            provider()
        end.record()
        return start, end, not host_counts and start.query()

    def queue(provider: Provider, calls: int = 1) -> Callable[[], tuple[float, bool]]:
        sleep = sleeps.get(provider, SLEEP_CYCLES)
        start, end, late = queue_once(provider, calls, sleep)
        while late and sleep < LONGEST_SLEEP and provider not in waiting:
            sleep *= 2
            start, end, late = queue_once(provider, calls, sleep)
        if late:
            waiting.add(provider)
        sleeps[provider] = SLEEP_CYCLES if late else sleep

        def read() -> tuple[float, bool]:
            end.synchronize()
            return start.elapsed_time(end) / calls, late

        return read

    return queue


def cpu_time(provider: Provider, calls: int = 1) -> Callable[[], tuple[float, bool]]:
    start = time.perf_counter()
    for _ in range(calls):
        provider()
    ms = (time.perf_counter() - start) * 1e3 / calls
    return lambda: (ms, False)


def copy_of(size: float, device: torch.device) -> Provider:
    """Reads and writes `size` bytes in all."""
    source = torch.randint(256, (max(1, int(size) // 2),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def percentile(values: list[float], percent: float) -> float:
    """Linear between the two nearest."""
    return torch.tensor(values, dtype=torch.float64).quantile(percent / 100).item()


def peak_memory(provider: Provider, device: torch.device) -> float | str:
    if device.type != "cuda":
        return ""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    provider()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def peaks(device: torch.device) -> tuple[float, float] | None:
    """TFLOP/s of a bf16 product of 8192^3 random numbers, and GB/s (read and written) of a copy of 1 GiB."""
    if device.type != "cuda":
        return None
    n = 8192
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    moved = 2 << 30
    providers = {"matmul": lambda: a @ b, "copy": copy_of(moved, device)}
    ms = {k: percentile(v, 50) for k, v in time_interleaved(providers, device, flush=False).items()}
    return 2 * n**3 / ms["matmul"] / 1e9, moved / ms["copy"] / 1e6


# Writing down


def print_rows(rows: list[Row]) -> None:
    for row in sorted(rows, key=lambda r: r.ms):
        ratio = f"{row.ratio:5.2f}x" if row.ratio != "" else ""
        for item in ("tokens", "images", "crops"):
            if (rate := getattr(row, f"{item}_s")) != "":
                ratio += f", {rate:,.0f} {item}/s"
        if row.peak_mib != "" and row.tokens_s != "":
            ratio += f", {row.peak_mib:,.0f} MiB"
        rate = f"{row.tflops:7.1f} TFLOP/s" if row.tflops != "" else f"{row.gbs:7.0f} GB/s"
        print(
            f"{row.kernel:21s} {row.case:22s} {row.provider:26s} {row.ms:9.4f} ms "
            f"({row.ms_p10:.4f}-{row.ms_p90:.4f}) {rate} {ratio}",
            flush=True,
        )


def csv_path(gpu: str, suffix: str = "") -> Path:
    name = "cpu" if gpu.startswith("CPU") else re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return RESULTS / f"{name}{suffix}.csv"


def check_columns(path: Path) -> None:
    """Raises ValueError where there is a csv file with other columns than `Row` has."""
    columns = ",".join(f.name for f in fields(Row))
    if path.exists() and (found := path.read_text().partition("\n")[0]) != columns:
        raise ValueError(f"{path} has the columns {found}, and not {columns}: move it away")


def append_rows(rows: list[Row], path: Path) -> None:
    check_columns(path)
    columns = [f.name for f in fields(Row)]
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(columns)
        for row in rows:
            writer.writerow([rounded(getattr(row, c)) for c in columns])


def rounded(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def candidates(op: Provider, table: dict, key: object, settings: dict[str, object]) -> dict[str, Provider]:
    """By name: the op with each of these settings in a kernel's table of launch settings."""

    def with_setting(setting: object) -> Provider:
        def call() -> Outputs:
            with entry(table, key, setting):
                return op()

        return call

    return {name: with_setting(setting) for name, setting in settings.items()}


def rows_by_warps(rows: Iterable[int], warps: Iterable[int], letters: str = "BM") -> dict[str, object]:
    """Settings (rows, warps) under such names as "BM2 w4"."""
    return {f"{letters}{r} w{w}": (r, w) for r, w in itertools.product(rows, warps)}


@contextmanager
def entry(table: dict, key: object, value: object) -> Iterator[None]:
    """Puts a candidate into a kernel's table of launch settings for the length of a call."""
    before = table[key]
    table[key] = value
    try:
        yield
    finally:
        table[key] = before
