"""The model's attention: causal with head dim 96 (decoder), non-causal with 64 (image tower), and the others."""

import torch
from minivlm2vec_kernels import attention_triton as attention
from tests.aot import Spec

# (name, head dim, causal, tile, descriptors too, promises wgmma on sm_90, default tests)
DECODER, TOWER = attention.CAUSAL_TILES, attention.FULL_TILES


def specs() -> list[Spec]:
    chosen = [_spec(96, True, tile, quick=tile.tma) for tile in DECODER.values()]
    chosen += [_spec(64, False, tile, quick=tile.tma) for tile in TOWER.values()]
    others = [_spec(96, True, tile) for tile in attention.TILES if tile not in DECODER.values()]
    others += [_spec(64, False, tile) for tile in attention.TILES if tile not in TOWER.values()]
    others += [_spec(H, True, DECODER[1024]) for H in (32, 48, 80, 128)]
    others += [_spec(H, True, attention.FP32_TILE, dtype="fp32") for H in (64, 96, 128)]
    return chosen + others


def _spec(H: int, causal: bool, tile: attention.Tile, quick: bool = False, dtype: str = "bf16") -> Spec:
    H0, H1 = attention.split_head_dim(H)
    pointers = {name: f"*{dtype}" for name in ("q", "k", "v", "out")}
    integers = [f"stride_{x}{d}" for x in ("q", "k", "v", "o") for d in ("t", "n")] + ["heads", "tiles"]
    return Spec(
        kernel="attention_triton.attention_kernel",
        config=f"{dtype} H{H} {'causal' if causal else 'full'} {tile.BM}x{tile.BN} warps{tile.warps} "
        f"stages{tile.stages} {'tma' if tile.tma else 'pointers'}",
        types=pointers
        | {name: "*i32" for name in ("cu_seqlens_q", "cu_seqlens_k")}
        | {"scale_log2": "fp32"}
        | {name: "i32" for name in integers},
        constants={"group": 1, "H0": H0, "H1": H1, "BM": tile.BM, "BN": tile.BN, "TAIL": attention.TAIL}
        | {"CAUSAL": causal, "TMA": tile.tma},
        unaligned=frozenset({"tiles"}),
        num_warps=tile.warps,
        num_stages=tile.stages,
        wgmma=tile.BM >= 64 and dtype == "bf16",
        archs=(90,) if tile.tma else (80, 90, 100),
        quick=quick,
        options={"enable_fp_fusion": True},
    )
