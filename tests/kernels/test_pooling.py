"""pool_last_token: the kernel against the reference."""

import pytest
import torch

from minivlm2vec_kernels import ops, reference
from tests.kernels.kernel_cases import DTYPES, WIDTHS, captured, compiled

EPS = 1e-5
ATOL = {torch.float32: 2e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}  # equal roundings, then a float32 sum
LENGTHS = [[1], [2, 1, 1, 17], [63, 577, 1, 1000]]

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("lengths", "width"), [*((n, 384) for n in LENGTHS), *(([2, 1], w) for w in WIDTHS)])
def test_pool_last_token(lengths, width, normalize, dtype, device, generator, assert_error_at_most):
    x, cu_seqlens, weight = inputs(lengths, width, dtype, device, generator)
    out = ops.pool_last_token(x, cu_seqlens, weight, EPS, normalize=normalize, backend="triton")
    same = reference.pool_last_token(x, cu_seqlens, weight, EPS, normalize=normalize)
    exact = reference.pool_last_token(x.float(), cu_seqlens, weight.float(), EPS, normalize=normalize)
    assert_error_at_most(out, same, exact, atol=ATOL[dtype])


def test_a_row_of_zeros_stays_zero(device):
    x, weight = torch.zeros(3, 64, device=device), torch.ones(64, device=device)
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32, device=device)
    assert torch.equal(
        ops.pool_last_token(x, cu_seqlens, weight, EPS, backend="triton"), torch.zeros(1, 64, device=device)
    )


def test_no_sequences(device):
    x, weight = torch.zeros(0, 64, device=device), torch.ones(64, device=device)
    cu_seqlens = torch.zeros(1, dtype=torch.int32, device=device)
    assert ops.pool_last_token(x, cu_seqlens, weight, EPS, backend="triton").shape == (0, 64)


def test_strided_rows_and_int64_lengths(device, generator):
    x, cu_seqlens, weight = inputs([5, 1, 3], 192, torch.float32, device, generator)
    x, weight, cu_seqlens = x[:, 64:128], weight[:64], cu_seqlens.long()
    torch.testing.assert_close(
        ops.pool_last_token(x, cu_seqlens, weight, EPS, backend="triton"),
        reference.pool_last_token(x, cu_seqlens, weight, EPS),
    )


def test_errors(device, generator):
    x, cu_seqlens, weight = inputs([2, 1], 64, torch.float32, device, generator)
    with pytest.raises(ValueError, match=r"norm_weight must have shape \(64,\), got \(32,\)"):
        ops.pool_last_token(x, cu_seqlens, weight[:32], EPS, backend="triton")
    with pytest.raises(ValueError, match="x has no rows, cu_seqlens is of 2 sequences"):
        ops.pool_last_token(x[:0], cu_seqlens, weight, EPS, backend="triton")
    with pytest.raises(ValueError, match="stride 1"):
        ops.pool_last_token(x.repeat(1, 1).t(), cu_seqlens, weight[:3], EPS, backend="triton")


def test_under_compile(device, generator):
    x, cu_seqlens, weight = inputs([5, 1, 3], 64, torch.float32, device, generator)
    out = compiled(lambda: ops.pool_last_token(x, cu_seqlens, weight, EPS, backend="triton"))
    torch.testing.assert_close(out, reference.pool_last_token(x, cu_seqlens, weight, EPS))


@pytest.mark.gpu
def test_in_a_cuda_graph(device, generator):
    x, cu_seqlens, weight = inputs([30] * 64, 3072, torch.bfloat16, device, generator)
    op = lambda: ops.pool_last_token(x, cu_seqlens, weight, EPS, backend="triton")  # noqa: E731
    assert torch.equal(captured(op), op())


@pytest.mark.gpu
def test_beyond_2_31_elements(device):
    x = torch.randn(800_000, 3072, device=device, dtype=torch.bfloat16)  # 2.46e9 elements
    weight = torch.ones(3072, device=device, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 10, 800_000], dtype=torch.int32, device=device)
    out = ops.pool_last_token(x, cu_seqlens, weight, EPS, backend="triton")
    torch.testing.assert_close(out, reference.pool_last_token(x, cu_seqlens, weight, EPS))


def inputs(lengths, width, dtype, device, generator):
    """x [sum of lengths, width], cu_seqlens [len(lengths) + 1], weight [width]."""
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    x = torch.randn(sum(lengths), width, device=device, generator=generator).to(dtype)
    return x, cu_seqlens, torch.randn(width, device=device, generator=generator).to(dtype)
