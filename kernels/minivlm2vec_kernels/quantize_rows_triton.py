"""Rows to 8-bit floating point, each with a scale of its own, in one pass over memory.

The numbers are e4m3 without infinities, of which 448 is the greatest (Micikevicius et al., arXiv 2209.05433).

Shapes: R rows, K columns; a program takes BM whole rows of BK = the next power of two of K columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .custom_op import compiled_as_op
from .launch import as_rows, cdiv, empty_like, on_device_of, whole_rows

E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def scaled(v):
    """v [BM, BK] float32 -> v * (1 / scale) and scale [BM] = max(max |v|, 1e-12) / 448 of each row.

    One division a row: one an element takes longer than reading it. The product is within 2^-22 of the quotient that
    the specification rounds, relative to it, so it may be rounded the other way where that lies as near to the middle
    of two e4m3 numbers, and is then as good."""
    s = tl.div_rn(tl.maximum(tl.max(tl.abs(v), axis=1), 1e-12), E4M3_MAX)  # [BM]
    return v * tl.div_rn(1.0, s)[:, None], s


@triton.jit
def quantize_rows_kernel(x, out, scale, R, K, stride_x, BM: tl.constexpr, BK: tl.constexpr):
    """out, scale = x `scaled`, rounded to the nearest e4m3."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    cols = tl.arange(0, BK)  # [BK]
    inside = (rows < R)[:, None] & (cols < K)[None, :]  # [BM, BK]
    v = tl.load(x + rows[:, None] * stride_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    q, s = scaled(v)
    tl.store(scale + rows, s, mask=rows < R)
    tl.store(out + rows[:, None] * K + cols[None, :], q.to(out.dtype.element_ty), mask=inside)


def _fake_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty_like(x, torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


@compiled_as_op(_fake_quantize_rows)
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] with dense rows. Returns e4m3 [..., K], contiguous, and scales [...] float32."""
    out, scale = _fake_quantize_rows(x)
    x = as_rows(x, "x")
    R, K = x.shape
    BK, BM, warps = whole_rows(K, "quantize_rows")
    if R == 0:
        return out, scale
    with on_device_of(x):
        quantize_rows_kernel[(cdiv(R, BM),)](
            x, out, scale, R, K, x.stride(0), BM=BM, BK=BK, num_warps=warps, enable_fp_fusion=True
        )  # fmt: skip
    return out, scale
