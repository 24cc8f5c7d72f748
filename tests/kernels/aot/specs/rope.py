"""rope_triton.py: the decoder's heads, and grouped ones of a small checkpoint."""

from minivlm2vec_kernels import rope_triton
from tests.kernels.aot import Spec

STRIDES = [f"stride_{x}_{dim}" for x in ("q", "k", "oq", "ok") for dim in ("token", "head")]


def specs() -> list[Spec]:
    return [_spec(32, 32, 96), _spec(8, 2, 64), _spec(32, 8, 128), _spec(32, 32, 96, backward=True)]


def _spec(N: int, Nkv: int, H: int, backward: bool = False) -> Spec:
    BN, BNKV, BH, warps = rope_triton.settings(N, Nkv, H)
    types = dict.fromkeys(("q", "k", "out_q", "out_k"), "*bf16") | {"cos": "*fp32", "sin": "*fp32"}
    types |= dict.fromkeys(("N", "Nkv", *STRIDES, "stride_cos", "stride_sin"), "i32")
    constants = {"HALF": H // 2, "BACKWARD": backward, "BN": BN, "BNKV": BNKV, "BH": BH}
    unaligned = frozenset() if N % 16 == Nkv % 16 == 0 else frozenset({"N", "Nkv"})
    return Spec(
        "rope_triton.rope_kernel", f"N{N} Nkv{Nkv} H{H}{' backward' if backward else ''}", types, constants, warps,
        unaligned=unaligned, quick=H == 96 and not backward,
    )  # fmt: skip
