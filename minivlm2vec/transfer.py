"""Tensors on their way to the host, beside what the device computes next."""

import torch
from torch import Tensor


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
