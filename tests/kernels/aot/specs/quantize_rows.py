"""quantize_rows_triton.py: every row of its table; the decoder's width is part of the default tests. e4m3 exists from
sm_89 on."""

from minivlm2vec_kernels.launch import ROW_SETTINGS, whole_rows
from tests.kernels.aot import DTYPES, Spec, in_dtype, width_of

TYPES = {"x": "*bf16", "out": "*fp8e4nv", "scale": "*fp32", "R": "i32", "K": "i32", "stride_x": "i32"}


def specs() -> list[Spec]:
    return [in_dtype(_spec(width_of(BK)), dtype) for BK in ROW_SETTINGS for dtype in DTYPES]


def _spec(K: int) -> Spec:
    BK, BM, warps = whole_rows(K, "quantize_rows")
    return Spec(
        "quantize_rows_triton.quantize_rows_kernel", f"K{K}", TYPES, {"BM": BM, "BK": BK}, warps,
        unaligned=frozenset({"R"}), archs=(90, 100), quick=K == 3072,
    )  # fmt: skip
