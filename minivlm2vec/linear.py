"""The matrices of the model: the one linear layer, which a quantised or adapted layer replaces, and embeddings.

Neither draws random numbers when it is made: weights come from a checkpoint. (On the meta device torch's own
initialisation would also import 150 MB of Python that inference never needs.)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minivlm2vec_kernels import ops


class Linear(nn.Linear):
    """y = x W^T + b, and the forms in which the model needs it.

    Whoever changes how a matrix is stored or multiplied (fp8, LoRA, prepack.py) replaces all of these methods.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias=bias)

    def add_to(self, residual: Tensor, x: Tensor, *, bias_is_in: bool = False, backend: str | None = None) -> Tensor:
        """residual + x W^T + b; `residual` is written over where gradients are disabled. bias_is_in: the residual
        holds b already, as `bias_ahead` allows."""
        bias = None if bias_is_in else self.bias
        if torch.is_grad_enabled():
            return residual + F.linear(x, self.weight, bias)
        return ops.linear_add_(residual, x, self.weight, bias, backend=backend)

    def bias_ahead(self) -> Tensor | None:
        """The bias, if `add_to` can do without: whoever normalises the residual then adds it in the same pass. None
        where there is none to add, where the product adds it for nothing, and with gradients."""
        return None if torch.is_grad_enabled() else self.bias

    def silu_mul(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """silu(gate) * up, where gate is the first half of the outputs (no bias)."""
        return ops.linear_silu_mul(x, self.weight, backend=backend)

    def quick_gelu(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """quick_gelu(x W^T + b)."""
        return ops.linear_quick_gelu(x, self.weight, self.bias, backend=backend)

    def rows(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """Outputs start to stop alone: x W[start:stop]^T (+ b)."""
        return F.linear(x, self.weight[start:stop], None if self.bias is None else self.bias[start:stop])

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """A table of rows, looked up by number."""

    def reset_parameters(self) -> None:
        pass
