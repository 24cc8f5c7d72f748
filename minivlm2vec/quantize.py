"""8-bit floating point (e4m3) for the decoder's large matrices: about half the time of a product, other vectors.

    y = (x_q W_q^T) * s_x * s_w      x_q = e4m3(x / s_x), s_x = max |x| / 448 for each token's row
                                     W_q = e4m3(W / s_w), s_w = max |W| / 448 for each row of outputs

Weights are converted once, when a model is loaded; inputs whenever they come. 448 is the greatest e4m3 number.
T tokens, K inputs, N outputs.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from minivlm2vec_kernels import ops

from .linear import Linear
from .model import VLM2Vec

# Left as they are. down_proj: its inputs have a few very large channels in Phi-3, which a common scale of the row
# would drown the others for. First and last layer: their errors pass through all others, or through none to be
# averaged. Tower and projector: a fifth of the work of an image, in matrices of half the width.
KEEP = ("decoder.layers.*.mlp.down_proj", "decoder.layers.first.*", "decoder.layers.last.*", "vision.*", "projector.*")


def quantize_fp8(model: VLM2Vec, *, keep: Sequence[str] = KEEP) -> VLM2Vec:
    """Replaces the model's Linear modules by Fp8Linear, in place, one after the other; returns the model.

    keep: names of modules that stay in bfloat16, as shell patterns; the number of the first and of the last decoder
        layer may be written "first" and "last".

    Raises ValueError where the model is not bfloat16, or on a CUDA device without e4m3 products (before sm_89).
    """
    weight = model.decoder.norm.weight
    if weight.dtype != torch.bfloat16:
        raise ValueError(f"precision 'fp8' is for bfloat16 models, got {weight.dtype}; dtype=torch.bfloat16 loads one")
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 9):
        capability = ".".join(map(str, torch.cuda.get_device_capability(weight.device)))
        raise ValueError(f"precision 'fp8' needs a device of capability 8.9 or more, got {capability}")
    if not any(type(module) is Linear for module in model.modules()):
        raise ValueError("the model has no plain linear layer left to convert; load it with prepack=False")
    last = str(len(model.decoder.layers) - 1)
    patterns = [p.replace(".first.", ".0.").replace(".last.", f".{last}.") for p in keep]
    # Names alone: a list of the modules would keep every bfloat16 weight until the end.
    names = [name for name, module in model.named_modules() if type(module) is Linear]
    for name in names:
        if not any(fnmatchcase(name, p) for p in patterns):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Fp8Linear(model.get_submodule(name)))
    return model


class Fp8Linear(Linear):
    """A Linear whose products are of e4m3 numbers, summed in float32 and returned in the inputs' dtype. No gradient.

    Attributes:
        weight: [N, K] e4m3; N and K multiples of 16.
        scale: [N] float32.
        bias: [N] or None, as it was.
    """

    def __init__(self, linear: Linear):
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.weight.shape
        if self.out_features % 16 or self.in_features % 16:
            raise ValueError(f"an fp8 product needs multiples of 16, got a matrix {list(linear.weight.shape)}")
        weight, scale = ops.quantize_rows(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor, backend: str | None = None) -> Tensor:
        return self._product(x, self.weight, self.scale, self.bias, backend)

    def add_to(self, residual: Tensor, x: Tensor, *, bias_is_in: bool = False, backend: str | None = None) -> Tensor:
        return residual.add_(self(x, backend))

    def bias_ahead(self) -> None:
        return None

    def silu_mul(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        return ops.silu_mul(self(x, backend), backend=backend)

    def quick_gelu(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        return ops.quick_gelu(self(x, backend), backend=backend)

    def rows(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        bias = None if self.bias is None else self.bias[start:stop]
        return self._product(x, self.weight[start:stop], self.scale[start:stop], bias)

    def _product(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, backend: str | None = None
    ) -> Tensor:  # [..., K] -> [..., N]
        rows, row_scale = ops.quantize_rows(x.reshape(-1, self.in_features), backend=backend)
        if x.is_cuda:
            y = torch._scaled_mm(rows, weight.t(), row_scale[:, None], scale[None], bias=bias, out_dtype=x.dtype)
        else:  # the same sums, to see what they cost in accuracy; torch 2.11's _scaled_mm wants one scale a matrix here
            y = rows.float() @ weight.float().t() * row_scale[:, None] * scale
            y = (y if bias is None else y + bias).to(x.dtype)
        return y.view(*x.shape[:-1], -1)
