"""Rows -> vectors. Texts are tokenised and images decoded in threads while the model computes.

The rows of one part, and nothing else, decide how they are packed: so a part has the same bits whenever, wherever
and after whatever interruption it is computed.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..embedder import Embedder, pack_by_length
from ..errors import InputError
from ..processor import Loaded, Planned
from ..transfer import HostCopy
from .rows import BadRow, Columns, Row, digest_of
from .sources import Part

_Planning = tuple[int, list[Row], list[Future]]  # a part's number, its rows, their plans


@dataclass
class Result:
    """A finished part.

    Fields:
        number: which part.
        first: number of its first row.
        vectors: [n, D] float32; NaN in the rows that have no vector.
        errors: those rows, ascending.
        images: digest of the image files' sizes and times of change.
    """

    number: int
    first: int
    vectors: np.ndarray
    images: str
    errors: list[BadRow] = field(default_factory=list)


@dataclass
class _Pack:
    """Rows of one part that are computed together; `futures` bring their loaded inputs."""

    result: Result
    rows: list[Row]
    plans: list[Planned]
    last: bool  # of its part
    futures: list[Future] = field(default_factory=list)


class Pipeline:
    """Embeds parts of rows.

    Args:
        embedder: the model.
        columns: where a row keeps its text and images.
        prompt, max_length: as for `Embedder.encode`.
        batch_tokens: tokens of a pack.
        num_workers: threads; default the embedder's.
        on_bad_row: called for each row without a vector, from the calling thread; what it raises ends the run.
        on_rows: called with the number of rows that were finished.
    """

    def __init__(
        self,
        embedder: Embedder,
        columns: Columns,
        *,
        prompt: str | None = None,
        max_length: int | None = None,
        batch_tokens: int = 16384,
        num_workers: int | None = None,
        on_bad_row: Callable[[BadRow], None] = lambda bad: None,
        on_rows: Callable[[int], object] = lambda n: None,
    ):
        self.embedder = embedder
        self.columns = columns
        self.options: dict[str, Any] = {"prompt": prompt, "max_length": max_length}
        self.batch_tokens = batch_tokens
        self.num_workers = num_workers or embedder.num_workers
        self.on_bad_row = on_bad_row
        self.on_rows = on_rows
        self.watch = Stopwatch(embedder.device)

    def run(self, parts: Iterable[Part]) -> Iterator[Result]:
        """Yields the parts in their order. Holds two parts' rows and the images of a few packs."""
        with ThreadPoolExecutor(self.num_workers) as pool:
            try:
                yield from self._run(parts, pool)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, parts: Iterable[Part], pool: ThreadPoolExecutor) -> Iterator[Result]:
        packs = self._load_ahead(self._packs(self._plan_ahead(parts, pool)), pool)
        launched: deque[tuple[_Pack, list[Row], HostCopy | None]] = deque()
        for pack in packs:
            rows, items = self._collect(pack)
            launched.append((pack, rows, self._launch(items)))
            if len(launched) > 1:  # on a GPU the next pack computes while this one's vectors are fetched
                yield from self._finish(*launched.popleft())
        for pack, rows, vectors in launched:
            yield from self._finish(pack, rows, vectors)
        self.watch.stop()

    def _plan_ahead(self, parts: Iterable[Part], pool: ThreadPoolExecutor) -> Iterator[_Planning]:
        """Parts whose plans are under way; the next part's are begun before one is handed out."""
        coming: deque[_Planning] = deque()
        for number, rows in parts:
            coming.append((number, rows, [pool.submit(self._plan, row) for row in rows]))
            if len(coming) > 1:
                yield coming.popleft()
        yield from coming

    def _plan(self, row: Row) -> tuple[str, Planned | BadRow]:
        stamp = self.columns.stamp(row)  # before the file is opened: what is replaced later has another one
        try:
            return stamp, self.embedder.plan(self.columns.item(row), **self.options)
        except InputError as e:
            return stamp, _bad(row, e)

    def _packs(self, parts: Iterable[_Planning]) -> Iterator[_Pack]:
        for number, rows, futures in parts:
            with self.watch.waiting():
                planned = [f.result() for f in futures]
            vectors = np.full((len(rows), self.embedder.dimension), np.nan, np.float32)
            result = Result(number, rows[0].number, vectors, digest_of(stamp for stamp, _ in planned))
            good = [(r, p) for r, (_, p) in zip(rows, planned, strict=True) if isinstance(p, Planned)]
            for _, p in planned:
                if isinstance(p, BadRow):
                    self._report(result, p)
            self.on_rows(len(rows) - len(good))
            batches = pack_by_length([len(p) for _, p in good], self.batch_tokens) or [[]]
            for i, batch in enumerate(batches):
                yield _Pack(result, [good[j][0] for j in batch], [good[j][1] for j in batch], i == len(batches) - 1)

    def _load_ahead(self, packs: Iterable[_Pack], pool: ThreadPoolExecutor) -> Iterator[_Pack]:
        """Hands out packs in order; the next pack and 2 * num_workers rows beyond are under way by then."""
        coming: deque[_Pack] = deque()
        for pack in packs:
            pack.futures = [pool.submit(self._load, row, p) for row, p in zip(pack.rows, pack.plans, strict=True)]
            coming.append(pack)
            while len(coming) > 1 and sum(len(p.rows) for p in list(coming)[1:]) >= 2 * self.num_workers:
                yield coming.popleft()
        yield from coming

    def _load(self, row: Row, planned: Planned) -> Loaded | BadRow:
        try:
            return self.embedder.load(planned)
        except InputError as e:
            return _bad(row, e)

    def _collect(self, pack: _Pack) -> tuple[list[Row], list[Loaded]]:
        with self.watch.waiting():
            loaded = [f.result() for f in pack.futures]
        pack.futures, pack.plans = [], []
        for x in loaded:
            if isinstance(x, BadRow):
                self._report(pack.result, x)
        good = [(r, x) for r, x in zip(pack.rows, loaded, strict=True) if isinstance(x, Loaded)]
        return [r for r, _ in good], [x for _, x in good]

    def _launch(self, items: Sequence[Loaded]) -> HostCopy | None:
        if not items:
            return None
        with self.watch.computing():
            return HostCopy(self.embedder.embed(items))

    def _finish(self, pack: _Pack, rows: list[Row], vectors: HostCopy | None) -> Iterator[Result]:
        result = pack.result
        if vectors is not None:
            for row, vector in zip(rows, vectors.wait().float().numpy(), strict=True):
                if np.isfinite(vector).all():
                    result.vectors[row.number - result.first] = vector
                else:
                    self._report(result, BadRow(row.number, row.line, "vector", NOT_FINITE))
        self.on_rows(len(pack.rows))
        if pack.last:
            result.errors.sort(key=lambda bad: bad.row)
            yield result

    def _report(self, result: Result, bad: BadRow) -> None:
        result.errors.append(bad)
        self.on_bad_row(bad)


class Stopwatch:
    """Measures for how long the model had no input to work on.

    On a GPU that is the time between the end of one pack and the start of the next as the device saw them; elsewhere
    the time that the calling thread spent waiting for rows to be planned and loaded.
    """

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.waited = 0.0  # seconds
        self.began = time.perf_counter()
        self.ended: float | None = None
        self.events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def elapsed(self) -> float:
        """Seconds from the start to `stop`, or to now."""
        return (self.ended or time.perf_counter()) - self.began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if not self.cuda:
            self.waited += time.perf_counter() - start

    @contextmanager
    def computing(self) -> Iterator[None]:
        if not self.cuda:
            yield
            return
        if not self.events:
            self.waited += time.perf_counter() - self.began
        stream = torch.cuda.current_stream(self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        yield
        end.record(stream)
        self.events.append((start, end))
        self._add_gaps()

    def stop(self) -> None:
        self.ended = time.perf_counter()
        self._add_gaps()

    def _add_gaps(self) -> None:
        while len(self.events) > 1 and self.events[1][0].query():
            (_, end), (start, _) = self.events.popleft(), self.events[0]
            self.waited += max(0.0, end.elapsed_time(start) / 1e3)


NOT_FINITE = "its vector holds NaN or infinite values; float16 overflows where bfloat16 and float32 do not"


def _bad(row: Row, e: InputError) -> BadRow:
    return BadRow(row.number, row.line, e.name, e.reason)
