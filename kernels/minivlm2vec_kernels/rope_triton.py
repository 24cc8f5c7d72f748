"""Rotary position embedding (Su et al., arXiv 2104.09864) of q and k in one launch: into new tensors, or in place.

The halves a and b of a head are turned against each other, as in GPT-NeoX and Llama, not neighbouring numbers as in the
paper. float16, bfloat16 or float32; products in float32, cos and sin rounded to q's dtype first.

Shapes: T packed tokens, N query heads, Nkv key-value heads, H head dim. A program takes one token: all its
        query and key heads, so that its cos and sin are read once.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .custom_op import compiled_as_op
from .launch import check_shape, empty_like, next_power_of_2, on_device_of

# elements of a token's two tiles (query and key heads, both halves, padded to powers of two) -> warps
SETTINGS = {1024: 1, 2048: 2, 4096: 4, 16384: 8}


@triton.jit
def _load_halves(x, heads, dims, stride, N, HALF: tl.constexpr):
    at = x + (heads.to(tl.int64) * stride)[:, None] + dims[None, :]  # [BN, BH]; heads may lie far apart
    inside = (heads < N)[:, None] & (dims < HALF)[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    return inside, a, b


@triton.jit
def _store_rotated(x, heads, dims, stride, inside, a, b, cos, sin, HALF: tl.constexpr):
    at = x + (heads.to(tl.int64) * stride)[:, None] + dims[None, :]  # [BN, BH]
    dtype = at.dtype.element_ty
    tl.store(at, (a * cos - b * sin).to(dtype), mask=inside)
    tl.store(at + HALF, (b * cos + a * sin).to(dtype), mask=inside)


@triton.jit
def rope_kernel(
    q, k, out_q, out_k, cos, sin,
    N, Nkv, stride_q_token, stride_q_head, stride_k_token, stride_k_head,
    stride_oq_token, stride_oq_head, stride_ok_token, stride_ok_head, stride_cos, stride_sin,
    HALF: tl.constexpr, BACKWARD: tl.constexpr, BN: tl.constexpr, BNKV: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of a head; float32 inside, cos and sin
    rounded to q's dtype first. BACKWARD: the transpose of that matrix, which is the same with -sin.

    out_q, out_k may be q and k. Everything is loaded before anything is stored: the compiler moves no load before a
    store that precedes it."""
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BH)  # [BH]
    dtype = q.dtype.element_ty
    c = tl.load(cos + token * stride_cos + dims, mask=dims < HALF, other=0.0).to(dtype).to(tl.float32)[None, :]
    s = tl.load(sin + token * stride_sin + dims, mask=dims < HALF, other=0.0).to(dtype).to(tl.float32)[None, :]
    if BACKWARD:
        s = -s

    heads, heads_kv = tl.arange(0, BN), tl.arange(0, BNKV)
    q_inside, qa, qb = _load_halves(q + token * stride_q_token, heads, dims, stride_q_head, N, HALF)
    k_inside, ka, kb = _load_halves(k + token * stride_k_token, heads_kv, dims, stride_k_head, Nkv, HALF)
    _store_rotated(out_q + token * stride_oq_token, heads, dims, stride_oq_head, q_inside, qa, qb, c, s, HALF)
    _store_rotated(out_k + token * stride_ok_token, heads_kv, dims, stride_ok_head, k_inside, ka, kb, c, s, HALF)


def _fake_rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    return None


@compiled_as_op(_fake_rope_, mutates_args=("q", "k"))
def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Writes over q [T, N, H] and k [T, Nkv, H], views with a dense last dimension; cos, sin [T, H / 2]."""
    _launch(q, k, q, k, cos, sin, backward=False)


def _fake_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    return empty_like(q), empty_like(k)


@compiled_as_op(_fake_rope)
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """The same into new tensors, contiguous. backward: q and k are gradients of what was returned."""
    out_q, out_k = _fake_rope(q, k, cos, sin, backward)
    _launch(q, k, out_q, out_k, cos, sin, backward)
    return out_q, out_k


class Rope(torch.autograd.Function):
    """`rope` with a gradient by q and k. It is linear in them, so that nothing but cos and sin is kept.

    Not in place: q and k are views of a buffer of which other views (v) are used as well, and writing into it
    would make autograd rebuild the gradient of the whole from pieces.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return rope(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = [x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk)]  # autograd hands out expanded ones
        cos, sin = ctx.saved_tensors
        return *rope(dq, dk, cos, sin, True), None, None


def _launch(q: Tensor, k: Tensor, out_q: Tensor, out_k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
    T, N, H = q.shape
    Nkv = k.shape[1]
    if H % 2:
        raise ValueError(f"head dim must be even, got {H}")
    check_shape(k, (T, Nkv, H), "k")
    check_shape(cos, (T, H // 2), "cos")
    check_shape(sin, (T, H // 2), "sin")
    for name, x in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension must have stride 1, got strides {x.stride()}")
    if T == 0:
        return
    BN, BNKV, BH, warps = settings(N, Nkv, H)
    with on_device_of(q):
        rope_kernel[(T,)](
            q, k, out_q, out_k, cos, sin,
            N, Nkv, *q.stride()[:2], *k.stride()[:2], *out_q.stride()[:2], *out_k.stride()[:2],
            cos.stride(0), sin.stride(0),
            HALF=H // 2, BACKWARD=backward, BN=BN, BNKV=BNKV, BH=BH, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip


@functools.cache
def settings(N: int, Nkv: int, H: int) -> tuple[int, int, int, int]:
    """(BN, BNKV, BH, warps) for a token of N + Nkv heads. Either may be 0: a block holds at least one, masked."""
    BN, BNKV, BH = (next_power_of_2(max(n, 1)) for n in (N, Nkv, H // 2))
    elements = 2 * BH * (BN + BNKV)
    warps = next((w for limit, w in SETTINGS.items() if elements <= limit), 16)
    return BN, BNKV, BH, warps
