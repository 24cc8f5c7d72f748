"""Two cards that are not there, for what depends on which of them a copy to the host runs on.

    with two_cards():
        HostCopy(OnCard(values, "cuda:1")).wait()

A copy that was queued arrives only when an event of its own device's stream is waited for; until then the host's memory
holds NaN. The current device is cuda:0, as in a process that nobody told otherwise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

QUEUES: dict[int, list[Callable[[], object]]] = {0: [], 1: []}  # by device: copies that have not arrived


class OnCard(Tensor):
    """Values that pretend to be on a card."""

    @staticmethod
    def __new__(cls, values: Tensor, device: str):
        made = values.as_subclass(cls)
        made.pretended = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.pretended

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        plain = [x.as_subclass(Tensor) if isinstance(x, cls) else x for x in args]
        if function is Tensor.copy_ and isinstance(args[1], cls):
            assert kwargs["non_blocking"]
            QUEUES[args[1].device.index].append(lambda: Tensor.copy_(*plain))
            return args[0].fill_(float("nan"))
        result = function(*plain, **kwargs)
        return cls(result, str(args[0].device)) if isinstance(result, Tensor) else result


class Stream:
    def __init__(self, device: int):
        self.device = device

    def record_event(self) -> "Event":
        event = Event()
        event.record(self)
        return event


class Event:
    def __init__(self, **_):
        self.before: list[Callable[[], object]] = []
        self.device: int | None = None  # of the stream that it was recorded on

    def record(self, stream: Stream | None = None) -> None:
        self.device = (stream or current_stream()).device
        self.before = list(QUEUES[self.device])

    def synchronize(self) -> None:
        for copy in self.before:
            copy()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


def current_stream(device: torch.device | None = None) -> Stream:
    return Stream(0 if device is None else torch.device(device).index)


@contextmanager
def two_cards() -> Iterator[None]:
    empty = torch.empty

    def without_pinning(*args, pin_memory: bool = False, **kwargs):
        return empty(*args, **kwargs)

    with (
        mock.patch.object(torch.cuda, "Event", Event),
        mock.patch.object(torch.cuda, "current_stream", current_stream),
        mock.patch.object(torch, "empty", without_pinning),
    ):
        yield
    for queue in QUEUES.values():
        queue.clear()
