"""linear_triton.py: every setting that a sweep may choose; those in use are part of the default tests."""

from minivlm2vec_kernels.linear_triton import CANDIDATES, Tiles
from tests.kernels.aot import Spec

KERNELS = {"quick_gelu": "linear_quick_gelu_kernel", "silu_mul": "linear_silu_mul_kernel"}


def specs() -> list[Spec]:
    return [
        _spec(kernel, tiles, path == "tma", in_use=i == 0)
        for (kernel, path), candidates in CANDIDATES.items()
        for i, tiles in enumerate(candidates)
    ]


def _spec(kernel: str, tiles: Tiles, tma: bool, in_use: bool) -> Spec:
    t = tiles
    blocks = {"x": (t.BM, t.BK), "weight": (t.BN, t.BK), "out": (t.BM, t.BN)}
    types = {name: f"tensordesc<bf16[{r}, {c}]>" if tma else "*bf16" for name, (r, c) in blocks.items()}
    types |= {"bias": "*bf16", "N": "i32"} if kernel == "quick_gelu" else {"F": "i32"}
    types |= dict.fromkeys(("M", "K", "stride_x", "stride_weight"), "i32")
    constants = {"BM": t.BM, "BN": t.BN, "BK": t.BK, "GROUP": t.GROUP, "TMA": tma, "PRECISION": "ieee"}
    return Spec(
        f"linear_triton.{KERNELS[kernel]}",
        f"{'tma' if tma else 'pointer'} {t.BM}x{t.BN}x{t.BK} w{t.warps} s{t.stages} r{t.resident}",
        types,
        constants,
        t.warps,
        t.stages,
        unaligned=frozenset({"M"}),
        archs=((90, 100) if in_use else (90,)) if tma else (80, 90),  # TMA tiles are tuned for sm_90
        wgmma=True,
        quick=in_use,
    )
