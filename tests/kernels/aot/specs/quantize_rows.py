"""quantize_rows_triton.py: the inputs of the decoder's matrices. e4m3 exists from sm_89 on."""

from minivlm2vec_kernels.launch import whole_rows
from tests.kernels.aot import Spec

TYPES = {"x": "*bf16", "out": "*fp8e4nv", "scale": "*fp32", "R": "i32", "K": "i32", "stride_x": "i32"}


def specs() -> list[Spec]:
    return [_spec(K) for K in (1024, 3072, 8192)]


def _spec(K: int) -> Spec:
    BK, BM, warps = whole_rows(K)
    return Spec(
        "quantize_rows_triton.quantize_rows_kernel", f"K{K}", TYPES, {"BM": BM, "BK": BK}, warps,
        unaligned=frozenset({"R"}), archs=(90, 100), quick=K == 3072,
    )  # fmt: skip
