"""layer_norm_triton.py: the tower's width, a small checkpoint's, and a wide one."""

from minivlm2vec_kernels import layer_norm_triton
from tests.aot import Spec

TYPES = dict.fromkeys(("x", "weight", "bias", "out"), "*bf16") | {
    "R": "i32", "D": "i32", "stride_x": "i32", "stride_residual": "i32", "eps": "fp32"
}  # fmt: skip


def specs() -> list[Spec]:
    return [_spec(D, add) for D in (64, 1024, 4096, 8192) for add in (False, True)]


def _spec(D: int, add: bool) -> Spec:
    BD, BM, warps = layer_norm_triton.settings(D)
    optional = ("residual", "total")
    types = TYPES | (dict.fromkeys(optional, "*bf16") if add else {})
    constants = {"ADD": add, "BM": BM, "BD": BD} | ({} if add else dict.fromkeys(optional))
    name = f"D{D}{' add' if add else ''}"
    return Spec(
        "layer_norm_triton.layer_norm_kernel", name, types, constants, warps, unaligned=frozenset({"R"}),
        quick=D == 1024 and add,
    )  # fmt: skip
