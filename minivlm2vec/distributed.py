"""What `torchrun` started: this process' rank and device, and how it waits for the others and hears from them.

    with Ranks() as ranks:                       # without torchrun: one process, and nothing below waits
        work(ranks.share(items), device=ranks.device())
        ranks.barrier()

The first `Ranks` sets up torch's default process group, Gloo for CPU tensors and NCCL for CUDA's, and leaves it open
until the process ends: the addresses that torchrun's store keeps do not allow a second one.
"""

import atexit
import datetime
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

NO_TIMEOUT = datetime.timedelta(days=365)  # one rank may well need a day longer than another

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process' number and how many there are, as torchrun says, without waiting for the others."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Ranks:
    """The processes that share a job: those of `torchrun`, or this one alone. A context manager.

    Making one waits for the others, so all processes make one at the same point. A default process group that is
    there already is used as it is.

    Attributes:
        rank, world: this process' number among all, and how many there are.
        local_rank, local_world: the same among the processes of this machine.
    """

    def __init__(self) -> None:
        self.rank, self.world = rank_and_world()
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", self.local_rank + 1))
        self._group: Any = _new_group() if self.world > 1 else None

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's run of neighbouring items."""
        n = len(items)
        return items[self.rank * n // self.world : (self.rank + 1) * n // self.world]

    def device(self, wanted: torch.device | str | None = None, *, exclusive: bool = False) -> str | None:
        """The device of this process.

        An explicit device wins. "cuda" is this rank's GPU on its machine. None is the same where there are several
        processes and a GPU; else it stays None, the caller's default. A GPU becomes the current device of this
        process: what is queued without naming a device goes to it.

        exclusive: no two ranks may have the same GPU, which is so where CUDA tensors are exchanged (NCCL). Raises
        ValueError where several processes of this machine were given one.
        """
        cuda = torch.cuda.is_available()
        if (wanted is None and self.world > 1 and cuda) or str(wanted) == "cuda":
            wanted = f"cuda:{self.local_rank % torch.cuda.device_count()}" if cuda else "cuda"
        elif exclusive and self.local_world > 1 and str(wanted).startswith("cuda:"):
            raise ValueError(
                f"device {wanted} is one GPU for the {self.local_world} processes that torchrun started on this "
                'machine; say "cuda", or leave the device out, and each process takes its own'
            )
        if cuda and str(wanted).startswith("cuda"):
            torch.cuda.set_device(torch.device(str(wanted)))
        return None if wanted is None else str(wanted)

    def barrier(self) -> None:
        """Waits for the others. Raises RuntimeError where one of them is gone."""
        if self.world > 1:
            dist.barrier(group=self._group)

    def agree(self, message: bytes) -> bytes:
        """The first rank's message; all must be of one length."""
        if self.world == 1:
            return message
        shared = torch.tensor(list(message), dtype=torch.uint8)
        dist.broadcast(shared, src=0, group=self._group)
        return bytes(shared.tolist())

    def largest(self, n: int) -> int:
        """The largest of all ranks' numbers."""
        return int(self.gather(torch.tensor([n])).max())

    def gather(self, x: Tensor) -> Tensor:
        """[n, ...] -> [sum of n, ...]: the rows of all ranks in their order; n may differ. Gradients reach one's own
        rows alone: every rank computes the same loss from all rows, and needs its derivative by its own."""
        if self.world == 1:
            return x
        group = self._group if x.device.type == "cpu" else None  # the default group has the backend of other devices
        sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(x)], device=x.device), group=group)
        longest = max(int(n) for n in sizes)
        padded = torch.cat([x.detach(), x.new_zeros(longest - len(x), *x.shape[1:])])
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        parts = [part[: int(n)] for part, n in zip(parts, sizes, strict=True)]
        parts[self.rank] = x
        return torch.cat(parts)


def _new_group() -> Any:
    """A Gloo group of all ranks that waits as long as it takes; the default group is set up where there is none."""
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_destroy_default_group)
    return dist.new_group(backend="gloo", timeout=NO_TIMEOUT)


def _destroy_default_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
