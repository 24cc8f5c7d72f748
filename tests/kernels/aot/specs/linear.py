"""linear_triton.py: every setting that a sweep may choose; those in use are part of the default tests."""

from minivlm2vec_kernels.linear_triton import CANDIDATES, Tiles
from tests.kernels.aot import Spec

KERNELS = {"quick_gelu": "linear_quick_gelu_kernel", "silu_mul": "linear_silu_mul_kernel"}


def specs() -> list[Spec]:
    found = [_spec(*key, tiles, i == 0) for key, candidates in CANDIDATES.items() for i, tiles in enumerate(candidates)]
    return [*found, _spec("quick_gelu", "tma", CANDIDATES["quick_gelu", "tma"][0], True, bias_first=False)]


def _spec(kernel: str, path: str, tiles: Tiles, in_use: bool, bias_first: bool = True) -> Spec:
    """TMA tiles are tuned for sm_90. On sm_100, where the bias comes last, the one in use is compiled too."""
    tma = path == "tma"
    t = tiles
    blocks = {"x": (t.BM, t.BK), "weight": (t.BN, t.BK), "out": (t.BM, t.BN)}
    types = {name: f"tensordesc<bf16[{r}, {c}]>" if tma else "*bf16" for name, (r, c) in blocks.items()}
    types |= {"bias": "*bf16", "N": "i32"} if kernel == "quick_gelu" else {"F": "i32"}
    types |= dict.fromkeys(("M", "K", "stride_x", "stride_weight"), "i32")
    constants = {"BM": t.BM, "BN": t.BN, "BK": t.BK, "GROUP": t.GROUP, "TMA": tma}
    if kernel == "quick_gelu":
        constants["BIAS_FIRST"] = bias_first
    archs = (90,) if tma else (80, 90)
    if tma and in_use:
        archs = (100,) if not bias_first else (90,) if kernel == "quick_gelu" else (90, 100)
    return Spec(
        f"linear_triton.{KERNELS[kernel]}",
        f"{path} {t.BM}x{t.BN}x{t.BK} w{t.warps} s{t.stages} r{t.resident}{'' if bias_first else ' bias last'}",
        types,
        constants,
        t.warps,
        t.stages,
        unaligned=frozenset({"M"}),
        archs=archs,
        wgmma=True,
        quick=in_use,
    )
