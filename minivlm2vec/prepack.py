"""Linear layers packed for a CPU: the weights in the blocked layout that oneDNN multiplies from.

A plain matrix is brought into that layout again at every call; done once, products are faster (bench/README.md has
the figures). A packed layer has no parameters left, so it is for inference alone, and says so.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minivlm2vec_kernels import ops

from .linear import Linear
from .model import VLM2Vec


def can_prepack(model: VLM2Vec) -> bool:
    """Whether this torch has oneDNN's packed product for the model's device and dtype."""
    weight = model.decoder.norm.weight
    return supports(weight.device, weight.dtype)


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepack(model: VLM2Vec) -> VLM2Vec:
    """Replaces every Linear of the model by a PackedLinear, one after the other, each freeing what it replaces."""
    weight = model.decoder.norm.weight
    if not can_prepack(model):
        raise ValueError(
            f"prepack is for float32 and bfloat16 on a CPU with oneDNN, got {weight.dtype} on {weight.device}"
        )
    # Names alone: a list of the layers would keep every plain weight until the end.
    for name in [n for n, m in model.named_modules() if type(m) is Linear]:
        parent, _, leaf = name.rpartition(".")
        packed = PackedLinear(model.get_submodule(name), _parts(model, name))
        setattr(model.get_submodule(parent), leaf, packed)
    return model


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed. `parts`: numbers of rows that `rows` can be asked for."""

    def __init__(self, layer: Linear, parts: tuple[int, ...] = ()):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        sizes = parts or (layer.out_features,)
        biases = [None] * len(sizes) if layer.bias is None else layer.bias.detach().split(sizes)
        weights = layer.weight.detach().split(sizes)
        self.packs = [
            (torch.ops.mkldnn._reorder_linear_weight(w, None), b) for w, b in zip(weights, biases, strict=True)
        ]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def forward(self, x: Tensor) -> Tensor:
        out = [_product(x, w, b) for w, b in self.packs]
        return out[0] if len(out) == 1 else torch.cat(out, dim=-1)

    def add_to(self, residual: Tensor, x: Tensor, *, bias_is_in: bool = False, backend: str | None = None) -> Tensor:
        if len(self.packs) > 1:
            return residual.add_(self(x))
        weight, bias = self.packs[0]
        _refuse_gradient(x, residual)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")

    def bias_ahead(self) -> None:
        return None

    def silu_mul(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        return ops.silu_mul(self(x), backend=backend)

    def quick_gelu(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        return F.silu(self(x).mul_(1.702), inplace=True).mul_(1 / 1.702)

    def rows(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        stop = self.out_features if stop is None else stop
        ends = [*self.starts[1:], self.out_features]
        for begin, end, (weight, bias) in zip(self.starts, ends, self.packs, strict=True):
            if (begin, end) == (start, stop):
                return _product(x, weight, bias)
        return self(x)[..., start:stop]

    def train(self, mode: bool = True) -> "PackedLinear":
        if mode:
            raise RuntimeError("this layer is packed for CPU inference; load the model with prepack=False to train it")
        return super().train(mode)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _refuse_gradient(x)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _refuse_gradient(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError("this layer is packed for CPU inference and has no gradient; load with prepack=False")


def _parts(model: VLM2Vec, name: str) -> tuple[int, ...]:
    """Queries apart from keys and values in the last layer, where they are computed for different tokens."""
    d = model.config.decoder
    if name != f"decoder.layers.{d.num_hidden_layers - 1}.self_attn.qkv_proj":
        return ()
    return d.num_attention_heads * d.head_dim, 2 * d.num_key_value_heads * d.head_dim
