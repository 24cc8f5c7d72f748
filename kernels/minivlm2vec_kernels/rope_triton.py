"""Rotary position embedding of q and k, in place, in one launch.

Shapes: T packed tokens, N query heads, Nkv key-value heads, H head dim. A program takes one token: all its
        query and key heads, so that its cos and sin are read once.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import check_shape, compiled_as_op, on_device_of

# elements of a token's two tiles (query and key heads, both halves, padded to powers of two) -> warps
SETTINGS = {1024: 1, 2048: 2, 4096: 4, 16384: 8}


@triton.jit
def _load_halves(x, heads, dims, stride, N, HALF: tl.constexpr):
    at = x + heads[:, None] * stride + dims[None, :]  # [BN, BH]
    inside = (heads < N)[:, None] & (dims < HALF)[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    return at, inside, a, b


@triton.jit
def _store_rotated(at, inside, a, b, cos, sin, HALF: tl.constexpr):
    dtype = at.dtype.element_ty
    tl.store(at, (a * cos - b * sin).to(dtype), mask=inside)
    tl.store(at + HALF, (b * cos + a * sin).to(dtype), mask=inside)


@triton.jit
def rope_kernel(
    q, k, cos, sin,
    N, Nkv, stride_q_token, stride_q_head, stride_k_token, stride_k_head, stride_cos, stride_sin,
    HALF: tl.constexpr, BN: tl.constexpr, BNKV: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of a head; float32 inside, cos and sin
    rounded to q's dtype first. Everything is loaded before anything is stored: loads cannot pass a store."""
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BH)  # [BH]
    dtype = q.dtype.element_ty
    c = tl.load(cos + token * stride_cos + dims, mask=dims < HALF, other=0.0).to(dtype).to(tl.float32)[None, :]
    s = tl.load(sin + token * stride_sin + dims, mask=dims < HALF, other=0.0).to(dtype).to(tl.float32)[None, :]

    q_at, q_inside, qa, qb = _load_halves(q + token * stride_q_token, tl.arange(0, BN), dims, stride_q_head, N, HALF)
    k_at, k_inside, ka, kb = _load_halves(
        k + token * stride_k_token, tl.arange(0, BNKV), dims, stride_k_head, Nkv, HALF
    )
    _store_rotated(q_at, q_inside, qa, qb, c, s, HALF)
    _store_rotated(k_at, k_inside, ka, kb, c, s, HALF)


def _fake_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    return None


@compiled_as_op(_fake_rope, mutates_args=("q", "k"))
def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Writes over q [T, N, H] and k [T, Nkv, H], views with a dense last dimension; cos, sin [T, H / 2]."""
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
            q, k, cos, sin,
            N, Nkv, q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0), sin.stride(0),
            HALF=H // 2, BN=BN, BNKV=BNKV, BH=BH, num_warps=warps,
        )  # fmt: skip


def settings(N: int, Nkv: int, H: int) -> tuple[int, int, int, int]:
    """(BN, BNKV, BH, warps) for a token of N + Nkv heads. Either may be 0: a block holds at least one, masked."""
    BN, BNKV, BH = (triton.next_power_of_2(max(n, 1)) for n in (N, Nkv, H // 2))
    elements = 2 * BH * (BN + BNKV)
    warps = next((w for limit, w in SETTINGS.items() if elements <= limit), 16)
    return BN, BNKV, BH, warps
