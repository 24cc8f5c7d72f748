"""pooling_triton.py: the decoder's width and a small checkpoint's."""

import triton.language as tl

from minivlm2vec_kernels import pooling_triton
from tests.kernels.aot import Spec


def specs() -> list[Spec]:
    return [_spec(3072), _spec(256)]


def _spec(D: int) -> Spec:
    BD, warps = pooling_triton.settings(D)
    types = {"x": "*bf16", "cu_seqlens": "*i32", "weight": "*bf16", "out": "*fp32"}
    types |= {"T": "i32", "D": "i32", "stride_x": "i32", "eps": "fp32"}
    constants = {"NORMALIZE": True, "NORM_DTYPE": tl.bfloat16, "BD": BD}
    return Spec(
        "pooling_triton.pool_last_token_kernel", f"D{D}", types, constants, warps,
        unaligned=frozenset({"T"}), quick=D == 3072,
    )  # fmt: skip
