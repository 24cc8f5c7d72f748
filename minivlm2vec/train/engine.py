"""What wraps the model for one process, for DDP, or for FSDP2 (`fully_shard`)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..batch import PackedBatch
from ..distributed import Ranks
from ..model import VLM2Vec


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

    Args:
        kind: "ddp" or "fsdp"; of no account where there is one process.

    Attributes:
        encoder: for vectors, of which no gradient is kept.
        trained: for vectors whose gradient is summed over processes.
    """

    def __init__(self, encoder: Encoder, kind: str, device: torch.device, ranks: Ranks):
        self.encoder = encoder
        self.trained: nn.Module = encoder
        self.ranks = ranks
        self.kind = kind if ranks.world > 1 else "single"
        if self.kind == "fsdp":
            _shard(encoder, device, ranks.world)
        elif self.kind == "ddp":
            self.trained = DistributedDataParallel(encoder, broadcast_buffers=False, gradient_as_bucket_view=True)

    def hold(self) -> AbstractContextManager:
        """The context in which gradients are added up without being exchanged. FSDP exchanges them always: keeping
        them whole would need the memory that it saves."""
        return self.trained.no_sync() if isinstance(self.trained, DistributedDataParallel) else nullcontext()

    def dummy_chunks(self, chunks: int) -> int:
        """How many chunks more another process has; under FSDP all must compute equally often."""
        return self.ranks.largest(chunks) - chunks if self.kind == "fsdp" else 0


def _shard(encoder: Encoder, device: torch.device, world: int) -> None:
    """Shards every decoder layer, and the rest as one: the tower runs as often as a process' images ask for, and
    a layer that is gathered by all must be run by all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world,))
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


def as_held(value: Tensor, parameter: Tensor) -> Tensor:
    """What belongs to a parameter, as this process holds that: on its device, and its shard alone."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor) or value.ndim == 0:
        return value
    placements = parameter.placements if value.shape == parameter.shape else [Replicate()]
    return distribute_tensor(value, parameter.device_mesh, placements)


def keeping_buffers(module: nn.Module, encode: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`encode`, after which the module's buffers are as before: for a first pass that a second one repeats, so that
    running statistics (BatchNorm's) are counted once."""

    def call(*args: object) -> Tensor:
        before = [(b, b.clone()) for b in module.buffers()]
        out = encode(*args)
        with torch.no_grad():
            for b, value in before:
                b.copy_(value)
        return out

    return call
