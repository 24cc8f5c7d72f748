"""layer_norm, add_layer_norm and layer_norm_shift_: the kernel against the reference."""

import pytest
import torch

from minivlm2vec_kernels import ops, reference
from tests.kernels.kernel_cases import DTYPES, ROWS, WIDTHS, captured, compiled

EPS = 1e-5
ATOL = {torch.float32: 2e-6, torch.float16: 0.0, torch.bfloat16: 0.0}  # the reference is float32 inside too

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [*((r, 64) for r in ROWS), *((5, w) for w in WIDTHS)])
def test_layer_norm(rows, width, dtype, device, generator, assert_error_at_most):
    x, _, weight, bias = inputs(rows, width, dtype, device, generator)
    out = ops.layer_norm(x, weight, bias, EPS, backend="triton")
    assert_error_at_most(out, *references(reference.layer_norm, x, weight, bias), atol=ATOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [*((r, 64) for r in ROWS), *((5, w) for w in WIDTHS)])
def test_add_layer_norm(rows, width, dtype, device, generator, assert_error_at_most):
    x, residual, weight, bias = inputs(rows, width, dtype, device, generator)
    out, total = ops.add_layer_norm(x, residual, weight, bias, EPS, backend="triton")
    assert torch.equal(total, residual + x)
    assert_error_at_most(out, *references(reference.layer_norm, total, weight, bias), atol=ATOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [*((r, 64) for r in ROWS), *((5, w) for w in WIDTHS)])
def test_layer_norm_shift_(rows, width, dtype, device, generator, assert_error_at_most):
    x, _, weight, bias = inputs(rows, width, dtype, device, generator)
    shift = torch.randn(width, device=device, generator=generator).to(dtype)
    before = x.clone()
    out, shifted = ops.layer_norm_shift_(x, shift, weight, bias, EPS, backend="triton")
    assert torch.equal(x, before + shift) and shifted is x
    assert_error_at_most(out, *references(reference.layer_norm, before, weight, bias), atol=ATOL[dtype])


def test_shift_refuses(device, generator):
    x, _, weight, bias = inputs(5, 64, torch.float32, device, generator)
    with pytest.raises(ValueError, match=r"shift must have shape \(64,\), got \(32,\)"):
        ops.layer_norm_shift_(x, bias[:32], weight, bias, EPS, backend="triton")
    with pytest.raises(ValueError, match="x must be contiguous"):
        ops.layer_norm_shift_(x[:, :32], bias[:32], weight[:32], bias[:32], EPS, backend="triton")


def test_strided_rows(device, generator):
    wide, residual, weight, bias = inputs(17, 192, torch.float32, device, generator)
    x, residual, weight, bias = wide[:, 64:128], residual[:, :64], weight[:64], bias[:64]
    for ours, torchs in zip(
        ops.add_layer_norm(x, residual, weight, bias, EPS, backend="triton"),
        reference.add_layer_norm(x, residual, weight, bias, EPS),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs)


def test_more_than_two_dimensions(device, generator):
    x, _, weight, bias = inputs(12, 64, torch.float32, device, generator)
    out = ops.layer_norm(x.view(3, 4, 64), weight, bias, EPS, backend="triton")
    torch.testing.assert_close(out, reference.layer_norm(x, weight, bias, EPS).view(3, 4, 64))


def test_large_mean_does_not_cancel(device, generator):
    """A mean 1000 times the deviation: E[x^2] - E[x]^2 in float32 would lose the variance."""
    x, _, weight, bias = inputs(5, 1024, torch.float32, device, generator)
    out = ops.layer_norm(x + 1000, weight, bias, EPS, backend="triton")
    exact = reference.layer_norm((x + 1000).double(), weight.double(), bias.double(), EPS)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, r, w, b: (x.t(), r.t(), w, b), "stride 1"),
        (lambda x, r, w, b: (x, r, w[:32], b), r"weight must have shape \(64,\), got \(32,\)"),
        (lambda x, r, w, b: (x, r, w, b[:32]), r"bias must have shape \(64,\), got \(32,\)"),
        (lambda x, r, w, b: (x, r[:1], w, b), r"residual must have shape \(4, 64\), got \(1, 64\)"),
        (lambda x, r, w, b: (x, r.half(), w, b), "residual is torch.float16, x is torch.float32"),
        (lambda *tensors: tuple(t.repeat(*[1] * (t.dim() - 1), 1024) for t in tensors), "65536 elements"),
    ],
)
def test_errors(change, message, device, generator):
    x, residual, weight, bias = change(*inputs(4, 64, torch.float32, device, generator))
    with pytest.raises(ValueError, match=message):
        ops.add_layer_norm(x, residual, weight, bias, EPS, backend="triton")


def test_under_compile(device, generator):
    x, residual, weight, bias = inputs(17, 64, torch.float32, device, generator)
    expected = reference.add_layer_norm(x, residual, weight, bias, EPS)
    out = compiled(lambda: ops.add_layer_norm(x, residual, weight, bias, EPS, backend="triton"))
    torch.testing.assert_close(out, expected)
    z, shifted = compiled(lambda: ops.layer_norm_shift_(x.clone(), bias, weight, bias, EPS, backend="triton"))
    torch.testing.assert_close((z, shifted), (reference.layer_norm(x, weight, bias, EPS), x + bias))
    y = compiled(lambda: ops.layer_norm(x, weight, bias, EPS, backend="triton"))
    torch.testing.assert_close(y, reference.layer_norm(x, weight, bias, EPS))


@pytest.mark.gpu
def test_in_a_cuda_graph(device, generator):
    x, residual, weight, bias = inputs(1000, 3072, torch.bfloat16, device, generator)
    op = lambda: ops.add_layer_norm(x, residual, weight, bias, EPS, backend="triton")  # noqa: E731
    for ours, eager in zip(captured(op), op(), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.gpu
def test_beyond_2_31_elements(device):
    x = torch.randn(2_300_000, 1024, device=device, dtype=torch.bfloat16)  # 2.36e9 elements
    weight, bias = torch.randn(2, 1024, device=device, dtype=torch.bfloat16)
    out = ops.layer_norm(x, weight, bias, EPS, backend="triton")
    torch.testing.assert_close(out[-5:], reference.layer_norm(x[-5:], weight, bias, EPS))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_on_a_device_that_is_not_current(generator):
    x, _, weight, bias = (t.to("cuda:1") for t in inputs(17, 64, torch.float32, "cuda", generator))
    torch.testing.assert_close(
        ops.layer_norm(x, weight, bias, EPS, backend="triton"), reference.layer_norm(x, weight, bias, EPS)
    )


def inputs(rows, width, dtype, device, generator):
    """x, residual [rows, width], weight, bias [width]."""
    x, residual = torch.randn(2, rows, width, device=device, generator=generator).to(dtype)
    weight, bias = torch.randn(2, width, device=device, generator=generator).to(dtype)
    return x, residual, weight, bias


def references(op, x, weight, bias):
    """At x's dtype, and in float32."""
    return op(x, weight, bias, EPS), op(x.float(), weight.float(), bias.float(), EPS)
