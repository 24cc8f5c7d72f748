"""Prometheus metrics of one server, in a registry of its own."""

from collections.abc import Callable, Sequence

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
POWERS = tuple(4**n for n in range(1, 10))
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts and measures; `render` gives the text of /metrics."""

    def __init__(self, device: torch.device):
        r = self.registry = CollectorRegistry()
        ProcessCollector(registry=r)
        GCCollector(registry=r)
        self.requests = Counter("minivlm2vec_requests", "Answers of /v1/embeddings", ["status"], registry=r)
        self.request_seconds = Histogram(
            "minivlm2vec_request_seconds", "From the first byte to the answer, 200s only", buckets=SECONDS, registry=r
        )
        self.in_flight = Gauge("minivlm2vec_requests_in_flight", "Requests in the house", registry=r)
        self.disconnects = Counter("minivlm2vec_disconnects", "Requests whose client went away", registry=r)
        self.inputs = Counter("minivlm2vec_inputs", "Inputs embedded", registry=r)
        self.tokens = Counter("minivlm2vec_tokens", "Tokens embedded, image tokens included", registry=r)
        self.batch_inputs = Histogram("minivlm2vec_batch_inputs", "Inputs of a pack", buckets=POWERS, registry=r)
        self.batch_tokens = Histogram("minivlm2vec_batch_tokens", "Tokens of a pack", buckets=POWERS, registry=r)
        self.batch_seconds = Histogram("minivlm2vec_batch_seconds", "Time of a pack", buckets=SECONDS, registry=r)
        self.queue_seconds = Histogram(
            "minivlm2vec_queue_seconds", "Time of an input in the queue", buckets=SECONDS, registry=r
        )
        if device.type == "cuda":
            self._gauge("minivlm2vec_gpu_memory_allocated_bytes", "By tensors", lambda: _memory(device)[0])
            self._gauge("minivlm2vec_gpu_memory_reserved_bytes", "By PyTorch", lambda: _memory(device)[1])
            self._gauge("minivlm2vec_gpu_memory_peak_bytes", "By tensors, at most", lambda: _memory(device)[2])
            self._gauge("minivlm2vec_gpu_memory_total_bytes", "Of the device", lambda: _memory(device)[3])

    def watch_queue(self, waiting: Callable[[], tuple[int, int]]) -> None:
        """waiting() gives the jobs and tokens in the queue."""
        self._gauge("minivlm2vec_queue_inputs", "Inputs in the queue", lambda: waiting()[0])
        self._gauge("minivlm2vec_queue_tokens", "Tokens in the queue", lambda: waiting()[1])

    def pack(self, jobs: int, tokens: int, waits: Sequence[float], seconds: float) -> None:
        """One pack was computed; see `batching.Observer`."""
        self.inputs.inc(jobs)
        self.tokens.inc(tokens)
        self.batch_inputs.observe(jobs)
        self.batch_tokens.observe(tokens)
        self.batch_seconds.observe(seconds)
        for wait in waits:
            self.queue_seconds.observe(wait)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(value)


def _memory(device: torch.device) -> tuple[int, int, int, int]:
    """Bytes allocated, reserved, allocated at most, and there at all."""
    return (
        torch.cuda.memory_allocated(device),
        torch.cuda.memory_reserved(device),
        torch.cuda.max_memory_allocated(device),
        torch.cuda.get_device_properties(device).total_memory,
    )
