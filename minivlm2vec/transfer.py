"""Tensors on their way to the host, beside what the device computes next; constants on their way to a device, once."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., tuple[Tensor, ...]])


def constants(make: F) -> F:
    """Decorator of a function that makes tensors for hashable arguments. They are made once, as copying them to a
    device waits for it, and are constants of a compiled graph. At most 16 are kept, none that torch.export traces."""
    kept: dict[Any, tuple[Tensor, ...]] = {}

    @functools.wraps(make)
    def get(*args: Any) -> tuple[Tensor, ...]:
        if args in kept:
            return kept[args]
        with torch.inference_mode(False):  # a model that trains may want them too
            made = make(*args)
        if not torch.compiler.is_compiling():
            kept[args] = made
            if len(kept) > 16:
                kept.pop(next(iter(kept)), None)
        return made

    return torch.compiler.assume_constant_result(get)  # type: ignore[return-value]


class HostCopy:
    """A copy of a tensor in the host's memory. On CUDA it is queued at once, behind what computes the tensor; asked
    for later, it would stand behind the next batch too.

    The stream and the event are those of the tensor's device, which need not be the current one.
    """

    def __init__(self, tensor: Tensor):
        self._host, self._copied = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> Tensor:
        """The copy, on the CPU, once it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.cpu()
