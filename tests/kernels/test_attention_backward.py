"""Attention's gradient against its reference's: in the interpreter, and on a card with -m gpu."""

import functools

import pytest
import torch

from minivlm2vec_kernels import attention, attention_backward_triton
from minivlm2vec_kernels.attention_triton import Tile
from tests.kernels.kernel_cases import (
    check_finite_differences,
    check_gradients,
    compiled_gradients,
    cumulated,
    gradients,
)
from tests.kernels.test_attention import HEAD_DIMS, packed

BLOCKS = {"even": (32, 32), "narrow": (32, 16), "wide": (16, 32)}  # rows of a tile, and of a block that it meets

pytestmark = pytest.mark.usefixtures("poison_empty", "large_tiles")


def op(cu_q, cu_k, causal, backend="triton", scale=None):
    """attention of q, k, v alone."""
    fewer = {} if cu_q is cu_k else {"cu_seqlens_q": cu_q, "max_seqlen_q": longest(cu_q)}
    return functools.partial(
        attention, cu_seqlens=cu_k, max_seqlen=longest(cu_k), causal=causal, scale=scale, backend=backend, **fewer
    )


def longest(cu):
    return cu.diff().max().item()


def check(q, k, v, cu_q, cu_k, causal, generator, scale=None):
    plain = op(cu_q, cu_k, causal, "torch", scale)
    check_gradients(op(cu_q, cu_k, causal, "triton", scale), plain, plain, [q, k, v], generator)


# ---------------------------------------------------------------------------- correctness, in the interpreter


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("H", "causal"), [(96, True), (64, False)])
def test_awkward_lengths_of_grouped_heads(H, causal, dtype, generator):
    check(*packed([1, 63, 2, 17, 65], 2, 1, H, dtype, generator), causal, generator)


@pytest.mark.parametrize("H", HEAD_DIMS)
def test_every_head_dim(H, generator):
    check(*packed([33, 1], 1, 1, H, torch.float16, generator), True, generator)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("causal", [True, False])
def test_rests_beside_whole_blocks(causal, blocks, generator, monkeypatch):
    """Diagonals that cut blocks anywhere; last blocks that are full, of one row, of one row less."""
    outer, inner = BLOCKS[blocks]
    for pass_, rows in [("dq", (outer, inner)), ("dkv", (inner, outer))]:
        monkeypatch.setitem(attention_backward_triton.TILES, pass_, {256: Tile(*rows, 4, 1)})
    check(*packed([32, 33, 31], 1, 1, 16, torch.float16, generator), causal, generator)


@pytest.mark.parametrize("q_lengths", [[1, 1, 1], [5, 1, 70], [30, 2, 0]])
@pytest.mark.parametrize("causal", [True, False])
def test_fewer_queries_than_keys(causal, q_lengths, generator):
    """The pruned last layer and shared prefixes; queries that see no key; keys that no query sees."""
    inputs = packed([100, 1, 70], 2, 1, 48, torch.float16, generator, q_lengths)
    check(*inputs, causal, generator)


@pytest.mark.parametrize("N, Nkv", [(4, 2), (3, 3)])
def test_grouped_query_heads(N, Nkv, generator):
    check(*packed([20, 1, 33], N, Nkv, 32, torch.float32, generator), True, generator)


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_scale(scale, generator):
    check(*packed([40], 1, 1, 32, torch.float32, generator), True, generator, scale)


def test_large_scores_do_not_overflow(generator):
    q, k, v, cu, _ = packed([70], 1, 1, 32, torch.float32, generator)
    check(30 * q, 30 * k, v, cu, cu, True, generator)


@pytest.mark.parametrize("causal", [True, False])
def test_finite_differences(causal, generator):
    q, k, v, cu, _ = packed([5, 1], 2, 1, 16, torch.float32, generator)
    check_finite_differences(op(cu, cu, causal), [q, k, v], generator, step=1e-2, rtol=1e-3)


def test_through_views_of_one_buffer(generator):
    """The gradient of qkv, of which q, k and v are views; out's own is expanded, or has its heads before its tokens."""
    qkv = torch.randn(50, 4 * 32, device=generator.device, generator=generator)
    cu, results = cumulated([20, 30], generator.device), []
    for backend in ("triton", "torch"):
        leaf = qkv.clone().requires_grad_()
        q, k, v = (x.unflatten(1, (-1, 32)) for x in leaf.split([64, 32, 32], dim=1))
        y = op(cu, cu, True, backend)(q, k, v)
        assert y.requires_grad
        (y.sum() + y.transpose(0, 1).contiguous().square().sum()).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_sequence_is_the_same_alone_and_in_any_pack(causal, generator):
    """Bit for bit: neighbours, even NaN ones, do not reach its gradient."""
    q, k, v, cu, _ = packed([20, 70, 33], 2, 1, 32, torch.float16, generator)
    seeds = torch.randn(q.shape, device=q.device, generator=generator).half()
    alone_cu = cumulated([70], q.device)
    alone = gradients(op(alone_cu, alone_cu, causal), [x[20:90] for x in (q, k, v)], [seeds[20:90]])
    for x in (q, k, v, seeds):
        x[:20], x[90:] = float("nan"), float("nan")
    whole = gradients(op(cu, cu, causal), [q, k, v], [seeds])
    assert all(torch.equal(a, b[20:90]) for a, b in zip(alone, whole, strict=True))


def test_rows_beyond_the_last_sequence_get_no_gradient(generator):
    q, k, v, _, _ = packed([20, 5], 2, 1, 32, torch.float32, generator)
    cu = cumulated([20], q.device)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = op(cu, cu, True)(*leaves)
    assert (y[20:] == 0).all()  # a NaN there would become one in the gradient of what y is multiplied with
    for gradient in torch.autograd.grad(y.sum(), leaves):
        assert (gradient[20:] == 0).all() and (gradient[:20] != 0).any()


def test_no_tokens(generator):
    q, k, v, cu_q, cu_k = packed([0, 0], 2, 2, 64, torch.float32, generator)
    assert [g.shape for g in gradients(op(cu_q, cu_k, True), [q, k, v], [q])] == [q.shape, k.shape, v.shape]


def test_gradient_of_one_of_three(generator):
    q, k, v, cu, _ = packed([17, 2], 1, 1, 32, torch.float32, generator)
    all_of_them = gradients(op(cu, cu, True), [q, k, v], [v])
    for i in range(3):
        leaves = [q, k, v]
        leaves[i] = leaves[i].detach().requires_grad_()
        (alone,) = torch.autograd.grad(op(cu, cu, True)(*leaves), leaves[i], v)
        assert torch.equal(alone, all_of_them[i])


def test_under_compile(generator):
    q, k, v, cu, _ = packed([30, 1, 17], 2, 1, 96, torch.float32, generator)
    attend = op(cu, cu, True)
    doubled = lambda q, k, v: 2 * attend(q, k, v)  # noqa: E731
    seeds = [torch.randn(q.shape, device=q.device, generator=generator)]
    got, expected = compiled_gradients(doubled, [q, k, v], seeds), gradients(doubled, [q, k, v], seeds)
    torch.testing.assert_close(got, expected)


def test_forward_is_the_same_with_a_gradient(generator):
    q, k, v, cu, _ = packed([65, 1, 30], 2, 1, 96, torch.float16, generator)
    expected = op(cu, cu, True)(q, k, v)
    assert torch.equal(op(cu, cu, True)(q.detach().requires_grad_(), k, v), expected)


# ------------------------------------------------------------------------------------------------------ on a card


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("H", HEAD_DIMS)
def test_gpu_head_dims(H, causal, dtype, generator):
    check(*packed([777, 1, 30, 577, 64], 8, 8, H, dtype, generator), causal, generator)
    check(*packed([2529, 17, 1000], 8, 2, H, dtype, generator), causal, generator)


@pytest.mark.gpu
def test_gpu_long_packs(generator):
    check(*packed([4096, 1, 2048], 2, 2, 96, torch.bfloat16, generator), True, generator)
    check(*packed([577] * 40, 16, 16, 64, torch.bfloat16, generator), False, generator)
    check(*packed([30] * 64, 32, 32, 96, torch.bfloat16, generator), True, generator)


@pytest.mark.gpu
@pytest.mark.parametrize("q_lengths", [[1, 1, 1], [500, 1, 20]])
def test_gpu_fewer_queries_than_keys(q_lengths, generator):
    check(*packed([2529, 1, 777], 8, 8, 96, torch.bfloat16, generator, q_lengths), True, generator)


@pytest.mark.gpu
def test_gpu_the_same_bits_at_every_run(generator):
    q, k, v, cu, _ = packed([777, 1, 577], 8, 2, 96, torch.bfloat16, generator)
    seeds = [torch.randn(q.shape, device=q.device, generator=generator).bfloat16()]
    first, again = (gradients(op(cu, cu, True), [q, k, v], seeds) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
