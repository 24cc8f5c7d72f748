"""The gradient of attention over packed sequences, without atomics: two passes, whose sums have a fixed order.

Shapes: T packed tokens (Tq queries, Tk keys), B sequences, N query heads, Nkv key-value heads, H = H0 + H1
        head dim; Lq, Lk queries and keys of one sequence; BM queries, BN keys of a block.

With s = scale q k^T, p = softmax(s) and out = p v, and dout the gradient of out (Dao, arXiv 2307.08691):

    delta = rowsum(dout * out)       dp = dout v^T       ds = p * (dp - delta)
    dv = p^T dout                    dq = scale ds k     dk = scale ds^T q

Forward keeps lse, log2 of every query's sum of exponentials, so that p = 2^(log2(e) s - lse) needs no search for a
maximum. The first pass takes BM queries of one head, walks over their keys, and leaves dq and delta; the second
takes BN keys of one key-value head, walks over the queries of all heads that share it, and leaves dk and dv. Both
compute s and dp, seven products instead of the five of a single pass, which would have to add up dq with atomics.
As forward, causal query tiles are aligned to the sequence's end, and 96 is a dot of 64 and a dot of 32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cards
from .attention_triton import (
    LOG2_E,
    NO_TENSOR_CORES_TILE,
    Tile,
    check_inputs,
    launch,
    load_rows,
    register_limit,
    sequence_at,
    split_head_dim,
    store_rows,
    tile_for,
)
from .cards import Card
from .custom_op import compiled_as_op
from .launch import cdiv, empty_like, on_device_of

# ------------------------------------------------------------------------------------------------ queries' gradient


@triton.jit(do_not_specialize=["tiles", "Tq"])
def attention_dq_kernel(
    q, k, v, out, dout, lse, delta, dq, cu_seqlens_q, cu_seqlens_k,
    scale, scale_log2, heads, group, tiles, Tq,
    stride_qt, stride_qn, stride_kt, stride_kn, stride_vt, stride_vn,
    H0: tl.constexpr, H1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head, tile of BM queries), tile fastest; of `tiles` as many as the longest sequence has.

    q, out, dout, dq [Tq, N, H]; k, v [Tk, Nkv, H]; lse, delta [N, Tq] float32; cu_seqlens [B + 1] int32;
    scale_log2 = scale * log2(e); group = N / Nkv. out, dout and dq are contiguous.
    """
    program = tl.program_id(0)
    tile, head, sequence = program % tiles, (program // tiles % heads).to(tl.int64), program // tiles // heads
    q_start, Lq = sequence_at(cu_seqlens_q, sequence)
    k_start, Lk = sequence_at(cu_seqlens_k, sequence)
    if tile * BM >= Lq:
        return
    H: tl.constexpr = H0 + H1
    stride_t = heads * H
    at = q_start * stride_t + head * H
    q += q_start * stride_qt + head * stride_qn
    k += k_start * stride_kt + head // group * stride_kn
    v += k_start * stride_vt + head // group * stride_vn

    if CAUSAL:
        row = Lq - (tile + 1) * BM  # negative in the ragged tile; rows before 0 are not stored
    else:
        row = tile * BM
    rows = row + tl.arange(0, BM)  # [BM]
    inside = (rows >= 0) & (rows < Lq)
    q0 = load_rows(q, row, Lq, stride_qt, BM, H0, True)  # [BM, H0]
    do0 = load_rows(dout + at, row, Lq, stride_t, BM, H0, True)  # [BM, H0]
    o0 = load_rows(out + at, row, Lq, stride_t, BM, H0, True)  # [BM, H0]
    d = tl.sum(do0.to(tl.float32) * o0.to(tl.float32), 1)  # [BM]
    q1, do1 = q0, do0
    if H1 > 0:
        q1 = load_rows(q + H0, row, Lq, stride_qt, BM, H1, True)  # [BM, H1]
        do1 = load_rows(dout + at + H0, row, Lq, stride_t, BM, H1, True)  # [BM, H1]
        o1 = load_rows(out + at + H0, row, Lq, stride_t, BM, H1, True)  # [BM, H1]
        d += tl.sum(do1.to(tl.float32) * o1.to(tl.float32), 1)
    tl.store(delta + head * Tq + q_start + rows, d, mask=inside)
    l = tl.load(lse + head * Tq + q_start + rows, mask=inside, other=float("inf"))  # [BM]; inf makes p 0

    if CAUSAL:  # the last query sees the last key
        last = rows + (Lk - Lq)
        end = tl.minimum(row + BM, Lq) + (Lk - Lq)
        whole = tl.maximum((tl.maximum(row, 0) + (Lk - Lq) + 1) // BN * BN, 0)
    else:
        last = tl.zeros_like(rows) + (Lk - 1)
        end = Lk
        whole = Lk // BN * BN
    dq0 = tl.zeros([BM, H0], tl.float32)
    dq1 = tl.zeros([BM, H1 if H1 > 0 else 1], tl.float32)
    for col in tl.range(0, whole, BN):
        dq0, dq1 = _add_keys(dq0, dq1, q0, q1, do0, do1, l, d, k, v, col, Lk, last, scale_log2,
                             stride_kt, stride_vt, H0, H1, BN, False)  # fmt: skip
    for col in tl.range(whole, end, BN):
        dq0, dq1 = _add_keys(dq0, dq1, q0, q1, do0, do1, l, d, k, v, col, Lk, last, scale_log2,
                             stride_kt, stride_vt, H0, H1, BN, True)  # fmt: skip
    store_rows(dq + at, dq0 * scale, row, Lq, stride_t, BM, H0)
    if H1 > 0:
        store_rows(dq + at + H0, dq1 * scale, row, Lq, stride_t, BM, H1)


@triton.jit
def _add_keys(
    dq0, dq1, q0, q1, do0, do1, l, d, k, v, col, Lk, last, scale_log2, stride_kt, stride_vt,
    H0: tl.constexpr, H1: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds ds k of keys col .. col + BN to dq. MASKED: query i sees no key beyond last[i]."""
    k0 = load_rows(k, col, Lk, stride_kt, BN, H0, MASKED)  # [BN, H0]
    v0 = load_rows(v, col, Lk, stride_vt, BN, H0, MASKED)  # [BN, H0]
    s = tl.dot(q0, k0.T, input_precision="ieee")  # [BM, BN]
    dp = tl.dot(do0, v0.T, input_precision="ieee")  # [BM, BN]
    k1 = k0
    if H1 > 0:
        k1 = load_rows(k + H0, col, Lk, stride_kt, BN, H1, MASKED)  # [BN, H1]
        v1 = load_rows(v + H0, col, Lk, stride_vt, BN, H1, MASKED)  # [BN, H1]
        s = tl.dot(q1, k1.T, s, input_precision="ieee")
        dp = tl.dot(do1, v1.T, dp, input_precision="ieee")
    if MASKED:
        s = tl.where(col + tl.arange(0, BN)[None, :] <= last[:, None], s, float("-inf"))
    p = tl.math.exp2(s * scale_log2 - l[:, None])
    ds = (p * (dp - d[:, None])).to(k0.dtype)  # [BM, BN]
    dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")  # [BM, H0]
    if H1 > 0:
        dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")  # [BM, H1]
    return dq0, dq1


# ---------------------------------------------------------------------------------------- keys' and values' gradient


@triton.jit(do_not_specialize=["tiles", "Tq"])
def attention_dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k,
    scale, scale_log2, heads_kv, group, tiles, Tq,
    stride_qt, stride_qn, stride_kt, stride_kn, stride_vt, stride_vn,
    H0: tl.constexpr, H1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Program (sequence, key-value head, tile of BN keys); arguments as above. dk, dv [Tk, Nkv, H], contiguous.

    Causal, the first tile has the most queries and starts first.
    """
    program = tl.program_id(0)
    tile, sequence = program % tiles, program // tiles // heads_kv
    head_kv = (program // tiles % heads_kv).to(tl.int64)
    q_start, Lq = sequence_at(cu_seqlens_q, sequence)
    k_start, Lk = sequence_at(cu_seqlens_k, sequence)
    col = tile * BN
    if col >= Lk:
        return
    H: tl.constexpr = H0 + H1
    stride_t = heads_kv * group * H
    k += k_start * stride_kt + head_kv * stride_kn
    v += k_start * stride_vt + head_kv * stride_vn
    k0 = load_rows(k, col, Lk, stride_kt, BN, H0, True)  # [BN, H0]
    v0 = load_rows(v, col, Lk, stride_vt, BN, H0, True)  # [BN, H0]
    k1, v1 = k0, v0
    if H1 > 0:
        k1 = load_rows(k + H0, col, Lk, stride_kt, BN, H1, True)  # [BN, H1]
        v1 = load_rows(v + H0, col, Lk, stride_vt, BN, H1, True)  # [BN, H1]
    dk0, dv0 = tl.zeros([BN, H0], tl.float32), tl.zeros([BN, H0], tl.float32)
    dk1 = tl.zeros([BN, H1 if H1 > 0 else 1], tl.float32)
    dv1 = tl.zeros([BN, H1 if H1 > 0 else 1], tl.float32)

    first = tl.zeros([BN], tl.int32)  # the first query that sees a key
    row = 0
    if CAUSAL:  # the last query sees the last key
        first = col - (Lk - Lq) + tl.arange(0, BN)
        row = tl.maximum(col - (Lk - Lq), 0)
    blocks = tl.cdiv(Lq - row, BM)
    for step in tl.range(0, group * blocks):  # one loop over heads and blocks: two, nested, take more registers
        head = head_kv * group + step // blocks
        dk0, dk1, dv0, dv1 = _add_queries(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1,
            q + q_start * stride_qt + head * stride_qn, dout + q_start * stride_t + head * H,
            lse + head * Tq + q_start, delta + head * Tq + q_start,
            row + step % blocks * BM, Lq, first, scale_log2, stride_qt, stride_t, H0, H1, BM, CAUSAL,
        )  # fmt: skip

    at = k_start * heads_kv * H + head_kv * H
    store_rows(dk + at, dk0 * scale, col, Lk, heads_kv * H, BN, H0)
    store_rows(dv + at, dv0, col, Lk, heads_kv * H, BN, H0)
    if H1 > 0:
        store_rows(dk + at + H0, dk1 * scale, col, Lk, heads_kv * H, BN, H1)
        store_rows(dv + at + H0, dv1, col, Lk, heads_kv * H, BN, H1)


@triton.jit
def _add_queries(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, lse, delta, row, Lq, first, scale_log2, stride_qt, stride_t,
    H0: tl.constexpr, H1: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Adds p^T dout and ds^T q of queries row .. row + BM to dv and dk. Everything is transposed, keys by queries,
    so that p and ds enter their products from registers. CAUSAL: key j is seen by no query before first[j]."""
    rows = row + tl.arange(0, BM)  # [BM]
    q0 = load_rows(q, row, Lq, stride_qt, BM, H0, True)  # [BM, H0]
    do0 = load_rows(dout, row, Lq, stride_t, BM, H0, True)  # [BM, H0]
    l = tl.load(lse + rows, mask=rows < Lq, other=float("inf"))  # [BM]; inf makes p 0
    d = tl.load(delta + rows, mask=rows < Lq, other=0.0)  # [BM]
    s = tl.dot(k0, q0.T, input_precision="ieee")  # [BN, BM]
    dp = tl.dot(v0, do0.T, input_precision="ieee")  # [BN, BM]
    q1, do1 = q0, do0
    if H1 > 0:
        q1 = load_rows(q + H0, row, Lq, stride_qt, BM, H1, True)  # [BM, H1]
        do1 = load_rows(dout + H0, row, Lq, stride_t, BM, H1, True)  # [BM, H1]
        s = tl.dot(k1, q1.T, s, input_precision="ieee")
        dp = tl.dot(v1, do1.T, dp, input_precision="ieee")
    if CAUSAL:
        s = tl.where(rows[None, :] >= first[:, None], s, float("-inf"))
    p = tl.math.exp2(s * scale_log2 - l[None, :])
    ds = (p * (dp - d[None, :])).to(q0.dtype)  # [BN, BM]
    p = p.to(q0.dtype)
    dv0 = tl.dot(p, do0, dv0, input_precision="ieee")  # [BN, H0]
    dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")  # [BN, H0]
    if H1 > 0:
        dv1 = tl.dot(p, do1, dv1, input_precision="ieee")  # [BN, H1]
        dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")  # [BN, H1]
    return dk0, dk1, dv0, dv1


# ---------------------------------------------------------------------------------------------------- their settings

# pass -> largest head dim -> tile. Settled by what the compiler makes of them (tests/kernels/aot/table.json): these
# spill nowhere; `python -m bench.run --sweep --only attention_backward` times them beside others.
TILES = {
    "dq": {
        160: Tile(64, 32, 8, 2),
        192: Tile(32, 32, 8, 2),
    },
    "dkv": {
        128: Tile(32, 64, 8, 2),
        144: Tile(16, 32, 8, 1),
        192: Tile(32, 16, 8, 1),
    },
}
MOST_REGISTERS = 255  # a thread of dkv; left alone, ptxas stops some programs earlier and spills two to four values

SMALL_TILES = {  # of both, for programs that have 64 KB
    96: Tile(32, 32, 4, 1),
    144: Tile(16, 32, 8, 1),
    192: Tile(32, 16, 8, 1),
}


def choose_backward_tile(pass_: str, H: int, dtype: torch.dtype, card: Card | None = None) -> Tile:
    if dtype == torch.float32 or (card is not None and not card.tensor_cores):
        return NO_TENSOR_CORES_TILE
    tiles = SMALL_TILES if card is not None and card.small else TILES[pass_]
    return next(tile for widest, tile in tiles.items() if widest >= H)


# ---------------------------------------------------------------------------------------------------- their launchers


def _fake_attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float | None,
    cu_seqlens_q: Tensor | None, max_seqlen_q: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@compiled_as_op(_fake_attention_with_lse)
def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float | None,
    cu_seqlens_q: Tensor | None, max_seqlen_q: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention_triton.attention`, and lse [N, Tq]."""
    if cu_seqlens_q is None or max_seqlen_q is None:
        cu_seqlens_q, max_seqlen_q = cu_seqlens, max_seqlen
    tile = tile_for(q, k, v, max_seqlen_q, max_seqlen, causal)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return launch(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_q, max_seqlen_q, causal, scale, tile, lse), lse


def _fake_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    causal: bool, scale: float | None, cu_seqlens_q: Tensor | None, max_seqlen_q: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return empty_like(q), empty_like(k), empty_like(v)


@compiled_as_op(_fake_attention_backward)
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    causal: bool, scale: float | None, cu_seqlens_q: Tensor | None, max_seqlen_q: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dout [Tq, N, H], and what went into and came out of `attention_with_lse`. Returns dq, dk, dv, contiguous.

    Rows beyond the last sequence get zeros. Never waits for the device.
    """
    if cu_seqlens_q is None or max_seqlen_q is None:
        cu_seqlens_q, max_seqlen_q = cu_seqlens, max_seqlen
    card = cards.card_of(q)
    tiles = [choose_backward_tile(pass_, q.shape[2], q.dtype, card) for pass_ in ("dq", "dkv")]
    return launch_backward(dout, q, k, v, out, lse, cu_seqlens, max_seqlen, cu_seqlens_q, max_seqlen_q,
                           causal, scale, *tiles)  # fmt: skip


def launch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int,
    cu_seqlens_q: Tensor, max_seqlen_q: int, causal: bool, scale: float | None, tile_q: Tile, tile_kv: Tile,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`attention_backward` with given tiles, for tests and for the bench's sweep."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_inputs(q, k, v, cu_seqlens_k, cu_seqlens_q, scale)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    (Tq, N, H), Nkv, B = q.shape, k.shape[1], len(cu_seqlens_q) - 1
    H0, H1 = split_head_dim(H)
    delta, dout = torch.empty_like(lse), dout.contiguous()
    lengths = (cu_seqlens_q, cu_seqlens_k)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    tiles_q, tiles_k = cdiv(max_seqlen_q, tile_q.BM), cdiv(max_seqlen_k, tile_kv.BN)
    with on_device_of(q):
        if B * N * tiles_q:
            attention_dq_kernel[(B * N * tiles_q,)](
                q, k, v, out, dout, lse, delta, dq, *lengths,
                scale, scale * LOG2_E, N, N // Nkv, tiles_q, Tq, *strides,
                H0=H0, H1=H1, BM=tile_q.BM, BN=tile_q.BN, CAUSAL=causal,
                num_warps=tile_q.warps, num_stages=tile_q.stages, enable_fp_fusion=True,
            )  # fmt: skip
        if B * Nkv * tiles_k:
            attention_dkv_kernel[(B * Nkv * tiles_k,)](
                q, k, v, dout, lse, delta, dk, dv, *lengths,
                scale, scale * LOG2_E, Nkv, N // Nkv, tiles_k, Tq, *strides,
                H0=H0, H1=H1, BM=tile_kv.BM, BN=tile_kv.BN, CAUSAL=causal,
                num_warps=tile_kv.warps, num_stages=tile_kv.stages, enable_fp_fusion=True,
                **register_limit(MOST_REGISTERS),
            )  # fmt: skip
    return dq, dk, dv


class Attention(torch.autograd.Function):
    """`attention_triton.attention` with a gradient by q, k and v. Keeps them, what is returned, and lse."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float | None,
        cu_seqlens_q: Tensor | None, max_seqlen_q: int | None,
    ) -> Tensor:  # fmt: skip
        out, lse = attention_with_lse(q, k, v, cu_seqlens, max_seqlen, causal, scale, cu_seqlens_q, max_seqlen_q)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, cu_seqlens_q)
        ctx.options = max_seqlen, causal, scale, max_seqlen_q
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens, cu_seqlens_q = ctx.saved_tensors
        max_seqlen, causal, scale, max_seqlen_q = ctx.options
        dq, dk, dv = attention_backward(
            dout, q, k, v, out, lse, cu_seqlens, max_seqlen, causal, scale, cu_seqlens_q, max_seqlen_q
        )
        return dq, dk, dv, None, None, None, None, None, None
