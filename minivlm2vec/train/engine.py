"""Processes and what wraps the model for them: one process, DDP, or FSDP2 (`fully_shard`), under torchrun."""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ..batch import PackedBatch
from ..model import VLM2Vec


def start_processes(device: torch.device | str | None = None) -> torch.device:
    """Joins the processes that torchrun started, if it did, and returns this one's device."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather_rows(x: Tensor) -> Tensor:
    """Rows [n, ...] of all processes, in the order of their ranks; n may differ. Gradients reach one's own rows:
    every process computes the same loss from all rows, and needs its derivative by its own alone."""
    if world_size() == 1:
        return x
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    longest = max(int(n) for n in sizes)
    padded = torch.cat([x.detach(), x.new_zeros(longest - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    parts = [part[: int(n)] for part, n in zip(parts, sizes, strict=True)]
    parts[rank()] = x
    return torch.cat(parts)


def largest(n: int, device: torch.device) -> int:
    """The largest of the processes' numbers."""
    return int(gather_rows(torch.tensor([n], device=device)).max())


class Encoder(nn.Module):
    """PackedBatch -> vectors [B, D], not normalised: the model as it is trained.

    amp: the dtype of autocast; None trains in the model's own.
    """

    def __init__(self, model: VLM2Vec, amp: torch.dtype | None = None):
        super().__init__()
        self.model, self.amp = model, amp

    def forward(self, batch: PackedBatch) -> Tensor:
        with torch.autocast(batch.input_ids.device.type, self.amp) if self.amp else nullcontext():
            vectors = self.model(batch, normalize=False)
        return vectors if batch.grids else vectors + self._untouched()

    def _untouched(self) -> Tensor | float:
        """Zero, from the parameters that only images use. Processes whose chunk shows none must reduce gradients of
        the same parameters as the others."""
        modules = (self.model.vision, self.model.projector)
        parts = [p.sum() for m in modules for p in m.parameters() if p.requires_grad]
        return 0 * torch.stack(parts).sum() if parts else 0.0


class Engine:
    """How an Encoder is run, and where its gradients are summed.

    Attributes:
        encoder: for vectors, of which no gradient is kept.
        trained: for vectors whose gradient is summed over processes.
    """

    def __init__(self, encoder: Encoder, kind: str, device: torch.device):
        self.encoder = self.trained = encoder
        self.kind = kind if world_size() > 1 else "single"
        if self.kind == "fsdp":
            _shard(encoder, device)
        elif self.kind == "ddp":
            self.trained = DistributedDataParallel(encoder, broadcast_buffers=False, gradient_as_bucket_view=True)

    @property
    def hold(self) -> Callable[[], AbstractContextManager]:
        """The context in which gradients are added up without being exchanged. FSDP exchanges them always: keeping
        them whole would need the memory that it saves."""
        return self.trained.no_sync if self.kind == "ddp" else nullcontext

    def idle(self, chunks: int, device: torch.device) -> int:
        """How many chunks more another process has; under FSDP all must compute equally often."""
        return largest(chunks, device) - chunks if self.kind == "fsdp" else 0


def _shard(encoder: Encoder, device: torch.device) -> None:
    """Shards every decoder layer, and the rest as one: the tower runs as often as a process' images ask for, and
    a layer that is gathered by all must be run by all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in encoder.model.decoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(encoder, mesh=mesh)
    encoder.model.decoder.embed_tokens.register_forward_hook(_with_gradient)


def _with_gradient(_module: nn.Module, _args: tuple, out: Tensor) -> Tensor:
    """FSDP sums a layer's gradients when that of its input is there, and those of a layer whose input needs none at the
    very end. Where embeddings are frozen, the first layer's input would need one in processes with images alone, and
    processes would sum in different orders. So it always needs one."""
    return out.requires_grad_() if torch.is_grad_enabled() else out


def whole(x: Tensor) -> Tensor:
    """The tensor of which a process may hold a shard. To be called by all."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def as_held(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as this process holds `like`: on its device, and its shard alone."""
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def checkpoint_layers(model: VLM2Vec) -> None:
    """From now on the layers' activations are computed again in the backward pass instead of kept."""
    for layer in (*model.vision.layers, *model.decoder.layers):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def without_gradient(module: nn.Module) -> None:
    """From now on the module computes as in inference, in its own dtype."""
    forward = module.forward

    def call(x: Tensor, *args, **kwargs):
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return forward(x, *args, **kwargs)

    module.forward = call
