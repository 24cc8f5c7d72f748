"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), and residual add + RMSNorm, in one pass over memory; and their
gradients, in one pass as well. float16, bfloat16 or float32, sums in float32.

Shapes: R rows, D width; a program takes BM whole rows of BD = the next power of two of D columns. Backward, P
        programs share the rows, and each sums up the weight's gradient of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .custom_op import compiled_as_op
from .launch import as_rows, cdiv, check_shape, dense_rows, empty_like, on_device_of, whole_rows
from .quantize_rows_triton import scaled

# BD -> (BM, warps), backward: twice the operands and a sum, so half as many elements a thread as in ROW_SETTINGS.
BACKWARD_SETTINGS = {
    64: (32, 4),
    128: (16, 4),
    256: (8, 4),
    512: (4, 4),
    1024: (2, 4),
    2048: (1, 4),
    4096: (1, 8),
    8192: (1, 16),
}
BACKWARD_PROGRAMS = 256  # P: about two a multiprocessor; the same on every card, so that sums are too

# -------------------------------------------------------------------------------------------------------- forward


@triton.jit
def rms_norm_kernel(
    x, residual, weight, out, total,
    R, D, stride_x, stride_residual, eps,
    ADD: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """s = x (+ residual) in x's dtype; out = (s / sqrt(mean(s^2) + eps) in x's dtype) * weight; total = s."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    cols = tl.arange(0, BD)  # [BD]
    inside = (rows < R)[:, None] & (cols < D)[None, :]  # [BM, BD]
    w = tl.load(weight + cols, mask=cols < D, other=0.0, eviction_policy="evict_last").to(tl.float32)  # [BD]

    s = tl.load(x + rows[:, None] * stride_x + cols[None, :], mask=inside, other=0.0)  # [BM, BD]
    dtype = s.dtype
    s = s.to(tl.float32)
    if ADD:
        r = tl.load(residual + rows[:, None] * stride_residual + cols[None, :], mask=inside, other=0.0)
        s = (s + r.to(tl.float32)).to(dtype)
        tl.store(total + rows[:, None] * D + cols[None, :], s, mask=inside)
        s = s.to(tl.float32)

    scale = tl.rsqrt(tl.sum(s * s, axis=1) / D + tl.cast(eps, tl.float32))  # [BM]
    y = (s * scale[:, None]).to(dtype).to(tl.float32) * w[None, :]
    tl.store(out + rows[:, None] * D + cols[None, :], y.to(out.dtype.element_ty), mask=inside)


def _fake_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return empty_like(x, torch.promote_types(x.dtype, weight.dtype))


def _fake_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _fake_rms_norm(x, weight, eps), empty_like(x)


@compiled_as_op(_fake_rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] with dense rows, weight [D]. Returns a contiguous tensor of x's shape."""
    out = _fake_rms_norm(x, weight, eps)
    _launch(x, None, weight, out, None, eps)
    return out


@compiled_as_op(_fake_add_rms_norm)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [..., D] of one dtype. Returns (normed, residual + x), both contiguous."""
    check_shape(residual, x.shape, "residual")
    if residual.dtype != x.dtype:
        raise ValueError(f"residual is {residual.dtype}, x is {x.dtype}")
    out, total = _fake_add_rms_norm(x, residual, weight, eps)
    _launch(x, residual, weight, out, total, eps)
    return out, total


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, total: Tensor | None, eps: float) -> None:
    x = as_rows(x, "x")
    residual = None if residual is None else as_rows(residual, "residual")
    R, D = x.shape
    check_shape(weight, (D,), "weight")
    if R == 0:
        return
    BD, BM, warps = whole_rows(D, "rms_norm")
    with on_device_of(x):
        rms_norm_kernel[(cdiv(R, BM),)](
            x, residual, weight.contiguous(), out, total,
            R, D, x.stride(0), 0 if residual is None else residual.stride(0), eps,
            ADD=residual is not None, BM=BM, BD=BD, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit
def rms_norm_quantize_kernel(
    x, weight, out, scale,
    R, D, stride_x, eps,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y = the norm of x as above, in the dtype that weight gives it; out, scale = y `scaled`, as e4m3."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    cols = tl.arange(0, BD)  # [BD]
    inside = (rows < R)[:, None] & (cols < D)[None, :]  # [BM, BD]
    w = tl.load(weight + cols, mask=cols < D, other=0.0, eviction_policy="evict_last")  # [BD]
    v = tl.load(x + rows[:, None] * stride_x + cols[None, :], mask=inside, other=0.0)  # [BM, BD]
    s = v.to(tl.float32)
    norm = tl.rsqrt(tl.sum(s * s, axis=1) / D + tl.cast(eps, tl.float32))  # [BM]
    y = (s * norm[:, None]).to(v.dtype)
    y = (y.to(tl.float32) * w.to(tl.float32)[None, :]).to((y + w[None, :]).dtype)
    q, s = scaled(y.to(tl.float32))
    tl.store(scale + rows, s, mask=rows < R)
    tl.store(out + rows[:, None] * D + cols[None, :], q.to(out.dtype.element_ty), mask=inside)


def _fake_rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return empty_like(x, torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


@compiled_as_op(_fake_rms_norm_quantize)
def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., D] with dense rows, weight [D]. Returns e4m3 [..., D], contiguous, and scales [...] float32."""
    out, scale = _fake_rms_norm_quantize(x, weight, eps)
    x = as_rows(x, "x")
    R, D = x.shape
    check_shape(weight, (D,), "weight")
    BD, BM, warps = whole_rows(D, "rms_norm")
    if R == 0:
        return out, scale
    with on_device_of(x):
        rms_norm_quantize_kernel[(cdiv(R, BM),)](
            x, weight.contiguous(), out, scale, R, D, x.stride(0), eps,
            BM=BM, BD=BD, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out, scale


# ------------------------------------------------------------------------------------------------------- backward


@triton.jit
def rms_norm_backward_kernel(
    dout, dtotal, s, weight, ds, dweight,
    R, D, stride_dout, stride_dtotal, stride_s, eps,
    ADD: tl.constexpr, DWEIGHT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """With n = s / sqrt(mean(s^2) + eps), computed anew, and dn = dout * weight, in float32:

        ds = (dn - n * mean(dn * n)) / sqrt(mean(s^2) + eps) (+ dtotal)      dweight = sum over rows of dout * n

    Program i of P takes blocks i, i + P, ... of BM rows; dweight [P, D] float32 gets its part of the sum in row i.
    """
    cols = tl.arange(0, BD)  # [BD]
    w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)  # [BD]
    dw = tl.zeros([BM, BD], tl.float32)
    for row in tl.range(tl.program_id(0) * BM, R, tl.num_programs(0) * BM):
        rows = tl.cast(row, tl.int64) + tl.arange(0, BM)  # [BM]
        inside = (rows < R)[:, None] & (cols < D)[None, :]  # [BM, BD]
        n = tl.load(s + rows[:, None] * stride_s + cols[None, :], mask=inside, other=0.0)  # [BM, BD]
        dtype = n.dtype
        dn = tl.load(dout + rows[:, None] * stride_dout + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        n = n.to(tl.float32)
        scale = tl.rsqrt(tl.sum(n * n, axis=1) / D + tl.cast(eps, tl.float32))  # [BM]
        scale = tl.where(rows < R, scale, 0.0)  # with eps = 0 it would be infinite beyond the last row, and dw NaN
        n = n * scale[:, None]
        if DWEIGHT:
            dw += dn * n.to(dtype).to(tl.float32)  # as forward: what the weight was multiplied with
        dn = dn * w[None, :]
        dx = (dn - n * (tl.sum(dn * n, axis=1) / D)[:, None]) * scale[:, None]
        if ADD:
            dx += tl.load(dtotal + rows[:, None] * stride_dtotal + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(ds + rows[:, None] * D + cols[None, :], dx.to(dtype), mask=inside)
    if DWEIGHT:
        tl.store(dweight + tl.program_id(0).to(tl.int64) * D + cols, tl.sum(dw, axis=0), mask=cols < D)


def _fake_rms_norm_backward(
    dout: Tensor, dtotal: Tensor | None, s: Tensor, weight: Tensor, eps: float, with_weight: bool
) -> tuple[Tensor, Tensor]:
    return empty_like(s), weight.new_empty(weight.shape if with_weight else (0,))


@compiled_as_op(_fake_rms_norm_backward)
def rms_norm_backward(
    dout: Tensor, dtotal: Tensor | None, s: Tensor, weight: Tensor, eps: float, with_weight: bool
) -> tuple[Tensor, Tensor]:
    """dout, dtotal, s [..., D]: gradients of the norm and (or None) of s itself, s what was normalised.

    Returns (ds, dweight), contiguous, in the dtypes of s and of weight; dweight is empty without `with_weight`.
    """
    ds = empty_like(s)
    rows, dout, D = as_rows(s, "s"), dense_rows(dout), s.shape[-1]
    dtotal = None if dtotal is None else dense_rows(dtotal)
    BD, BM, warps = whole_rows(D, "rms_norm_backward", BACKWARD_SETTINGS)
    programs = min(cdiv(len(rows), BM), BACKWARD_PROGRAMS)
    parts = torch.empty(programs if with_weight else 0, D, dtype=torch.float32, device=s.device)
    if programs:
        with on_device_of(s):
            rms_norm_backward_kernel[(programs,)](
                dout, dtotal, rows, weight.contiguous(), ds, parts,
                len(rows), D, dout.stride(0), 0 if dtotal is None else dtotal.stride(0), rows.stride(0), eps,
                ADD=dtotal is not None, DWEIGHT=with_weight, BM=BM, BD=BD, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return ds, parts.sum(0).to(weight.dtype) if with_weight else weight.new_empty(0)


class RMSNorm(torch.autograd.Function):
    """`rms_norm` with a gradient. Keeps x and nothing else."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        whole_rows(x.shape[-1], "rms_norm_backward", BACKWARD_SETTINGS)  # refused before anything is computed
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dweight = rms_norm_backward(dout, None, x, weight, ctx.eps, ctx.needs_input_grad[1])
        return dx, dweight if ctx.needs_input_grad[1] else None, None


class AddRMSNorm(torch.autograd.Function):
    """`add_rms_norm` with a gradient, which is the same for x and residual. Keeps their sum, which is returned."""

    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        whole_rows(x.shape[-1], "rms_norm_backward", BACKWARD_SETTINGS)
        out, total = add_rms_norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        ds, dweight = rms_norm_backward(dout, dtotal, total, weight, ctx.eps, ctx.needs_input_grad[2])
        return ds, ds, dweight if ctx.needs_input_grad[2] else None, None
