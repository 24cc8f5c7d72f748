"""The one dispatch: what chooses between Triton and torch."""

import functools
from types import SimpleNamespace

import pytest
import torch

from minivlm2vec_kernels import ops


def tensor(cuda=True, requires_grad=False):
    """All that the choice looks at: CPU tests cannot make a CUDA tensor."""
    return SimpleNamespace(is_cuda=cuda, requires_grad=requires_grad, device="cuda" if cuda else "cpu")


@pytest.mark.parametrize("backward", [False, True])
def test_auto_takes_triton_on_cuda_unless_a_gradient_is_needed(backward, monkeypatch):
    monkeypatch.setattr(ops, "BACKEND", "auto")
    for argument in (None, "auto"):
        choose = functools.partial(ops.choose_backend, argument, backward=backward)
        assert choose(tensor(), tensor()) == "triton"
        assert choose(tensor(), tensor(requires_grad=True)) == "torch"
        assert choose(tensor(cuda=False)) == "torch"
        with torch.no_grad():
            assert choose(tensor(), tensor(requires_grad=True)) == "triton"


def test_triton_on_request_carries_gradients_or_raises():
    assert ops.choose_backend("triton", tensor(requires_grad=True), backward=True) == "triton"
    with pytest.raises(RuntimeError, match=r"no backward pass; use torch\.no_grad"):
        ops.choose_backend("triton", tensor(requires_grad=True))
    with torch.no_grad():
        assert ops.choose_backend("triton", tensor(requires_grad=True)) == "triton"


def test_the_argument_beats_the_environment(monkeypatch):
    monkeypatch.setattr(ops, "BACKEND", "triton")
    assert ops.choose_backend(None, tensor(requires_grad=True), backward=True) == "triton"
    assert ops.choose_backend("torch", tensor()) == "torch"
    assert ops.choose_backend("auto", tensor(requires_grad=True), backward=True) == "torch"


def test_wrong_requests_say_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"needs CUDA tensors .* got one on cpu"):
        ops.choose_backend("triton", tensor(cuda=False), backward=True)
    with pytest.raises(ValueError, match="one of auto, triton, torch, got 'cuda'"):
        ops.choose_backend("cuda", tensor())


def test_the_environment_asks_for_backward_kernels(device, monkeypatch):
    """MINIVLM2VEC_BACKEND=triton: the graph holds our functions, not autograd's of the reference."""
    monkeypatch.setattr(ops, "BACKEND", "triton")
    x, weight = torch.randn(4, 64, device=device, requires_grad=True), torch.ones(64, device=device)
    q, k = x.view(4, 2, 32), x.view(4, 2, 32) * 2
    cos, sin = torch.ones(2, 4, 16, device=device)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32, device=device)
    outs = {
        "RMSNormBackward": ops.rms_norm(x, weight, 1e-5),
        "AddRMSNormBackward": ops.add_rms_norm(x, x * 2, weight, 1e-5)[0],
        "SiluMulBackward": ops.silu_mul(x),
        "RopeBackward": ops.rope(q, k, cos, sin)[1],
        "AttentionBackward": ops.attention(q, k, k, cu_seqlens, 4, causal=True),
    }
    assert {name: y.grad_fn.name() for name, y in outs.items()} == {name: name for name in outs}
