"""linear_quick_gelu and linear_silu_mul: the fused kernels, by pointers and by TMA, against the reference."""

import pytest
import torch

from minivlm2vec_kernels import linear_triton, ops, reference
from minivlm2vec_kernels.linear_triton import Tiles
from tests.kernels.kernel_cases import DTYPES, captured, compiled

SMALL = Tiles(32, 32, 32, 4, 2, 1, GROUP=2)
ATOL = {torch.float32: 4e-6, torch.float16: 0.0, torch.bfloat16: 0.0}  # measured: sums in another order
SIZES = [(0, 64, 32), (1, 32, 32), (17, 64, 48), (130, 160, 72), (64, 224, 32)]  # M, N, K

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_quick_gelu_tiles(M, N, K, tma, dtype, device, generator, assert_error_at_most):
    x, weight, bias = inputs(M, N, K, dtype, device, generator)
    out = x.new_empty(M, N)
    linear_triton.run_quick_gelu(x, weight, out, bias, SMALL, tma)
    assert_error_at_most(out, *references(reference.linear_quick_gelu, x, weight, bias), atol=ATOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_silu_mul_tiles(M, N, K, tma, dtype, device, generator, assert_error_at_most):
    x, weight, _ = inputs(M, N, K, dtype, device, generator)
    out = x.new_empty(M, N // 2)
    linear_triton.run_silu_mul(x, weight, out, SMALL, tma)
    assert_error_at_most(out, *references(reference.linear_silu_mul, x, weight), atol=ATOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 6, 5), (17, 100, 33), (145, 130, 96)])
@pytest.mark.parametrize("fused", [True, False, None])
def test_ops_of_any_size(M, N, K, fused, dtype, device, generator, assert_error_at_most):
    x, weight, bias = inputs(M, N, K, dtype, device, generator)
    out = ops.linear_quick_gelu(x, weight, bias, fused=fused, backend="triton")
    assert_error_at_most(out, *references(reference.linear_quick_gelu, x, weight, bias), atol=ATOL[dtype])
    out = ops.linear_silu_mul(x, weight, fused=fused, backend="triton")
    assert_error_at_most(out, *references(reference.linear_silu_mul, x, weight), atol=ATOL[dtype])


def test_strided_rows_of_more_dimensions(device, generator):
    x, weight, bias = inputs(12, 64, 96, torch.float32, device, generator)
    x, weight = x.view(3, 4, 96)[..., 32:64], weight[:, 32:64]
    out = ops.linear_quick_gelu(x, weight, bias, fused=True, backend="triton")
    torch.testing.assert_close(out, reference.linear_quick_gelu(x, weight, bias))
    out = ops.linear_silu_mul(x, weight, fused=True, backend="triton")
    torch.testing.assert_close(out, reference.linear_silu_mul(x, weight))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs a piece of a kernel in the interpreter")
def test_every_tile_is_visited_once():
    """The grouped order is a permutation, also where rows of tiles do not fill the last group."""
    for m_tiles, n_tiles, group in [(1, 5, 8), (7, 3, 4), (16, 16, 8), (9, 1, 2)]:
        seen = [grouped(t, m_tiles, n_tiles, group) for t in range(m_tiles * n_tiles)]
        assert sorted(seen) == [(m, n) for m in range(m_tiles) for n in range(n_tiles)]


def grouped(tile, m_tiles, n_tiles, group):
    """linear_triton._tile_of in Python, run by the interpreter's own code."""
    m, n = linear_triton._tile_of.fn(tile, m_tiles, n_tiles, 1, 1, group)
    return int(m), int(n)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[:, :16], w, b), r"x has 16 features, weight has shape \(64, 32\)"),
        (lambda x, w, b: (x.half(), w, b), "x is torch.float16, weight is torch.float32"),
        (lambda x, w, b: (x, w, b[:8]), r"bias must have shape \(64,\), got \(8,\)"),
        (lambda x, w, b: (x, w.repeat(1, 2)[:, ::2], b), "weight: the last dimension must have stride 1"),
    ],
)
def test_errors(change, message, device, generator):
    x, weight, bias = change(*inputs(4, 64, 32, torch.float32, device, generator))
    with pytest.raises(ValueError, match=message):
        ops.linear_quick_gelu(x, weight, bias, fused=True, backend="triton")


def test_gate_up_needs_two_halves(device, generator):
    x, weight, _ = inputs(4, 63, 32, torch.float32, device, generator)
    with pytest.raises(ValueError, match="even number of rows, got 63"):
        ops.linear_silu_mul(x, weight, fused=True, backend="triton")


def test_large_products_of_16_bits_are_fused_by_default(monkeypatch, device):
    monkeypatch.setattr(linear_triton, "FUSED_ROWS", 8)
    for rows, dtype, fused in [(7, torch.half, False), (8, torch.half, True), (8, torch.float, False)]:
        assert linear_triton.fuses_quick_gelu(torch.empty(rows, 4, dtype=dtype, device=device)) is fused


def test_under_compile(device, generator):
    x, weight, bias = inputs(17, 64, 32, torch.float32, device, generator)
    out = compiled(lambda: ops.linear_quick_gelu(x, weight, bias, fused=True, backend="triton"))
    torch.testing.assert_close(out, reference.linear_quick_gelu(x, weight, bias))
    out = compiled(lambda: ops.linear_silu_mul(x, weight, fused=True, backend="triton"))
    torch.testing.assert_close(out, reference.linear_silu_mul(x, weight))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "path"), list(linear_triton.CANDIDATES))
def test_every_candidate(kernel, path, dtype, device, generator, assert_error_at_most):
    x, weight, bias = inputs(1000, 3072, 1024, dtype, device, generator)
    if path == "tma" and not linear_triton.can_use_tma(x):
        pytest.skip("no TMA on this card")
    run = linear_triton.run_quick_gelu if kernel == "quick_gelu" else linear_triton.run_silu_mul
    op = reference.linear_quick_gelu if kernel == "quick_gelu" else reference.linear_silu_mul
    rest = (bias,) if kernel == "quick_gelu" else ()
    expected = references(op, x, weight, *rest)
    for tiles in linear_triton.CANDIDATES[kernel, path]:
        out = torch.full_like(expected[0], float("nan"))
        run(x, weight, out, *rest, tiles, path == "tma")
        assert_error_at_most(out, *expected)


@pytest.mark.gpu
def test_in_a_cuda_graph(device, generator):
    x, weight, bias = inputs(2000, 4096, 1024, torch.bfloat16, device, generator)
    op = lambda: ops.linear_quick_gelu(x, weight, bias, fused=True, backend="triton")  # noqa: E731
    assert torch.equal(captured(op), op())
    op = lambda: ops.linear_silu_mul(x, weight, fused=True, backend="triton")  # noqa: E731
    assert torch.equal(captured(op), op())


@pytest.mark.gpu
def test_beyond_2_31_elements(device, generator):
    x, weight, bias = inputs(600_000, 4096, 64, torch.bfloat16, device, generator)  # 2.46e9 elements out
    out = ops.linear_quick_gelu(x, weight, bias, fused=True, backend="triton")
    torch.testing.assert_close(out[-5:], reference.linear_quick_gelu(x[-5:], weight, bias))


def inputs(M, N, K, dtype, device, generator):
    """x [M, K], weight [N, K] of rows about as long as one, bias [N]."""
    x = torch.randn(M, K, device=device, generator=generator).to(dtype)
    weight = (torch.randn(N, K, device=device, generator=generator) / K**0.5).to(dtype)
    return x, weight, torch.randn(N, device=device, generator=generator).to(dtype)


def references(op, *tensors):
    """At the tensors' dtype, and in float64."""
    return op(*tensors), op(*(t.double() for t in tensors))
