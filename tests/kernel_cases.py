"""Sizes and ways of calling that the kernel tests share."""

import pytest
import torch

# The interpreter rounds to bfloat16 towards zero and multiplies matrices of it wrongly: that is for a card.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
ROWS = [0, 1, 2, 17, 63, 577, 1000]
WIDTHS = [1, 96, 100, 384, 1000, 1024, 3072, 8192]


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
