"""The activations of the two MLPs: SwiGLU's silu(gate) * up (Shazeer, arXiv 2002.05202) with its gradient, and CLIP's
quick_gelu, y * sigmoid(1.702 y) (Hendrycks and Gimpel, arXiv 1606.08415), of y = x + bias. Computed in float32.

Shapes: R rows, F features; a program takes BF features of one row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .custom_op import compiled_as_op
from .launch import as_rows, cdiv, check_shape, dense_rows, empty_like, next_power_of_2, on_device_of

# kernel -> (largest BF, warps): 16 elements a thread for each operand, two 16-byte loads of bf16
SETTINGS = {"silu_mul": (2048, 4), "quick_gelu": (2048, 4), "silu_mul_backward": (2048, 4)}


@triton.jit
def silu_mul_kernel(gate_up, out, F, stride, BF: tl.constexpr):
    """out = gate * sigmoid(gate) * up in float32; gate is a row's first half, up its second."""
    blocks = tl.cdiv(F, BF)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BF + tl.arange(0, BF)  # [BF]
    inside = cols < F
    gate = tl.load(gate_up + row * stride + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + F + cols, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out + row * F + cols, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_backward_kernel(dout, gate_up, dgate_up, F, stride_dout, stride, BF: tl.constexpr):
    """dgate = dout * up * (a + gate * a * (1 - a)), dup = dout * gate * a, with a = sigmoid(gate), in float32."""
    blocks = tl.cdiv(F, BF)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BF + tl.arange(0, BF)  # [BF]
    inside = cols < F
    dy = tl.load(dout + row * stride_dout + cols, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * stride + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + F + cols, mask=inside, other=0.0).to(tl.float32)
    a = tl.sigmoid(gate)
    dgate, dup = dy * up * (a + gate * a * (1 - a)), dy * gate * a
    dtype = dgate_up.dtype.element_ty
    tl.store(dgate_up + row * 2 * F + cols, dgate.to(dtype), mask=inside)
    tl.store(dgate_up + row * 2 * F + F + cols, dup.to(dtype), mask=inside)


@triton.jit
def quick_gelu_kernel(x, bias, out, F, stride, BIAS: tl.constexpr, BF: tl.constexpr):
    """out = y * sigmoid(1.702 y), y = x (+ bias), in float32."""
    blocks = tl.cdiv(F, BF)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BF + tl.arange(0, BF)  # [BF]
    inside = cols < F
    y = tl.load(x + row * stride + cols, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + cols, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    y = y * tl.sigmoid(1.702 * y)
    tl.store(out + row * F + cols, y.to(out.dtype.element_ty), mask=inside)


def _fake_silu_mul(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@compiled_as_op(_fake_silu_mul)
def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2F] with dense rows. Returns [..., F], contiguous."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up's last dimension must be even, got {gate_up.shape[-1]}")
    out = _fake_silu_mul(gate_up)
    if out.numel() == 0:
        return out
    x, F = as_rows(gate_up, "gate_up"), out.shape[-1]
    BF, warps = settings("silu_mul", F)
    with on_device_of(x):
        silu_mul_kernel[(x.shape[0] * cdiv(F, BF),)](
            x, out, F, x.stride(0), BF=BF, num_warps=warps, enable_fp_fusion=True
        )
    return out


def _fake_silu_mul_backward(dout: Tensor, gate_up: Tensor) -> Tensor:
    return empty_like(gate_up)


@compiled_as_op(_fake_silu_mul_backward)
def silu_mul_backward(dout: Tensor, gate_up: Tensor) -> Tensor:
    """dout [..., F], gate_up [..., 2F] as it was given. Returns its gradient, contiguous."""
    dgate_up = empty_like(gate_up)
    if dgate_up.numel() == 0:
        return dgate_up
    dout, x, F = dense_rows(dout), as_rows(gate_up, "gate_up"), dout.shape[-1]
    BF, warps = settings("silu_mul_backward", F)
    with on_device_of(x):
        silu_mul_backward_kernel[(x.shape[0] * cdiv(F, BF),)](
            dout, x, dgate_up, F, dout.stride(0), x.stride(0), BF=BF, num_warps=warps, enable_fp_fusion=True
        )
    return dgate_up


class SiluMul(torch.autograd.Function):
    """`silu_mul` with a gradient. Keeps gate_up and nothing else."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return silu_mul(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> Tensor:
        return silu_mul_backward(dout, *ctx.saved_tensors)


def _fake_quick_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    return empty_like(x, None if bias is None else torch.promote_types(x.dtype, bias.dtype))


@compiled_as_op(_fake_quick_gelu)
def quick_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., F] with dense rows, bias [F] or None. Returns a contiguous tensor of x's shape."""
    out = _fake_quick_gelu(x, bias)
    F = x.shape[-1]
    if bias is not None:
        check_shape(bias, (F,), "bias")
        bias = bias.contiguous()
    if out.numel() == 0:
        return out
    x = as_rows(x, "x")
    BF, warps = settings("quick_gelu", F)
    with on_device_of(x):
        quick_gelu_kernel[(x.shape[0] * cdiv(F, BF),)](
            x, bias, out, F, x.stride(0), BIAS=bias is not None, BF=BF, num_warps=warps, enable_fp_fusion=True
        )
    return out


def settings(kernel: str, F: int) -> tuple[int, int]:
    """(BF, warps) for rows of F features."""
    largest, warps = SETTINGS[kernel]
    return min(largest, max(128, next_power_of_2(F))), warps
