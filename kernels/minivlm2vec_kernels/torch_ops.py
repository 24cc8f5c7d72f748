"""What runs without Triton: on CPUs, on cards that Triton does not know, and, unless Triton is asked for, where a
gradient is needed. The same values as `reference.py`, to rounding, sooner or in less memory; an op that has no
faster form is the reference's own. Imports nothing but torch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .custom_op import NAMESPACE, compiled_as_op
from .reference import (
    add_rms_norm,
    image_patches,
    linear_silu_mul,
    merge_crops,
    pool_last_token,
    quantize_rows,
    rms_norm,
    rms_norm_quantize,
    rope,
    silu_mul,
)

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "image_patches",
    "layer_norm",
    "layer_norm_shift_",
    "linear_add_",
    "linear_quick_gelu",
    "linear_silu_mul",
    "merge_crops",
    "pool_last_token",
    "quantize_rows",
    "quick_gelu",
    "rms_norm",
    "rms_norm_quantize",
    "rope",
    "rope_",
    "silu_mul",
]

# --------------------------------------------------------------------------------------------------------- attention


def attention(
    q: Tensor,  # [Tq, N, H]
    k: Tensor,  # [Tk, Nkv, H]
    v: Tensor,  # [Tk, Nkv, H]
    cu_seqlens: Tensor,  # [B + 1]
    *,
    causal: bool,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,  # [B + 1]
) -> Tensor:  # [Tq, N, H], contiguous
    """Sequences of the same lengths are one batched call of torch's fused attention.

    Under torch.compile it is one op: the lengths decide what is called, so tracing it would mean one graph for each
    batch.
    """
    return _attention(q, k, v, cu_seqlens, causal, scale, cu_seqlens_q)


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float | None, cu_seqlens_q: Tensor | None
) -> Tensor:
    return q.new_empty(q.shape)


@compiled_as_op(_fake_attention, name="torch_attention")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float | None, cu_seqlens_q: Tensor | None
) -> Tensor:
    k_len = cu_seqlens.diff().tolist()
    q_len = k_len if cu_seqlens_q is None else cu_seqlens_q.diff().tolist()
    padding = q.new_zeros(q.shape[0] - sum(q_len), *q.shape[1:])  # rows that belong to no sequence
    q, k, v = q[: sum(q_len)], k[: sum(k_len)], v[: sum(k_len)]
    same: dict[tuple[int, int], list[int]] = {}  # lengths -> the sequences that have them
    for i, lengths in enumerate(zip(q_len, k_len, strict=True)):
        same.setdefault(lengths, []).append(i)
    if len(same) == 1:
        out = _equal_lengths(q, k, v, len(k_len), causal, scale)
        return torch.cat([out, padding]) if len(padding) else out.contiguous()
    split, parts = (q.split(q_len), k.split(k_len), v.split(k_len)), [padding] * len(q_len)
    for (n, _), members in same.items():
        a, b, c = (torch.cat([x[i] for i in members]) if len(members) > 1 else x[members[0]] for x in split)
        out = _equal_lengths(a, b, c, len(members), causal, scale)
        for i, y in zip(members, out.split([n] * len(members)), strict=True):
            parts[i] = y
    return torch.cat([*parts, padding])


def _equal_lengths(q: Tensor, k: Tensor, v: Tensor, batch: int, causal: bool, scale: float | None) -> Tensor:
    if q.shape[0] == 0 or k.shape[0] == 0:
        return torch.zeros_like(q)  # a query that sees no key
    qs, ks, vs = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))  # [B, N, L, H]
    mask, lq, lk = None, qs.shape[2], ks.shape[2]
    if causal and lq > lk:  # the first queries see no key
        seen = _equal_lengths(qs[:, :, lq - lk :].transpose(1, 2).flatten(0, 1), k, v, batch, causal, scale)
        return F.pad(seen.unflatten(0, (batch, -1)), (0, 0, 0, 0, lq - lk, 0)).flatten(0, 1)
    if causal and lq == 1:
        causal = False  # one query, aligned to the end, sees every key
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[1] == k.shape[1] and (not causal or lk <= 128):
        return _by_products(qs, ks, vs, scale, causal)
    if causal and lq != lk:  # the last query sees the last key
        mask = torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril(lk - lq)
    y = F.scaled_dot_product_attention(
        qs,
        ks,
        vs,
        mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=ks.shape[1] != qs.shape[1],
    )
    return y.transpose(1, 2).flatten(0, 1)


def _by_products(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool
) -> Tensor:  # [B, N, L, H] -> [B L, N, H]
    """Attention as two products: on a CPU in bfloat16 a quarter faster than the fused function at 577 keys, and with
    its gradient three to five times as fast at 15 to 60."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    n = max(1, (1 << 20) // (q.shape[1] * q.shape[2] * k.shape[2]))  # sequences whose scores stay in the cache
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2]) if causal else None
    parts = []
    for a, b, c in zip(q.split(n), k.split(n), v.split(n), strict=True):
        scores = torch.matmul(a * scale, b.mT)
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        parts.append(torch.matmul(scores.softmax(-1), c))
    return torch.cat(parts).transpose(1, 2).flatten(0, 1)


@torch.library.custom_op(f"{NAMESPACE}::torch_attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float | None,
    cu_seqlens_q: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients by q, k and v, from the forward pass once more. Only compiled code calls it."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attention(q, k, v, cu_seqlens, causal, scale, cu_seqlens_q)

    dq, dk, dv = torch.func.vjp(forward, q, k, v)[1](dout)  # autograd itself is switched off inside a custom op
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_attention_backward.register_fake
def _(dout, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_inputs(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, ctx.causal, ctx.scale, cu_seqlens_q = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, cu_seqlens_q)


def _gradients(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, cu_seqlens_q = ctx.saved_tensors
    gradients = _attention_backward(dout, q, k, v, cu_seqlens, ctx.causal, ctx.scale, cu_seqlens_q)
    return *gradients, None, None, None, None


_attention.op.register_autograd(_gradients, setup_context=_keep_inputs)

# ------------------------------------------------------------------------------------------------------------- norms


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return layer_norm(total, weight, bias, eps), total


def layer_norm_shift_(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return layer_norm(x, weight, bias, eps), x.add_(shift)


# --------------------------------------------------------------------------------------------------------- the others


def linear_add_(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is not None:
        residual.add_(bias)
    return residual.addmm_(x, weight.t())


def quick_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x if bias is None else x + bias
    scaled = 1.702 * y
    return y * torch.sigmoid(scaled) if scaled.requires_grad else scaled.sigmoid_().mul_(y)


def linear_quick_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.linear(x, weight, bias)
    if y.requires_grad:
        return quick_gelu(y)
    return quick_gelu_(y)


def quick_gelu_(y: Tensor) -> Tensor:
    """`quick_gelu` written over y, without a temporary: silu(1.702 y) / 1.702. For a product that nobody else holds."""
    return F.silu(y.mul_(1.702), inplace=True).mul_(1 / 1.702)


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.to(q.dtype)[:, None], sin.to(q.dtype)[:, None]  # [T, 1, H / 2]
    for x in (q, k):
        a, b = x.chunk(2, dim=-1)
        a_before = a.clone()
        a.mul_(cos).addcmul_(b, sin, value=-1)
        b.mul_(cos).addcmul_(a_before, sin)
    return q, k
