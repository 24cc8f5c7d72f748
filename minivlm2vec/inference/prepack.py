"""Linear layers packed for a CPU: the weights in the blocked layout that oneDNN multiplies from.

A plain matrix is brought into that layout again at every call; done once, products are faster (bench/README.md has
the figures). A packed layer has no parameters left.

oneDNN compiles a product for each number of rows, in some 0.6 MB that torch keeps in two caches of 1,024 products each,
and between them the activations leave holes: 2,000 calls with texts of all lengths took 1.6 GB. So rows are padded to
few numbers (`padding`) where that costs no more than compiling, and the caches are made smaller (`bound_caches`).
"""

import functools
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minivlm2vec_kernels import ops
from minivlm2vec_kernels.torch_ops import quick_gelu_

from .fused import InferenceOnly

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # of oneDNN, and of torch in front of it
CACHED_PRODUCTS = 64
COMPILING = 1 << 25  # multiplications that take as long as compiling a product, some 0.5 ms
WORTH = 32  # a product that takes so many times as long is compiled: copying its rows would cost more than it saves


def can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's packed product for a device and dtype. Warns once where it ought to and has not:
    the operators are torch's own, and no release has to keep them."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype in (torch.float32, torch.bfloat16) and _works(dtype)


@functools.cache
def _works(dtype: torch.dtype) -> bool:
    bound_caches()
    x, weight, bias = torch.eye(4, 8, dtype=dtype), torch.ones(16, 8, dtype=dtype), torch.ones(16, dtype=dtype)
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        with torch.no_grad():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
            z = torch.ops.mkldnn._linear_pointwise.binary(x, torch.ones_like(y), packed, bias, "add")
        wrong = None if bool((y == 2).all() and (z == 3).all()) else "the product of ones is wrong"
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as e:
        wrong = str(e).partition("\n")[0]
    if wrong is not None:
        warnings.warn(
            f"torch {torch.__version__} does not multiply by packed weights as earlier ones do ({wrong}): linear "
            "layers stay as they are, with the same vectors, later",
            stacklevel=2,
        )
    return wrong is None


def prepack(layer: nn.Linear, backend: str | None, parts: tuple[int, ...] = ()) -> None:
    """Turns a plain linear layer into a PackedLinear, in place, and frees its weight.

    parts: numbers of rows that `PackedLinear.rows` will be asked for.
    """
    bound_caches()
    sizes = list(parts or (layer.out_features,))
    weight, bias = layer.weight.detach(), layer.bias
    biases = [None] * len(sizes) if bias is None else bias.detach().split(sizes)
    del layer.weight, layer.bias
    layer.__class__ = PackedLinear
    packed: Any = layer
    packed.backend = backend
    packed.packs = [
        (torch.ops.mkldnn._reorder_linear_weight(w, None), b)
        for w, b in zip(weight.split(sizes), biases, strict=True)
    ]  # fmt: skip
    packed.ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]


def bound_caches() -> None:
    """Fewer compiled products are kept, unless the environment says how many. They are read when the process first
    uses oneDNN, so what it did before this decides."""
    for name in CACHES:
        os.environ.setdefault(name, str(CACHED_PRODUCTS))


def padding(rows: int, weights: int) -> int:
    """Rows to be added to a product with a matrix of so many weights: to the next of eight numbers between two powers
    of two, but where that would cost more than compiling for one more number of rows."""
    if rows * weights > WORTH * COMPILING:
        return 0
    step = min((1 << (rows - 1).bit_length()) // 16, COMPILING // weights)
    return -rows % (1 << (step.bit_length() - 1)) if step > 1 else 0


class PackedLinear(InferenceOnly, nn.Linear):
    """y = x W^T + b with W packed, and FusedLinear's other forms.

    Attributes:
        packs: W's rows and b's, in one or more runs; ends: the row at which each run ends.
    """

    backend: str | None
    packs: list[tuple[Tensor, Tensor | None]]
    ends: list[int]

    def forward(self, x: Tensor) -> Tensor:
        out = [self._product(x, w, b) for w, b in self.packs]
        return out[0] if len(out) == 1 else torch.cat(out, dim=-1)

    def add_(self, residual: Tensor, x: Tensor, *, bias_is_in: bool = False) -> Tensor:
        if len(self.packs) > 1 or self._padding(x):
            return residual.add_(self(x))
        weight, bias = self.packs[0]
        _refuse_gradient(x, residual)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.packs[0][1] is not None}"

    def bias_ahead(self) -> None:
        return None

    def silu_mul(self, x: Tensor) -> Tensor:
        return ops.silu_mul(self(x), backend=self.backend)

    def quick_gelu(self, x: Tensor) -> Tensor:
        return quick_gelu_(self(x))

    def rows(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        stop = self.out_features if stop is None else stop
        for begin, end, (weight, bias) in zip([0, *self.ends], self.ends, self.packs, strict=False):
            if (begin, end) == (start, stop):
                return self._product(x, weight, bias)
        return self(x)[..., start:stop]

    def _padding(self, x: Tensor) -> int:
        return padding(len(x), self.in_features * self.out_features) if x.ndim == 2 else 0

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _refuse_gradient(x)
        if more := self._padding(x):
            return self._product(F.pad(x, (0, 0, 0, more)), weight, bias)[: len(x)]
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _refuse_gradient(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError("PackedLinear has no gradient: load the model with optimize=False")
