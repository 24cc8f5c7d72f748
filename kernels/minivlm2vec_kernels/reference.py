"""The specification: each op as its formula in plain torch, and nothing clever.

Kernels (`*_triton.py`) and what runs without Triton (`torch_ops.py`) are tested against these functions. Their
arguments are those of `ops.py`, where shapes are explained, without `backend` and the lengths of the longest sequence.
Nothing here writes over an argument: `rope` specifies `ops.rope_` too, `linear_add` and `layer_norm_shift` those with
an underscore behind.

Shapes: T packed tokens, B sequences, N query heads, Nkv key-value heads, H head dim, D width, C crops,
        P patches per side of a crop, I image tokens, S pixels per side of a crop.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .image_grids import Grid


def attention(
    q: Tensor,  # [Tq, N, H]
    k: Tensor,  # [Tk, Nkv, H]
    v: Tensor,  # [Tk, Nkv, H]
    cu_seqlens: Tensor,  # [B + 1]
    *,
    causal: bool,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,  # [B + 1]
) -> Tensor:  # [Tq, N, H]
    """softmax(scale * q k^T) v of each sequence (Vaswani et al., arXiv 1706.03762); query head n reads key
    head n // (N / Nkv).

    Scores and sums are float32 at least; probabilities are rounded to v's dtype, as tensor cores want them.
    """
    probabilities = attention_probabilities(q, k, cu_seqlens, causal=causal, scale=scale, cu_seqlens_q=cu_seqlens_q)
    v, starts = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1), cu_seqlens.tolist()
    outs = [
        torch.einsum("nqk,knh->qnh", wide(p.to(v.dtype)), wide(v[start:stop])).to(q.dtype)
        for p, start, stop in zip(probabilities, starts[:-1], starts[1:], strict=True)
    ]
    rest = q[sum(len(y) for y in outs) :]
    return torch.cat([*outs, torch.zeros_like(rest)])  # rows beyond the last sequence


def attention_probabilities(
    q: Tensor,  # [Tq, N, H]
    k: Tensor,  # [Tk, Nkv, H]
    cu_seqlens: Tensor,  # [B + 1]
    *,
    causal: bool,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,  # [B + 1]
) -> list[Tensor]:  # [N, Lq, Lk] of each sequence
    """softmax(scale * q k^T) of each sequence, float32 at least. A query that sees no key has zeros."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [Tk, N, H]
    k_starts = cu_seqlens.tolist()
    q_starts = k_starts if cu_seqlens_q is None else cu_seqlens_q.tolist()
    found = []
    for q0, q1, k0, k1 in zip(q_starts[:-1], q_starts[1:], k_starts[:-1], k_starts[1:], strict=True):
        scores = scale * torch.einsum("qnh,knh->nqk", wide(q[q0:q1]), wide(k[k0:k1]))
        above = torch.ones_like(scores, dtype=torch.bool).triu(1 + (k1 - k0) - (q1 - q0))  # the last sees the last
        hidden = above & causal
        found.append(scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0))
    return found


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight (Zhang and Sennrich, arXiv 1910.07467)."""
    y = wide(x)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias (Ba et al., arXiv 1607.06450)."""
    y = wide(x)
    y = y - y.mean(-1, keepdim=True)
    y = y / (y.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return (y * wide(weight) + wide(bias)).to(x.dtype)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return layer_norm(total, weight, bias, eps), total


def layer_norm_shift(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return layer_norm(x, weight, bias, eps), x + shift


def linear_add(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return residual + F.linear(x, weight, bias)


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's silu(gate) * up (Shazeer, arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def quick_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The approximation x * sigmoid(1.702 x) of GELU (Hendrycks and Gimpel, arXiv 1606.08415), which CLIP takes."""
    y = x if bias is None else x + bias
    return y * torch.sigmoid(1.702 * y)


def linear_quick_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return quick_gelu(F.linear(x, weight, bias))


def linear_silu_mul(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    return silu_mul(F.linear(x, gate_up_weight))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row divided by its scale, max |x| / 448, as e4m3 (Micikevicius et al., arXiv 2209.05433)."""
    scale = x.abs().amax(-1).float().clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale[..., None]).to(torch.float8_e4m3fn).contiguous(), scale.contiguous()


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return quantize_rows(rms_norm(x, weight, eps))


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding (Su et al., arXiv 2104.09864) of the halves a, b of a head, as in GPT-NeoX and Llama."""
    cos, sin = cos.to(q.dtype)[:, None], sin.to(q.dtype)[:, None]  # [T, 1, H / 2]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def image_patches(
    crops: Tensor, grids: Sequence[Grid], mean: Tensor, std: Tensor, patch_size: int, dtype: torch.dtype
) -> Tensor:
    """(pixels / 255 - mean) / std of each crop, before them the whole image brought to a crop's size, cut into patches:
    Phi-3.5-vision's processor and the unfolding of CLIP's convolution."""
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
    """`hd_feature_transform` of Phi-3.5-vision's modeling_phi3_v.py: the crops' rows, each ended by sub_GN; glb_GN; the
    global view's."""
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
    """The last row of each sequence, normed and brought to length one: VLM2Vec's pooling (arXiv 2410.05160)."""
    last = rms_norm(x[cu_seqlens[1:].long() - 1], norm_weight, eps).float()
    return F.normalize(last, dim=-1) if normalize else last


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
