"""quantize_rows: the reference against the rule of rounding, the kernel against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlm2vec_kernels import ops, quantize_rows, reference
from tests.kernels.kernel_cases import DTYPES, ROWS, WIDTHS, captured, compiled

E4M3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
E4M3 = E4M3[E4M3.isfinite()].unique()  # every number there is
SIZES = [*((rows, 384) for rows in ROWS), *((5, width) for width in WIDTHS)]

gpu_with_e4m3 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="e4m3 exists from sm_89 on"
)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9), exponent=st.integers(-20, 20))
def test_rows_are_rounded_to_the_nearest_number(seed, rows, exponent):
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    q, scale = quantize_rows(x)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (rows,)
    exact = x / scale[:, None]
    nearest = (exact[..., None] - E4M3).abs().amin(-1)
    assert ((q.float() - exact).abs() <= nearest + 1e-4).all()
    assert (q.float().abs().amax(1) == 448).all(), "a row's largest number takes the largest there is"


def test_zeros_and_huge_rows():
    x = torch.zeros(3, 16, dtype=torch.bfloat16)
    x[1], x[2, 3] = 3.0e38, 1e-30
    q, scale = quantize_rows(x)
    assert (q[0].float() == 0).all() and scale.isfinite().all() and (scale > 0).all()
    back = q.float() * scale[:, None]
    assert torch.allclose(back[1], x[1].float(), rtol=1e-6)


@gpu_with_e4m3
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_kernel(rows, width, dtype, device, generator, poison_empty):
    x = torch.randn(rows, width, device=device, generator=generator).to(dtype)
    check(x, ops.quantize_rows(x, backend="triton"))


@gpu_with_e4m3
def test_kernel_on_views_and_extremes(device, generator, poison_empty):
    wide = torch.randn(7, 3, 200, device=device, generator=generator)
    wide[0], wide[1], wide[2] = 0.0, 3e38, 1e-30
    check(wide[:, 1, :128], ops.quantize_rows(wide[:, 1, :128], backend="triton"))
    check(wide, ops.quantize_rows(wide, backend="triton"))


@pytest.mark.parametrize("width", [64, 3072])
@torch.no_grad()
def test_a_product_with_the_reciprocal_differs_at_ties_alone(width):
    """What the kernel rounds instead of a quotient. bfloat16 is the case with ties: 448 x / max |x| is in the middle of
    two e4m3 numbers for 2 or 3 of 10,000 elements."""
    x = torch.randn(512, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, scale = reference.quantize_rows(x)
    ours = (x.float() * (1 / scale)[:, None]).to(torch.float8_e4m3fn)
    differ = q.float() != ours.float()
    assert differ.float().mean() < 1e-3
    assert at_ties(x, scale, q.float(), ours.float())[differ].all()
    exact = x.double() / scale.double()[:, None]
    error, reference_error = ((y.double() - exact).abs() for y in (ours, q))
    assert (error <= reference_error * (1 + 2**-16)).all(), "as near as the quotient's"


def at_ties(x, scale, a, b):
    """Where the exact quotient lies within 2^-22 of the middle of two neighbouring e4m3 numbers, relative to it."""
    exact, middle = x.double() / scale.double()[..., None], (a.double() + b.double()) / 2
    apart = (a - b).abs() / torch.maximum(a.abs(), b.abs()).clamp_min(2**-9)
    near = (exact - middle).abs() <= 2**-22 * exact.abs()
    return near & ((apart <= 1 / 8) | ((a - b).abs() <= 2**-9))


def check(x, ours):
    """Equal to the reference on a card, but for ties. Triton's interpreter rounds halves up, cuts off subnormal
    numbers, and loses the carry where one is rounded up to a power of two (126 becomes 64, not 128): there, as near as
    the reference, subnormal ones within their distance of 2^-9, and carries not asked."""
    (q, scale), (expected_q, expected_scale) = ours, reference.quantize_rows(x)
    assert q.dtype == torch.float8_e4m3fn and q.is_contiguous() and scale.dtype == torch.float32
    assert torch.equal(scale, expected_scale)
    same = (q.float() == expected_q.float()) | at_ties(x, scale, q.float(), expected_q.float())
    if not x.is_cuda:
        exact, ours, torchs = x.float() / scale[..., None], q.float(), expected_q.float()
        same |= (ours - exact).abs() == (torchs - exact).abs()
        same |= (exact.abs() < 2**-6) & ((ours - exact).abs() < 2**-9)
        same |= (exact.abs() * (1 - 2**-20)).frexp().mantissa > 31 / 32 - 2**-19  # to be rounded up to a power of two
    assert same.all(), f"{(~same).sum()} of {same.numel()} differ"


def test_errors(device):
    with pytest.raises(ValueError, match="65536 elements"):
        ops.quantize_rows(torch.zeros(1, 65536, device=device), backend="triton")
    with pytest.raises(ValueError, match="stride 1"):
        ops.quantize_rows(torch.zeros(4, 8, device=device).t(), backend="triton")


@gpu_with_e4m3
def test_under_compile(device):
    x = torch.tensor([[1.0, -2.0, 4.0, 448.0]], device=device)
    q, scale = compiled(lambda: ops.quantize_rows(x, backend="triton"))
    assert torch.equal(q.float(), x) and scale.item() == 1.0


@pytest.mark.gpu
@gpu_with_e4m3
def test_in_a_cuda_graph(device, generator):
    x = torch.randn(1000, 3072, device=device, generator=generator).bfloat16()
    for ours, eager in zip(captured(lambda: ops.quantize_rows(x, backend="triton")), ops.quantize_rows(x), strict=True):
        assert torch.equal(ours.float(), eager.float())
