"""uint8 crops to normalised patches in the model's dtype, the global view included, in one kernel.

The global view is what torch's bicubic interpolation makes of the whole image (Keys, "Cubic convolution interpolation
for digital image processing", 1981, with a = -0.75), which is what Phi-3.5-vision's processor calls. Float32 inside.

Shapes: an image of h x w crops of S x S pixels; P = S / p patches of p x p pixels per side. Its views are the
        global view, then the crops. A program writes BO elements of one line of patches of one view:
        P patches of 3 * p * p, which lie end to end in the output, and read p rows of pixels.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .custom_op import compiled_as_op
from .image_grids import Grid, launches, pack, unflatten
from .launch import cdiv, check_shape, on_device_of

SETTINGS = {"image_patches": (512, 4)}  # kernel -> (BO, warps)


@triton.jit
def _cubic_weight(distance):
    """Keys' cubic convolution kernel with a = -0.75."""
    d = tl.abs(distance)
    near = (1.25 * d - 2.25) * d * d + 1.0  # (a + 2) d^3 - (a + 3) d^2 + 1
    far = ((-0.75 * d + 3.75) * d - 6.0) * d + 3.0  # a d^3 - 5a d^2 + 8a d - 4a
    return tl.where(d <= 1.0, near, far)


@triton.jit
def _global_view(canvas, y, x, channel, inside, h, w, S: tl.constexpr, BO: tl.constexpr):
    """Pixel (y, x) of the canvas of h x w crops brought to S x S: its position there is (h (y + 1/2) - 1/2,
    w (x + 1/2) - 1/2), its value the sum of the 4 x 4 pixels around, weighted by cubic convolution."""
    value = tl.zeros((BO,), tl.float32)
    top, left = h * y + (h - 1) // 2, w * x + (w - 1) // 2  # the last pixel at or before the position
    y_part, x_part = ((h - 1) % 2) * 0.5, ((w - 1) % 2) * 0.5  # and how far the position lies behind it
    for i in range(-1, 3):  # not unrolled: 4 elements a thread, 16 pixels each, would spill
        row = tl.minimum(tl.maximum(top + i, 0), h * S - 1)
        for j in tl.static_range(-1, 3):
            col = tl.minimum(tl.maximum(left + j, 0), w * S - 1)
            crop = (row // S * w + col // S).to(tl.int64)
            place = crop * (S * S * 3) + (row % S * S + col % S) * 3 + channel
            unused = h % 2 * i | w % 2 * j  # where a pixel is hit in its centre the others weigh 0
            pixel = tl.load(canvas + place, mask=inside & (y < tl.where(unused == 0, S, 0)), other=0)
            value += _cubic_weight(i - y_part) * _cubic_weight(j - x_part) * pixel.to(tl.float32)
    return value


@triton.jit
def image_patches_kernel(
    crops, mean, std, out, grids,
    S: tl.constexpr, p: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """(pixel / 255 - mean) / std. The global view is interpolated from pixels and then normalised: as its
    weights add up to one, that is the same as interpolating normalised pixels."""
    P: tl.constexpr = S // p
    line: tl.constexpr = P * 3 * p * p  # elements of a line of patches
    image = tl.program_id(1)
    h, w, before, first_view = 0, 0, 0, 0  # crops and views of the images before this one
    for i in tl.static_range(len(grids)):
        h_i, w_i = grids[i] >> 16, (grids[i] & 65535) >> 1
        before += tl.where(i < image, h_i * w_i, 0)
        first_view += tl.where(i < image, h_i * w_i + 1, 0)
        h = tl.where(i == image, h_i, h)
        w = tl.where(i == image, w_i, w)

    blocks: tl.constexpr = (line + BO - 1) // BO
    patch_y = tl.program_id(0) // blocks % P
    view = tl.program_id(0) // blocks // P  # 0: the global view
    if view <= h * w:
        o = tl.program_id(0) % blocks * BO + tl.arange(0, BO)  # [BO], in the order patch, channel, row, column
        inside = o < line
        channel = o // (p * p) % 3
        y = patch_y * p + o // p % p
        x = o // (3 * p * p) * p + o % p
        if view > 0:
            pixels = crops + tl.cast(before + view - 1, tl.int64) * (S * S * 3)
            value = tl.load(pixels + (y * S + x) * 3 + channel, mask=inside, other=0).to(tl.float32)
        else:
            value = _global_view(crops + tl.cast(before, tl.int64) * (S * S * 3), y, x, channel, inside, h, w, S, BO)
        m = tl.load(mean + channel, mask=inside, other=0.0)
        s = tl.load(std + channel, mask=inside, other=1.0)
        place = (tl.cast(first_view + view, tl.int64) * P + patch_y) * line + o
        tl.store(out + place, ((value / 255.0 - m) / s).to(out.dtype.element_ty), mask=inside)


def _fake_image_patches(
    crops: Tensor, flat_grids: Sequence[int], mean: Tensor, std: Tensor, patch_size: int, dtype: torch.dtype
) -> Tensor:
    P = crops.shape[1] // patch_size
    views = sum(1 + h * w for h, w in unflatten(flat_grids))
    return crops.new_empty((views, P * P, 3 * patch_size**2), dtype=dtype)


@compiled_as_op(_fake_image_patches)
def image_patches(
    crops: Tensor, flat_grids: Sequence[int], mean: Tensor, std: Tensor, patch_size: int, dtype: torch.dtype
) -> Tensor:
    """crops [sum h * w, S, S, 3] uint8, contiguous; flat_grids: h, w of each image; mean, std [3] float32."""
    S, grids = crops.shape[1], unflatten(flat_grids)
    check_shape(crops, (sum(h * w for h, w in grids), S, S, 3), "crops")
    check_shape(mean, (3,), "mean")
    check_shape(std, (3,), "std")
    if crops.dtype != torch.uint8 or not crops.is_contiguous():
        raise ValueError(f"crops must be contiguous uint8, got {crops.dtype} with strides {crops.stride()}")
    if S % patch_size:
        raise ValueError(f"crops of {S} pixels do not divide into patches of {patch_size}")
    out = _fake_image_patches(crops, flat_grids, mean, std, patch_size, dtype)
    crop = view = 0
    for images in launches(grids):
        _launch(crops[crop:], images, mean.float().contiguous(), std.float().contiguous(), out[view:], patch_size)
        crop += sum(h * w for h, w in images)
        view += sum(1 + h * w for h, w in images)
    return out


def _launch(crops: Tensor, grids: Sequence[Grid], mean: Tensor, std: Tensor, out: Tensor, p: int) -> None:
    S, (BO, warps) = crops.shape[1], SETTINGS["image_patches"]
    blocks = cdiv(3 * S * p, BO)
    most_views = max(1 + h * w for h, w in grids)
    with on_device_of(crops):
        image_patches_kernel[(blocks * (S // p) * most_views, len(grids))](
            crops, mean, std, out, pack(grids), S=S, p=p, BO=BO, num_warps=warps, enable_fp_fusion=True
        )
