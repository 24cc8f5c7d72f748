"""Exact attention over packed sequences of any lengths: out = softmax(scale * q k^T) v.

Shapes: T packed tokens (Tq queries, Tk keys), B sequences, N query heads, Nkv key-value heads, H = H0 + H1
        head dim; Lq, Lk queries and keys of one sequence; BM queries of a tile, BN keys of a block.

One program computes BM queries of one head of one sequence. It walks over the keys in blocks and keeps for
every query the largest score m, the sum l of exponentials and their weighted sum of values acc (Milakov and
Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135), with exponentials to base 2:

    s = log2(e) scale q k^T      m' = max(m, rowmax(s))      p = 2^(s - m')      a = 2^(m - m')
    l' = a l + rowsum(p)         acc' = a acc + p v          and at the end out = acc / l

What fits it to this model's shapes:
  - A head dim is a power of two or the sum of two, so 96 is a dot of 64 and a dot of 32. Triton's blocks are
    powers of two, and padding to 128 would cost a third more tensor work, registers and shared memory.
  - Causal query tiles are aligned to the sequence's end: the ragged tile is then the one with the fewest
    keys. Tiles with the most keys start first.
  - Keys up to the diagonal (or the last whole block) take a loop without masks, the rest a loop with them.
    Sequences that fit in one block of keys take no loop at all.
  - 577 = 9 * 64 + 1: up to TAIL queries or keys left over by whole tiles take one of TAIL, not a whole one.
  - On sm_90 keys and values come through descriptors that the host makes once a launch, two blocks ahead.

Where gradients are needed m + log2(l) is kept, from which attention_backward_triton.py computes every p again.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import cards
from .custom_op import compiled_as_op
from .launch import cdiv, empty_like, on_device_of
from .tile_schedule import TileSchedule

LOG2_E = 1.4426950408889634
TAIL = 16  # the smallest side of a tl.dot
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# ------------------------------------------------------------------------------------------------- the kernel


@triton.jit(do_not_specialize=["tiles", "stride_lse"])
def attention_kernel(
    q, k, v, k0, k1, v0, v1, out, lse, cu_seqlens_q, cu_seqlens_k, schedule,
    scale_log2, heads, group, tiles, stride_lse,
    stride_qt, stride_qn, stride_kt, stride_kn, stride_vt, stride_vn, stride_ot, stride_on,
    H0: tl.constexpr, H1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr,
    CAUSAL: tl.constexpr, ONE_BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head, tile), tile fastest; of `tiles` as many as the longest sequence has. With a schedule
    (row of it, head), head fastest.

    q [Tq, N, H]; k, v [Tk, Nkv, H]; out [Tq, N, H]; lse [N, Tq] float32 or None: log2 of every query's sum of
    exponentials, inf if it sees no key; cu_seqlens [B + 1] int32; schedule [W, 5] int32 (tile_schedule.py) or None;
    scale_log2 = scale * log2(e); group = N / Nkv. TMA: k0, k1, v0, v1 are descriptors of k and v as [Nkv, Tk, H],
    whose blocks are BN keys of H0 or H1; else None.
    """
    program = tl.program_id(0)
    if schedule is None:
        tile, head, sequence = program % tiles, program // tiles % heads, program // tiles // heads
        q_start, Lq = sequence_at(cu_seqlens_q, sequence)
        k_start, Lk = sequence_at(cu_seqlens_k, sequence)
        if tile * BM >= Lq:
            return
    else:
        head = program % heads
        entry = schedule + program // heads * 5
        q_start, Lq = tl.load(entry).to(tl.int64), tl.load(entry + 1)
        k_start, Lk, tile = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    head_kv = head // group
    q += q_start * stride_qt + head.to(tl.int64) * stride_qn
    k += head_kv.to(tl.int64) * stride_kn
    v += head_kv.to(tl.int64) * stride_vn
    out += q_start * stride_ot + head * stride_on
    if lse is not None:
        lse += head.to(tl.int64) * stride_lse + q_start

    if CAUSAL:
        row = Lq - (tile + 1) * BM  # negative in the ragged tile; rows before 0 are not stored
    else:
        row = tile * BM
    k_start = k_start.to(tl.int32)
    k_end = k_start + Lk
    if TMA and Lk < BN:
        _attend(q, k, v, k0, k1, v0, v1, head_kv, out, lse, row, Lq, k_start, k_end, scale_log2,
                stride_qt, stride_kt, stride_vt, stride_ot,
                H0, H1, BM, BN, TAIL, CAUSAL, True, TMA)  # fmt: skip
    elif not CAUSAL and not ONE_BLOCK and BM > TAIL and Lq - row <= TAIL:
        _attend(q, k, v, k0, k1, v0, v1, head_kv, out, lse, row, Lq, k_start, k_end, scale_log2,
                stride_qt, stride_kt, stride_vt, stride_ot,
                H0, H1, TAIL, BN, TAIL, CAUSAL, ONE_BLOCK, TMA)  # fmt: skip
    else:
        _attend(q, k, v, k0, k1, v0, v1, head_kv, out, lse, row, Lq, k_start, k_end, scale_log2,
                stride_qt, stride_kt, stride_vt, stride_ot,
                H0, H1, BM, BN, TAIL, CAUSAL, ONE_BLOCK, TMA)  # fmt: skip


@triton.jit
def sequence_at(cu_seqlens, i):
    """Sequence i's start, in 64 bits because strides are multiplied with it, and its length."""
    start, end = tl.load(cu_seqlens + i), tl.load(cu_seqlens + i + 1)
    return start.to(tl.int64), end - start


@triton.jit
def _attend(
    q, k, v, k0, k1, v0, v1, head_kv, out, lse, row, Lq, k_start, k_end, scale_log2,
    stride_qt, stride_kt, stride_vt, stride_ot,
    H0: tl.constexpr, H1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr,
    CAUSAL: tl.constexpr, ONE_BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Queries row .. row + BM of one sequence and head. k, v and the descriptors begin with the first key of the pack;
    the sequence's are k_start .. k_end."""
    q0 = load_rows(q, row, Lq, stride_qt, BM, H0, True)  # [BM, H0]
    q1 = q0
    if H1 > 0:
        q1 = load_rows(q + H0, row, Lq, stride_qt, BM, H1, True)  # [BM, H1]
    m = tl.full([BM], -1.0e30, tl.float32)  # finite, so that m - m' is never inf - inf
    l = tl.zeros([BM], tl.float32)
    acc0 = tl.zeros([BM, H0], tl.float32)
    acc1 = tl.zeros([BM, H1 if H1 > 0 else 1], tl.float32)

    rows = row + tl.arange(0, BM)  # [BM]
    Lk = k_end - k_start
    if CAUSAL:  # the last query sees the last key
        last = rows + (k_end - Lq)
        end = tl.minimum(row + BM, Lq) + (k_end - Lq)
        whole = k_start + tl.maximum((tl.maximum(row, 0) + (Lk - Lq) + 1) // BN * BN, 0)
        tail = end
    else:
        last = tl.zeros_like(rows) + (k_end - 1)
        end = k_end
        whole = k_start + Lk // BN * BN
        tail = tl.where(end - whole > TAIL, end, whole)

    if ONE_BLOCK:  # straight-line code takes less than half of the loops' registers
        acc0, acc1, l, m = _step(acc0, acc1, l, m, q0, q1, k, v, k0, k1, v0, v1, head_kv, k_start, k_start, k_end, last,
                                 scale_log2, stride_kt, stride_vt, H0, H1, BN, True, False)  # fmt: skip
    else:
        for col in tl.range(k_start, whole, BN):
            acc0, acc1, l, m = _step(acc0, acc1, l, m, q0, q1, k, v, k0, k1, v0, v1, head_kv, col, col, k_end, last,
                                     scale_log2, stride_kt, stride_vt, H0, H1, BN, False, TMA)  # fmt: skip
        # A block of a descriptor never reaches beyond the sequence, where another's values are: the last one begins
        # early enough to end with it, and leaves out the keys that it has in common with the one before. What the
        # compiler would compute ahead of this loop takes registers that keep a second program off the multiprocessor.
        for col in tl.range(whole, tail, BN, disable_licm=True):
            at = tl.minimum(col, k_end - BN) if TMA else col
            acc0, acc1, l, m = _step(acc0, acc1, l, m, q0, q1, k, v, k0, k1, v0, v1, head_kv, at, col, k_end, last,
                                     scale_log2, stride_kt, stride_vt, H0, H1, BN, True, TMA)  # fmt: skip
        if not CAUSAL:
            for col in tl.range(tail, end, TAIL):  # once or not at all
                acc0, acc1, l, m = _step(acc0, acc1, l, m, q0, q1, k, v, k0, k1, v0, v1, head_kv, col, col, k_end, last,
                                         scale_log2, stride_kt, stride_vt,
                                         H0, H1, TAIL, True, False)  # fmt: skip

    some = tl.where(l > 0, l, 1.0)  # a query that sees no key gets zeros
    norm = 1.0 / some
    store_rows(out, acc0 * norm[:, None], row, Lq, stride_ot, BM, H0)
    if H1 > 0:
        store_rows(out + H0, acc1 * norm[:, None], row, Lq, stride_ot, BM, H1)
    if lse is not None:
        tl.store(lse + rows, tl.where(l > 0, m + tl.log2(some), float("inf")), mask=(rows >= 0) & (rows < Lq))


@triton.jit
def _step(
    acc0, acc1, l, m, q0, q1, k, v, k0, k1, v0, v1, head_kv, at, col, k_end, last, scale_log2,
    stride_kt, stride_vt,
    H0: tl.constexpr, H1: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Adds keys at .. at + BN to the running softmax. MASKED: query i sees none beyond last[i], and none before col."""
    key0 = _load_keys(k, k0, head_kv, at, k_end, stride_kt, 0, BN, H0, MASKED, TMA)  # [BN, H0]
    s = tl.dot(q0, key0.T, input_precision="ieee")  # [BM, BN]
    if H1 > 0:
        key1 = _load_keys(k, k1, head_kv, at, k_end, stride_kt, H0, BN, H1, MASKED, TMA)  # [BN, H1]
        s = tl.dot(q1, key1.T, s, input_precision="ieee")
    if MASKED:
        cols = at + tl.arange(0, BN)  # [BN]
        seen = cols[None, :] <= last[:, None]
        if TMA:
            seen &= (cols >= col)[None, :]
        s = tl.where(seen, s, float("-inf"))

    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    p = tl.math.exp2(s * scale_log2 - m_new[:, None])  # [BM, BN]; one multiply-add and one exp2 an element
    alpha = tl.math.exp2(m - m_new)
    l = l * alpha + tl.sum(p, 1)

    value0 = _load_keys(v, v0, head_kv, at, k_end, stride_vt, 0, BN, H0, MASKED, TMA)  # [BN, H0]
    p = p.to(value0.dtype)
    acc0 = tl.dot(p, value0, acc0 * alpha[:, None], input_precision="ieee")  # [BM, H0]
    if H1 > 0:
        value1 = _load_keys(v, v1, head_kv, at, k_end, stride_vt, H0, BN, H1, MASKED, TMA)  # [BN, H1]
        acc1 = tl.dot(p, value1, acc1 * alpha[:, None], input_precision="ieee")  # [BM, H1]
    return acc0, acc1, l, m_new


@triton.jit
def _load_keys(
    pointer, descriptor, head_kv, at, k_end, stride, COLUMN: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows at .. at + BR of keys or values, columns from COLUMN on.  [BR, BC]"""
    if TMA:
        return descriptor.load([head_kv, at, COLUMN]).reshape(BR, BC)
    else:
        return load_rows(pointer + COLUMN, at, k_end, stride, BR, BC, MASKED)


@triton.jit
def load_rows(
    source, row, end, stride, BR: tl.constexpr, BC: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Rows row .. row + BR from a pointer; MASKED: zeros for those outside 0 .. end.  [BR, BC]"""
    rows = tl.arange(0, BR)
    pointers = source + tl.cast(row, tl.int64) * stride + rows[:, None] * stride + tl.arange(0, BC)[None, :]
    if MASKED:
        return tl.load(pointers, mask=((row + rows >= 0) & (row + rows < end))[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(out, x, row, end, stride, BR: tl.constexpr, BC: tl.constexpr):
    rows = tl.arange(0, BR)
    pointers = out + tl.cast(row, tl.int64) * stride + rows[:, None] * stride + tl.arange(0, BC)[None, :]
    tl.store(pointers, x.to(out.dtype.element_ty), mask=((row + rows >= 0) & (row + rows < end))[:, None])


# ----------------------------------------------------------------------------------------------- its settings


class Tile(NamedTuple):
    BM: int
    BN: int
    warps: int
    stages: int
    tma: bool = False


# (queries, keys) of the longest sequence, up to which a row holds -> tile. Settled by what the compiler makes
# of them (tests/kernels/aot/table.json) and by arithmetic (bench/README.md); `python -m bench.run --sweep --only
# attention` times them beside others. With descriptors three stages, as two leave no load ahead of its wait.
ANY = 2**31
TILES = {  # (causal, descriptors)
    (True, True): {
        (32, 32): Tile(32, 32, 2, 1),  # one block of keys; 96 registers, so 10 programs a multiprocessor
        (64, 64): Tile(64, 64, 4, 1),
        (16, ANY): Tile(16, 64, 4, 2),  # the last token of long sequences
        (ANY, ANY): Tile(128, 64, 8, 3, True),
    },
    (True, False): {
        (32, 32): Tile(32, 32, 2, 1),
        (64, 64): Tile(64, 64, 4, 1),
        (16, ANY): Tile(16, 64, 4, 2),
        (1024, ANY): Tile(64, 32, 4, 3),
        (ANY, ANY): Tile(128, 64, 8, 2),
    },
    (False, True): {
        (32, 32): Tile(32, 32, 2, 1),
        (64, 64): Tile(64, 64, 4, 1),
        (16, ANY): Tile(16, 64, 4, 2),
        (ANY, ANY): Tile(128, 64, 8, 3, True),
    },
    (False, False): {
        (32, 32): Tile(32, 32, 2, 1),
        (64, 64): Tile(64, 64, 4, 1),
        (16, ANY): Tile(16, 64, 4, 2),
        (ANY, ANY): Tile(64, 32, 4, 2),
    },
}
WIDEST = 96  # head dim for which TILES that go through pointers spill nowhere
NO_TENSOR_CORES_TILE = Tile(16, 16, 8, 1)  # of float32, and of any dtype where Triton uses none; others spill


def choose_tile(H: int, max_seqlen_q: int, max_seqlen_k: int, causal: bool, tma: bool, dtype: torch.dtype) -> Tile:
    tile = _first_that_holds(max_seqlen_q, max_seqlen_k, TILES[causal, tma], dtype)
    return tile if tile.tma or H <= WIDEST else choose_small_tile(H, max_seqlen_q, max_seqlen_k, dtype)


# The widest head dim, and as TILES: for programs that have 64 KB, of which sm_75 takes both operands of every product,
# and for heads that are wider than WIDEST, whose sums fill the registers.
SMALL_TILES = {
    128: {
        (32, 32): Tile(32, 32, 2, 1),
        (16, ANY): Tile(16, 64, 4, 2),
        (ANY, ANY): Tile(64, 32, 4, 2),
    },
    192: {
        (32, 32): Tile(32, 32, 2, 1),
        (16, ANY): Tile(16, 32, 4, 2),
        (ANY, ANY): Tile(32, 32, 8, 2),
    },
}


def choose_small_tile(H: int, max_seqlen_q: int, max_seqlen_k: int, dtype: torch.dtype) -> Tile:
    split_head_dim(H)  # raises for those that have no tile
    rows = next(rows for widest, rows in SMALL_TILES.items() if widest >= H)
    return _first_that_holds(max_seqlen_q, max_seqlen_k, rows, dtype)


def _first_that_holds(
    max_seqlen_q: int, max_seqlen_k: int, rows: dict[tuple[int, int], Tile], dtype: torch.dtype
) -> Tile:
    if dtype == torch.float32:
        return NO_TENSOR_CORES_TILE
    for (q, k), tile in rows.items():
        if max_seqlen_q <= q and max_seqlen_k <= k:
            return tile
    raise ValueError(f"no tile for {max_seqlen_q} queries and {max_seqlen_k} keys")


def most_registers(tile: Tile, H: int, causal: bool) -> int | None:
    """Registers a thread that ptxas may take, None: as it likes. 128 at 256 threads let two programs share a
    multiprocessor's 65536; wider heads than 96 would spill, and full attention of a head in two parts. Left alone,
    ptxas stops some loops over pointers at 96 and spills two values, where 126 to 134 hold them all: they may have the
    most that there are."""
    if tile.tma:
        return 128 if tile.warps == 8 and H <= 96 and (causal or split_head_dim(H)[1] == 0) else None
    return 255 if tile.stages > 1 or tile == NO_TENSOR_CORES_TILE else None


def register_limit(registers: int | None) -> dict[str, int]:
    """The option of a launch, which AMD's compiler has not."""
    return {} if registers is None or torch.version.hip is not None else {"maxnreg": registers}


def split_head_dim(H: int) -> tuple[int, int]:
    """H as one power of two of at least 16, or as the sum of two: 64 -> (64, 0), 96 -> (64, 32)."""
    H0 = 1 << (H.bit_length() - 1)
    H1 = H - H0
    if not 16 <= H0 <= 128 or (H1 and (H1 < 16 or H1 & (H1 - 1))):
        raise ValueError(f"head dim {H}: must be 16, 32, 64 or 128, or the sum of two of them (48, 80, 96, ...)")
    return H0, H1


# ----------------------------------------------------------------------------------------------- its launcher


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float | None,
    cu_seqlens_q: Tensor | None, max_seqlen_q: int | None,
) -> Tensor:  # fmt: skip
    return empty_like(q)


@compiled_as_op(_fake_attention)
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float | None,
    cu_seqlens_q: Tensor | None, max_seqlen_q: int | None,
) -> Tensor:  # fmt: skip
    """See `ops.attention`. Never waits for the device; `max_seqlen` too small leaves rows unwritten."""
    if cu_seqlens_q is None or max_seqlen_q is None:
        cu_seqlens_q, max_seqlen_q = cu_seqlens, max_seqlen
    tile = tile_for(q, k, v, max_seqlen_q, max_seqlen, causal)
    return launch(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_q, max_seqlen_q, causal, scale, tile)


def launch(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int, cu_seqlens_q: Tensor,
    max_seqlen_q: int, causal: bool, scale: float | None, tile: Tile, lse: Tensor | None = None,
    schedule: TileSchedule | None = None,
) -> Tensor:  # fmt: skip
    """`attention` with a given tile, for tests and for the bench's sweep. lse [N, Tq] float32 is filled if given; then
    rows beyond the last sequence are zeros, because a NaN there, times a gradient of zero, would be a NaN in the
    gradient of a weight."""
    T, N, H = q.shape
    scale = H**-0.5 if scale is None else scale
    check_inputs(q, k, v, cu_seqlens_k, cu_seqlens_q, scale)
    out = empty_like(q) if lse is None else torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    (H0, H1), tiles, order = split_head_dim(H), cdiv(max_seqlen_q, tile.BM), None
    programs = (cu_seqlens_q.shape[0] - 1) * N * tiles
    if schedule is not None:
        schedule.check(len(q), len(k), len(cu_seqlens_q) - 1, max_seqlen_q, max_seqlen_k)
        order = schedule.tiles(tile.BM, q.device)
        programs = order.shape[0] * N
    if T == 0 or programs == 0:
        return out
    if k.shape[0] == 0:  # of which no descriptor can be made
        if lse is not None:
            lse.fill_(float("inf"))
        return out.zero_()
    one_block = max_seqlen_k <= tile.BN
    described = describe_keys(k, v, tile.BN, H0, H1) if tile.tma and not one_block else (None,) * 4
    with on_device_of(q):
        attention_kernel[(programs,)](
            q, k, v, *described, out, lse, cu_seqlens_q, cu_seqlens_k, order,
            scale * LOG2_E, N, N // k.shape[1], tiles, T,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], N * H, H,
            H0=H0, H1=H1, BM=tile.BM, BN=tile.BN, TAIL=TAIL,
            CAUSAL=causal, ONE_BLOCK=one_block, TMA=described[0] is not None,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
            **register_limit(most_registers(tile, H, causal)),
        )  # fmt: skip
    return out


def scheduled(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float | None,
    cu_seqlens_q: Tensor | None, max_seqlen_q: int | None, schedule: TileSchedule,
) -> Tensor:  # fmt: skip
    """`attention` for the tiles of a schedule and no others."""
    if cu_seqlens_q is None or max_seqlen_q is None:
        cu_seqlens_q, max_seqlen_q = cu_seqlens, max_seqlen
    tile = tile_for(q, k, v, max_seqlen_q, max_seqlen, causal)
    return launch(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_q, max_seqlen_q, causal, scale, tile, schedule=schedule)


def tile_for(q: Tensor, k: Tensor, v: Tensor, max_seqlen_q: int, max_seqlen_k: int, causal: bool) -> Tile:
    """The tile of a call, on the card that its tensors are on."""
    card = cards.card_of(q)
    if card is not None and not card.tensor_cores:
        return NO_TENSOR_CORES_TILE
    if card is not None and card.small:
        return choose_small_tile(q.shape[2], max_seqlen_q, max_seqlen_k, q.dtype)
    return choose_tile(q.shape[2], max_seqlen_q, max_seqlen_k, causal, supports_tma(q, k, v), q.dtype)


def describe_keys(k: Tensor, v: Tensor, BN: int, H0: int, H1: int) -> tuple[TensorDescriptor | None, ...]:
    """k0, k1, v0, v1 of the kernel: keys and values [Nkv, T, H] in blocks of BN rows of one head. They travel with the
    launch, so that a program loads at once, and a CUDA graph keeps them."""

    def describe(x: Tensor, width: int) -> TensorDescriptor | None:
        if not width:
            return None
        (T, Nkv, H), (stride_t, stride_n, _) = x.shape, x.stride()
        return TensorDescriptor(x, [Nkv, T, H], [stride_n, stride_t, 1], [1, BN, width])

    return describe(k, H0), describe(k, H1), describe(v, H0), describe(v, H1)


def supports_tma(*tensors: Tensor) -> bool:
    """Descriptors are used on NVIDIA's sm_90, for 16-bit tensors whose every row of every head is 16-byte aligned."""
    if not tensors[0].is_cuda or cards.card(tensors[0].get_device()).name != "sm_90":
        return False
    return all(is_aligned(t) for t in tensors)


def is_aligned(t: Tensor) -> bool:
    size, (stride_t, stride_n, _) = t.element_size(), t.stride()
    return stride_t > 0 and stride_n > 0 and not (t.data_ptr() | stride_t * size | stride_n * size) % 16


def check_inputs(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, cu_seqlens_q: Tensor, scale: float) -> None:
    dtype, device = q.dtype, q.device  # read once: an attribute of a tensor takes 0.1 to 0.2 us
    if dtype not in DTYPES:
        raise ValueError(f"q must be float16, bfloat16 or float32, got {dtype}")
    if v.shape != k.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"k {tuple(k.shape)}, v {tuple(v.shape)}, q {tuple(q.shape)} do not go together")
    _check_heads("q", q, dtype, device)
    _check_heads("k", k, dtype, device)
    _check_heads("v", v, dtype, device)
    _check_lengths("cu_seqlens", cu_seqlens_k, device)
    if cu_seqlens_q is not cu_seqlens_k:
        _check_lengths("cu_seqlens_q", cu_seqlens_q, device)
        if len(cu_seqlens_k) != len(cu_seqlens_q):
            raise ValueError(f"cu_seqlens has {len(cu_seqlens_k)} entries, cu_seqlens_q {len(cu_seqlens_q)}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")


def _check_heads(name: str, x: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if x.stride(2) != 1:
        raise ValueError(f"{name}: the last dimension must have stride 1, got strides {x.stride()}")
    if x.dtype != dtype or x.device != device:
        raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {dtype} on {device}")


def _check_lengths(name: str, cu: Tensor, device: torch.device) -> None:
    if cu.dtype != torch.int32 or not cu.is_contiguous() or cu.device != device:
        raise ValueError(f"{name} must be dense int32 on {device}, got {cu.dtype}, {cu.stride()}, {cu.device}")
