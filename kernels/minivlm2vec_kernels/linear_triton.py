"""Matrix products that end in an activation: bias + quick_gelu, and SwiGLU of a fused gate_up weight.

The product itself never reaches memory. Against cuBLAS and a separate kernel that saves writing and reading
it: 16 KB a token and layer in the tower (F = 4096), 64 KB in the decoder (2F = 16384), of bf16.

Shapes: x [M, K]; weight [N, K] (or [2F, K], gate first); out [M, N] (or [M, F]). A program computes tiles
        [BM, BN] one after another, in an order that keeps GROUP rows of tiles together for L2, and walks over
        K in steps of BK. Tiles come and go through TMA descriptors on sm_90 and sm_100, else by pointers.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import cards
from .custom_op import compiled_as_op
from .launch import as_rows, cdiv, check_shape, multiprocessors, on_device_of


@dataclass(frozen=True)
class Tiles:
    """One launch setting. `resident`: programs per multiprocessor, each of which takes several tiles in turn;
    0: one program a tile."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    resident: int
    GROUP: int = 8


# What a sweep on a card chooses between (python -m bench.run --sweep); the first of each list is in use. Two
# resident programs need at most 113 KB each, stages and the tile to store (227 KB of shared memory).
CANDIDATES = {
    ("quick_gelu", "tma"): [
        Tiles(128, 256, 64, 8, 3, 1),
        Tiles(128, 256, 64, 8, 3, 0),
        Tiles(256, 128, 64, 8, 3, 1),
        Tiles(128, 128, 64, 8, 4, 1),
        Tiles(128, 128, 64, 8, 2, 2),
        Tiles(128, 128, 64, 4, 2, 2),
        Tiles(128, 128, 64, 8, 2, 0),
        Tiles(64, 128, 64, 4, 3, 2),
    ],
    ("quick_gelu", "pointer"): [
        Tiles(128, 128, 32, 4, 4, 0),
        Tiles(128, 128, 64, 8, 3, 0),
        Tiles(128, 256, 32, 8, 3, 0),
        Tiles(64, 128, 32, 4, 4, 0),
        Tiles(64, 64, 32, 4, 4, 0),
    ],
    ("silu_mul", "tma"): [
        Tiles(128, 128, 64, 8, 3, 1),
        Tiles(128, 128, 64, 8, 4, 1),
        Tiles(128, 128, 64, 8, 3, 0),
        Tiles(256, 64, 64, 8, 3, 1),
        Tiles(128, 64, 64, 4, 3, 2),
        Tiles(64, 128, 64, 4, 2, 2),
    ],
    ("silu_mul", "pointer"): [
        Tiles(128, 64, 32, 4, 4, 0),
        Tiles(128, 64, 64, 8, 3, 0),
        Tiles(64, 64, 32, 4, 4, 0),
    ],
}
FLOAT32 = Tiles(64, 64, 32, 4, 2, 0)  # for correctness: cuBLAS is the way to multiply float32
FUSED_ROWS = 1024  # linear_quick_gelu is fused from so many rows: below, tiles are too few to fill a card


@triton.jit
def _tile_of(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Number of a tile -> its row and column, columns of GROUP tiles after one another."""
    m_tiles, n_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = tile // (GROUP * n_tiles) * GROUP
    height = tl.minimum(m_tiles - first, GROUP)
    within = tile % (GROUP * n_tiles)
    return first + within % height, within // height


@triton.jit
def _load(x, row, col, rows, cols, stride, BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr):
    """Tile [BR, BC] of a matrix at (row, col), zeros beyond its edges."""
    if TMA:
        tile = x.load([row, col])
    else:
        r, c = row + tl.arange(0, BR), col + tl.arange(0, BC)
        at = x + r.to(tl.int64)[:, None] * stride + c[None, :]
        tile = tl.load(at, mask=(r < rows)[:, None] & (c < cols)[None, :], other=0.0)
    return tile


@triton.jit
def _store(x, tile, row, col, rows, cols, stride, BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        x.store([row, col], tile.to(x.dtype))
    else:
        r, c = row + tl.arange(0, BR), col + tl.arange(0, BC)
        at = x + r.to(tl.int64)[:, None] * stride + c[None, :]
        tl.store(at, tile.to(x.dtype.element_ty), mask=(r < rows)[:, None] & (c < cols)[None, :])


@triton.jit
def _sigmoid(x, factor: tl.constexpr):
    """1 / (1 + exp(-factor x)), by one exponential of base 2 and one approximate root: 1 / d = (1 / sqrt(d))^2, each a
    single instruction of a relative error below 2^-21. A division is 8, for denormal numbers, which d >= 1 is not; an
    infinite d gives 0, as it should."""
    root = tl.rsqrt(1.0 + tl.exp2(x * (-1.4426950408889634 * factor)))  # log2(e)
    return root * root


@triton.jit
def linear_quick_gelu_kernel(
    x, weight, bias, out,
    M, N, K, stride_x, stride_weight,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, BIAS_FIRST: tl.constexpr,
):  # fmt: skip
    """out = y * sigmoid(1.702 y), y = x weight^T + bias, in float32 until the store.

    BIAS_FIRST: the bias is loaded before the product, which hides its way, and stays in registers meanwhile."""
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0), flatten=TMA):
        m, n = _tile_of(tile, M, N, BM, BN, GROUP)
        cols = n * BN + tl.arange(0, BN)  # [BN]
        if BIAS_FIRST:
            b_n = tl.load(bias + cols, mask=cols < N, other=0.0)  # [BN]
        y = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            a = _load(x, m * BM, k, M, K, stride_x, BM, BK, TMA)  # [BM, BK]
            b = _load(weight, n * BN, k, N, K, stride_weight, BN, BK, TMA)  # [BN, BK]
            y = tl.dot(a, b.T, y, input_precision="ieee")
        if not BIAS_FIRST:
            b_n = tl.load(bias + cols, mask=cols < N, other=0.0)
        y += b_n.to(tl.float32)[None, :]
        y = y * _sigmoid(y, 1.702)
        _store(out, y, m * BM, n * BN, M, N, N, BM, BN, TMA)


@triton.jit
def linear_silu_mul_kernel(
    x, weight, out,
    M, F, K, stride_x, stride_weight,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """out = gate * sigmoid(gate) * up, gate = x weight[:F]^T, up = x weight[F:]^T; float32 to the store."""
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(F, BN), tl.num_programs(0), flatten=TMA):
        m, n = _tile_of(tile, M, F, BM, BN, GROUP)
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            a = _load(x, m * BM, k, M, K, stride_x, BM, BK, TMA)  # [BM, BK]
            b = _load(weight, n * BN, k, 2 * F, K, stride_weight, BN, BK, TMA)  # [BN, BK]
            c = _load(weight, F + n * BN, k, 2 * F, K, stride_weight, BN, BK, TMA)  # [BN, BK]
            gate = tl.dot(a, b.T, gate, input_precision="ieee")
            up = tl.dot(a, c.T, up, input_precision="ieee")
        y = gate * _sigmoid(gate, 1.0) * up
        _store(out, y, m * BM, n * BN, M, F, F, BM, BN, TMA)


def _fake_linear_quick_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@compiled_as_op(_fake_linear_quick_gelu)
def linear_quick_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., K], weight [N, K], bias [N], rows dense, one dtype. Returns [..., N], contiguous."""
    check_shape(bias, weight.shape[:1], "bias")
    out = _fake_linear_quick_gelu(x, weight, bias)
    run_quick_gelu(*_matrices(x, weight, out), bias.contiguous())
    return out


def _fake_linear_silu_mul(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], gate_up_weight.shape[0] // 2))


@compiled_as_op(_fake_linear_silu_mul)
def linear_silu_mul(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    """x [..., K], gate_up_weight [2F, K], gate first; rows dense, one dtype. Returns [..., F], contiguous."""
    if gate_up_weight.shape[0] % 2:
        raise ValueError(f"gate_up_weight must have an even number of rows, got {gate_up_weight.shape[0]}")
    out = _fake_linear_silu_mul(x, gate_up_weight)
    run_silu_mul(*_matrices(x, gate_up_weight, out))
    return out


def _matrices(x: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, weight has shape {tuple(weight.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, weight is {weight.dtype}")
    return as_rows(x, "x"), as_rows(weight, "weight"), as_rows(out, "out")


def run_quick_gelu(
    x: Tensor, weight: Tensor, out: Tensor, bias: Tensor, tiles: Tiles | None = None, tma: bool | None = None
) -> None:
    """Writes quick_gelu(x weight^T + bias) to `out`. `tiles` and `tma` are chosen here unless given."""
    (M, K), N = x.shape, weight.shape[0]
    tma = can_use_tma(x, weight, out) if tma is None else tma
    tiles = tiles or settings("quick_gelu", x.dtype, tma, cards.card_of(x))
    if out.numel() == 0:
        return
    with on_device_of(x):
        linear_quick_gelu_kernel[_grid(x, M, N, tiles)](
            *_operands(x, weight, tiles, tma), bias, _matrix(out, tiles.BM, tiles.BN, tma),
            M, N, K, x.stride(0), weight.stride(0),
            **_constants(tiles, tma), BIAS_FIRST=_bias_first(x),
        )  # fmt: skip


def _bias_first(x: Tensor) -> bool:
    """Not on sm_100: a thread there has a row of the tile, hence as many numbers of the bias as of the tile, which
    takes 450 to 580 spills."""
    return not x.is_cuda or not cards.card(x.get_device()).name.startswith("sm_10")


def run_silu_mul(x: Tensor, weight: Tensor, out: Tensor, tiles: Tiles | None = None, tma: bool | None = None) -> None:
    """Writes silu(x weight[:F]^T) * (x weight[F:]^T) to `out`. `tiles`, `tma`: chosen here unless given."""
    (M, K), F = x.shape, weight.shape[0] // 2
    tma = can_use_tma(x, weight, out) if tma is None else tma
    tiles = tiles or settings("silu_mul", x.dtype, tma, cards.card_of(x))
    if out.numel() == 0:
        return
    with on_device_of(x):
        linear_silu_mul_kernel[_grid(x, M, F, tiles)](
            *_operands(x, weight, tiles, tma), _matrix(out, tiles.BM, tiles.BN, tma),
            M, F, K, x.stride(0), weight.stride(0),
            **_constants(tiles, tma),
        )  # fmt: skip


def fuses_quick_gelu(x: Tensor) -> bool:
    """Whether linear_quick_gelu is one kernel unless told otherwise."""
    return x.element_size() == 2 and x.numel() >= FUSED_ROWS * x.shape[-1]


def can_use_tma(*matrices: Tensor) -> bool:
    """TMA wants NVIDIA's sm_90 or sm_100 (and our tiles their shared memory), and rows on multiples of 16 bytes."""
    x = matrices[0]
    if not x.is_cuda or x.element_size() != 2 or not cards.card(x.get_device()).tma:
        return False
    return all(t.data_ptr() % 16 == 0 and t.stride(0) > 0 and t.stride(0) % 8 == 0 for t in matrices)


def settings(kernel: str, dtype: torch.dtype, tma: bool, card: cards.Card | None = None) -> Tiles:
    """Four stages of 128 x 128 tiles fill a card's 64 KB of shared memory to the last byte."""
    if card is not None and not card.tensor_cores:
        return replace(FLOAT32, warps=8)
    if dtype == torch.float32:
        return FLOAT32
    tiles = CANDIDATES[kernel, "tma" if tma else "pointer"][0]
    return replace(tiles, stages=min(tiles.stages, 3)) if card is not None and card.small else tiles


def _grid(x: Tensor, M: int, N: int, tiles: Tiles) -> tuple[int]:
    count = cdiv(M, tiles.BM) * cdiv(N, tiles.BN)
    if not tiles.resident or not x.is_cuda:
        return (count,)
    return (min(count, tiles.resident * multiprocessors(x.get_device())),)


def _operands(x: Tensor, weight: Tensor, tiles: Tiles, tma: bool) -> tuple:
    return _matrix(x, tiles.BM, tiles.BK, tma), _matrix(weight, tiles.BN, tiles.BK, tma)


def _matrix(x: Tensor, rows: int, cols: int, tma: bool) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, cols]) if tma else x


def _constants(tiles: Tiles, tma: bool) -> dict:
    return {
        "BM": tiles.BM, "BN": tiles.BN, "BK": tiles.BK, "GROUP": tiles.GROUP, "TMA": tma,
        "num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True,
    }  # fmt: skip
