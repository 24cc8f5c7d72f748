"""rope_triton.py: the decoder's heads, and grouped ones of a small checkpoint."""

from minivlm2vec_kernels import rope_triton
from tests.aot import Spec

STRIDES = ("stride_q_token", "stride_q_head", "stride_k_token", "stride_k_head", "stride_cos", "stride_sin")


def specs() -> list[Spec]:
    return [_spec(32, 32, 96), _spec(8, 2, 64), _spec(32, 8, 128)]


def _spec(N: int, Nkv: int, H: int) -> Spec:
    BN, BNKV, BH, warps = rope_triton.settings(N, Nkv, H)
    types = {"q": "*bf16", "k": "*bf16", "cos": "*fp32", "sin": "*fp32", "N": "i32", "Nkv": "i32"}
    types |= dict.fromkeys(STRIDES, "i32")
    constants = {"HALF": H // 2, "BN": BN, "BNKV": BNKV, "BH": BH}
    unaligned = frozenset() if N % 16 == Nkv % 16 == 0 else frozenset({"N", "Nkv"})
    return Spec(
        "rope_triton.rope_kernel", f"N{N} Nkv{Nkv} H{H}", types, constants, warps,
        unaligned=unaligned, quick=H == 96,
    )  # fmt: skip
