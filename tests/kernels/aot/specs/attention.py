"""Attention as a launch can reach it: every tile of the tables with every head dim, causal and not, grouped heads, with
lse for a gradient; the published model's are part of the default tests."""

import torch

from minivlm2vec_kernels import attention_triton as attention
from minivlm2vec_kernels.attention_triton import NO_TENSOR_CORES_TILE, SMALL_TILES, TILES, WIDEST, Tile
from tests.kernels.aot import ARCHS, Spec

HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128, 144, 160, 192)  # all that `split_head_dim` takes
PUBLISHED = ((True, 96), (False, 64))  # decoder, tower
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def specs() -> list[Spec]:
    found = {}
    for (causal, _), table in TILES.items():
        for (_, keys), tile in table.items():
            for H in HEAD_DIMS:
                for one in _sizes(tile, keys) if H <= WIDEST or tile.tma else ():
                    found[causal, tile, H, one] = [_spec(H, causal, tile, one_block=one)]
    for H in HEAD_DIMS:
        rows = next(rows for widest, rows in SMALL_TILES.items() if widest >= H)
        for causal in (True, False):
            for (_, keys), tile in rows.items() if H > WIDEST else ():
                for one in _sizes(tile, keys):
                    found[causal, tile, H, one] = [_spec(H, causal, tile, one_block=one)]
    for causal, H in PUBLISHED:  # what changes no more than an argument
        for (_, keys), tile in (*TILES[causal, True].items(), *TILES[causal, False].items()):
            one = keys <= tile.BN
            found[causal, tile, H, one, "other"] = [
                _spec(H, causal, tile, one_block=one, group=4),
                _spec(H, causal, tile, one_block=one, lse=True),
                _spec(H, causal, tile, one_block=one, scheduled=True),
            ]
    for H in HEAD_DIMS:
        for causal in (True, False):
            found[causal, NO_TENSOR_CORES_TILE, H] = [
                _spec(H, causal, NO_TENSOR_CORES_TILE, dtype="fp32", one_block=o) for o in (False, True)
            ]
    return [spec for specs in found.values() for spec in specs]


def _sizes(tile: Tile, keys: int) -> tuple[bool, ...]:
    """Whether a tile meets keys of one block, in a row for so many keys: few queries also do, where their row of the
    table is for few queries alone."""
    return (True,) if keys <= tile.BN else (False, True) if tile.BM <= 16 else (False,)


def _spec(
    H: int, causal: bool, tile: Tile, *, one_block: bool, group: int = 1, dtype: str = "bf16", lse: bool = False,
    scheduled: bool = False,
) -> Spec:  # fmt: skip
    H0, H1 = attention.split_head_dim(H)
    tma = tile.tma and not one_block
    strides = [f"stride_{x}{dim}" for x in "qkvo" for dim in "tn"]
    types = dict.fromkeys(["q", "k", "v", "out"], f"*{dtype}")
    types |= dict.fromkeys(["cu_seqlens_q", "cu_seqlens_k"], "*i32")
    types |= dict.fromkeys(["heads", "tiles", "stride_lse", *strides], "i32") | {"scale_log2": "fp32"}
    constants = {"H0": H0, "H1": H1, "BM": tile.BM, "BN": tile.BN, "TAIL": attention.TAIL}
    constants |= {"CAUSAL": causal, "ONE_BLOCK": one_block, "TMA": tma}
    for name, width in (("k0", H0), ("v0", H0), ("k1", H1), ("v1", H1)):
        described = {name: f"tensordesc<{dtype}[1, {tile.BN}, {width}]>"} if tma and width else {}
        types |= described
        constants |= {} if described else {name: None}
    types |= {"lse": "*fp32"} if lse else {}
    constants |= {} if lse else {"lse": None}
    types |= {"schedule": "*i32"} if scheduled else {}
    constants |= {} if scheduled else {"schedule": None}
    if group == 1:  # Triton makes an integer argument of 1 a constant
        constants["group"] = 1
    else:
        types["group"] = "i32"
    registers = attention.most_registers(tile, H, causal)
    return Spec(
        kernel="attention_triton.attention_kernel",
        config=f"{dtype} H{H} {'causal' if causal else 'full'} group{group} {tile.BM}x{tile.BN} "
        f"warps{tile.warps} stages{tile.stages} {'tma' if tma else 'pointers'}"
        f"{' one block' if one_block else ''}{' lse' if lse else ''}{' scheduled' if scheduled else ''}",
        types=types,
        constants=constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        unaligned=frozenset({"tiles", "group", "stride_lse"}),
        archs=(90,) if tma else ARCHS,
        wgmma=tile.BM >= 64 and dtype == "bf16",
        blocks=2 if tma and (causal, H) in PUBLISHED else 1,
        ahead=1 if tma else 0,
        quick=(causal, H) in PUBLISHED
        and group == 1
        and not lse
        and dtype == "bf16"
        and (tma or (tile.stages == 1 and not scheduled)),
        options={} if registers is None else {"maxnreg": registers},
    )
