"""rms_norm_triton.py: the decoder's width, a narrow one, and a width that is no power of two."""

from minivlm2vec_kernels.launch import whole_rows
from minivlm2vec_kernels.rms_norm_triton import BACKWARD_SETTINGS
from tests.kernels.aot import Spec

TYPES = dict.fromkeys(("x", "weight", "out"), "*bf16") | {
    "R": "i32", "D": "i32", "stride_x": "i32", "stride_residual": "i32", "eps": "fp32"
}  # fmt: skip


def specs() -> list[Spec]:
    forward = [_spec(D, add) for D in (64, 1024, 3072, 8192) for add in (False, True)]
    return [
        *forward,
        *(_quantize(D) for D in (1024, 3072, 8192)),
        _backward(3072, True),
        _backward(3072, False),
        _backward(8192, True),
    ]


def _spec(D: int, add: bool) -> Spec:
    BD, BM, warps = whole_rows(D)
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
    BD, BM, warps = whole_rows(D)
    types = TYPES | {"out": "*fp8e4nv", "scale": "*fp32"}
    types.pop("stride_residual")
    return Spec(
        "rms_norm_triton.rms_norm_quantize_kernel", f"D{D}", types, {"BM": BM, "BD": BD}, warps,
        unaligned=frozenset({"R"}), archs=(90, 100), quick=D == 3072,
    )  # fmt: skip


def _backward(D: int, weight: bool) -> Spec:
    """Of add_rms_norm with all gradients, or of rms_norm with a frozen weight."""
    BD, BM, warps = whole_rows(D, BACKWARD_SETTINGS)
    pointers = dict.fromkeys(("dout", "s", "weight", "ds") + (("dtotal",) if weight else ()), "*bf16")
    numbers = dict.fromkeys(("R", "D", "stride_dout", "stride_dtotal", "stride_s"), "i32")
    types = pointers | numbers | {"dweight": "*fp32", "eps": "fp32"}
    constants = {"ADD": weight, "DWEIGHT": weight, "BM": BM, "BD": BD} | ({} if weight else {"dtotal": None})
    name = f"D{D}{' add weight' if weight else ''}"
    return Spec(
        "rms_norm_triton.rms_norm_backward_kernel", name, types, constants, warps, unaligned=frozenset({"R"}),
        quick=D == 3072 and weight,
    )  # fmt: skip
