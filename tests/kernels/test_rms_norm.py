"""rms_norm and add_rms_norm: the kernel against the reference."""

import pytest
import torch
import torch.nn.functional as F

from minivlm2vec_kernels import ops, reference, rms_norm_triton
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

EPS = 1e-5
ATOL = {
    torch.float32: 2e-6,
    torch.float16: 0.0,
    torch.bfloat16: 0.0,
}  # the reference's statistic is float32 too

gpu_with_e4m3 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="e4m3 exists from sm_89 on"
)

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [*((r, 64) for r in ROWS), *((5, w) for w in WIDTHS)])
def test_rms_norm(rows, width, dtype, device, generator, assert_error_at_most):
    x, _, weight = inputs(rows, width, dtype, device, generator)
    out = ops.rms_norm(x, weight, EPS, backend="triton")
    assert_error_at_most(out, *references(reference.rms_norm, x, weight), atol=ATOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [*((r, 64) for r in ROWS), *((5, w) for w in WIDTHS)])
def test_add_rms_norm(rows, width, dtype, device, generator, assert_error_at_most):
    x, residual, weight = inputs(rows, width, dtype, device, generator)
    out, total = ops.add_rms_norm(x, residual, weight, EPS, backend="triton")
    assert torch.equal(total, residual + x)
    assert_error_at_most(out, *references(reference.rms_norm, total, weight), atol=ATOL[dtype])


@gpu_with_e4m3
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [*((r, 64) for r in (0, 1, 17, 63)), *((5, w) for w in WIDTHS)])
def test_rms_norm_quantize(rows, width, dtype, device, generator):
    """What the two kernels give after one another, to the last bit; `quantize_rows` is held to its reference."""
    x, _, weight = inputs(rows, width, dtype, device, generator)
    q, scale = ops.rms_norm_quantize(x, weight, EPS, backend="triton")
    norm = ops.rms_norm(x, weight, EPS, backend="triton")
    expected_q, expected_scale = ops.quantize_rows(norm, backend="triton")
    assert q.dtype == torch.float8_e4m3fn and q.is_contiguous() and scale.dtype == torch.float32
    torch.testing.assert_close(scale, expected_scale, rtol=2**-7 if dtype != torch.float32 else 1e-6, atol=0)
    back, expected = q.float() * scale[:, None], expected_q.float() * expected_scale[:, None]
    # sums may be taken in another order, and one rounding of the norm may fall on the other side
    assert ((back - expected).abs() <= 2**-3 * expected.abs() + 2**-9 * scale[:, None]).all()
    assert (back != expected).float().mean() <= 0.01 if back.numel() else True


@gpu_with_e4m3
def test_rms_norm_quantize_of_views_and_other_dtypes(device, generator):
    wide, _, weight = inputs(17, 192, torch.float16, device, generator)
    x = wide[:, 64:128].unflatten(0, (1, 17))
    for w in (weight[:64], weight[:64].float()):
        q, scale = ops.rms_norm_quantize(x, w, EPS, backend="triton")
        assert q.shape == x.shape and scale.shape == (1, 17)
        expected = ops.quantize_rows(ops.rms_norm(x, w, EPS, backend="triton"), backend="triton")
        assert torch.equal(scale, expected[1]) and torch.equal(q.float(), expected[0].float())


@gpu_with_e4m3
def test_errors_of_rms_norm_quantize(device):
    x = torch.zeros(4, 64, device=device)
    with pytest.raises(ValueError, match=r"weight must have shape \(64,\), got \(32,\)"):
        ops.rms_norm_quantize(x, x[0, :32], EPS, backend="triton")
    with pytest.raises(ValueError, match="stride 1"):
        ops.rms_norm_quantize(x.t(), x[:, 0], EPS, backend="triton")


def test_strided_rows(device, generator):
    wide, residual, weight = inputs(17, 192, torch.float32, device, generator)
    x, residual, weight = wide[:, 64:128], residual[:, :64], weight[:64]
    for ours, torchs in zip(
        ops.add_rms_norm(x, residual, weight, EPS, backend="triton"),
        reference.add_rms_norm(x, residual, weight, EPS),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs)


def test_more_than_two_dimensions(device, generator):
    x, _, weight = inputs(12, 64, torch.float32, device, generator)
    out = ops.rms_norm(x.view(3, 4, 64), weight, EPS, backend="triton")
    torch.testing.assert_close(out, reference.rms_norm(x, weight, EPS).view(3, 4, 64))


def test_weight_of_another_dtype_promotes_as_in_torch(device, generator):
    x, _, weight = inputs(3, 64, torch.float16, device, generator)
    out = ops.rms_norm(x, weight.float(), EPS, backend="triton")
    torch.testing.assert_close(out, reference.rms_norm(x, weight.float(), EPS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, r, w: (x.t(), r.t(), w), "stride 1"),
        (lambda x, r, w: (x, r, w[:32]), r"weight must have shape \(64,\), got \(32,\)"),
        (lambda x, r, w: (x, r[:1], w), r"residual must have shape \(4, 64\), got \(1, 64\)"),
        (lambda x, r, w: (x, r.half(), w), "residual is torch.float16, x is torch.float32"),
        (lambda x, r, w: (x.repeat(1, 1024), r.repeat(1, 1024), w.repeat(1024)), "65536 elements"),
    ],
)
def test_errors(change, message, device, generator):
    x, residual, weight = change(*inputs(4, 64, torch.float32, device, generator))
    with pytest.raises(ValueError, match=message):
        ops.add_rms_norm(x, residual, weight, EPS, backend="triton")


def test_under_compile(device, generator):
    x, residual, weight = inputs(17, 64, torch.float32, device, generator)
    expected = reference.add_rms_norm(x, residual, weight, EPS)
    out = compiled(lambda: ops.add_rms_norm(x, residual, weight, EPS, backend="triton"))
    torch.testing.assert_close(out, expected)
    y = compiled(lambda: ops.rms_norm(x, weight, EPS, backend="triton"))
    torch.testing.assert_close(y, reference.rms_norm(x, weight, EPS))


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [*((r, 64) for r in (0, 1, 2, 17, 65)), (5, 1), (5, 100), (3, 3072)])
def test_gradients(rows, width, dtype, device, generator):
    x, residual, weight = inputs(rows, width, dtype, device, generator)
    norm, total = gradient_ops("triton"), gradient_ops("torch")
    for ours, torchs, exact, tensors in zip(norm, total, EXACT, [(x, weight), (x, residual, weight)], strict=True):
        check_gradients(ours, torchs, exact, tensors, generator, GRADIENT_ATOL[dtype])


@pytest.mark.parametrize("programs", [1, 3])
def test_gradient_of_the_weight_is_summed_over_programs(programs, device, generator, monkeypatch):
    """Programs that take several blocks of rows, of which the last is ragged; eps = 0 bears rows that are not there."""
    monkeypatch.setattr(rms_norm_triton, "BACKWARD_PROGRAMS", programs)
    monkeypatch.setitem(rms_norm_triton.BACKWARD_SETTINGS, 64, (4, 4))
    tensors = inputs(63, 64, torch.float32, device, generator)[::2]
    op, plain = (lambda x, w, b=b: ops.rms_norm(x, w, 0.0, backend=b) for b in ("triton", "torch"))
    exact = lambda x, w: F.rms_norm(x, (64,), w, 0.0)  # noqa: E731
    check_gradients(op, plain, exact, tensors, generator, GRADIENT_ATOL[torch.float32])
    first, again = (gradients(op, tensors, [torch.ones(63, 64, device=device)]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_finite_differences(device, generator):
    x, residual, weight = inputs(3, 24, torch.float32, device, generator)
    norm, total = gradient_ops("triton")
    check_finite_differences(norm, (x, weight), generator, step=1e-2, rtol=1e-3)
    check_finite_differences(total, (x, residual, weight), generator, step=1e-2, rtol=1e-3)


def test_gradients_through_views_and_expanded_ones(device, generator):
    """Rows of a wider buffer; a gradient of one number, expanded; weight alone or input alone; one output unused."""
    wide, residual, weight = inputs(17, 192, torch.float32, device, generator)
    results = []
    for backend in ("triton", "torch"):
        buffer, w = wide.clone().requires_grad_(), weight[:64].clone().requires_grad_()
        x = buffer[:, 64:128]
        ops.rms_norm(x.detach(), w, EPS, backend=backend).sum().backward()
        ops.rms_norm(x, w.detach(), EPS, backend=backend).sum().backward()
        ops.rms_norm(x.unflatten(1, (4, 16)), w[:16], EPS, backend=backend).mT.mul(2).mT.sum().backward()
        ops.add_rms_norm(x, residual[:, :64], w, EPS, backend=backend)[0].sum().backward()
        ops.add_rms_norm(x, residual[:, :64], w, EPS, backend=backend)[1].sum().backward()
        results.append((buffer.grad, w.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_gradients_under_compile(device, generator):
    x, residual, weight = inputs(17, 64, torch.float32, device, generator)
    norm, total = gradient_ops("triton")
    for op, tensors in [(norm, (x, weight)), (total, (x, residual, weight))]:
        seeds = [residual] if op is norm else [residual, x]
        got, expected = compiled_gradients(op, tensors, seeds), gradients(op, tensors, seeds)
        torch.testing.assert_close(got, expected)


def test_a_gradient_of_a_gradient_is_refused(device, generator):
    x, _, weight = (t.requires_grad_() for t in inputs(3, 64, torch.float32, device, generator))
    y = ops.rms_norm(x, weight, EPS, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.gpu
def test_gradients_of_a_long_batch(device, generator):
    x, residual, weight = inputs(8192, 3072, torch.bfloat16, device, generator)
    norm, total = gradient_ops("triton"), gradient_ops("torch")
    for ours, torchs, exact, tensors in zip(norm, total, EXACT, [(x, weight), (x, residual, weight)], strict=True):
        check_gradients(ours, torchs, exact, tensors, generator)


# ------------------------------------------------------------------------------------------------------ on a card


@pytest.mark.gpu
def test_in_a_cuda_graph(device, generator):
    x, residual, weight = inputs(1000, 3072, torch.bfloat16, device, generator)
    op = lambda: ops.add_rms_norm(x, residual, weight, EPS, backend="triton")  # noqa: E731
    for ours, eager in zip(captured(op), op(), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.gpu
def test_beyond_2_31_elements(device):
    x = torch.randn(800_000, 3072, device=device, dtype=torch.bfloat16)  # 2.46e9 elements
    weight = torch.ones(3072, device=device, dtype=torch.bfloat16)
    out = ops.rms_norm(x, weight, EPS, backend="triton")
    torch.testing.assert_close(out[-5:], reference.rms_norm(x[-5:], weight, EPS))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_on_a_device_that_is_not_current(generator):
    x, _, weight = (t.to("cuda:1") for t in inputs(17, 64, torch.float32, "cuda", generator))
    torch.testing.assert_close(ops.rms_norm(x, weight, EPS, backend="triton"), reference.rms_norm(x, weight, EPS))


def inputs(rows, width, dtype, device, generator):
    """x, residual [rows, width], weight [width]."""
    x, residual = torch.randn(2, rows, width, device=device, generator=generator).to(dtype)
    return x, residual, torch.randn(width, device=device, generator=generator).to(dtype)


def references(op, x, weight):
    """At x's dtype, and in float32."""
    return op(x, weight, EPS), op(x.float(), weight.float(), EPS)


def gradient_ops(backend):
    """rms_norm and add_rms_norm of tensors alone."""
    return (
        lambda x, w: ops.rms_norm(x, w, EPS, backend=backend),
        lambda x, r, w: ops.add_rms_norm(x, r, w, EPS, backend=backend),
    )


EXACT = (  # the reference's own statistic is float32
    lambda x, w: F.rms_norm(x, x.shape[-1:], w, EPS),
    lambda x, r, w: (F.rms_norm(x + r, x.shape[-1:], w, EPS), x + r),
)
GRADIENT_ATOL = {torch.float32: 1e-6, torch.float16: 0.0, torch.bfloat16: 0.0}  # measured
