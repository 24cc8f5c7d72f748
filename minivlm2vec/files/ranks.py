"""The processes of one `torchrun`; without it, this one alone."""

import datetime
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

NO_TIMEOUT = datetime.timedelta(days=365)  # one rank may well need a day longer than another


class Ranks:
    """Rank and number of processes, as torchrun set them in the environment. A context manager."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))

    def __enter__(self) -> "Ranks":
        if self.world > 1:
            dist.init_process_group("gloo", timeout=NO_TIMEOUT)  # only barriers: no GPU needed
        return self

    def __exit__(self, *error) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for the others. Raises RuntimeError where one of them is gone."""
        if self.world > 1:
            dist.barrier()

    def share(self, items: Sequence[int]) -> Sequence[int]:
        """This rank's run of neighbouring items."""
        n = len(items)
        return items[self.rank * n // self.world : (self.rank + 1) * n // self.world]

    def device(self) -> str | None:
        """The GPU of this rank on its host, or None where there is one process or no GPU."""
        if self.world == 1 or not torch.cuda.is_available():
            return None
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
