"""8-bit floating point (e4m3) for the decoder's large matrices: about half the time of a product, other vectors.

    y = (x_q W_q^T) * s_x * s_w      x_q = e4m3(x / s_x), s_x = max |x| / 448 for each token's row
                                     W_q = e4m3(W / s_w), s_w = max |W| / 448 for each row of outputs

Weights are converted once, when a model is loaded; inputs whenever they come, those of qkv_proj and gate_up_proj by the
norm before them. 448 is the greatest e4m3 number.
T tokens, K inputs, N outputs.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minivlm2vec_kernels import ops

from .fused import InferenceOnly, QuantizedRows, Rows

# Left as they are. down_proj: its inputs have a few very large channels in Phi-3, which a common scale of the row
# would drown the others for. o_proj: a ninth of the work, and no norm precedes it that would bring its inputs into 8
# bits for nothing (bench/README.md). First and last layer: their errors pass through all others, or through none to be
# averaged. Tower and projector: a fifth of the work of an image, in matrices of half the width.
KEEP = (
    "decoder.layers.*.mlp.down_proj", "decoder.layers.*.self_attn.o_proj", "decoder.layers.first.*",
    "decoder.layers.last.*", "vision.*", "projector.*",
)  # fmt: skip


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError where a model is not bfloat16, or on a device without these e4m3 products: NVIDIA's before
    sm_89, AMD's (another format), and cards for which cuBLAS has none with a scale for each row."""
    if dtype != torch.bfloat16:
        raise ValueError(f"precision 'fp8' is for bfloat16 models, got {dtype}; dtype=torch.bfloat16 loads one")
    if device.type == "cuda" and torch.version.hip is not None:
        raise ValueError("precision 'fp8' is NVIDIA's e4m3; AMD's 8-bit floats are another format")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ValueError(f"precision 'fp8' needs a device of capability 8.9 or more, got {capability}")
    if device.type == "cuda":
        _try_product(device)


def _try_product(device: torch.device) -> None:
    """Some cards of a capability that would do are refused by some cuBLAS: PyTorch issue 192707."""
    x, scale = torch.ones(16, 16, device=device).to(torch.float8_e4m3fn), torch.ones(16, 1, device=device)
    try:
        y = scaled_mm(x, x.t(), scale, scale.t(), None, torch.bfloat16)
        wrong = None if bool((y == 16).all()) else "the product of ones is not 16"
    except (RuntimeError, ValueError, TypeError, AttributeError) as e:  # a private operator may change its arguments
        wrong = str(e)
    if wrong is not None:
        raise ValueError(f"precision 'fp8' does not work on {torch.cuda.get_device_name(device)} with torch "
                         f"{torch.__version__}: {wrong}")  # fmt: skip


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    fast_accum: bool = False,
) -> Tensor:
    """a [T, K] times b [K, N], both e4m3, times scale_a [T, 1] and scale_b [1, N], plus bias [N]. Returns [T, N].

    By the operator that torch.compile and torchao use, which is private; where it is gone, by the public function.
    """
    if hasattr(torch, "_scaled_mm"):
        return torch._scaled_mm(a, b, scale_a, scale_b, bias=bias, out_dtype=dtype, use_fast_accum=fast_accum)
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(a, b, scale_a, by_row, scale_b, by_row, bias=bias, output_dtype=dtype, use_fast_accum=fast_accum)


def takes_fp8(name: str, num_layers: int, keep: Sequence[str]) -> bool:
    """Whether the matrix of that name is multiplied in 8 bits.

    keep: names of those that are not, as shell patterns; the number of the first and of the last decoder layer may be
        written "first" and "last".
    """
    patterns = [p.replace(".first.", ".0.").replace(".last.", f".{num_layers - 1}.") for p in keep]
    return not any(fnmatchcase(name, p) for p in patterns)


def check_sizes(layer: nn.Linear, name: str) -> None:
    """Raises ValueError for sizes that 16 does not divide."""
    if layer.out_features % 16 or layer.in_features % 16:
        raise ValueError(
            f"precision 'fp8' needs sizes that are multiples of 16, {name} is {list(layer.weight.shape)}; "
            "fp8_keep leaves matrices as they are"
        )


def quantize(layer: nn.Linear, backend: str | None) -> None:
    """Turns a plain linear layer, of sizes that 16 divides, into an Fp8Linear, in place."""
    weight, scale = ops.quantize_rows(layer.weight.detach(), backend=backend)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.scale = nn.Parameter(scale, requires_grad=False)
    layer.__class__ = Fp8Linear
    cast(Fp8Linear, layer).backend = backend


class Fp8Linear(InferenceOnly, nn.Linear):
    """A product of e4m3 numbers, summed in float32 and returned in the inputs' dtype, and FusedLinear's other forms.

    Attributes:
        weight: [N, K] e4m3; N and K multiples of 16.
        scale: [N] float32.
        bias: [N] or None, as it was.
        takes_quantized: inputs may come as QuantizedRows, for outputs in bfloat16.
        fast_accum: sum in the tensor cores' own precision (about 14 bits) instead of adding to float32 every 128
            products; off until a row says what it gains (`model_fp8` of bench_model.py).
    """

    backend: str | None
    scale: nn.Parameter
    takes_quantized = True
    fast_accum = False

    def forward(self, x: Rows) -> Tensor:
        return self._product(x, self.weight, self.scale, self.bias)

    def add_(self, residual: Tensor, x: Tensor, *, bias_is_in: bool = False) -> Tensor:
        return residual.add_(self(x))

    def bias_ahead(self) -> None:
        return None

    def silu_mul(self, x: Rows) -> Tensor:
        return ops.silu_mul(self(x), backend=self.backend)

    def quick_gelu(self, x: Tensor) -> Tensor:
        return ops.quick_gelu(self(x), backend=self.backend)

    def rows(self, x: Rows, start: int, stop: int | None) -> Tensor:
        bias = None if self.bias is None else self.bias[start:stop]
        return self._product(x, self.weight[start:stop], self.scale[start:stop], bias)

    def _product(self, x: Rows, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:  # [..., K] -> [..., N]
        if isinstance(x, QuantizedRows):
            return self._quantized_product(x, weight, scale, bias, torch.bfloat16)
        rows = QuantizedRows(*ops.quantize_rows(x.reshape(-1, self.in_features), backend=self.backend))
        return self._quantized_product(rows, weight, scale, bias, x.dtype).view(*x.shape[:-1], -1)

    def _quantized_product(
        self, x: QuantizedRows, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:  # [R, K] -> [R, N]
        if x.q.is_cuda:
            return scaled_mm(x.q, weight.t(), x.scale[:, None], scale[None], bias, dtype, fast_accum=self.fast_accum)
        # the same sums, to see what they cost in accuracy; torch 2.11's _scaled_mm wants one scale a matrix here
        y = x.q.float() @ weight.float().t() * x.scale[:, None] * scale
        return (y if bias is None else y + bias).to(dtype)
