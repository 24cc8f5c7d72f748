"""Image features to the projector's input: 2x2 merge, row separators and the global separator as one gather.

The order is that of `hd_feature_transform` in Phi-3.5-vision's modeling_phi3_v.py, with its names of the separators.

Shapes: C crops of P x P patches, D width, m = P / 2. An image of h x w crops gives h * m lines of w * m + 1
        rows, one row for glb_GN, and m lines of m + 1 rows; a row has 4D channels. A program writes BR rows
        of BD = the next power of two of 4D channels.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .custom_op import compiled_as_op
from .image_grids import Grid, launches, pack, unflatten
from .launch import cdiv, check_shape, next_power_of_2, on_device_of

# BD up to this -> (BR, warps): 64 elements a thread at most
SETTINGS = {1024: (8, 4), 2048: (4, 4), 4096: (2, 4), 8192: (1, 4), 32768: (1, 16)}


@triton.jit
def merge_crops_kernel(
    features, sub_GN, glb_GN, out,
    stride_crop, stride_patch, grids,
    P: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A row is sub_GN at the end of a line, glb_GN before the global view, else the 2 x 2 patches whose top
    left is patch (2y, 2x) of its crop; the packed grids (image_grids.py) say which crop that is."""
    m: tl.constexpr = P // 2
    image = tl.program_id(1)
    h, w, first_crop, first_row = 0, 0, 0, 0
    for i in tl.static_range(len(grids)):
        h_i, w_i = grids[i] >> 16, (grids[i] & 65535) >> 1
        first_crop += tl.where(i < image, h_i * w_i + 1, 0)
        first_row += tl.where(i < image, (h_i * w_i + 1) * m * m + (h_i + 1) * m + 1, 0)
        h = tl.where(i == image, h_i, h)
        w = tl.where(i == image, w_i, w)

    rows = (h * w + 1) * m * m + (h + 1) * m + 1
    glb_row = h * m * (w * m + 1)
    row = tl.program_id(0) * BR + tl.arange(0, BR)  # [BR], within the image
    local = row < glb_row
    in_view = tl.where(local, row, row - glb_row - 1)
    line = tl.where(local, w * m, m) + 1
    y, x = in_view // line, in_view % line
    is_end, is_glb = (x == line - 1) & (row != glb_row), row == glb_row
    crop = first_crop + tl.where(local, 1 + (y // m) * w + x // m, 0)
    top_left = 2 * (y % m) * P + 2 * (x % m)

    c = tl.arange(0, BD)  # [BD], in the order dy, dx, D
    inside = (row < rows)[:, None] & (c < 4 * D)[None, :]  # [BR, BD]
    patch = top_left[:, None] + (c // (2 * D) * P + c // D % 2)[None, :]
    place = crop.to(tl.int64)[:, None] * stride_crop + patch.to(tl.int64) * stride_patch + (c % D)[None, :]
    merged = tl.load(features + place, mask=inside & ~(is_end | is_glb)[:, None], other=0.0)
    separator = tl.where(is_glb[:, None], glb_GN + c[None, :], sub_GN + c[None, :])
    end = tl.load(separator, mask=inside & (is_end | is_glb)[:, None], other=0.0)
    value = tl.where((is_end | is_glb)[:, None], end, merged.to(end.dtype))
    tl.store(out + (first_row + row).to(tl.int64)[:, None] * (4 * D) + c[None, :], value, mask=inside)


def rows_of(grid: Grid, m: int) -> int:
    h, w = grid
    return (h * w + 1) * m * m + (h + 1) * m + 1


def _fake_merge_crops(features: Tensor, flat_grids: Sequence[int], sub_GN: Tensor, glb_GN: Tensor) -> Tensor:
    m = round(features.shape[1] ** 0.5) // 2
    rows = sum(rows_of(grid, m) for grid in unflatten(flat_grids))
    dtype = torch.promote_types(features.dtype, torch.promote_types(sub_GN.dtype, glb_GN.dtype))
    return features.new_empty((rows, 4 * features.shape[2]), dtype=dtype)


@compiled_as_op(_fake_merge_crops)
def merge_crops(features: Tensor, flat_grids: Sequence[int], sub_GN: Tensor, glb_GN: Tensor) -> Tensor:
    """features [C, P * P, D], dense rows; flat_grids: h, w of each image; separators of 4D. -> [I, 4D]."""
    _, patches, D = features.shape
    P, grids = round(patches**0.5), unflatten(flat_grids)
    if D > 1 and features.stride(2) != 1:
        raise ValueError(f"features: the last dimension must have stride 1, got strides {features.stride()}")
    check_shape(sub_GN.reshape(-1), (4 * D,), "sub_GN, flat,")
    check_shape(glb_GN.reshape(-1), (4 * D,), "glb_GN, flat,")
    out = _fake_merge_crops(features, flat_grids, sub_GN, glb_GN)
    sub_GN, glb_GN = sub_GN.to(out.dtype).contiguous(), glb_GN.to(out.dtype).contiguous()
    crop = row = 0
    for images in launches(grids):
        _launch(features[crop:], images, sub_GN, glb_GN, out[row:], P, D)
        crop += sum(h * w + 1 for h, w in images)
        row += sum(rows_of(grid, P // 2) for grid in images)
    return out


def _launch(
    features: Tensor, grids: Sequence[Grid], sub_GN: Tensor, glb_GN: Tensor, out: Tensor, P: int, D: int
) -> None:
    BD, BR, warps = settings(4 * D)
    most_rows = max(rows_of(grid, P // 2) for grid in grids)
    with on_device_of(features):
        merge_crops_kernel[(cdiv(most_rows, BR), len(grids))](
            features, sub_GN, glb_GN, out,
            features.stride(0), features.stride(1), pack(grids),
            P=P, D=D, BR=BR, BD=BD, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip


def settings(width: int) -> tuple[int, int, int]:
    """(BD, BR, warps) for rows of `width` = 4D channels."""
    BD = next_power_of_2(width)
    for limit, (BR, warps) in SETTINGS.items():
        if limit >= BD:
            return BD, BR, warps
    raise ValueError(f"rows of {width} channels are wider than the {max(SETTINGS)} that fit in one program")
