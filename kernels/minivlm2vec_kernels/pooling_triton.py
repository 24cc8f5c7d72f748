"""From hidden states to embeddings: the last token of each sequence, final RMSNorm, L2 norm, in one launch.

Shapes: T packed tokens, B sequences, D width; a program takes one sequence, BD = the next power of two of D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .custom_op import compiled_as_op
from .launch import as_rows, check_shape, next_power_of_2, on_device_of

SETTINGS = {2048: 4, 8192: 8, 32768: 16}  # BD up to this -> warps


@triton.jit
def pool_last_token_kernel(
    x, cu_seqlens, weight, out,
    T, D, stride_x, eps,
    NORMALIZE: tl.constexpr, NORM_DTYPE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """n = (x / sqrt(mean(x^2) + eps) in x's dtype) * weight, rounded; out = n / max(|n|, 1e-12) in fp32."""
    sequence = tl.program_id(0).to(tl.int64)
    row = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - 1
    row = tl.where(row < 0, row + T, row)  # an empty first sequence: torch's negative index, not a stray read
    cols = tl.arange(0, BD)  # [BD]
    inside = cols < D
    h = tl.load(x + row * stride_x + cols, mask=inside, other=0.0)
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    dtype = h.dtype
    h = h.to(tl.float32)
    h = (h * tl.rsqrt(tl.sum(h * h) / D + tl.cast(eps, tl.float32))).to(dtype).to(tl.float32)
    n = (h * w).to(NORM_DTYPE).to(tl.float32)
    if NORMALIZE:
        n = n / tl.maximum(tl.sqrt(tl.sum(n * n)), 1e-12)
    tl.store(out + sequence * D + cols, n, mask=inside)


def _fake_pool_last_token(x: Tensor, cu_seqlens: Tensor, norm_weight: Tensor, eps: float, normalize: bool) -> Tensor:
    return x.new_empty((cu_seqlens.shape[0] - 1, x.shape[1]), dtype=torch.float32)


@compiled_as_op(_fake_pool_last_token)
def pool_last_token(x: Tensor, cu_seqlens: Tensor, norm_weight: Tensor, eps: float, normalize: bool) -> Tensor:
    """x [T, D] with dense rows, cu_seqlens [B + 1], norm_weight [D]. Returns [B, D] float32."""
    x = as_rows(x, "x")
    T, D = x.shape
    check_shape(norm_weight, (D,), "norm_weight")
    out = _fake_pool_last_token(x, cu_seqlens, norm_weight, eps, normalize)
    if out.numel() == 0:
        return out
    if T == 0:
        raise ValueError(f"x has no rows, cu_seqlens is of {out.shape[0]} sequences")
    BD, warps = settings(D)
    norm_dtype = torch.promote_types(x.dtype, norm_weight.dtype)
    with on_device_of(x):
        pool_last_token_kernel[(out.shape[0],)](
            x, cu_seqlens.contiguous(), norm_weight.contiguous(), out,
            T, D, x.stride(0), eps,
            NORMALIZE=normalize, NORM_DTYPE=TRITON_DTYPES[norm_dtype], BD=BD, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def settings(D: int) -> tuple[int, int]:
    """(BD, warps) for rows of D elements."""
    BD = next_power_of_2(D)
    warps = next((w for limit, w in SETTINGS.items() if limit >= BD), None)
    if warps is None:
        raise ValueError(f"rows of {D} elements are wider than the {max(SETTINGS)} that fit in one program")
    return BD, warps
