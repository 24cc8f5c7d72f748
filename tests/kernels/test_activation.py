"""silu_mul and quick_gelu: the kernels against the reference."""

import pytest
import torch

from minivlm2vec_kernels import ops, reference
from tests.kernels.kernel_cases import (
    DTYPES,
    ROWS,
    WIDTHS,
    captured,
    check_finite_differences,
    check_gradients,
    compiled,
    compiled_gradients,
    gradients,
)

ATOL = {torch.float32: 1e-6, torch.float16: 0.0, torch.bfloat16: 0.0}  # measured: sigmoid through exp2

pytestmark = pytest.mark.usefixtures("poison_empty")
SIZES = [*((r, 64) for r in ROWS if r < 100), *((5, w) for w in WIDTHS)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_silu_mul(rows, width, dtype, device, generator, assert_error_at_most):
    x = randn(rows, 2 * width, dtype, device, generator)
    out = ops.silu_mul(x, backend="triton")
    assert_error_at_most(out, reference.silu_mul(x), reference.silu_mul(x.double()), atol=ATOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_quick_gelu(rows, width, with_bias, dtype, device, generator, assert_error_at_most):
    x = randn(rows, width, dtype, device, generator)
    bias = randn(1, width, dtype, device, generator)[0] if with_bias else None
    out = ops.quick_gelu(x, bias, backend="triton")
    exact = reference.quick_gelu(x.double(), bias.double() if with_bias else None)
    assert_error_at_most(out, reference.quick_gelu(x, bias), exact, atol=ATOL[dtype])


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_quick_gelu_of_two_dtypes(dtypes, device, generator):
    x, bias = (
        torch.randn(*n, device=device, generator=generator).to(t) for n, t in zip([(5, 96), (96,)], dtypes, strict=True)
    )
    out, expected = ops.quick_gelu(x, bias, backend="triton"), reference.quick_gelu(x, bias)
    assert out.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("value", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_large_values_stay_finite(value, device):
    x = torch.full((2, 128), value, device=device)
    torch.testing.assert_close(ops.silu_mul(x, backend="triton"), reference.silu_mul(x))
    torch.testing.assert_close(ops.quick_gelu(x, backend="triton"), reference.quick_gelu(x))


def test_strided_rows_of_more_dimensions(device, generator):
    x = randn(12, 256, torch.float32, device, generator).view(3, 4, 256)[..., 64:192]
    torch.testing.assert_close(ops.silu_mul(x, backend="triton"), reference.silu_mul(x))
    torch.testing.assert_close(ops.quick_gelu(x, backend="triton"), reference.quick_gelu(x))


def test_errors(device):
    x = torch.zeros(4, 63, device=device)
    with pytest.raises(ValueError, match="even, got 63"):
        ops.silu_mul(x, backend="triton")
    with pytest.raises(ValueError, match=r"bias must have shape \(63,\), got \(64,\)"):
        ops.quick_gelu(x, torch.zeros(64, device=device), backend="triton")
    with pytest.raises(ValueError, match="stride 1"):
        ops.quick_gelu(x.t(), backend="triton")


def test_under_compile(device, generator):
    x, bias = (
        randn(17, 64, torch.float32, device, generator),
        randn(1, 64, torch.float32, device, generator)[0],
    )
    out = compiled(lambda: (ops.silu_mul(x, backend="triton"), ops.quick_gelu(x, bias, backend="triton")))
    torch.testing.assert_close(out, (reference.silu_mul(x), reference.quick_gelu(x, bias)))


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 64), (1, 1), (2, 100), (17, 63), (3, 2500)])
def test_silu_mul_gradient(rows, width, dtype, device, generator):
    x = randn(rows, 2 * width, dtype, device, generator)
    check_gradients(silu_mul, reference.silu_mul, reference.silu_mul, [x], generator, ATOL[dtype])


def test_silu_mul_finite_differences(device, generator):
    x = randn(3, 10, torch.float32, device, generator)
    check_finite_differences(silu_mul, [x], generator, step=1e-2, rtol=1e-3)


@pytest.mark.parametrize("value", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_silu_mul_gradient_of_large_values_stays_finite(value, device):
    x, seeds = torch.full((2, 128), value, device=device), [torch.ones(2, 64, device=device)]
    torch.testing.assert_close(gradients(silu_mul, [x], seeds), gradients(reference.silu_mul, [x], seeds))


def test_silu_mul_gradient_through_views_and_expanded_ones(device, generator):
    wide = randn(12, 256, torch.float32, device, generator).view(3, 4, 256)
    results = []
    for backend in ("triton", "torch"):
        x = wide.clone().requires_grad_()
        ops.silu_mul(x[..., 64:192], backend=backend).sum().backward()
        ops.silu_mul(x[..., 64:192], backend=backend).mT.contiguous().mT.square().sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)


def test_silu_mul_gradient_under_compile(device, generator):
    x, dout = randn(17, 128, torch.float32, device, generator), randn(17, 64, torch.float32, device, generator)
    torch.testing.assert_close(compiled_gradients(silu_mul, [x], [dout]), gradients(silu_mul, [x], [dout]))


def test_ops_without_a_backward_kernel_refuse_gradients(device, generator):
    x = randn(3, 64, torch.float32, device, generator).requires_grad_()
    weight = randn(128, 64, torch.float32, device, generator) / 8
    with pytest.raises(RuntimeError, match="no backward pass"):
        ops.quick_gelu(x, backend="triton")
    with pytest.raises(RuntimeError, match="no backward pass"):
        ops.linear_silu_mul(x, weight, fused=True, backend="triton")
    ours, torchs = (ops.linear_silu_mul(x, weight, backend=b) for b in ("triton", "torch"))
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x) for y in (ours, torchs)))


@pytest.mark.gpu
def test_silu_mul_gradient_of_a_long_batch(device, generator):
    x = randn(8192, 16384, torch.bfloat16, device, generator)
    check_gradients(silu_mul, reference.silu_mul, reference.silu_mul, [x], generator)


# ------------------------------------------------------------------------------------------------------ on a card


@pytest.mark.gpu
def test_in_a_cuda_graph(device, generator):
    x = randn(1000, 8192, torch.bfloat16, device, generator)
    op = lambda: (ops.silu_mul(x, backend="triton"), ops.quick_gelu(x, x[0], backend="triton"))  # noqa: E731
    for ours, eager in zip(captured(op), op(), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.gpu
def test_beyond_2_31_elements(device):
    x = torch.randn(150_000, 16384, device=device, dtype=torch.bfloat16)  # 2.46e9 elements
    torch.testing.assert_close(ops.silu_mul(x, backend="triton")[-5:], reference.silu_mul(x[-5:]))
    torch.testing.assert_close(ops.quick_gelu(x, backend="triton")[-5:], reference.quick_gelu(x[-5:]))


def randn(rows, width, dtype, device, generator):
    return torch.randn(rows, width, device=device, generator=generator).to(dtype)


def silu_mul(x):
    return ops.silu_mul(x, backend="triton")
