"""What an examination found, as values: for a program, as JSON, and as text that may be shown to anybody."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["passed", "failed", "not run"]
NARROWEST, WIDEST = 60, 120  # columns
SMALLER = {"TFLOP/s": ("GFLOP/s", "MFLOP/s"), "GB/s": ("MB/s", "KB/s")}  # units, each a thousandth of the one before
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Fact:
    """One line about the machine. A value that could not be had is "not read"."""

    name: str
    value: str


@dataclass(frozen=True)
class Case:
    """What was examined; fields as of `Check` and `Timing`."""

    section: str
    name: str
    case: str
    dtype: str

    @property
    def title(self) -> str:
        return ", ".join(part for part in (self.name, self.case, self.dtype) if part)


@dataclass(frozen=True)
class Check(Case):
    """One comparison, and what came of it.

    Fields:
        section: "device" (torch alone), "kernels" or "model".
        name: a kernel's or a form of the model, such as "attention" or "CUDA graphs".
        case: the shapes, in words.
        dtype: "float16", for example.
        error, tolerance: of kernels the largest absolute error against float64 and the largest that is allowed; of the
            model the largest relative error of a vector. None where there is none: nothing was computed, or not every
            number is finite.
        reason: of a failure or of not running, in a sentence.
        way_round: the argument or environment variable with which the rest goes on, of a failed check.
        seconds: how long it took, compiling included.
    """

    verdict: Verdict
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""
    way_round: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Timing(Case):
    """How fast a kernel, or a peak of the machine, is.

    Fields:
        section: "peaks" or "speed".
        ms: median milliseconds; None where it was not measured, for `reason`.
        torch_ms, torch_name: of torch's fastest way of the same, and which that is.
        rate, unit: useful work a second: TFLOP/s or GB/s.
        share: of the peak that limits it, 0 to 1.
    """

    ms: float | None = None
    torch_ms: float | None = None
    torch_name: str = ""
    rate: float | None = None
    unit: str = ""
    share: float | None = None
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """What `examine` found. It holds no user names, home folders or host names.

    Fields:
        version: of minivlm2vec.
        device: "cuda", "cpu", "mps".
        backend: of the kernels that were examined: "triton" or "torch".
        environment: facts about the machine.
        kernels, model: the checks; those of torch alone are the first of `kernels`.
        peaks, speed: what was timed.
        seconds: all of it took.
        stopped: whether it was interrupted; what it had not come to is "not run".
    """

    version: str
    device: str
    backend: str
    environment: tuple[Fact, ...]
    kernels: tuple[Check, ...]
    model: tuple[Check, ...]
    peaks: tuple[Timing, ...] = ()
    speed: tuple[Timing, ...] = ()
    seconds: float = 0.0
    stopped: bool = False

    @property
    def checks(self) -> tuple[Check, ...]:
        return self.kernels + self.model

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if c.verdict == "failed")

    @property
    def passed(self) -> bool:
        """Whether it came to its end, something was compared, and nothing was wrong."""
        return not self.stopped and not self.failed and any(c.verdict == "passed" for c in self.checks)

    @property
    def verdict(self) -> str:
        """One line, whose first word is PASSED, FAILED or STOPPED."""
        counts = {v: sum(c.verdict == v for c in self.checks) for v in ("passed", "failed", "not run")}
        rest = f", {counts['not run']} not run" if counts["not run"] else ""
        where = f"minivlm2vec {self.version} with {self.backend} kernels on {self.device}, {self.seconds:.0f} s"
        if self.stopped:
            wrong = f"{counts['failed']} of {_checks(counts['passed'] + counts['failed'])} wrong"
            return f"STOPPED before its end: {wrong}{rest}. {where}"
        if self.passed:
            return f"PASSED: {_checks(counts['passed'])} right{rest}. {where}"
        if not self.failed:
            return f"FAILED: nothing could be compared{rest}. {where}"
        return f"FAILED: {counts['failed']} of {_checks(counts['passed'] + counts['failed'])} wrong{rest}. {where}"

    def as_json(self) -> str:
        """Every field, and "verdict" and "passed"."""
        data: dict[str, Any] = asdict(self) | {"passed": self.passed, "verdict": self.verdict}
        return json.dumps(data, indent=2, allow_nan=False)

    def text(self, width: int = 80) -> str:
        """For a terminal of so many columns, and to be pasted into an issue. The verdict is the last line."""
        width = max(NARROWEST, min(width, WIDEST))
        parts = [_environment(self.environment, width), *_kernels(self.kernels, width), *_model(self.model, width)]
        parts += [*_speed(self.peaks, self.speed, width)]
        parts += [*_not_run([*self.checks, *self.peaks, *self.speed], width)]
        parts += [*_failures(self.failed, width), "\n".join(_wrapped(self.verdict, width))]
        return "\n\n".join(parts)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _checks(n: int) -> str:
    return f"{n} check" if n == 1 else f"{n} checks"


# ------------------------------------------------------------------------------------------------------ the sections


def _environment(facts: Sequence[Fact], width: int) -> str:
    names = max((len(f.name) for f in facts), default=0)
    lines = [line for f in facts for line in _wrapped(f.value, width, f"  {f.name:{names}}  ", " " * (names + 4))]
    return "\n".join(["ENVIRONMENT", *lines])


def _kernels(checks: Sequence[Check], width: int) -> Iterator[str]:
    """A line a kernel: of each dtype the error that comes nearest to its tolerance, and how many were right."""
    if not checks:
        return
    dtypes = [d for d in DTYPES if any(c.dtype == d and c.verdict != "not run" for c in checks)] or list(DTYPES[:1])
    names = list(dict.fromkeys(c.name for c in checks if c.dtype in dtypes))
    column = max((width - 2 - max(map(len, names))) // len(dtypes) - 2, 12) if names else 12
    column = min(column, 26)
    first = max(map(len, names), default=0)
    head = "".join(f"  {d:>{column}}" for d in dtypes)
    rows = [f"  {'':{first}}{head}"]
    for name in names:
        cells = [_cell([c for c in checks if (c.name, c.dtype) == (name, d)], column) for d in dtypes]
        rows.append(f"  {name:{first}}" + "".join(f"  {cell:>{column}}" for cell in cells))
    said = "KERNELS: largest error and its tolerance, of the case that comes nearest to it"
    yield "\n".join([*_wrapped(said, width), *rows])


def _cell(checks: Sequence[Check], column: int) -> str:
    wrong = sum(c.verdict == "failed" for c in checks)
    if wrong:
        return f"FAILED {wrong} of {len(checks)}" if column >= 14 else "FAILED"
    worst = max((c for c in checks if c.verdict == "passed"), key=_nearness, default=None)
    if worst is None:
        return "not run" if checks else ""
    cell = f"{worst.error:.1e} of {worst.tolerance:.1e}"
    return cell if len(cell) <= column else f"{worst.error:.0e}/{worst.tolerance:.0e}"


def _nearness(check: Check) -> float:
    return (check.error or 0.0) / (check.tolerance or 1.0)


def _model(checks: Sequence[Check], width: int) -> Iterator[str]:
    if not checks:
        return
    tail = 30  # error, tolerance, verdict
    rows = []
    for c in checks:
        head = _cut(c.title, width - tail - 3)
        error = "" if c.error is None else f"{c.error:.1e}"
        tolerance = "" if c.tolerance is None else f"{c.tolerance:.0e}"
        verdict = "FAILED" if c.verdict == "failed" else c.verdict
        rows.append(f"  {head:{width - tail - 3}} {error:>9} {tolerance:>9}  {verdict:<8}".rstrip())
    said = "MODEL: largest relative error of a vector, its tolerance"
    yield "\n".join([*_wrapped(said, width), *rows])


def _speed(peaks: Sequence[Timing], timings: Sequence[Timing], width: int) -> Iterator[str]:
    if peaks:
        rows = [f"  {t.title:{width - 24}} {_rate(t):>20}" for t in peaks]
        yield "\n".join(["PEAKS of this machine, in this run", *rows])
    if not timings:
        return
    numbers = 48
    names = width - numbers - 2
    rows = [f"  {'':{names}}{'ms':>9}{'torch ms':>10}{'faster by':>11}{'rate':>12}{'peak':>6}"]
    for t in timings:
        head = f"{t.name}, {t.case}"
        if len(head) >= names:  # a line of its own
            rows += _wrapped(head, width, "  ", "    ")
            head = ""
        if t.ms is None:
            rows.append(f"  {head:{names}}{'not timed':>9}")
            continue
        best = "" if t.torch_ms is None else f"{t.torch_ms:.4g}"
        ratio = "" if t.torch_ms is None else f"{t.torch_ms / t.ms:.2f}x"
        share = "" if t.share is None else f"{100 * t.share:.0f}%"
        rows.append(f"  {head:{names}}{t.ms:>9.4g}{best:>10}{ratio:>11}{_rate(t, short=True):>12}{share:>6}")
    yield "\n".join([*_wrapped("SPEED of each kernel, beside the fastest of torch's own ways", width), *rows])


def _rate(t: Timing, short: bool = False) -> str:
    if t.rate is None:
        return "not measured"
    rate, unit = t.rate, t.unit
    for smaller in SMALLER.get(unit, ()):
        if rate < 1:
            rate, unit = 1e3 * rate, smaller
    number = f"{rate:.3g}" if rate < 100 else f"{rate:,.0f}"
    return f"{number} {unit.replace('FLOP', 'F') if short else unit}"


def _not_run(rows: Sequence[Check | Timing], width: int) -> Iterator[str]:
    """By reason, with the names of what was not run for it, and of what was not timed."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if isinstance(row, Timing) and row.ms is None:
            reasons.setdefault(row.reason, []).append(f"time of {row.name}")
        elif isinstance(row, Check) and row.verdict == "not run":
            reasons.setdefault(row.reason, []).append(f"{row.name} {row.dtype}".strip())
    if not reasons:
        return
    lines = []
    for reason, names in reasons.items():
        distinct = list(dict.fromkeys(names))
        lines += _wrapped(f"{reason}: {', '.join(distinct)}", width, "  ", "    ")
    yield "\n".join(["NOT RUN", *lines])


def _failures(failed: Sequence[Check], width: int) -> Iterator[str]:
    if not failed:
        return
    lines = []
    for c in failed:
        numbers = "" if c.error is None else f": error {c.error:.2e}, tolerance {c.tolerance:.2e}"
        reason = f": {c.reason}" if c.reason else ""
        lines += _wrapped(f"{c.title}{numbers}{reason}", width, "  ", "    ")
        if c.way_round:
            lines += _wrapped(f"until it is mended: {c.way_round}", width, "    ", "    ")
    yield "\n".join(["FAILED", *lines])


def _wrapped(text: str, width: int, first: str = "", later: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=later) or [first.rstrip()]
