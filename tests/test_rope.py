"""rope: the kernel, in place on views of one qkv buffer, against the reference."""

import pytest
import torch

from minivlm2vec_kernels import ops, reference
from tests.kernel_cases import DTYPES, captured, compiled

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
    q, k, v = views(qkv.clone(), N, Nkv, H)
    q0, k0, v0 = views(qkv, N, Nkv, H)
    out = ops.rope(q, k, cos, sin, backend="triton")
    same = reference.rope(q0, k0, cos, sin)
    exact = reference.rope(q0.float(), k0.float(), cos.to(dtype).float(), sin.to(dtype).float())
    for ours, torchs, best in zip(out, same, exact, strict=True):
        assert_error_at_most(ours, torchs, best, atol=ATOL[dtype])
    assert torch.equal(v, v0)


def test_writes_over_its_arguments(device, generator):
    qkv, cos, sin = inputs(5, 4, 2, 96, torch.float32, device, generator)
    q, k, _ = views(qkv, 4, 2, 96)
    expected = reference.rope(q, k, cos, sin)
    out = ops.rope(q, k, cos, sin, backend="triton")
    for returned, argument, torchs in zip(out, (q, k), expected, strict=True):
        assert returned.data_ptr() == argument.data_ptr()
        torch.testing.assert_close(argument, torchs)


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
        q, k = ops.rope(q, k, cos, sin, backend="triton")
        return q + 0, k + 0, v + 0, buffer

    q, k, v, buffer = compiled(rotate)
    torch.testing.assert_close((q, k), expected)
    torch.testing.assert_close((q, k, v), views(buffer, 4, 2, 96))


@pytest.mark.gpu
def test_in_a_cuda_graph(device, generator):
    qkv, cos, sin = inputs(1000, 32, 32, 96, torch.bfloat16, device, generator)
    expected = reference.rope(*views(qkv, 32, 32, 96)[:2], cos, sin)

    def rotate():
        q, k, _ = views(qkv.clone(), 32, 32, 96)
        return tuple(x.clone() for x in ops.rope(q, k, cos, sin, backend="triton"))

    for ours, torchs in zip(captured(rotate), expected, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.gpu
def test_beyond_2_31_elements(device):
    T, N, H = 250_000, 32, 96
    qkv = torch.randn(T, 3 * N * H, device=device, dtype=torch.bfloat16)  # 2.3e9 elements
    cos, sin = torch.randn(2, T, H // 2, device=device)
    q, k, _ = views(qkv, N, N, H)
    expected = reference.rope(q[-5:], k[-5:], cos[-5:], sin[-5:])
    q, k = ops.rope(q, k, cos, sin, backend="triton")
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
