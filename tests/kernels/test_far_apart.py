"""Rows, tokens and heads more than 2^31 elements from the first one: offsets are computed in 64 bits.

In the interpreter, whose integers are as wide as the card's. The memory is asked for and hardly touched: 11 GB of
addresses a tensor, and a few pages.
"""

import mmap

import pytest
import torch

from minivlm2vec_kernels import ops, reference
from minivlm2vec_kernels.attention_triton import Tile, launch
from tests.kernels.kernel_cases import cumulated, gradients

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; a card has tests of its own")

R, D, APART = 4, 64, 2**30 + 64  # rows, their width, and how far they lie apart: the third is beyond 2^31
DTYPE = torch.float16
MAP_NORESERVE = 0x4000  # Linux's


def far_apart(rows: int, width: int, apart: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, width] random numbers. Before them lie 2^31 zeros, which an offset of 32 bits finds, and no fault."""
    numbers, flags = 2**31 + (rows - 1) * apart + width, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, numbers * DTYPE.itemsize, flags=flags)
    x = torch.frombuffer(memory, dtype=DTYPE).as_strided((rows, width), (apart, 1), 2**31)
    return x.copy_(torch.randn(rows, width, generator=generator))


def calls(generator: torch.Generator):
    """Name -> (op, its reference, tensors that lie far apart, what else it takes)."""
    x, y = (far_apart(R, D, APART, generator) for _ in range(2))
    make = lambda *shape: torch.randn(*shape, generator=generator).to(DTYPE)  # noqa: E731
    w, b, angles, separators = make(D), make(D), (make(R, D // 4), make(R, D // 4)), (make(32), make(32))
    tokens = [t.unflatten(1, (2, D // 2)) for t in (x, y)]  # [R, 2, D / 2]
    heads = [t.transpose(0, 1) for t in tokens]  # [2, R, D / 2]
    patches = x.as_strided((2, 4, 8), (8, APART, 1))  # of two crops
    of_heads, grids = tuple(a[:2] for a in angles), [(1, 1)]
    return {
        "rms_norm": (ops.rms_norm, reference.rms_norm, [x], (w, 1e-5)),
        "add_rms_norm": (ops.add_rms_norm, reference.add_rms_norm, [x, y], (w, 1e-5)),
        "layer_norm": (ops.layer_norm, reference.layer_norm, [x], (w, b, 1e-5)),
        "add_layer_norm": (ops.add_layer_norm, reference.add_layer_norm, [x, y], (w, b, 1e-5)),
        "silu_mul": (ops.silu_mul, reference.silu_mul, [x], ()),
        "quick_gelu": (ops.quick_gelu, reference.quick_gelu, [x], (b,)),
        "quantize_rows": (scales(ops.quantize_rows), scales(reference.quantize_rows), [x], ()),
        "rms_norm_quantize": (scales(ops.rms_norm_quantize), scales(reference.rms_norm_quantize), [x], (w, 1e-5)),
        "pool_last_token": (ops.pool_last_token, reference.pool_last_token, [x], (cumulated([1, 3]), w, 1e-5)),
        "merge_crops": (ops.merge_crops, reference.merge_crops, [patches], (grids, *separators)),
        "linear_quick_gelu": (fused(ops.linear_quick_gelu), reference.linear_quick_gelu, [x, y], (b[:R],)),
        "linear_silu_mul": (fused(ops.linear_silu_mul), reference.linear_silu_mul, [x, y], ()),
        "rope, tokens": (ops.rope, reference.rope, tokens, angles),
        "rope, heads": (ops.rope, reference.rope, heads, of_heads),
        "rope_, heads": (ops.rope_, reference.rope, heads, of_heads),
    }


def fused(op):
    return lambda *args, backend: op(*args, fused=True, backend=backend)


def scales(op):
    """Each row's greatest number decides its own; 8-bit numbers themselves are rounded otherwise by the interpreter."""
    return lambda *args, **options: op(*args, **options)[1]


def same(ours, theirs) -> bool:
    """Up to rounding; another row's numbers are off by about 1."""
    pairs = zip(ours, theirs, strict=True) if isinstance(theirs, tuple) else [(ours, theirs)]
    return all((a.float() - b.float()).abs().max() <= 0.01 * b.float().abs().max() for a, b in pairs)


@pytest.mark.parametrize("name", calls(torch.Generator().manual_seed(0)))
def test_rows_beyond_2_to_the_31_elements(name, generator):
    op, expected, far, others = calls(generator)[name]
    near = [x.clone() for x in far]
    theirs = expected(*near, *others)
    assert same(op(*far, *others, backend="triton"), theirs)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "silu_mul"])
def test_gradients_of_rows_beyond_2_to_the_31_elements(name, generator):
    op, expected, far, others = calls(generator)[name]
    near = [x.clone() for x in far]
    seeds = [torch.randn(y.shape, generator=generator).to(DTYPE) for y in as_tuple(expected(*near, *others))]
    ours = gradients(lambda *x: op(*x, *others, backend="triton"), far, seeds)
    assert same(ours, gradients(lambda *x: expected(*x, *others), near, seeds))


def as_tuple(outs):
    return outs if isinstance(outs, tuple) else (outs,)


@pytest.mark.parametrize("heads_apart", [False, True])
@pytest.mark.parametrize("tma", [False, True])
def test_attention_beyond_2_to_the_31_elements(heads_apart, tma, generator):
    """The last 20 of 540 tokens of 2^22 elements, and heads of 2^30 elements."""
    q, k, v, cu = packed(heads_apart, generator)
    tile, n = Tile(16, 16, 4, 1, tma), int(cu.diff())
    ours = launch(q, k, v, cu, n, cu, n, True, None, tile)[cu[0] : cu[1]]
    near = [x[cu[0] : cu[1]].clone() for x in (q, k, v)]
    assert same(ours, reference.attention(*near, cumulated([n]), causal=True))


@pytest.mark.parametrize("heads_apart", [False, True])
def test_gradients_of_attention_beyond_2_to_the_31_elements(heads_apart, generator):
    q, k, v, cu = packed(heads_apart, generator)
    n = int(cu.diff())
    seed = torch.zeros(q.shape, dtype=DTYPE)
    seed[cu[0] :] = torch.randn(n, *q.shape[1:], generator=generator)
    ours = gradients(lambda *x: ops.attention(*x, cu, n, causal=True, backend="triton"), (q, k, v), [seed])
    near = [x[cu[0] : cu[1]].clone() for x in (q, k, v)]
    theirs = gradients(lambda *x: reference.attention(*x, cumulated([n]), causal=True), near, [seed[cu[0] :]])
    assert same(tuple(x[cu[0] :] for x in ours), theirs)


def packed(heads_apart: bool, generator: torch.Generator):
    """q, k, v [T, N, 16] of one buffer, and where the one sequence begins and ends."""
    if heads_apart:
        x = far_apart(R, 3 * 20 * 16, APART, generator).unflatten(1, (3, 20, 16))  # [N, 3, 20, 16]
        return *x.transpose(0, 2).unbind(1), cumulated([20])
    x = far_apart(540, 3 * 2 * 16, 2**22 + 8, generator).unflatten(1, (3, 2, 16))
    return *x.unbind(1), torch.tensor([520, 540], dtype=torch.int32)
