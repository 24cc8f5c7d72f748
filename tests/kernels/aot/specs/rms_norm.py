"""rms_norm_triton.py: every row of its tables; the decoder's width is part of the default tests."""

from minivlm2vec_kernels.launch import ROW_SETTINGS, WIDEST, whole_rows
from minivlm2vec_kernels.rms_norm_triton import BACKWARD_SETTINGS
from tests.kernels.aot import DTYPES, Spec, in_dtype, width_of

TYPES = dict.fromkeys(("x", "weight", "out"), "*bf16") | {
    "R": "i32", "D": "i32", "stride_x": "i32", "stride_residual": "i32", "eps": "fp32"
}  # fmt: skip


def specs() -> list[Spec]:
    widest = WIDEST["rms_norm"]
    widths = [width_of(BD) for BD in ROW_SETTINGS if widest >= BD]
    forward = [_spec(D, add) for D in widths for add in (False, True)]
    backward = [_backward(width_of(BD), add, weight) for BD in BACKWARD_SETTINGS for add, weight in BACKWARD]
    return [in_dtype(s, dtype) for s in (*forward, *map(_quantize, widths), *backward) for dtype in DTYPES]


BACKWARD = [(add, weight) for add in (True, False) for weight in (True, False)]


def _spec(D: int, add: bool) -> Spec:
    BD, BM, warps = whole_rows(D, "rms_norm")
    optional = ("residual", "total")
    types = TYPES | (dict.fromkeys(optional, "*bf16") if add else {})
    constants = {"ADD": add, "BM": BM, "BD": BD} | ({} if add else dict.fromkeys(optional))
    name = f"D{D}{' add' if add else ''}"
    return Spec(
        "rms_norm_triton.rms_norm_kernel", name, types, constants, warps, unaligned=frozenset({"R"}),
        quick=D == 3072 and add,
    )  # fmt: skip


def _quantize(D: int) -> Spec:
    """e4m3 exists from sm_89 on."""
    BD, BM, warps = whole_rows(D, "rms_norm")
    types = TYPES | {"out": "*fp8e4nv", "scale": "*fp32"}
    types.pop("stride_residual")
    return Spec(
        "rms_norm_triton.rms_norm_quantize_kernel", f"D{D}", types, {"BM": BM, "BD": BD}, warps,
        unaligned=frozenset({"R"}), archs=(90, 100), quick=D == 3072,
    )  # fmt: skip


def _backward(D: int, add: bool, weight: bool) -> Spec:
    """add: of add_rms_norm, else of rms_norm; weight: with a gradient of the weight, which else is frozen."""
    BD, BM, warps = whole_rows(D, "rms_norm_backward", BACKWARD_SETTINGS)
    pointers = dict.fromkeys(("dout", "s", "weight", "ds") + (("dtotal",) if add else ()), "*bf16")
    numbers = dict.fromkeys(("R", "D", "stride_dout", "stride_dtotal", "stride_s"), "i32")
    types = pointers | numbers | {"dweight": "*fp32", "eps": "fp32"}
    constants = {"ADD": add, "DWEIGHT": weight, "BM": BM, "BD": BD} | ({} if add else {"dtotal": None})
    name = f"D{D}{' add' if add else ''}{' weight' if weight else ''}"
    return Spec(
        "rms_norm_triton.rms_norm_backward_kernel", name, types, constants, warps, unaligned=frozenset({"R"}),
        quick=D == 3072 and add and weight,
    )  # fmt: skip
