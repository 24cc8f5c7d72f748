"""The public ops: signatures, argument checks, and the one dispatch between Triton and torch.

Shapes: T packed tokens, B sequences, N query heads, Nkv key-value heads, H head dim, D width, C crops,
        P patches per side of a crop, p pixels per side of a patch, I image tokens, S pixels per side of a crop.

Sequences lie end to end, without padding; `cu_seqlens` [B + 1] int32 holds where each begins, and where the
last ends. Every op takes `backend=`: None (the environment's choice), "auto", "triton" or "torch"; another one is a
ValueError. Gradients flow through Triton kernels where "triton" is asked for, in attention, rms_norm, add_rms_norm,
silu_mul, rope and the unfused linear_silu_mul; the other ops refuse.

As in torch, an op whose name ends in an underscore writes over an argument, and no other does: what they return is
theirs alone. Every op can be traced by torch.compile without a graph break.
"""

import math
import os
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cards, torch_ops
from .image_grids import Grid, flatten
from .launch import WIDEST
from .tile_schedule import TileSchedule

BACKENDS = ("auto", "triton", "torch")
BACKEND = os.environ.get("MINIVLM2VEC_BACKEND", "auto")


def choose_backend(
    backend: str | None, *tensors: Tensor, backward: bool = False, dtype: torch.dtype | None = None,
    widest: int | None = None,
) -> Literal["triton", "torch"]:  # fmt: skip
    """Returns "triton" or "torch" for an op on `tensors`; `backward`: whether its kernels carry gradients; `dtype`: of
    what it returns, where the tensors do not tell; `widest`: elements of a row, the last dimension, that a program of
    its kernel takes at most.

    The argument beats the variable MINIVLM2VEC_BACKEND, which beats auto. Auto takes Triton on a CUDA device
    when no gradient is needed and torch otherwise: no backward kernel has been timed against torch's yet. It takes
    torch for wider rows and, with one warning, on AMD's cards and for bfloat16 where the card has none
    (`cards.takes_triton`). An explicit "triton" that cannot run raises.

    Raises ValueError where kernels would be taken for tensors on several devices: they would read another card's
    memory, or fail somewhere else and later.
    """
    choice = BACKEND if backend is None else backend
    if choice not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {choice!r}")
    x = tensors[0]
    wide = widest is not None and x.shape[-1] > widest
    if choice == "torch" or (choice == "auto" and (not x.is_cuda or wide or needs_grad(*tensors))):
        return "torch"
    dtypes = torch.bfloat16 in (dtype, *(t.dtype for t in tensors)), dtype == torch.float8_e4m3fn
    number = x.get_device()
    for t in tensors:  # half the time of any()
        if t.get_device() != number:
            raise ValueError(f"all tensors must be on one device, got {', '.join(str(t.device) for t in tensors)}")
    if choice == "auto":
        return "triton" if cards.takes_triton(number, *dtypes) else "torch"
    if not backward and needs_grad(*tensors):
        raise RuntimeError(
            "backend='triton': this op's kernels have no backward pass; use torch.no_grad(), or backend='torch'"
        )
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"backend='triton' needs CUDA tensors (or TRITON_INTERPRET=1), got one on {x.device}")
    if x.is_cuda and (why := cards.refusal(number, *dtypes)):
        raise RuntimeError(f"backend='triton': {why}; or take backend='torch'")
    return "triton"


def needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def refuse_gradient(op: str, *tensors: Tensor) -> None:
    """Raises RuntimeError where a gradient is needed by an op that writes over what autograd would have kept."""
    if needs_grad(*tensors):
        raise RuntimeError(f"{op} writes over its argument and has no gradient; use torch.no_grad()")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    host_cu_seqlens: Tensor | None = None,
    schedule: TileSchedule | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v, each sequence for itself.

    q [Tq, N, H]; k, v [Tk, Nkv, H], N a multiple of Nkv (grouped query: head n reads key head n // (N / Nkv));
    cu_seqlens [B + 1] int32 for the keys; scale defaults to H ** -0.5. Strided views of one qkv buffer are fine
    as long as the last dimension is dense. Returns [Tq, N, H], contiguous.

    `cu_seqlens_q`, `max_seqlen_q`: where the queries are fewer than the keys (the last tokens of each sequence).
    Queries are aligned to the end of their keys: with `causal`, query i of Lq sees keys 0 .. Lk - Lq + i.
    `host_cu_seqlens`: cu_seqlens on the CPU, where the caller has them: torch then reads no lengths back from a device.
    `schedule`: a TileSchedule of the same lengths; the kernel then runs programs for the tiles that there are alone.
    It changes no result, where the lengths are those of cu_seqlens. Only the kernel follows it: not torch, nor
    torch.compile, nor a pass that needs a gradient.

    Padding for CUDA graphs: a sequence may be empty, and a query without any key gets zeros. Rows beyond the last
    sequence are allowed; they have no influence and no gradient, and what is returned in their place is unspecified.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key-value heads")
    if (cu_seqlens_q is None) != (max_seqlen_q is None):
        raise ValueError("cu_seqlens_q and max_seqlen_q go together")
    if cu_seqlens_q is None and q.shape[0] != k.shape[0]:
        raise ValueError(f"{q.shape[0]} queries but {k.shape[0]} keys: cu_seqlens_q is needed")
    chosen = choose_backend(backend, q, k, v, backward=True)
    if schedule is not None:
        if chosen == "triton" and not (needs_grad(q, k, v) or torch.compiler.is_compiling()):
            from . import attention_triton

            return attention_triton.scheduled(
                q, k, v, cu_seqlens, max_seqlen, causal, scale, cu_seqlens_q, max_seqlen_q, schedule
            )
        most_q = max_seqlen if max_seqlen_q is None else max_seqlen_q
        schedule.check(len(q), len(k), len(cu_seqlens) - 1, most_q, max_seqlen)
    if chosen == "triton":
        from . import attention_backward_triton, attention_triton

        op = attention_backward_triton.Attention.apply if needs_grad(q, k, v) else attention_triton.attention
        return op(q, k, v, cu_seqlens, max_seqlen, causal, scale, cu_seqlens_q, max_seqlen_q)
    lengths = cu_seqlens if host_cu_seqlens is None else host_cu_seqlens
    return torch_ops.attention(q, k, v, lengths, causal=causal, scale=scale, cu_seqlens_q=cu_seqlens_q)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps), statistic in float32, cast to x's dtype, then times weight. x [..., D]."""
    if choose_backend(backend, x, weight, backward=True, widest=WIDEST["rms_norm"]) == "torch":
        return torch_ops.rms_norm(x, weight, eps)
    from . import rms_norm_triton

    if needs_grad(x, weight):
        return rms_norm_triton.RMSNorm.apply(x, weight, eps)
    return rms_norm_triton.rms_norm(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """residual + x, and the RMSNorm of it. x, residual [..., D]. Returns (normed, residual + x)."""
    if choose_backend(backend, x, residual, weight, backward=True, widest=WIDEST["rms_norm"]) == "torch":
        return torch_ops.add_rms_norm(x, residual, weight, eps)
    from . import rms_norm_triton

    if needs_grad(x, residual, weight):
        return rms_norm_triton.AddRMSNorm.apply(x, residual, weight, eps)
    return rms_norm_triton.add_rms_norm(x, residual, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, in float32. x [..., D]."""
    if choose_backend(backend, x, weight, bias, widest=WIDEST["layer_norm"]) == "torch":
        return torch_ops.layer_norm(x, weight, bias, eps)
    from . import layer_norm_triton

    return layer_norm_triton.layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """residual + x, and the LayerNorm of it. x, residual [..., D]. Returns (normed, residual + x)."""
    if choose_backend(backend, x, residual, weight, bias, widest=WIDEST["layer_norm"]) == "torch":
        return torch_ops.add_layer_norm(x, residual, weight, bias, eps)
    from . import layer_norm_triton

    return layer_norm_triton.add_layer_norm(x, residual, weight, bias, eps)


def layer_norm_shift_(
    x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x, and x + shift, which is written over x: the bias of the product that is going to be added to x
    (see `linear_add_`), for which x would otherwise be read and written once more. x [..., D], contiguous for Triton;
    shift, weight, bias [D].

    Returns (normed, x). Raises RuntimeError where a gradient is needed.
    """
    taken = choose_backend(backend, x, shift, weight, bias, widest=WIDEST["layer_norm"])
    refuse_gradient("layer_norm_shift_", x, shift, weight, bias)
    if taken == "torch":
        return torch_ops.layer_norm_shift_(x, shift, weight, bias, eps)
    from . import layer_norm_triton

    return layer_norm_triton.layer_norm_shift_(x, shift, weight, bias, eps), x


def linear_add_(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """residual + x W^T (+ bias), written over `residual`, which is returned: the end of an attention or MLP block.

    residual [T, D], x [T, K], weight [D, K], bias [D]. torch's own product on every backend.
    Raises RuntimeError where a gradient is needed.
    """
    tensors = (residual, x, weight) if bias is None else (residual, x, weight, bias)
    choose_backend(backend, *tensors)
    refuse_gradient("linear_add_", *tensors)
    return torch_ops.linear_add_(residual, x, weight, bias)


def silu_mul(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up, where gate is the first half of the last dimension. [..., 2F] -> [..., F]."""
    if choose_backend(backend, gate_up, backward=True) == "torch":
        return torch_ops.silu_mul(gate_up)
    from . import activation_triton

    if needs_grad(gate_up):
        return activation_triton.SiluMul.apply(gate_up)
    return activation_triton.silu_mul(gate_up)


def quick_gelu(x: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y * sigmoid(1.702 y) with y = x + bias (CLIP's activation). x [..., F], bias [F]."""
    if choose_backend(backend, x, *([] if bias is None else [bias])) == "torch":
        return torch_ops.quick_gelu(x, bias)
    from . import activation_triton

    return activation_triton.quick_gelu(x, bias)


def linear_quick_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, *, fused: bool | None = None, backend: str | None = None
) -> Tensor:
    """quick_gelu(x W^T + bias): the first half of CLIP's MLP. x [..., K], weight [N, K], bias [N].

    On Triton `fused` chooses one kernel (True) or torch's product followed by `quick_gelu` (False). None is
    True for 1024 rows and more of 16-bit numbers: a product of K = 1024 is short, and the fused kernel need
    only reach 68 % of cuBLAS's speed to win.
    """
    if choose_backend(backend, x, weight, bias, widest=WIDEST["layer_norm"]) == "torch":
        return torch_ops.linear_quick_gelu(x, weight, bias)
    from . import linear_triton

    if linear_triton.fuses_quick_gelu(x) if fused is None else fused:
        return linear_triton.linear_quick_gelu(x, weight, bias)
    return quick_gelu(F.linear(x, weight), bias, backend="triton")


def linear_silu_mul(
    x: Tensor, gate_up_weight: Tensor, *, fused: bool | None = None, backend: str | None = None
) -> Tensor:
    """silu(x W_gate^T) * (x W_up^T): the first half of a SwiGLU MLP.

    x [..., K], gate_up_weight [2F, K], gate first. Returns [..., F].

    On Triton `fused` chooses one kernel (True) or torch's product followed by `silu_mul` (False). None is
    False: at K = 3072 the fused kernel must reach 89 % of cuBLAS's speed to win, which is yet to be measured.
    It has no gradient.
    """
    if choose_backend(backend, x, gate_up_weight, backward=not fused) == "torch":
        return torch_ops.linear_silu_mul(x, gate_up_weight)
    if not fused:
        return silu_mul(F.linear(x, gate_up_weight), backend="triton")
    from . import linear_triton

    return linear_triton.linear_silu_mul(x, gate_up_weight)


def quantize_rows(x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Rows as 8-bit floating point (e4m3), and what each is to be multiplied by: x ~ q * scale[..., None].

    scale = max(max |x|, 1e-12) / 448 of each row; 448 is the greatest e4m3 number. x [..., K].
    Returns (q [..., K] float8_e4m3fn, scale [...] float32), contiguous. Triton needs capability 8.9 for it.
    """
    if choose_backend(backend, x, dtype=torch.float8_e4m3fn, widest=WIDEST["quantize_rows"]) == "torch":
        return torch_ops.quantize_rows(x)
    from . import quantize_rows_triton

    return quantize_rows_triton.quantize_rows(x)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of `rms_norm`, whose rows never reach memory: 3 bytes an element moved instead of 7 in 16 bits.

    x [..., D], weight [D]. Returns (q [..., D] float8_e4m3fn, scale [...] float32), contiguous.
    """
    if choose_backend(backend, x, weight, dtype=torch.float8_e4m3fn, widest=WIDEST["rms_norm"]) == "torch":
        return torch_ops.rms_norm_quantize(x, weight, eps)
    from . import rms_norm_triton

    return rms_norm_triton.rms_norm_quantize(x, weight, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Rotary position embedding, halves rotated against each other: (a cos - b sin, b cos + a sin).

    q [T, N, H], k [T, Nkv, H], either of them without heads where only the other is to be turned; cos, sin
    [T, H / 2], already scaled, one row a token; cast to q's dtype first. Returns q and k turned, contiguous.
    The kernel carries no gradient by cos and sin.
    """
    if choose_backend(backend, q, k, cos, sin, backward=not needs_grad(cos, sin)) == "torch":
        return torch_ops.rope(q, k, cos, sin)
    from . import rope_triton

    if needs_grad(q, k):
        return rope_triton.Rope.apply(q, k, cos, sin)
    return rope_triton.rope(q, k, cos, sin, False)


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """`rope` written over q and k, which may be views of one buffer, and are returned.

    Raises RuntimeError where a gradient is needed.
    """
    taken = choose_backend(backend, q, k, cos, sin)
    refuse_gradient("rope_", q, k, cos, sin)
    if taken == "torch":
        return torch_ops.rope_(q, k, cos, sin)
    from . import rope_triton

    rope_triton.rope_(q, k, cos, sin)
    return q, k


def image_patches(
    crops: Tensor,
    grids: Sequence[Grid],
    mean: Tensor,
    std: Tensor,
    patch_size: int,
    dtype: torch.dtype,
    *,
    backend: str | None = None,
) -> Tensor:
    """Normalised patches of every image's global view and crops.

    crops [sum h * w, S, S, 3] uint8, image after image, row-major; grids: one (h, w) an image; mean, std [3]
    float32 of the 0..1 range. The global view is the whole canvas [h * S, w * S], normalised, brought to
    [S, S] by bicubic interpolation (a = -0.75, half-pixel centres, no antialiasing, edges clamped), in float32.
    Returns [C, P * P, 3 * p * p] in `dtype`, C = sum (1 + h * w): the global view, then the crops, image after
    image; pixels of a patch in the order channel, row, column (that of the convolution's weight).
    """
    if choose_backend(backend, crops, mean, std, dtype=dtype) == "torch":
        return torch_ops.image_patches(crops, grids, mean, std, patch_size, dtype)
    from . import image_patches_triton

    return image_patches_triton.image_patches(crops, flatten(grids), mean, std, patch_size, dtype)


def merge_crops(
    features: Tensor, grids: Sequence[Grid], sub_GN: Tensor, glb_GN: Tensor, *, backend: str | None = None
) -> Tensor:
    """Tower features to the projector's input: 2x2 neighbours side by side, separators put in.

    features [C, P * P, D], crops in the order of `image_patches`; sub_GN, glb_GN: 4D values each, any shape.
    An image gives h * m rows of w * m merged patches (m = P / 2; channels in the order dy, dx, D), each row
    ended by sub_GN; then glb_GN; then the global view's m rows of m, each ended by sub_GN.
    Returns [I, 4D], I = sum (h * w + 1) * m^2 + 1 + (h + 1) * m. Raises ValueError for features of another shape.
    """
    crops, patches = sum(1 + h * w for h, w in grids), features.shape[1]
    if patches % 4 or patches != math.isqrt(patches) ** 2:
        raise ValueError(f"features must have an even number of patches per side, got {patches} patches a crop")
    if crops != len(features):
        raise ValueError(f"the grids make {crops} crops, features hold {len(features)}")
    if choose_backend(backend, features, sub_GN, glb_GN) == "torch":
        return torch_ops.merge_crops(features, grids, sub_GN, glb_GN)
    from . import merge_crops_triton

    return merge_crops_triton.merge_crops(features, flatten(grids), sub_GN, glb_GN)


def pool_last_token(
    x: Tensor,
    cu_seqlens: Tensor,
    norm_weight: Tensor,
    eps: float,
    *,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """RMSNorm of each sequence's last row, L2-normalised in float32 (denominator at least 1e-12).

    x [T, D]; cu_seqlens [B + 1]. Returns [B, D] float32.
    """
    if choose_backend(backend, x, norm_weight, cu_seqlens) == "torch":
        return torch_ops.pool_last_token(x, cu_seqlens, norm_weight, eps, normalize=normalize)
    from . import pooling_triton

    return pooling_triton.pool_last_token(x, cu_seqlens, norm_weight, eps, normalize)
