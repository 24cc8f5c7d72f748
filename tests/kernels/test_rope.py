"""rope and rope_: the kernel on views of one qkv buffer, which rope_ writes over, against the reference."""

import warnings

import pytest
import torch

from minivlm2vec_kernels import ops, reference
from tests.kernels.kernel_cases import (
    DTYPES,
    captured,
    check_finite_differences,
    check_gradients,
    compiled,
    compiled_gradients,
    gradients,
)

HEADS = [(32, 32), (8, 2), (6, 3), (1, 1), (8, 0), (0, 2)]  # query, key-value
HEAD_DIMS = [32, 48, 64, 80, 96, 128]
ATOL = {
    torch.float32: 1e-6,
    torch.float16: 0.0,
    torch.bfloat16: 0.0,
}  # measured: torch may be exact in float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "N", "Nkv", "H"),
    [
        *((17, *heads, 96) for heads in HEADS),
        *((5, 4, 2, H) for H in HEAD_DIMS),
        *((T, 2, 1, 96) for T in (0, 1, 63)),
    ],
)
def test_rope(T, N, Nkv, H, dtype, device, generator, assert_error_at_most):
    qkv, cos, sin = inputs(T, N, Nkv, H, dtype, device, generator)
    q, k, _ = views(qkv, N, Nkv, H)
    out = ops.rope(q, k, cos, sin, backend="triton")
    same = reference.rope(q, k, cos, sin)
    exact = reference.rope(q.float(), k.float(), cos.to(dtype).float(), sin.to(dtype).float())
    for ours, torchs, best in zip(out, same, exact, strict=True):
        assert ours.is_contiguous()
        assert_error_at_most(ours, torchs, best, atol=ATOL[dtype])
    buffer = qkv.clone()
    in_place = ops.rope_(*views(buffer, N, Nkv, H)[:2], cos, sin, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(in_place, out, strict=True))
    written = views(buffer, N, Nkv, H)
    assert all(torch.equal(a, b) for a, b in zip(written, (*out, views(qkv, N, Nkv, H)[2]), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, c, s: (q, k, c[:, :24], s), r"cos must have shape \(5, 48\), got \(5, 24\)"),
        (lambda q, k, c, s: (q, k, c, s[:4]), r"sin must have shape \(5, 48\), got \(4, 48\)"),
        (lambda q, k, c, s: (q, k[:4], c, s), r"k must have shape \(5, 2, 96\), got \(4, 2, 96\)"),
        (lambda q, k, c, s: (q[..., :95], k[..., :95], c, s), "even, got 95"),
        (lambda q, k, c, s: (q.transpose(1, 2), k.transpose(1, 2), c[:, :2], s[:, :2]), "stride 1"),
    ],
)
def test_errors(change, message, device, generator):
    qkv, cos, sin = inputs(5, 4, 2, 96, torch.float32, device, generator)
    q, k, _ = views(qkv, 4, 2, 96)
    if "stride" in message:
        k = q  # transposed, both must have the same head dim
    with pytest.raises(ValueError, match=message):
        ops.rope(*change(q, k, cos, sin), backend="triton")


def test_under_compile(device, generator):
    """The compiler must learn that q and k are written, though they are views of one buffer."""
    qkv, cos, sin = inputs(17, 4, 2, 96, torch.float32, device, generator)
    expected = reference.rope(*views(qkv, 4, 2, 96)[:2], cos, sin)

    def rotate():
        buffer = qkv * 1.0
        q, k, v = views(buffer, 4, 2, 96)
        q, k = ops.rope_(q, k, cos, sin, backend="triton")
        return q + 0, k + 0, v + 0, buffer

    q, k, v, buffer = compiled(rotate)
    torch.testing.assert_close((q, k), expected)
    torch.testing.assert_close((q, k, v), views(buffer, 4, 2, 96))


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "N", "Nkv", "H"), [(17, 4, 2, 96), (1, 1, 1, 64), (65, 3, 1, 32), (5, 2, 0, 48)])
def test_gradients_by_the_packed_buffer(T, N, Nkv, H, dtype, device, generator):
    """q and k turned, v as it is: all views of one buffer, whose gradient gathers theirs."""
    qkv, cos, sin = inputs(T, N, Nkv, H, dtype, device, generator)
    cos, sin = 1.5 * cos.to(dtype), 1.5 * sin.to(dtype)  # LongRoPE scales them: the transpose is not the inverse
    ours, torchs = (turned(cos, sin, N, Nkv, H, backend) for backend in ("triton", "torch"))
    exact = turned(cos.double(), sin.double(), N, Nkv, H, "torch")
    check_gradients(ours, torchs, exact, [qkv], generator, ATOL[dtype])


def test_finite_differences(device, generator):
    """Linear, so that a wide step is exact but for rounding, and float32 enough for torch's own check."""
    qkv, cos, sin = inputs(5, 2, 1, 16, torch.float32, device, generator)
    check_finite_differences(turned(cos, sin, 2, 1, 16, "triton"), [qkv], generator, step=0.5, rtol=1e-5)
    qkv, cos, sin = inputs(2, 1, 1, 4, torch.float32, device, generator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input #.* is not a double precision")
        op = turned(cos, sin, 1, 1, 4, "triton")
        assert torch.autograd.gradcheck(op, qkv.requires_grad_(), eps=0.5, atol=1e-5, rtol=0)


def test_gradients_where_q_is_used_before_and_after(device, generator):
    qkv, cos, sin = inputs(5, 4, 2, 96, torch.float32, device, generator)
    leaf = qkv.clone().requires_grad_()
    q, k, _ = views(leaf * 1.0, 4, 2, 96)
    turned_q, turned_k = ops.rope(q, k, cos, sin, backend="triton")
    (turned_q.sum() + 2 * turned_k[:, :1].sum() + q.sum()).backward()  # expanded gradients
    expected = qkv.clone().requires_grad_()
    q, k, _ = views(expected, 4, 2, 96)
    turned_q, turned_k = reference.rope(q, k, cos, sin)
    (turned_q.sum() + 2 * turned_k[:, :1].sum() + q.sum()).backward()
    torch.testing.assert_close(leaf.grad, expected.grad)


def test_one_of_two_needs_a_gradient(device, generator):
    """As behind a frozen projection of queries, and where queries are turned alone."""
    qkv, cos, sin = inputs(5, 4, 4, 32, torch.float32, device, generator)
    q, k, _ = (x.contiguous() for x in views(qkv, 4, 4, 32))
    for number in (0, 1):
        leaves = [q.clone(), k.clone()]
        leaves[number].requires_grad_()
        out = ops.rope(*leaves, cos, sin, backend="triton")
        (gradient,) = torch.autograd.grad(out[number].square().sum(), leaves[number])
        torch.testing.assert_close(gradient, 2 * (q, k)[number])  # a rotation keeps the length


def test_gradients_by_cos_and_sin_are_refused(device, generator):
    qkv, cos, sin = inputs(5, 4, 2, 96, torch.float32, device, generator)
    with pytest.raises(RuntimeError, match="no backward pass"):
        ops.rope(*views(qkv, 4, 2, 96)[:2], cos.requires_grad_(), sin, backend="triton")


def test_gradients_under_compile(device, generator):
    qkv, cos, sin = inputs(17, 4, 2, 96, torch.float32, device, generator)
    seeds = views(torch.randn(qkv.shape, device=device, generator=generator), 4, 2, 96)
    got = compiled_gradients(turned(cos, sin, 4, 2, 96, "triton"), [qkv], seeds)
    torch.testing.assert_close(got, gradients(turned(cos, sin, 4, 2, 96, "torch"), [qkv], seeds))


@pytest.mark.gpu
def test_gradients_of_a_long_batch(device, generator):
    qkv, cos, sin = inputs(8192, 32, 32, 96, torch.bfloat16, device, generator)
    cos, sin = cos.bfloat16(), sin.bfloat16()
    ours, torchs = (turned(cos, sin, 32, 32, 96, backend) for backend in ("triton", "torch"))
    check_gradients(ours, torchs, turned(cos.double(), sin.double(), 32, 32, 96, "torch"), [qkv], generator)


# ------------------------------------------------------------------------------------------------------ on a card


@pytest.mark.gpu
def test_in_a_cuda_graph(device, generator):
    qkv, cos, sin = inputs(1000, 32, 32, 96, torch.bfloat16, device, generator)
    expected = reference.rope(*views(qkv, 32, 32, 96)[:2], cos, sin)

    def rotate():
        q, k, _ = views(qkv.clone(), 32, 32, 96)
        return tuple(x.clone() for x in ops.rope_(q, k, cos, sin, backend="triton"))

    for ours, torchs in zip(captured(rotate), expected, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.gpu
def test_beyond_2_31_elements(device):
    T, N, H = 250_000, 32, 96
    qkv = torch.randn(T, 3 * N * H, device=device, dtype=torch.bfloat16)  # 2.3e9 elements
    cos, sin = torch.randn(2, T, H // 2, device=device)
    q, k, _ = views(qkv, N, N, H)
    expected = reference.rope(q[-5:], k[-5:], cos[-5:], sin[-5:])
    q, k = ops.rope_(q, k, cos, sin, backend="triton")
    torch.testing.assert_close((q[-5:], k[-5:]), expected)


def inputs(T, N, Nkv, H, dtype, device, generator):
    """qkv [T, (N + 2 Nkv) * H]; cos, sin [T, H / 2] float32."""
    qkv = torch.randn(T, (N + 2 * Nkv) * H, device=device, generator=generator).to(dtype)
    angles = torch.randn(T, H // 2, device=device, generator=generator)
    return qkv, angles.cos(), angles.sin()


def views(qkv, N, Nkv, H):
    """q [T, N, H], k, v [T, Nkv, H]."""
    parts = qkv.split([N * H, Nkv * H, Nkv * H], dim=-1)
    return tuple(x.unflatten(-1, (-1, H)) for x in parts)


def turned(cos, sin, N, Nkv, H, backend):
    """qkv -> q and k turned, and v."""

    def op(qkv):
        q, k, v = views(qkv, N, Nkv, H)
        return *ops.rope(q, k, cos, sin, backend=backend), v * 1.0

    return op
