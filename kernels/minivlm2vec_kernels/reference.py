"""Every op in plain torch: the specification that the kernels are tested against, and the path that runs on CPUs
and, unless Triton is asked for, carries gradients. It imports nothing but torch.

Shapes: T packed tokens, B sequences, N query heads, Nkv key-value heads, H head dim, D width, C crops,
        P patches per side of a crop, I image tokens, S pixels per side of a crop.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # rows and columns of crops that an image was cut into


def attention(
    q: Tensor,  # [Tq, N, H]
    k: Tensor,  # [Tk, Nkv, H]
    v: Tensor,  # [Tk, Nkv, H]
    cu_seqlens: Tensor,  # [B + 1]
    max_seqlen: int,
    *,
    causal: bool,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,  # [B + 1]
    max_seqlen_q: int | None = None,
) -> Tensor:  # [Tq, N, H]
    k_len = cu_seqlens.diff().tolist()
    q_len = k_len if cu_seqlens_q is None else cu_seqlens_q.diff().tolist()
    padding = q.new_zeros(q.shape[0] - sum(q_len), *q.shape[1:])  # rows that belong to no sequence
    q, k, v = q[: sum(q_len)], k[: sum(k_len)], v[: sum(k_len)]
    same: dict[tuple[int, int], list[int]] = {}  # sequences of the same lengths are one batched call
    for i, lengths in enumerate(zip(q_len, k_len, strict=True)):
        same.setdefault(lengths, []).append(i)
    if len(same) == 1:
        out = _equal_lengths(q, k, v, len(k_len), causal, scale)
        return torch.cat([out, padding]) if len(padding) else out
    split, parts = (q.split(q_len), k.split(k_len), v.split(k_len)), [padding] * len(q_len)
    for (n, _), members in same.items():
        group = (torch.cat([x[i] for i in members]) if len(members) > 1 else x[members[0]] for x in split)
        out = _equal_lengths(*group, len(members), causal, scale)
        for i, y in zip(members, out.split([n] * len(members)), strict=True):
            parts[i] = y
    return torch.cat([*parts, padding])


def _equal_lengths(q: Tensor, k: Tensor, v: Tensor, batch: int, causal: bool, scale: float | None) -> Tensor:
    if q.shape[0] == 0 or k.shape[0] == 0:
        return torch.zeros_like(q)  # a query that sees no key
    qs, ks, vs = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))  # [B, N, L, H]
    mask, lq, lk = None, qs.shape[2], ks.shape[2]
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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return x32.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = residual + x
    return rms_norm(residual, weight, eps), residual


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = residual + x
    return layer_norm(residual, weight, bias, eps), residual


def layer_norm_shift(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed = layer_norm(x, weight, bias, eps)
    return normed, x + shift if torch.is_grad_enabled() else x.add_(shift)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """residual + x W^T (+ bias); writes over `residual` where gradients are disabled.

    Where they are enabled it does not, even if none of the tensors needs one: activations that are computed again
    in the backward pass (checkpointing) start from a residual that needs no gradient but must still be there.
    """
    if torch.is_grad_enabled():
        return residual + F.linear(x, weight, bias)
    if bias is not None:
        residual.add_(bias)
    return residual.addmm_(x, weight.t())


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def quick_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is not None:
        x = x + bias
    return x * torch.sigmoid(1.702 * x)


def linear_quick_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.linear(x, weight, bias)
    if y.requires_grad:
        return quick_gelu(y)
    return F.silu(y.mul_(1.702), inplace=True).mul_(1 / 1.702)  # the same without a temporary: silu(1.702 y) / 1.702


def linear_silu_mul(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    return silu_mul(F.linear(x, gate_up_weight))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1).float().clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale[..., None]).to(torch.float8_e4m3fn), scale


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.to(q.dtype)[:, None], sin.to(q.dtype)[:, None]  # [T, 1, H / 2]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def image_patches(
    crops: Tensor, grids: Sequence[Grid], mean: Tensor, std: Tensor, patch_size: int, dtype: torch.dtype
) -> Tensor:
    views = []
    for pixels, (rows, cols) in zip(crops.split([h * w for h, w in grids]), grids, strict=True):
        local = (pixels.permute(0, 3, 1, 2).float() / 255 - mean[:, None, None]) / std[:, None, None]
        size = local.shape[-1]
        canvas = local.unflatten(0, (rows, cols)).permute(2, 0, 3, 1, 4).reshape(1, 3, rows * size, cols * size)
        views += [F.interpolate(canvas, (size, size), mode="bicubic", align_corners=False), local]
    x = torch.cat(views)  # [C, 3, S, S]: the global view, then the crops, image after image
    x = x.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # [C, 3, P, p, P, p]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2).to(dtype)


def merge_crops(features: Tensor, grids: Sequence[Grid], sub_GN: Tensor, glb_GN: Tensor) -> Tensor:
    width, out = 4 * features.shape[-1], []
    sub_GN, glb_GN = sub_GN.reshape(1, 1, width), glb_GN.reshape(1, width)
    for image, (rows, cols) in zip(features.split([1 + h * w for h, w in grids]), grids, strict=True):
        sub, glb = _merge_2x2(image[1:], rows, cols), _merge_2x2(image[:1], 1, 1)
        out += [_end_rows(sub, sub_GN), glb_GN, _end_rows(glb, sub_GN)]
    return torch.cat(out) if out else features.new_empty(0, width)


def _merge_2x2(x: Tensor, rows: int, cols: int) -> Tensor:  # [rows * cols, P * P, D] -> [rows * m, cols * m, 4D]
    m, D = round(x.shape[1] ** 0.5) // 2, x.shape[-1]
    x = x.reshape(rows, cols, m, 2, m, 2, D).permute(0, 2, 1, 4, 3, 5, 6)  # rows, m, cols, m, dy, dx, D
    return x.reshape(rows * m, cols * m, 4 * D)


def _end_rows(x: Tensor, separator: Tensor) -> Tensor:
    return torch.cat([x, separator.expand(x.shape[0], 1, -1)], dim=1).flatten(0, 1)


def pool_last_token(
    x: Tensor, cu_seqlens: Tensor, norm_weight: Tensor, eps: float, *, normalize: bool = True
) -> Tensor:
    last = rms_norm(x[cu_seqlens[1:].long() - 1], norm_weight, eps).float()
    return F.normalize(last, dim=-1) if normalize else last
