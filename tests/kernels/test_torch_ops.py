"""What runs without Triton, against the specification: values, and gradients where there are any."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlm2vec_kernels import reference, torch_ops
from tests.kernels.kernel_cases import cumulated, gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}  # of the largest value, at least of 1
EPS = 1e-5

seeds = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))
dtypes = st.sampled_from(DTYPES)
few = settings(max_examples=40, deadline=None)

# --------------------------------------------------------------------------------------------------------- attention

lengths = st.one_of(st.integers(0, 6), st.sampled_from([1, 5, 33, 140]))
pairs = st.tuples(lengths, st.sampled_from(["all", "one", "none", "fewer", "more"]))
QUERIES = {"all": lambda n: n, "one": lambda n: 1, "none": lambda n: 0, "fewer": lambda n: (n + 1) // 2,
           "more": lambda n: n + 2}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    sequences=st.lists(pairs, max_size=7),
    same=st.booleans(),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    rest=st.integers(0, 2),
    dtype=dtypes,
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    generator=seeds,
)
def test_attention(sequences, same, heads, rest, dtype, causal, scale, generator):
    """Lengths that are equal and that are not, none, one query and all, more queries than keys, rows beyond the end."""
    k_lengths = [n for n, _ in sequences]
    q_lengths = k_lengths if same else [QUERIES[kind](n) for n, kind in sequences]
    N, Nkv = heads
    randn = lambda T, heads: torch.randn(T + rest, heads, 16, generator=generator).to(dtype)  # noqa: E731
    tensors = randn(sum(q_lengths), N), randn(sum(k_lengths), Nkv), randn(sum(k_lengths), Nkv)
    options = {"causal": causal, "scale": scale, "cu_seqlens_q": None if same else cumulated(q_lengths)}
    ours, exact = (
        lambda q, k, v, op=op: op(q, k, v, cumulated(k_lengths), **options)
        for op in (torch_ops.attention, reference.attention)
    )
    out, expected = ours(*tensors), exact(*(x.double() for x in tensors))
    assert out.is_contiguous() and out.dtype == dtype
    assert_close(out, expected)
    if not any(q and k for q, k in zip(q_lengths, k_lengths, strict=True)):
        return
    dout = torch.randn(out.shape, generator=generator).to(dtype)
    wide = gradients(exact, [x.double() for x in tensors], [dout.double()])
    for gradient, expected in zip(gradients(ours, tensors, [dout]), wide, strict=True):
        assert_close(gradient, expected)


def assert_close(ours, exact):
    assert ours.shape == exact.shape
    if ours.numel():
        error = (ours.double() - exact).abs().max().item() / max(1.0, exact.abs().max().item())
        assert error <= TOLERANCE[ours.dtype], f"{error:.2e} of the largest value ({ours.dtype})"


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_attention(dtype):
    """Views of one buffer, as the model has them."""
    qkv = torch.randn(20, 8 * 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = qkv.unflatten(1, (8, 16)).split([4, 2, 2], dim=1)
    cu_seqlens = cumulated([7, 7, 6])
    exact = reference.attention(*(x.double() for x in (q, k, v)), cu_seqlens, causal=True)
    assert_close(torch_ops.attention(q, k, v, cu_seqlens, causal=True), exact)


# -------------------------------------------------------------------------------------------------------- the others


def make(name, R, D, dtype, generator):
    """Arguments of an op: R rows, D columns."""
    randn = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    vector = lambda: randn(D)  # noqa: E731
    return {
        "layer_norm": lambda: (randn(R, D), vector(), vector()),
        "add_layer_norm": lambda: (randn(R, D), randn(R, D), vector(), vector()),
        "layer_norm_shift_": lambda: (randn(R, D), vector(), vector(), vector()),
        "linear_add_": lambda: (randn(R, 24), randn(R, D), randn(24, D) / D**0.5, randn(24)),
        "quick_gelu": lambda: (randn(R, D), vector()),
        "linear_quick_gelu": lambda: (randn(R, D), randn(24, D) / D**0.5, randn(24)),
        "rope_": lambda: (randn(R, 4, 2 * D), randn(R, 2, 2 * D), randn(R, D), randn(R, D)),
    }[name]()


OWN = ["layer_norm", "add_layer_norm", "layer_norm_shift_", "linear_add_", "quick_gelu", "linear_quick_gelu", "rope_"]


def test_every_op_is_tested_here_or_is_the_specification():
    same = {name for name in torch_ops.__all__ if getattr(torch_ops, name) is getattr(reference, name, None)}
    assert {*same, "attention", *OWN} == set(torch_ops.__all__)


@few
@given(name=st.sampled_from(OWN), R=st.integers(0, 40), D=st.integers(1, 70), dtype=dtypes, generator=seeds)
def test_values(name, R, D, dtype, generator):
    tensors = make(name, R, D, dtype, generator)
    specified, ours = pair(name)
    for out, exact in zip(ours(*tensors), specified(*(x.double() for x in tensors)), strict=True):
        assert_close(out, exact)


@few
@given(name=st.sampled_from([name for name in OWN if not name.endswith("_")]), R=st.integers(1, 20),
       D=st.integers(8, 70), dtype=dtypes, generator=seeds)  # fmt: skip
def test_gradients(name, R, D, dtype, generator):
    """At least 8 columns: of fewer the variance may be next to nothing, by which the norms' gradients are divided."""
    tensors = make(name, R, D, dtype, generator)
    specified, ours = pair(name)
    dout = [torch.randn(y.shape, generator=generator).to(dtype) for y in ours(*tensors)]
    wide = gradients(specified, [x.double() for x in tensors], [d.double() for d in dout])
    for gradient, exact in zip(gradients(ours, tensors, dout), wide, strict=True):
        assert_close(gradient, exact)


@pytest.mark.parametrize("bias", [True, False])
def test_optional_biases(bias):
    generator = torch.Generator().manual_seed(0)
    residual, x, weight, b = make("linear_add_", 5, 24, torch.float32, generator)
    b = b if bias else None
    expected = reference.linear_add(residual, x, weight, b)
    torch.testing.assert_close(torch_ops.linear_add_(residual, x, weight, b), expected)
    torch.testing.assert_close(torch_ops.quick_gelu(x, b), reference.quick_gelu(x, b))


def pair(name):
    """The specification of an op and the op, of tensors to a tuple of them; one with an underscore gets copies."""
    eps = (EPS,) if "norm" in name else ()
    specification, op = getattr(reference, name.removesuffix("_")), getattr(torch_ops, name)

    def ours(*tensors):
        return as_tuple(op(*(x.clone() for x in tensors) if name.endswith("_") else tensors, *eps))

    return lambda *tensors: as_tuple(specification(*tensors, *eps)), ours


def as_tuple(outs):
    return outs if isinstance(outs, tuple) else (outs,)
