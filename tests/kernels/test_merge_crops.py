"""merge_crops: a gather, so the kernel equals the reference exactly."""

import pytest
import torch

from minivlm2vec_kernels import image_grids, ops, reference
from tests.kernels.kernel_cases import DTYPES, captured, compiled

GRIDS = [[], [(1, 1)], [(2, 3)], [(1, 4), (4, 1), (2, 2)]]

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("grids", "P", "D"),
    [*((g, 4, 24) for g in GRIDS), ([(2, 1)], 2, 96), ([(1, 1)], 6, 1024), ([(1, 2)], 2, 1)],
)
def test_merge_crops(grids, P, D, dtype, device, generator):
    tensors = inputs(grids, P, D, dtype, device, generator)
    assert torch.equal(merge(tensors, grids), reference.merge_crops(tensors[0], grids, *tensors[1:]))


def test_more_images_than_one_launch_takes(device, generator, monkeypatch):
    monkeypatch.setattr(image_grids, "IMAGES_PER_LAUNCH", 2)
    grids = [(1, 2), (2, 1), (2, 2), (1, 1), (1, 3)]
    tensors = inputs(grids, 2, 24, torch.float32, device, generator)
    assert torch.equal(merge(tensors, grids), reference.merge_crops(tensors[0], grids, *tensors[1:]))


@pytest.mark.parametrize("mixed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_of_several_dtypes(mixed, device, generator):
    """The widest, as where torch puts them together."""
    grids = [(1, 2)]
    tensors = inputs(grids, 4, 24, torch.float16, device, generator)
    tensors = [t.float() * 1.001 if wide else t for t, wide in zip(tensors, mixed, strict=True)]
    out = merge(tensors, grids)
    assert out.dtype == torch.float32 and torch.equal(out, reference.merge_crops(tensors[0], grids, *tensors[1:]))


def test_class_token_is_skipped_by_a_view(device, generator):
    """The tower's output less its first token: crops lie further apart than their patches."""
    grids = [(1, 2), (2, 1)]
    features, *separators = inputs(grids, 4, 32, torch.float32, device, generator)
    with_class = torch.cat([torch.full_like(features[:, :1], float("nan")), features], dim=1)
    expected = reference.merge_crops(features, grids, *separators)
    assert torch.equal(merge((with_class[:, 1:], *separators), grids), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, s, g: (f[:-1], s, g), "the grids make 8 crops, features hold 7"),
        (lambda f, s, g: (f[:, :-1], s, g), "got 15 patches"),
        (lambda f, s, g: (f[:, :9], s, g), "even number of patches per side, got 9"),
        (lambda f, s, g: (f, s[..., :-1], g), r"sub_GN, flat, must have shape \(96,\), got \(95,\)"),
        (lambda f, s, g: (f, s, g[..., :-1]), r"glb_GN, flat, must have shape \(96,\), got \(95,\)"),
        (lambda f, s, g: (f.repeat(1, 1, 2)[..., ::2], s, g), "stride 1"),
    ],
)
def test_errors(change, message, device, generator):
    grids = [(1, 2), (2, 2)]
    tensors = change(*inputs(grids, 4, 24, torch.float32, device, generator))
    with pytest.raises(ValueError, match=message):
        merge(tensors, grids)


def test_error_names_a_grid_of_no_crops(device, generator):
    tensors = inputs([(1, 1)], 4, 24, torch.float32, device, generator)
    with pytest.raises(ValueError, match="0 x 5"):
        ops.merge_crops(tensors[0].repeat(2, 1, 1)[:2], [(0, 5), (0, 1)], *tensors[1:], backend="triton")


def test_under_compile(device, generator):
    grids = [(1, 2), (2, 2)]
    tensors = inputs(grids, 4, 24, torch.float32, device, generator)
    out = compiled(lambda: merge(tensors, grids))
    assert torch.equal(out, reference.merge_crops(tensors[0], grids, *tensors[1:]))


@pytest.mark.gpu
def test_in_a_cuda_graph(device, generator):
    grids = [(2, 2), (1, 3)] * 20
    tensors = inputs(grids, 24, 1024, torch.bfloat16, device, generator)
    out = captured(lambda: merge(tensors, grids))
    assert torch.equal(out, reference.merge_crops(tensors[0], grids, *tensors[1:]))


@pytest.mark.gpu
def test_beyond_2_31_elements(device, generator):
    grids = [(4, 4)] * 220
    tensors = inputs(grids, 24, 1024, torch.bfloat16, device, generator)  # 2.2e9 elements
    out = merge(tensors, grids)
    assert out.numel() > 2**31
    rows = 17 * 144 + 1 + 5 * 12
    expected = reference.merge_crops(tensors[0][-17:], grids[-1:], *tensors[1:])
    assert torch.equal(out[-rows:], expected)


def merge(tensors, grids):
    return ops.merge_crops(tensors[0], grids, *tensors[1:], backend="triton")


def inputs(grids, P, D, dtype, device, generator):
    """features [C, P * P, D] and two separators of 4D, in the checkpoint's shapes."""
    crops = sum(h * w + 1 for h, w in grids)
    sizes = [(crops, P * P, D), (1, 1, 1, 4 * D), (1, 1, 4 * D)]
    return tuple(torch.randn(size, device=device, generator=generator).to(dtype) for size in sizes)
