"""LayerNorm (Ba et al., arXiv 1607.06450); residual add + LayerNorm, and LayerNorm + the bias of the product that
follows, in one pass over memory. float16, bfloat16 or float32, sums in float32.

Shapes: R rows, D width; a program takes BM whole rows of BD = the next power of two of D columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from .custom_op import compiled_as_op
from .launch import as_rows, cdiv, check_shape, empty_like, on_device_of, whole_rows


@triton.jit
def layer_norm_kernel(
    x, residual, shift, weight, bias, out, total,
    R, D, stride_x, stride_residual, eps,
    ADD: tl.constexpr, SHIFT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """s = x (+ residual) in x's dtype; out = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias; total = s (+ shift).

    total may be x itself, if its rows are dense: a program reads its rows before it writes them.

    The variance is the mean of squared differences (two passes over registers, one over memory), as sums of
    squares cancel in float32 when the mean is large.
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    cols = tl.arange(0, BD)  # [BD]
    inside = (rows < R)[:, None] & (cols < D)[None, :]  # [BM, BD]
    w = tl.load(weight + cols, mask=cols < D, other=0.0, eviction_policy="evict_last").to(tl.float32)  # [BD]
    b = tl.load(bias + cols, mask=cols < D, other=0.0, eviction_policy="evict_last").to(tl.float32)  # [BD]

    s = tl.load(x + rows[:, None] * stride_x + cols[None, :], mask=inside, other=0.0)  # [BM, BD]
    dtype = s.dtype
    s = s.to(tl.float32)
    if ADD:
        r = tl.load(residual + rows[:, None] * stride_residual + cols[None, :], mask=inside, other=0.0)
        s = (s + r.to(tl.float32)).to(dtype)
        tl.store(total + rows[:, None] * D + cols[None, :], s, mask=inside)
        s = s.to(tl.float32)
    if SHIFT:
        c = tl.load(shift + cols, mask=cols < D, other=0.0, eviction_policy="evict_last").to(tl.float32)  # [BD]
        tl.store(total + rows[:, None] * D + cols[None, :], (s + c[None, :]).to(dtype), mask=inside)

    centred = tl.where(inside, s - (tl.sum(s, axis=1) / D)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + tl.cast(eps, tl.float32))  # [BM]
    y = centred * scale[:, None] * w[None, :] + b[None, :]
    tl.store(out + rows[:, None] * D + cols[None, :], y.to(out.dtype.element_ty), mask=inside)


def _fake_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return empty_like(x)


def _fake_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return empty_like(x), empty_like(x)


@compiled_as_op(_fake_layer_norm)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., D] with dense rows, weight and bias [D]. Returns a contiguous tensor of x's shape and dtype."""
    out = _fake_layer_norm(x, weight, bias, eps)
    _launch(x, None, None, weight, bias, out, None, eps)
    return out


@compiled_as_op(_fake_add_layer_norm)
def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [..., D] of one dtype. Returns (normed, residual + x), both contiguous."""
    check_shape(residual, x.shape, "residual")
    if residual.dtype != x.dtype:
        raise ValueError(f"residual is {residual.dtype}, x is {x.dtype}")
    out, total = _fake_add_layer_norm(x, residual, weight, bias, eps)
    _launch(x, residual, None, weight, bias, out, total, eps)
    return out, total


def _fake_layer_norm_shift_(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return empty_like(x)


@compiled_as_op(_fake_layer_norm_shift_, mutates_args=("x",))
def layer_norm_shift_(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., D] contiguous, shift [D]. Returns the normed x; x itself becomes x + shift."""
    if not x.is_contiguous():
        raise ValueError(f"x must be contiguous to be written over, got shape {tuple(x.shape)}, strides {x.stride()}")
    check_shape(shift, x.shape[-1:], "shift")
    out = _fake_layer_norm_shift_(x, shift, weight, bias, eps)
    _launch(x, None, shift, weight, bias, out, x, eps)
    return out


def _launch(
    x: Tensor,
    residual: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    total: Tensor | None,
    eps: float,
) -> None:
    x = as_rows(x, "x")
    residual = None if residual is None else as_rows(residual, "residual")
    R, D = x.shape
    check_shape(weight, (D,), "weight")
    check_shape(bias, (D,), "bias")
    if R == 0:
        return
    BD, BM, warps = whole_rows(D, "layer_norm")
    with on_device_of(x):
        layer_norm_kernel[(cdiv(R, BM),)](
            x, residual, None if shift is None else shift.contiguous(), weight.contiguous(), bias.contiguous(),
            out, total,
            R, D, x.stride(0), 0 if residual is None else residual.stride(0), eps,
            ADD=residual is not None, SHIFT=shift is not None, BM=BM, BD=BD, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
