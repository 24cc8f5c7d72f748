"""Jobs of many requests -> packs for the one thread that owns the model.

request A: job job job ─┐                                    model thread
request B: job ─────────┼─> waiting jobs, ordered by place ─> pack (<= batch_tokens) ─> launch ─> finish ─> futures
request C: job job ─────┘

Order. A job's place is a time: its request's arrival, plus `patience` times the seconds that the request's tokens
up to and including it take at the measured speed. So a short request is not held up by a long one's thousand inputs,
which have later places; and a long one is overtaken only by what arrives within a bounded time after it: nothing
starves.

Waiting. A pack leaves when it is full, when its first job has waited `max_wait`, or when nobody is missing: no
request has jobs to come, and as many requests wait as were in the house when the last pack left. A lone client never
waits, and many clients, whose next requests come within a few milliseconds of their last answers, share one pack
instead of taking turns in small ones.
"""

import asyncio
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..embedder import Embedder
from ..transfer import HostCopy

log = logging.getLogger("minivlm2vec.serve")

Finish = Callable[[], np.ndarray]
Launch = Callable[[Sequence[Any]], np.ndarray | Finish]


class ModelError(RuntimeError):
    """The model could not embed one input, alone and unhurried."""


class Observer(Protocol):
    """What a Batcher tells the metrics; called in the model's thread."""

    def pack(self, jobs: int, tokens: int, waits: Sequence[float], seconds: float) -> None: ...


@dataclass(eq=False)
class Job:
    """One input on its way through the model."""

    turn: "Turn"
    item: Any
    tokens: int
    future: asyncio.Future
    since: float
    waiting: bool = True


@dataclass(eq=False)
class Pack:
    """Jobs that are computed together."""

    jobs: list[Job]
    started: float
    finish: Finish | None = None


class Turn:
    """One request's right to hand in jobs; see `Batcher.request`."""

    def __init__(self, batcher: "Batcher"):
        self._batcher = batcher
        self.arrival = time.monotonic()
        self.tokens = 0  # handed in so far
        self.waiting = 0  # jobs in the queue
        self.complete = False

    def submit(self, items: Sequence[Any], *, last: bool = True) -> list[asyncio.Future]:
        """Hands in items (each with a len(), its tokens); returns a future of float32 [D] for each. Cancelling one
        takes the item out of the queue. last: no more will come."""
        return self._batcher._submit(self, items, last)


class Batcher:
    """Packs jobs and runs them in a thread of its own.

    Args:
        launch: computes items and returns float32 [B, D], or starts the computation and returns what waits for it.
        batch_tokens: of one pack; a longer job gets a pack of its own.
        max_batch_inputs: jobs in one pack.
        max_wait: seconds that a job waits for company.
        patience: see the top of this file.
        observer: is told of every pack.
    """

    def __init__(
        self,
        launch: Launch,
        *,
        batch_tokens: int = 16384,
        max_batch_inputs: int = 1024,
        max_wait: float = 0.005,
        patience: float = 4.0,
        observer: Observer | None = None,
    ):
        self._launch = launch
        self.batch_tokens = batch_tokens
        self.max_batch_inputs = max_batch_inputs
        self.max_wait = max_wait
        self.patience = patience
        self._observer = observer
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Job]] = []  # place, number, job; withdrawn ones are dropped later
        self._numbers = itertools.count()
        self._in_house = 0  # requests
        self._preparing = 0  # those of them that have jobs to come
        self._requests_waiting = 0  # those that have jobs in the queue
        self._last_in_house = 0  # when the last pack left
        self._waiting_jobs = self._waiting_tokens = 0
        self._since = 0.0  # when the queue was last empty
        self._launched: list[Pack] = []
        self._finished = 0.0  # when the last pack was
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.rate = 1e4  # tokens per second, until it is measured
        self.broken: str | None = None  # why the model answers nothing any more
        self.probe: Any = None  # an item that is known to be good

    def start(self) -> None:
        """Starts the thread; call it in the event loop that will await the futures."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="minivlm2vec-model", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Finishes what waits, then ends the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    @contextmanager
    def request(self):
        """A request is in the house; yields its Turn."""
        turn = Turn(self)
        with self._changed:
            self._in_house += 1
            self._preparing += 1
        try:
            yield turn
        finally:
            with self._changed:
                self._in_house -= 1
                self._complete(turn)

    @property
    def waiting(self) -> tuple[int, int]:
        """Jobs and tokens in the queue."""
        with self._changed:
            return self._waiting_jobs, self._waiting_tokens

    # In the event loop's thread

    def _submit(self, turn: Turn, items: Sequence[Any], last: bool) -> list[asyncio.Future]:
        now, jobs = time.monotonic(), []
        for item in items:
            turn.tokens += len(item)
            place = turn.arrival + self.patience * turn.tokens / self.rate
            job = Job(turn, item, len(item), self._loop.create_future(), now)
            job.future.add_done_callback(lambda f, job=job: self._withdraw(job) if f.cancelled() else None)
            jobs.append((place, next(self._numbers), job))
        with self._changed:
            if self.broken:
                raise ModelError(self.broken)
            if self._waiting_jobs == 0:
                self._since = now
            for entry in jobs:
                heapq.heappush(self._heap, entry)
            self._requests_waiting += turn.waiting == 0 and len(jobs) > 0
            turn.waiting += len(jobs)
            self._waiting_jobs += len(jobs)
            self._waiting_tokens += sum(job.tokens for _, _, job in jobs)
            if last:
                self._complete(turn)
            self._changed.notify()
        return [job.future for _, _, job in jobs]

    def _complete(self, turn: Turn) -> None:
        if not turn.complete:
            turn.complete = True
            self._preparing -= 1
            self._changed.notify()

    def _withdraw(self, job: Job) -> None:
        with self._changed:
            if job.waiting:
                self._leave_queue(job)
                job.item = None  # its images; the heap forgets the job itself later
                self._changed.notify()

    @staticmethod
    def _deliver(results: list[tuple[Job, Any]]) -> None:
        for job, result in results:
            if job.future.done():  # cancelled while it was computed
                continue
            if isinstance(result, Exception):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)

    # In the model's thread

    def _run(self) -> None:
        try:
            while (pack := self._next(block=not self._launched)) or self._launched:
                if pack is not None:
                    self._start(pack)
                if self._launched and self._launched[0] is not pack:
                    self._finish(self._launched[0])
        except BaseException as e:  # an error of this file: no answer would ever come
            log.exception("the model's thread died")
            self._break(f"the model's thread died: {e!r}")

    def _next(self, *, block: bool) -> Pack | None:
        """The next pack. None: there is no full one (not block: the model is busy), or none will come (block)."""
        with self._changed:
            while not self._ready(full_only=not block):
                if not block or (self._stopping and not self._waiting_jobs):
                    return None
                self._changed.wait(self._patience_left())
            return self._take()

    def _ready(self, *, full_only: bool) -> bool:
        if not self._waiting_jobs:
            return False
        if self._waiting_tokens >= self.batch_tokens or self._waiting_jobs >= self.max_batch_inputs:
            return True
        if full_only:
            return False
        nobody_missing = self._preparing == 0 and self._requests_waiting >= self._last_in_house
        return nobody_missing or self._stopping or self._patience_left() <= 0

    def _patience_left(self) -> float | None:
        """Seconds until the first job has waited long enough; None where there is none."""
        return max(0.0, self._since + self.max_wait - time.monotonic()) if self._waiting_jobs else None

    def _take(self) -> Pack:
        """Jobs in the order of their places; one that does not fit stays, and will be at the head next time."""
        jobs, passed, room = [], [], self.batch_tokens
        while self._heap and len(jobs) < self.max_batch_inputs and len(passed) < 64 and room > 0:
            entry = heapq.heappop(self._heap)
            job = entry[2]
            if not job.waiting:
                continue
            if jobs and job.tokens > room:
                passed.append(entry)
                continue
            jobs.append(job)
            room -= job.tokens
            self._leave_queue(job)
        for entry in passed:
            heapq.heappush(self._heap, entry)
        self._last_in_house = self._in_house
        self._since = 0.0  # what is left has waited long enough
        return Pack(jobs, time.monotonic())

    def _leave_queue(self, job: Job) -> None:
        job.waiting = False
        job.turn.waiting -= 1
        self._requests_waiting -= job.turn.waiting == 0
        self._waiting_jobs -= 1
        self._waiting_tokens -= job.tokens

    def _start(self, pack: Pack) -> None:
        self._launched.append(pack)
        try:
            result = self._launch([job.item for job in pack.jobs])
        except Exception as e:
            self._fail(pack, e)
            return
        if callable(result):
            pack.finish = result
        else:
            self._settle(pack, self._checked(pack.jobs, result))

    def _finish(self, pack: Pack) -> None:
        try:
            vectors = pack.finish()
        except Exception as e:
            self._fail(pack, e)
            return
        self._settle(pack, self._checked(pack.jobs, vectors))

    def _fail(self, pack: Pack, e: Exception) -> None:
        log.warning("a pack of %d inputs failed, each is tried alone: %s", len(pack.jobs), _describe(e))
        self._settle(pack, self._one_by_one(pack.jobs))

    def _settle(self, pack: Pack, results: list[tuple[Job, Any]]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, results)
        self._launched.remove(pack)
        self._measure(pack)

    def _checked(self, jobs: list[Job], vectors: np.ndarray) -> list[tuple[Job, Any]]:
        """Results; a row with NaN or infinity is computed again alone."""
        good = np.isfinite(vectors).all(axis=1)
        results = [(job, vector) for job, vector, ok in zip(jobs, vectors, good, strict=True) if ok]
        bad = [job for job, ok in zip(jobs, good, strict=True) if not ok]
        return results + (self._one_by_one(bad) if bad else [])

    def _one_by_one(self, jobs: list[Job]) -> list[tuple[Job, Any]]:
        """Every job for itself, so that one that cannot be computed fails alone."""
        results = [(job, self._alone(job)) for job in jobs]
        if self.probe is not None and all(isinstance(result, Exception) for _, result in results):
            try:
                self._compute(self.probe)
            except Exception as e:  # as after a CUDA error: no input can be computed any more
                log.critical("the model fails on every input: %s", _describe(e))
                self._break(f"the model fails on every input: {_describe(e)}")
        return results

    def _alone(self, job: Job) -> np.ndarray | ModelError:
        _free_memory()
        try:
            vector = self._compute(job.item)
        except Exception as e:
            log.error("an input of %d tokens failed alone", job.tokens, exc_info=e)
            return ModelError(_describe(e))
        if not np.isfinite(vector).all():
            return ModelError("the vector holds NaN or infinite values (float16 overflows where bfloat16 and float32 "
                              "do not)")  # fmt: skip
        return vector

    def _compute(self, item: Any) -> np.ndarray:
        result = self._launch([item])
        return (result() if callable(result) else result)[0]

    def _measure(self, pack: Pack) -> None:
        now = time.monotonic()
        seconds = max(now - max(pack.started, self._finished), 1e-6)
        self._finished = now
        tokens = sum(job.tokens for job in pack.jobs)
        speed = tokens / seconds
        if speed > self.rate or tokens * 2 >= self.batch_tokens or seconds > 0.25:  # small packs say little
            self.rate += 0.5 * (speed - self.rate)
        if self._observer is not None:
            self._observer.pack(len(pack.jobs), tokens, [pack.started - job.since for job in pack.jobs], seconds)

    def _break(self, why: str) -> None:
        with self._changed:
            self.broken = why
            lost, self._heap = [job for _, _, job in self._heap if job.waiting], []
            for job in lost:
                self._leave_queue(job)
            lost += [job for pack in self._launched for job in pack.jobs]
        self._loop.call_soon_threadsafe(self._deliver, [(job, ModelError(why)) for job in lost])


def launcher(embedder: Embedder) -> Launch:
    """`Launch` of an Embedder. On CUDA the copy to the host runs behind the computation, so that the next pack can
    be laid out meanwhile."""

    def launch(items: Sequence[Any]) -> np.ndarray | Finish:
        vectors = embedder.embed(items).float()
        if vectors.device.type != "cuda":
            return vectors.cpu().numpy()
        copy = HostCopy(vectors)
        return lambda: copy.wait().numpy()

    return launch


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _describe(e: BaseException) -> str:
    return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}"
