"""image_patches: the kernel against the reference, whose global view is torch's own bicubic interpolation."""

import pytest
import torch

from minivlm2vec_kernels import image_grids, ops, reference
from tests.kernels.kernel_cases import DTYPES, captured, compiled

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GRIDS = [[(1, 1)], [(2, 2)], [(2, 3)], [(1, 4), (3, 1)]]
ATOL = {
    torch.float32: 2e-6,
    torch.float16: 0.0,
    torch.bfloat16: 0.0,
}  # values up to 2.7; weights in another order

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grids", "S", "p"), [*((g, 16, 4) for g in GRIDS), ([(2, 1)], 28, 14), ([(2, 1)], 21, 7)])
def test_image_patches(grids, S, p, dtype, device, generator, assert_error_at_most):
    crops, mean, std = inputs(grids, S, device, generator)
    out = ops.image_patches(crops, grids, mean, std, p, dtype, backend="triton")
    same = reference.image_patches(crops, grids, mean, std, p, dtype)
    exact = reference.image_patches(crops, grids, mean.double(), std.double(), p, torch.float64)
    assert_error_at_most(out, same, exact, atol=ATOL[dtype])


def test_more_images_than_one_launch_takes(device, generator, monkeypatch):
    monkeypatch.setattr(image_grids, "IMAGES_PER_LAUNCH", 2)
    grids = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)]
    crops, mean, std = inputs(grids, 4, device, generator)
    out = ops.image_patches(crops, grids, mean, std, 2, torch.float32, backend="triton")
    expected = reference.image_patches(crops, grids, mean, std, 2, torch.float32)
    torch.testing.assert_close(out, expected, rtol=0, atol=ATOL[torch.float32])


def test_global_view_of_one_crop_is_that_crop(device, generator):
    crops, mean, std = inputs([(1, 1)], 16, device, generator)
    out = ops.image_patches(crops, [(1, 1)], mean, std, 4, torch.float32, backend="triton")
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, m, s: (c[:1], m, s), r"crops must have shape \(2, 16, 16, 3\), got \(1, 16, 16, 3\)"),
        (lambda c, m, s: (c.float(), m, s), "contiguous uint8, got torch.float32"),
        (lambda c, m, s: (c.transpose(1, 2), m, s), "contiguous uint8"),
        (lambda c, m, s: (c, m[:2], s), r"mean must have shape \(3,\), got \(2,\)"),
    ],
)
def test_errors(change, message, device, generator):
    tensors = change(*inputs([(1, 2)], 16, device, generator))
    with pytest.raises(ValueError, match=message):
        ops.image_patches(tensors[0], [(1, 2)], *tensors[1:], 4, torch.float32, backend="triton")


def test_patches_must_divide_a_crop(device, generator):
    crops, mean, std = inputs([(1, 2)], 16, device, generator)
    with pytest.raises(ValueError, match="16 pixels do not divide into patches of 5"):
        ops.image_patches(crops, [(1, 2)], mean, std, 5, torch.float32, backend="triton")


def test_under_compile(device, generator):
    crops, mean, std = inputs([(1, 2)], 16, device, generator)
    out = compiled(lambda: ops.image_patches(crops, [(1, 2)], mean, std, 4, torch.float32, backend="triton"))
    expected = reference.image_patches(crops, [(1, 2)], mean, std, 4, torch.float32)
    torch.testing.assert_close(out, expected, rtol=0, atol=ATOL[torch.float32])


@pytest.mark.gpu
def test_in_a_cuda_graph(device, generator):
    grids = [(2, 2), (1, 3)] * 20
    crops, mean, std = inputs(grids, 336, device, generator)
    op = lambda: ops.image_patches(crops, grids, mean, std, 14, torch.bfloat16, backend="triton")  # noqa: E731
    assert torch.equal(captured(op), op())


@pytest.mark.gpu
def test_beyond_2_31_elements(device, generator):
    grids = [(4, 4)] * 400
    crops, mean, std = inputs(grids, 336, device, generator)  # 2.2e9 bytes in, 2.3e9 elements out
    out = ops.image_patches(crops, grids, mean, std, 14, torch.bfloat16, backend="triton")
    expected = reference.image_patches(crops[-16:], grids[-1:], mean, std, 14, torch.bfloat16)
    torch.testing.assert_close(out[-17:], expected)


def inputs(grids, S, device, generator):
    crops = sum(h * w for h, w in grids)
    pixels = torch.randint(0, 256, (crops, S, S, 3), dtype=torch.uint8, device=device, generator=generator)
    return pixels, torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
