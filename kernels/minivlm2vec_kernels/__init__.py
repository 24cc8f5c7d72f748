"""The ops of VLM2Vec on packed sequences: plain torch as the specification, Triton kernels as the fast path."""

from .ops import (
    add_layer_norm,
    add_rms_norm,
    attention,
    choose_backend,
    image_patches,
    layer_norm,
    linear_add,
    linear_quick_gelu,
    linear_silu_mul,
    merge_crops,
    pool_last_token,
    quantize_rows,
    quick_gelu,
    rms_norm,
    rope,
    silu_mul,
)

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "choose_backend",
    "image_patches",
    "layer_norm",
    "linear_add",
    "linear_quick_gelu",
    "linear_silu_mul",
    "merge_crops",
    "pool_last_token",
    "quantize_rows",
    "quick_gelu",
    "rms_norm",
    "rope",
    "silu_mul",
]
