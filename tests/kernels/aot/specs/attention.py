"""Attention as the model launches it: causal with head dim 96 (decoder), full with 64 (image tower), both
also through pointers; the other head dims and float32 once each."""

from minivlm2vec_kernels import attention_triton as attention
from minivlm2vec_kernels.attention_triton import FP32_TILE, TILES, Tile
from tests.kernels.aot import Spec


def specs() -> list[Spec]:
    decoder = dict.fromkeys([*TILES[True, True].values(), *TILES[True, False].values()])
    tower = dict.fromkeys([*TILES[False, True].values(), *TILES[False, False].values()])
    return [
        *(_spec(96, True, t, one_block=t.stages == 1, quick=t.tma or t.stages == 1) for t in decoder),
        *(_spec(64, False, t, one_block=t.stages == 1, quick=t.tma) for t in tower),
        _spec(96, True, Tile(64, 64, 4, 2, True), one_block=False, group=4),
        *(_spec(H, True, Tile(64, 64, 4, 2, True), one_block=False) for H in (32, 48, 80, 128)),
        *(_spec(H, True, FP32_TILE, one_block=False, dtype="fp32") for H in (64, 96, 128)),
    ]


def _spec(
    H: int, causal: bool, tile: Tile, *, one_block: bool, group: int = 1, dtype: str = "bf16", quick: bool = False
) -> Spec:
    H0, H1 = attention.split_head_dim(H)
    strides = [f"stride_{x}{dim}" for x in "qkvo" for dim in "tn"]
    types = dict.fromkeys(["q", "k", "v", "out"], f"*{dtype}")
    types |= dict.fromkeys(["cu_seqlens_q", "cu_seqlens_k"], "*i32")
    types |= dict.fromkeys(["heads", "tiles", "stride_lse", *strides], "i32") | {"scale_log2": "fp32"}
    constants = {"H0": H0, "H1": H1, "BM": tile.BM, "BN": tile.BN, "TAIL": attention.TAIL}
    constants |= {"CAUSAL": causal, "ONE_BLOCK": one_block, "TMA": tile.tma, "lse": None}
    for name, width in (("k0", H0), ("v0", H0), ("k1", H1), ("v1", H1)):
        if tile.tma and width:
            types[name] = f"tensordesc<{dtype}[1, {tile.BN}, {width}]>"
        else:
            constants[name] = None
    registers = attention.most_registers(tile, H)
    if group == 1:  # Triton makes an integer argument of 1 a constant
        constants["group"] = 1
    else:
        types["group"] = "i32"
    return Spec(
        kernel="attention_triton.attention_kernel",
        config=f"{dtype} H{H} {'causal' if causal else 'full'} group{group} {tile.BM}x{tile.BN} "
        f"warps{tile.warps} stages{tile.stages} {'tma' if tile.tma else 'pointers'}",
        types=types,
        constants=constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        unaligned=frozenset({"tiles", "group", "stride_lse"}),
        archs=(90,) if tile.tma else (80, 90, 100),
        wgmma=tile.BM >= 64 and dtype == "bf16",
        quick=quick,
        options={"enable_fp_fusion": True} | ({} if registers is None else {"maxnreg": registers}),
    )
