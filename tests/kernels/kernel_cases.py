"""Sizes and ways of calling that the kernel tests share."""

import pytest
import torch

from tests.conftest import check_error

# The interpreter rounds to bfloat16 towards zero and multiplies matrices of it wrongly: that is for a card.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
ROWS = [0, 1, 2, 17, 63, 577, 1000]
WIDTHS = [1, 96, 100, 384, 1000, 1024, 3072, 8192]


def cumulated(lengths, device=None):
    """cu_seqlens [B + 1] int32 of sequences of these lengths."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def compiled(op):
    """`op()` under torch.compile without a graph break, kernels and all."""
    torch._dynamo.reset()
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"  # inductor would need a C++ compiler
    with torch.no_grad():
        return torch.compile(op, fullgraph=True, backend=backend)()


def captured(op):
    """`op()` run once to compile its kernels, then captured in a CUDA graph and replayed over NaNs."""
    op()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = op()
    for out in outs if isinstance(outs, tuple) else (outs,):
        out.fill_(float("nan"))
    graph.replay()
    return outs


def gradients(op, tensors, seeds):
    """The gradients of sum(op(*tensors) * seeds) by every tensor. An op may return one output or several."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outs = op(*leaves)
    return torch.autograd.grad(outs if isinstance(outs, tuple) else (outs,), leaves, seeds)


def check_gradients(op, same_dtype, exact, tensors, generator, atol=0.0):
    """Each gradient of `op` against autograd's through the same maths at the tensors' dtype, and through `exact` in
    float64; see `check_error`. The outputs' gradients are random."""
    with torch.no_grad():
        outs = same_dtype(*tensors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    seeds = [torch.randn(y.shape, device=y.device, generator=generator).to(y.dtype) for y in outs]
    wide = gradients(exact, [t.double() for t in tensors], [s.double() for s in seeds])
    all_of_them = gradients(op, tensors, seeds), gradients(same_dtype, tensors, seeds), wide
    for tensor, ours, torchs, best in zip(tensors, *all_of_them, strict=True):
        assert ours.dtype == tensor.dtype and ours.shape == tensor.shape
        check_error(ours, torchs, best, atol)


def check_finite_differences(op, tensors, generator, step, rtol):
    """The gradient of sum(op(*tensors) * seeds) along random directions, one tensor at a time, against central
    differences, whose error is of the order of step^2 and of 1e-7 / step: float32 is the kernels' widest dtype.
    rtol: of the gradient's length, which is about how large its product with a direction is."""
    random = lambda x: torch.randn(x.shape, device=x.device, generator=generator)  # noqa: E731
    outs = op(*tensors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    seeds = [random(y) for y in outs]
    for i, gradient in enumerate(gradients(op, tensors, seeds)):
        for _ in range(2):
            direction = random(tensors[i])
            ahead, behind = (_total(op, tensors, i, h * direction, seeds) for h in (step, -step))
            error = abs((ahead - behind) / (2 * step) - (gradient.double() * direction).sum().item())
            print(f"tensor {i}: off by {error:.1e}, gradient of length {gradient.norm():.1e}")
            assert error <= rtol * gradient.norm()


def _total(op, tensors, i, change, seeds):
    outs = op(*(t + change if j == i else t for j, t in enumerate(tensors)))
    outs = outs if isinstance(outs, tuple) else (outs,)
    return sum((y.double() * s).sum().item() for y, s in zip(outs, seeds, strict=True))


def compiled_gradients(op, tensors, seeds):
    """`gradients` of `op` under torch.compile, without a graph break."""
    torch._dynamo.reset()
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return gradients(torch.compile(op, fullgraph=True, backend=backend), tensors, seeds)
