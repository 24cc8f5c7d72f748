"""Jobs of many requests -> batches for the one thread that owns the model.

request A: job job job ─┐                                  model thread
request B: job ─────────┼─> waiting jobs, by due time ─> batch (<= batch_tokens) ─> launch ─> finish ─> futures
request C: job job job ─┘

Order. A job is due at its request's arrival, plus `patience` times the seconds that the request's tokens up to and
including it take at the measured speed. A short request does not wait behind the thousand inputs of a long one, which
are due later. A long request is overtaken only by what arrives within a bounded time after it, so nothing starves.

Waiting. A batch starts when it is full, when its first job has waited `max_wait`, or when nobody else is expected: no
request in flight has jobs still to come, and as many requests wait as were in flight when the last batch started. A
lone client never waits. Many clients, whose next requests come a few milliseconds after their last answers, share one
batch instead of taking turns in small ones.
"""

import asyncio
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from ..embedder import Embedder
from ..transfer import HostCopy

log = logging.getLogger("minivlm2vec.serve")

Finish = Callable[[], np.ndarray]
Launch = Callable[[Sequence[Any]], np.ndarray | Finish]


class ModelError(RuntimeError):
    """The model could not embed one input, even alone."""


class Observer(Protocol):
    """What a Batcher reports to; called in the model's thread."""

    def batch(self, inputs: int, tokens: int, waits: Sequence[float], seconds: float) -> None: ...


@dataclass(eq=False)
class Job:
    """One input on its way through the model; `since` is when it was submitted."""

    request: "RequestJobs"
    item: Any
    tokens: int
    future: asyncio.Future
    since: float
    waiting: bool = True


@dataclass(eq=False)
class Batch:
    """Jobs that are computed together."""

    jobs: list[Job]
    started: float
    finish: Finish | None = None


class RequestJobs:
    """The jobs of one request; see `Batcher.request`."""

    def __init__(self, batcher: "Batcher"):
        self._batcher = batcher
        self.arrival = time.monotonic()
        self.tokens = 0  # submitted so far
        self.waiting = 0  # jobs in the queue
        self.complete = False

    def submit(self, items: Sequence[Any], *, last: bool = True) -> list[asyncio.Future]:
        """Submits items (len(item) is its tokens); returns a future of float32 [D] for each. Cancelling a future
        takes its item out of the queue. last: no more will come."""
        return self._batcher._submit(self, items, last)


class Batcher:
    """Puts jobs together to batches and computes them in a thread of its own.

    Args:
        launch: computes items and returns float32 [B, D], or starts to and returns a function that waits for it.
        batch_tokens: of one batch; a longer job gets a batch of its own.
        max_batch_inputs: jobs in one batch.
        max_wait: seconds that a job waits for others.
        patience: see the top of this file.
        observer: is told of every batch.
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
        self._heap: list[tuple[float, int, Job]] = []  # due, number, job; cancelled ones are dropped later
        self._numbers = itertools.count()
        self._in_flight = 0  # requests
        self._preparing = 0  # those of them whose jobs are not all submitted yet
        self._requests_waiting = 0  # those that have jobs in the queue
        self._last_in_flight = 0  # when the last batch started
        self._waiting_jobs = self._waiting_tokens = 0
        self._since = 0.0  # when the queue was last empty
        self._launched: list[Batch] = []
        self._finished = 0.0  # when the last batch was
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="minivlm2vec-model", daemon=True)
        self._loop: asyncio.AbstractEventLoop  # set by `start`
        self.rate = 1e4  # tokens per second, until it is measured
        self.broken: str | None = None  # why the model answers nothing any more
        self.probe: Any = None  # an item that is known to be good

    def start(self) -> None:
        """Starts the thread; call it in the event loop that will await the futures."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Finishes what waits, then ends the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    @contextmanager
    def request(self) -> Iterator[RequestJobs]:
        """A request is in flight; yields what its jobs are submitted to."""
        request = RequestJobs(self)
        with self._changed:
            self._in_flight += 1
            self._preparing += 1
        try:
            yield request
        finally:
            with self._changed:
                self._in_flight -= 1
                self._complete(request)

    @property
    def waiting(self) -> tuple[int, int]:
        """Jobs and tokens in the queue."""
        with self._changed:
            return self._waiting_jobs, self._waiting_tokens

    # In the event loop's thread

    def _submit(self, request: RequestJobs, items: Sequence[Any], last: bool) -> list[asyncio.Future]:
        now = time.monotonic()
        jobs: list[tuple[float, int, Job]] = []
        for item in items:
            request.tokens += len(item)
            due = request.arrival + self.patience * request.tokens / self.rate
            job = Job(request, item, len(item), self._loop.create_future(), now)
            job.future.add_done_callback(partial(self._cancelled, job))
            jobs.append((due, next(self._numbers), job))
        with self._changed:
            if self.broken:
                raise ModelError(self.broken)
            if self._waiting_jobs == 0:
                self._since = now
            for entry in jobs:
                heapq.heappush(self._heap, entry)
            self._requests_waiting += request.waiting == 0 and len(jobs) > 0
            request.waiting += len(jobs)
            self._waiting_jobs += len(jobs)
            self._waiting_tokens += sum(job.tokens for _, _, job in jobs)
            if last:
                self._complete(request)
            self._changed.notify()
        return [job.future for _, _, job in jobs]

    def _complete(self, request: RequestJobs) -> None:
        if not request.complete:
            request.complete = True
            self._preparing -= 1
            self._changed.notify()

    def _cancelled(self, job: Job, future: asyncio.Future) -> None:
        if not future.cancelled():
            return
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
            while (batch := self._next(block=not self._launched)) or self._launched:
                if batch is not None:
                    self._start(batch)
                if self._launched and self._launched[0] is not batch:
                    self._finish(self._launched[0])
        except BaseException as e:  # an error of this file: no answer would ever come
            log.exception("the model's thread died")
            self._break(f"the model's thread died: {e!r}")

    def _next(self, *, block: bool) -> Batch | None:
        """The next batch. None: there is no full one (not block: the model is busy), or none will come (block)."""
        with self._changed:
            while not self._ready(full_only=not block):
                if not block or (self._stopping and not self._waiting_jobs):
                    return None
                self._changed.wait(self._seconds_to_wait() if self._waiting_jobs else None)
            return self._take()

    def _ready(self, *, full_only: bool) -> bool:
        if not self._waiting_jobs:
            return False
        if self._waiting_tokens >= self.batch_tokens or self._waiting_jobs >= self.max_batch_inputs:
            return True
        if full_only:
            return False
        nobody_expected = self._preparing == 0 and self._requests_waiting >= self._last_in_flight
        return nobody_expected or self._stopping or self._seconds_to_wait() <= 0

    def _seconds_to_wait(self) -> float:
        """Until the first job has waited long enough."""
        return max(0.0, self._since + self.max_wait - time.monotonic())

    def _take(self) -> Batch:
        """Jobs in the order in which they are due; one that does not fit stays, and comes first next time."""
        jobs: list[Job] = []
        passed: list[tuple[float, int, Job]] = []
        room = self.batch_tokens
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
        self._last_in_flight = self._in_flight
        self._since = 0.0  # what is left has waited long enough
        return Batch(jobs, time.monotonic())

    def _leave_queue(self, job: Job) -> None:
        job.waiting = False
        job.request.waiting -= 1
        self._requests_waiting -= job.request.waiting == 0
        self._waiting_jobs -= 1
        self._waiting_tokens -= job.tokens

    def _start(self, batch: Batch) -> None:
        self._launched.append(batch)
        try:
            result = self._launch([job.item for job in batch.jobs])
        except Exception as e:
            self._fail(batch, e)
            return
        if callable(result):
            batch.finish = result
        else:
            self._settle(batch, self._checked(batch.jobs, result))

    def _finish(self, batch: Batch) -> None:
        assert batch.finish is not None
        try:
            vectors = batch.finish()
        except Exception as e:
            self._fail(batch, e)
            return
        self._settle(batch, self._checked(batch.jobs, vectors))

    def _fail(self, batch: Batch, e: Exception) -> None:
        log.warning("a batch of %d inputs failed; trying each alone: %s", len(batch.jobs), _describe(e))
        self._settle(batch, self._one_by_one(batch.jobs))

    def _settle(self, batch: Batch, results: list[tuple[Job, Any]]) -> None:
        self._measure(batch)  # first, so that whoever has an answer finds it counted
        self._loop.call_soon_threadsafe(self._deliver, results)
        self._launched.remove(batch)

    def _checked(self, jobs: list[Job], vectors: np.ndarray) -> list[tuple[Job, Any]]:
        """Results; a row with NaN or infinity is computed again alone."""
        good = np.isfinite(vectors).all(axis=1)
        results = [(job, vector) for job, vector, ok in zip(jobs, vectors, good, strict=True) if ok]
        bad = [job for job, ok in zip(jobs, good, strict=True) if not ok]
        return results + (self._one_by_one(bad) if bad else [])

    def _one_by_one(self, jobs: list[Job]) -> list[tuple[Job, Any]]:
        """Computes each job alone, so that one that cannot be computed fails alone."""
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

    def _measure(self, batch: Batch) -> None:
        now = time.monotonic()
        seconds = max(now - max(batch.started, self._finished), 1e-6)
        self._finished = now
        tokens = sum(job.tokens for job in batch.jobs)
        speed = tokens / seconds
        if speed > self.rate or tokens * 2 >= self.batch_tokens or seconds > 0.25:  # small batches say little
            self.rate += 0.5 * (speed - self.rate)
        if self._observer is not None:
            self._observer.batch(len(batch.jobs), tokens, [batch.started - job.since for job in batch.jobs], seconds)

    def _break(self, why: str) -> None:
        with self._changed:
            self.broken = why
            lost, self._heap = [job for _, _, job in self._heap if job.waiting], []
            for job in lost:
                self._leave_queue(job)
            lost += [job for batch in self._launched for job in batch.jobs]
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
