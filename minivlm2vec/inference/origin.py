"""What a model is, fast or plain: the figures that are lost when layers are packed are taken before."""

from typing import NamedTuple

from torch import Tensor, nn

from ..weights import model_fingerprint
from .prepack import PackedLinear


class Origin(NamedTuple):
    """A model's `weights.model_fingerprint`, and how many parameters it has."""

    fingerprint: str
    num_parameters: int


def origin(model: nn.Module) -> Origin:
    """That of the plain model which this one is, or was made from by `optimize`."""
    kept = model.__dict__.get("origin")
    return kept or Origin(model_fingerprint(model), sum(p.numel() for p in model.parameters()))


def keep_origin(model: nn.Module, precision: str | None, fp8_keep: object) -> None:
    """Takes a plain model's figures. precision: those with "fp8" are another model's."""
    number = sum(p.numel() for p in model.parameters())
    fp8 = (precision, fp8_keep) if precision == "fp8" else ()
    model.__dict__["origin"] = Origin(model_fingerprint(model, *fp8), number)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of everything that a model computes with, packed weights too."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            tensors += [t for pack in layer.packs for t in pack if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)
