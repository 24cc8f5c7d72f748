"""The specification itself, against torch's own functions and against other ways to write the same formula."""

import pytest
import torch
import torch.nn.functional as F

from minivlm2vec_kernels import reference
from tests.kernels.kernel_cases import cumulated


@pytest.fixture
def randn():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def query_by_query(q, k, v, cu_q, cu_k, causal):
    group, rows = q.shape[1] // k.shape[1], []
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        for i in range(q0, q1):
            end = k1 - (q1 - 1 - i) if causal else k1
            keys, values = (x[k0:end].repeat_interleave(group, dim=1) for x in (k, v))
            p = torch.softmax(torch.einsum("nh,knh->nk", q[i], keys) * q.shape[-1] ** -0.5, dim=-1)
            rows.append(torch.einsum("nk,knh->nh", p, values))
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_lengths", [[5, 1, 3, 7], [2, 1, 3, 1]])
def test_attention_is_that_of_one_query_after_the_other(q_lengths, causal, randn):
    lengths = [5, 1, 3, 7]
    q, k, v = randn(sum(q_lengths), 4, 8), randn(16, 2, 8), randn(16, 2, 8)
    cu_q, cu_k = cumulated(q_lengths), cumulated(lengths)
    ours = reference.attention(q, k, v, cu_k, causal=causal, cu_seqlens_q=cu_q)
    close(ours, query_by_query(q, k, v, cu_q, cu_k, causal))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_one_sequence_is_torchs(causal, randn):
    q, k, v = randn(9, 4, 8), randn(9, 2, 8), randn(9, 2, 8)
    ours = reference.attention(q, k, v, cumulated([9]), causal=causal, scale=0.3)
    heads_first = (x.transpose(0, 1) for x in (q, k, v))
    theirs = F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=0.3, enable_gqa=True)
    close(ours, theirs.transpose(0, 1))


def test_attention_without_keys_or_sequences_is_zero(randn):
    """More queries than keys under a causal mask, a sequence without keys, rows beyond the last sequence."""
    q, k, v = (x.requires_grad_() for x in (randn(9, 2, 8), randn(3, 2, 8), randn(3, 2, 8)))
    out = reference.attention(q, k, v, cumulated([3, 0]), causal=True, cu_seqlens_q=cumulated([5, 2]))
    assert (out[[0, 1, 5, 6, 7, 8]] == 0).all() and (out[2:5] != 0).all()
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients) and (gradients[0][5:] == 0).all()


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_norms_are_torchs(name, randn):
    x, residual, *rest = randn(7, 24), randn(7, 24), randn(24), *([randn(24)] if name == "layer_norm" else [])
    theirs = getattr(F, name)
    close(getattr(reference, name)(x, *rest, 1e-5), theirs(x, (24,), *rest, eps=1e-5))
    normed, total = getattr(reference, f"add_{name}")(x, residual, *rest, 1e-5)
    close((normed, total), (theirs(x + residual, (24,), *rest, eps=1e-5), x + residual))


def test_activations_are_their_formulas(randn):
    gate, up, bias = randn(5, 12), randn(5, 12), randn(12)
    close(reference.silu_mul(torch.cat([gate, up], dim=1)), gate / (1 + torch.exp(-gate)) * up)
    y = gate + bias
    close(reference.quick_gelu(gate, bias), y / (1 + torch.exp(-1.702 * y)))


def test_rope_is_a_product_of_complex_numbers(randn):
    q, k, angles = randn(5, 4, 16), randn(5, 2, 16), randn(5, 8)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # e^(i angle)
    for ours, x in zip(reference.rope(q, k, angles.cos(), angles.sin()), (q, k), strict=True):
        turned = torch.complex(*x.chunk(2, dim=-1)) * turn
        close(ours, torch.cat([turned.real, turned.imag], dim=-1))


def test_pooling_is_of_the_last_row(randn):
    x, weight, lengths = randn(6, 16), randn(16), [2, 1, 3]
    ours = reference.pool_last_token(x, cumulated(lengths), weight, 1e-5)
    last = torch.stack([part[-1] for part in x.split(lengths)])
    expected = F.rms_norm(last, (16,), weight, 1e-5)
    torch.testing.assert_close(ours.double(), expected / expected.norm(dim=1, keepdim=True))
