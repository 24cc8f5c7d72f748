"""Prometheus metrics of one server, in a registry of its own."""

import functools
from collections.abc import Callable, Sequence

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
POWERS = tuple(4**n for n in range(1, 10))
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters and histograms; `render` returns the text of /metrics."""

    def __init__(self, device: torch.device):
        r = self.registry = CollectorRegistry()
        ProcessCollector(registry=r)
        GCCollector(registry=r)
        self.requests = Counter(
            "minivlm2vec_requests", "Answers, by path and HTTP status", ["path", "status"], registry=r
        )
        self.disconnects = Counter(
            "minivlm2vec_disconnects", "Requests whose client disconnected before the answer", registry=r
        )
        self.inputs = Counter("minivlm2vec_inputs", "Inputs embedded", registry=r)
        self.tokens = Counter("minivlm2vec_tokens", "Tokens embedded, image tokens included", registry=r)
        self.batch_inputs = self._histogram("batch_inputs", "Inputs in one batch", POWERS)
        self.batch_tokens = self._histogram("batch_tokens", "Tokens in one batch", POWERS)
        self.batch_seconds = self._histogram("batch_seconds", "Seconds to compute one batch", SECONDS)
        self.queue_seconds = self._histogram("queue_seconds", "Seconds that an input waited in the queue", SECONDS)
        self.request_seconds = self._histogram(
            "request_seconds", "Seconds from the start of a request to its answer (status 200 only)", SECONDS
        )
        if device.type == "cuda":
            self._watch_memory(device)

    def _watch_memory(self, device: torch.device) -> None:
        cuda, total = torch.cuda, torch.cuda.get_device_properties(device).total_memory
        self._gauge("gpu_memory_allocated_bytes", "GPU memory in tensors", lambda: cuda.memory_allocated(device))
        self._gauge("gpu_memory_reserved_bytes", "GPU memory reserved by PyTorch", lambda: cuda.memory_reserved(device))
        peak = functools.partial(cuda.max_memory_allocated, device)
        self._gauge("gpu_memory_peak_bytes", "Peak of the GPU memory in tensors", peak)
        self._gauge("gpu_memory_total_bytes", "Total memory of the GPU", lambda: total)

    def watch_requests(self, in_flight: Callable[[], int]) -> None:
        """in_flight() returns how many requests are being answered."""
        self._gauge("requests_in_flight", "Requests being answered", in_flight)

    def watch_queue(self, waiting: Callable[[], tuple[int, int]]) -> None:
        """waiting() returns how many inputs and tokens are in the queue."""
        self._gauge("queue_inputs", "Inputs waiting in the queue", lambda: waiting()[0])
        self._gauge("queue_tokens", "Tokens waiting in the queue", lambda: waiting()[1])

    def batch(self, inputs: int, tokens: int, waits: Sequence[float], seconds: float) -> None:
        """A batch was computed; see `batching.Observer`."""
        self.inputs.inc(inputs)
        self.tokens.inc(tokens)
        self.batch_inputs.observe(inputs)
        self.batch_tokens.observe(tokens)
        self.batch_seconds.observe(seconds)
        for wait in waits:
            self.queue_seconds.observe(wait)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(f"minivlm2vec_{name}", text, registry=self.registry).set_function(value)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"minivlm2vec_{name}", text, buckets=buckets, registry=self.registry)
