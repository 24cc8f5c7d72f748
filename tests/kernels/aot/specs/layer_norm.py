"""layer_norm_triton.py: every row of its table; the tower's width is part of the default tests."""

from minivlm2vec_kernels.launch import ROW_SETTINGS, WIDEST, whole_rows
from tests.kernels.aot import DTYPES, Spec, in_dtype

TYPES = dict.fromkeys(("x", "weight", "bias", "out"), "*bf16") | {
    "R": "i32", "D": "i32", "stride_x": "i32", "stride_residual": "i32", "eps": "fp32"
}  # fmt: skip


FORMS = {"": (), " add": ("residual", "total"), " shift": ("shift", "total")}


def specs() -> list[Spec]:
    widest = WIDEST["layer_norm"]
    widths = [D for D in ROW_SETTINGS if widest >= D]
    return [in_dtype(_spec(D, form), dtype) for D in widths for form in FORMS for dtype in DTYPES]


def _spec(D: int, form: str) -> Spec:
    BD, BM, warps = whole_rows(D, "layer_norm")
    given = FORMS[form]
    types = TYPES | dict.fromkeys(given, "*bf16")
    constants = {"ADD": "residual" in given, "SHIFT": "shift" in given, "BM": BM, "BD": BD}
    constants |= dict.fromkeys({"residual", "shift", "total"} - set(given))
    return Spec(
        "layer_norm_triton.layer_norm_kernel", f"D{D}{form}", types, constants, warps, unaligned=frozenset({"R"}),
        quick=D == 1024 and form != "",
    )  # fmt: skip
