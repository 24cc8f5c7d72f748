"""The machine's peaks, and each kernel's time beside torch's fastest way of the same, one after the other in turn.

On CUDA: events around a call, before which the device sleeps 0.1 ms, so that queuing from Python is hidden, and 256 MB
are written where memory decides, which empties its cache. Useful work alone counts: FLOPs without padding, each input
and output moved once. bench/ has more cases, more peers and percentiles.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm2vec_kernels import ops, torch_ops

from . import machine
from .kernels import EPS, cumulated, spelled
from .report import Timing
from .task import PEAKS, SPEED, NotRun, Options, Task

WARM_UPS, RUNS, SECONDS = 5, 30, 0.5  # of each way: so many runs, or so many seconds of them, at least FEWEST
FEWEST = 5
FLUSH_BYTES, SLEEP_CYCLES = 256 << 20, 200_000
COMPUTE, MEMORY = "matmul", "copy"

Call = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """One kernel at one size, on tensors of its own.

    Fields:
        ours: the call.
        torchs: torch's ways, by name; "torch.compile" is made of the first.
        flops, bytes: useful ones; without FLOPs bandwidth decides.
    """

    ours: Call
    torchs: dict[str, Call]
    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Size:
    """Rows and heads: those of 32 images at 4 crops or a part of them on a device, few on a CPU."""

    rows: int
    tower: int
    sequences: int
    crops: int
    gemm: int
    peak: int
    bytes: int


DEVICE = Size(rows=8192, tower=23080, sequences=32, crops=40, gemm=8192, peak=8192, bytes=1 << 30)
HOST = Size(rows=256, tower=577, sequences=1, crops=2, gemm=64, peak=1024, bytes=256 << 20)


def tasks(options: Options) -> Iterator[Task]:
    if options.interpret:
        return
    bench = Bench(torch.device(options.device), options.backend)
    for name, case, peak in bench.peaks():
        yield Task(PEAKS, name, case, bench.spelled, partial(bench.peak, name, case, peak))
    if options.quick:
        return
    for name, case, make in bench.kernels():
        yield Task(SPEED, name, case, bench.spelled, partial(bench.kernel, name, case, make))


@dataclass
class Bench:
    device: torch.device
    backend: str
    known: dict[str, float] = field(default_factory=dict)  # peaks, TFLOP/s and GB/s

    def __post_init__(self) -> None:
        self.size = HOST if self.device.type == "cpu" else DEVICE
        fast = machine.dtypes(self.device)[0][-1]
        self.dtype = torch.float32 if self.device.type == "cpu" else fast
        self.spelled = spelled(self.dtype)

    def peaks(self) -> Iterator[tuple[str, str, Callable[[], tuple[Call, float, str]]]]:
        n, size = self.size.peak, self.size.bytes
        words = f"{size >> 20} MiB" if size < 1 << 30 else f"{size >> 30} GiB"

        def matmul() -> tuple[Call, float, str]:
            a, b = self.randn(n, n), self.randn(n, n)
            return lambda: a @ b, 2 * n**3 / 1e9, "TFLOP/s"

        def copy() -> tuple[Call, float, str]:
            a = torch.ones(size // 4, dtype=torch.float32, device=self.device)
            b = torch.empty_like(a)
            return lambda: b.copy_(a), 2 * size / 1e6, "GB/s"

        def read() -> tuple[Call, float, str]:
            a = torch.ones(size // 4, dtype=torch.float32, device=self.device)
            return a.sum, size / 1e6, "GB/s"

        yield COMPUTE, f"{n} x {n} x {n}", matmul
        yield MEMORY, f"{words}, read and written", copy
        yield "read", words, read

    def peak(self, name: str, case: str, make: Callable[[], tuple[Call, float, str]]) -> Timing:
        call, work, unit = make()
        ms = self.milliseconds([call], flush=False)[0]
        self.known[name] = work / ms
        return Timing(PEAKS, name, case, self.spelled, ms=ms, rate=work / ms, unit=unit)

    def limit(self, name: str) -> float:
        """The peak, measured again where another process did so."""
        for other, case, make in self.peaks():
            if other == name and name not in self.known:
                self.peak(name, case, make)
        return self.known[name]

    def kernel(self, name: str, case: str, make: Callable[[], Work]) -> Timing:
        work = make()
        ways = dict(work.torchs)
        if self.device.type == "cuda":
            torch._dynamo.reset()
            ways["torch.compile"] = torch.compile(next(iter(work.torchs.values())), dynamic=False)
        ways = {way: call for way, call in ways.items() if _runs(call)}
        times = self.milliseconds([work.ours, *ways.values()], flush=not work.flops)
        torch_ms, best = min(zip(times[1:], ways, strict=True), default=(None, ""))
        unit, peak = ("TFLOP/s", COMPUTE) if work.flops else ("GB/s", MEMORY)
        rate = (work.flops / 1e9 or work.bytes / 1e6) / times[0]
        return Timing(SPEED, name, case, self.spelled, times[0], torch_ms, best, rate, unit, rate / self.limit(peak))

    def kernels(self) -> Iterator[tuple[str, str, Callable[[], Work]]]:
        s = self.size
        yield "attention", f"causal {s.sequences} x 777", partial(self.attention, s.sequences, 777, 32, 96, True)
        yield "attention", f"full {s.crops} x 577", partial(self.attention, s.crops, 577, 16, 64, False)
        for name in ("rms_norm", "add_rms_norm"):
            yield name, f"{s.rows} x 3072", partial(self.rows, name, s.rows, 3072, "xw")
        for name in ("layer_norm", "add_layer_norm"):
            yield name, f"{s.tower} x 1024", partial(self.rows, name, s.tower, 1024, "xwb")
        yield "silu_mul", f"{s.rows} x 8192", self.silu_mul
        yield "quick_gelu", f"{s.tower} x 4096", self.quick_gelu
        yield "rope", f"{s.rows} x 64 x 96", self.rope
        for name, rows, K, N in (("linear_quick_gelu", s.tower, 1024, 4096), ("linear_silu_mul", s.gemm, 3072, 16384)):
            yield name, f"{rows} x {N} x {K}", partial(self.linear, name, rows, K, N)
        yield "merge_crops", f"{s.crops} x 576 x 1024", self.merge_crops
        yield "image_patches", f"{s.crops} x 336 x 336", self.image_patches
        yield "pool_last_token", f"{s.sequences} x 777 x 3072", self.pool
        yield "quantize_rows", f"{s.rows} x 3072", self.quantize_rows

    # ------------------------------------------------------------------------------------------------- the kernels

    def attention(self, sequences: int, L: int, N: int, H: int, causal: bool) -> Work:
        T = sequences * L
        q, k, v = self.randn(T, 3 * N * H).unflatten(1, (3, N, H)).unbind(1)
        cu = cumulated([L] * sequences).to(self.device)
        a, b, c = (x.unflatten(0, (sequences, L)).transpose(1, 2) for x in (q, k, v))
        ways: dict[str, Call] = {"SDPA": partial(F.scaled_dot_product_attention, a, b, c, is_causal=causal)}
        pairs = sequences * (L * (L + 1) // 2 if causal else L * L)
        ours = lambda: ops.attention(q, k, v, cu, L, causal=causal, backend=self.backend)  # noqa: E731
        return Work(ours, ways, 4 * H * N * pairs)

    def rows(self, name: str, R: int, D: int, inputs: str) -> Work:
        adds = name.startswith("add")
        x, vectors = self.randn(R, D), [self.randn(D) for _ in inputs[1:]]
        tensors = [x, self.randn(R, D), *vectors] if adds else [x, *vectors]
        plain = getattr(torch_ops, name)
        ways: dict[str, Call] = {"eager": lambda: plain(*tensors, EPS)}
        if not adds:
            named: Callable[..., Tensor] = F.rms_norm if name == "rms_norm" else F.layer_norm
            ways[f"F.{name}"] = partial(named, x, (D,), *vectors, EPS)
        ours = lambda: getattr(ops, name)(*tensors, EPS, backend=self.backend)  # noqa: E731
        return self.moving(ours, ways, (4 if adds else 2) * R * D)

    def silu_mul(self) -> Work:
        x = self.randn(self.size.rows, 2 * 8192)
        ours = lambda: ops.silu_mul(x, backend=self.backend)  # noqa: E731
        return self.moving(ours, {"eager": lambda: torch_ops.silu_mul(x)}, 3 * x.numel() // 2)

    def quick_gelu(self) -> Work:
        x, bias = self.randn(self.size.tower, 4096), self.randn(4096)
        ours = lambda: ops.quick_gelu(x, bias, backend=self.backend)  # noqa: E731
        return self.moving(ours, {"eager": lambda: torch_ops.quick_gelu(x, bias)}, 2 * x.numel())

    def rope(self) -> Work:
        T = self.size.rows
        q, k, _ = self.randn(T, 3 * 32 * 96).unflatten(1, (3, 32, 96)).unbind(1)
        cos, sin = self.randn(T, 48), self.randn(T, 48)
        ours = lambda: ops.rope(q, k, cos, sin, backend=self.backend)  # noqa: E731
        return self.moving(ours, {"eager": lambda: torch_ops.rope(q, k, cos, sin)}, 4 * q.numel() + 2 * cos.numel())

    def linear(self, name: str, R: int, K: int, N: int) -> Work:
        x, weight, bias = self.randn(R, K), self.randn(N, K), self.randn(N)
        tensors = (x, weight, bias) if name == "linear_quick_gelu" else (x, weight)
        ours = lambda: getattr(ops, name)(*tensors, fused=True, backend=self.backend)  # noqa: E731
        return Work(ours, {"eager": lambda: getattr(torch_ops, name)(*tensors)}, 2 * R * K * N)

    def merge_crops(self) -> Work:
        C = self.size.crops
        grids = [(2, 2)] * (C // 5) or [(1, 1)]
        crops = sum(1 + h * w for h, w in grids)
        features, sub, glb = self.randn(crops, 577, 1024)[:, 1:], self.randn(4096), self.randn(4096)
        ours = lambda: ops.merge_crops(features, grids, sub, glb, backend=self.backend)  # noqa: E731
        return self.moving(ours, {"eager": lambda: torch_ops.merge_crops(features, grids, sub, glb)},
                           2 * crops * 576 * 1024)  # fmt: skip

    def image_patches(self) -> Work:
        grids = [(2, 2)] * (self.size.crops // 5) or [(1, 1)]
        crops = sum(h * w for h, w in grids)
        pixels = torch.full((crops, 336, 336, 3), 7, dtype=torch.uint8, device=self.device)
        mean, std = torch.full((3,), 0.5, device=self.device), torch.full((3,), 0.25, device=self.device)
        call = lambda op, **more: op(pixels, grids, mean, std, 14, self.dtype, **more)  # noqa: E731
        outputs = (crops + len(grids)) * 336 * 336 * 3
        return Work(lambda: call(ops.image_patches, backend=self.backend),
                    {"eager": lambda: call(torch_ops.image_patches)},
                    bytes=pixels.numel() + outputs * self.dtype.itemsize)  # fmt: skip

    def pool(self) -> Work:
        B = self.size.sequences
        x, weight, cu = self.randn(B * 777, 3072), self.randn(3072), cumulated([777] * B).to(self.device)
        ours = lambda: ops.pool_last_token(x, cu, weight, EPS, backend=self.backend)  # noqa: E731
        ways: dict[str, Call] = {"eager": lambda: torch_ops.pool_last_token(x, cu, weight, EPS)}
        return Work(ours, ways, bytes=B * 3072 * (self.dtype.itemsize + 4))

    def quantize_rows(self) -> Work:
        own = machine.capability(self.device)
        if self.backend == "triton" and (own is None or own < machine.FP8_FROM):
            raise NotRun("8-bit floats need compute capability 8.9")
        x = self.randn(self.size.rows, 3072)
        ours = lambda: ops.quantize_rows(x, backend=self.backend)  # noqa: E731
        size = x.numel() * (x.itemsize + 1) + 4 * len(x)
        return Work(ours, {"eager": lambda: torch_ops.quantize_rows(x)}, bytes=size)

    def moving(self, ours: Call, ways: dict[str, Call], elements: int) -> Work:
        return Work(ours, ways, bytes=elements * self.dtype.itemsize)

    def randn(self, *shape: int) -> Tensor:
        """Random numbers: zeros would raise clocks."""
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(self.dtype)

    # -------------------------------------------------------------------------------------------------- the clock

    def milliseconds(self, calls: list[Call], *, flush: bool) -> list[float]:
        """Medians, one run of each in turn, so that drifting clocks hit all alike."""
        timed = self.cuda_clock(flush) if self.device.type == "cuda" else host_clock
        for call in calls:
            for _ in range(WARM_UPS if self.device.type == "cuda" else 1):
                call()
        times: list[list[float]] = [[] for _ in calls]
        start = time.monotonic()
        for run in range(RUNS):
            reads = [timed(call) for call in calls]
            for found, read in zip(times, reads, strict=True):
                found.append(read())
            if run + 1 >= FEWEST and time.monotonic() - start > SECONDS * len(calls):
                break
        return [statistics.median(found) for found in times]

    def cuda_clock(self, flush: bool) -> Callable[[Call], Callable[[], float]]:
        buffer = torch.empty(FLUSH_BYTES if flush else 1, dtype=torch.uint8, device=self.device)

        def queue(call: Call) -> Callable[[], float]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            buffer.zero_()
            torch.cuda._sleep(SLEEP_CYCLES)
            start.record()
            call()
            end.record()

            def read() -> float:
                end.synchronize()
                return start.elapsed_time(end)

            return read

        return queue


def host_clock(call: Call) -> Callable[[], float]:
    start = time.perf_counter()
    call()
    ms = (time.perf_counter() - start) * 1e3
    return lambda: ms


def _runs(call: Call) -> bool:
    """Whether one of torch's ways works here: a compiler may be missing."""
    try:
        call()
        return True
    except Exception:
        return False
