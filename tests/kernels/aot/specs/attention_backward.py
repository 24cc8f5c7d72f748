"""Attention's gradient as a launch can reach it: every head dim, causal and not, grouped heads.

The decoder's is part of the default tests."""

import torch

from minivlm2vec_kernels import attention_backward_triton as backward
from minivlm2vec_kernels.attention_triton import Tile, split_head_dim
from tests.kernels.aot import ARCHS, Spec
from tests.kernels.aot.specs.attention import HEAD_DIMS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OWN = {"dq": ("out", "dq"), "dkv": ("dk", "dv")}  # the tensors, besides those of both passes


def specs() -> list[Spec]:
    return [spec for pass_ in OWN for spec in _specs(pass_)]


def _specs(pass_: str) -> list[Spec]:
    quick = {"archs": (90,), "quick": True}
    every = [(H, causal, dtype) for H in HEAD_DIMS for causal in (True, False) for dtype in DTYPES]
    found = [_spec(pass_, H, c, dtype=d, **(quick if (H, c, d) == (96, True, "bf16") else {})) for H, c, d in every]
    return [*found, _spec(pass_, 96, True, group=4), _spec(pass_, 64, False, group=4)]


def _spec(
    pass_: str, H: int, causal: bool, group: int = 1, dtype: str = "bf16", archs: tuple[int, ...] = ARCHS,
    quick: bool = False, tile: Tile | None = None,
) -> Spec:  # fmt: skip
    H0, H1 = split_head_dim(H)
    tile = tile or backward.choose_backward_tile(pass_, H, DTYPES[dtype])
    heads = "heads" if pass_ == "dq" else "heads_kv"
    types = dict.fromkeys(("q", "k", "v", "dout", *OWN[pass_]), f"*{dtype}")
    types |= dict.fromkeys(("lse", "delta"), "*fp32") | dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), "*i32")
    types |= dict.fromkeys((heads, "tiles", "Tq", *(f"stride_{x}{dim}" for x in "qkv" for dim in "tn")), "i32")
    types |= dict.fromkeys(("scale", "scale_log2"), "fp32") | ({} if group == 1 else {"group": "i32"})
    constants = {"H0": H0, "H1": H1, "BM": tile.BM, "BN": tile.BN, "CAUSAL": causal}
    constants |= {"group": 1} if group == 1 else {}  # Triton makes an integer argument of 1 a constant
    return Spec(
        kernel=f"attention_backward_triton.attention_{pass_}_kernel",
        config=f"{dtype} H{H} {'causal' if causal else 'full'} group{group} {tile.BM}x{tile.BN} "
        f"warps{tile.warps} stages{tile.stages}",
        types=types,
        constants=constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        unaligned=frozenset({"tiles", "Tq", "group"}),
        archs=archs,
        wgmma=max(tile.BM, tile.BN) >= 64 and dtype == "bf16",
        quick=quick,
        options={"maxnreg": backward.MOST_REGISTERS} if pass_ == "dkv" else {},
    )
