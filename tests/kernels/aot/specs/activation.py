"""activation_triton.py: the MLPs' widths of decoder and tower."""

from minivlm2vec_kernels import activation_triton
from tests.kernels.aot import Spec


def specs() -> list[Spec]:
    return [_silu_mul(8192), _silu_mul_backward(8192), _quick_gelu(4096, True), _quick_gelu(4096, False)]


def _silu_mul(F: int) -> Spec:
    BF, warps = activation_triton.settings("silu_mul", F)
    types = {"gate_up": "*bf16", "out": "*bf16", "F": "i32", "stride": "i32"}
    return Spec("activation_triton.silu_mul_kernel", f"F{F}", types, {"BF": BF}, warps, quick=True)


def _silu_mul_backward(F: int) -> Spec:
    BF, warps = activation_triton.settings("silu_mul_backward", F)
    types = dict.fromkeys(("dout", "gate_up", "dgate_up"), "*bf16")
    types |= dict.fromkeys(("F", "stride_dout", "stride"), "i32")
    return Spec("activation_triton.silu_mul_backward_kernel", f"F{F}", types, {"BF": BF}, warps, quick=True)


def _quick_gelu(F: int, bias: bool) -> Spec:
    BF, warps = activation_triton.settings("quick_gelu", F)
    types = {"x": "*bf16", "out": "*bf16", "F": "i32", "stride": "i32"} | ({"bias": "*bf16"} if bias else {})
    constants = {"BIAS": bias, "BF": BF} | ({} if bias else {"bias": None})
    name = f"F{F}{' bias' if bias else ''}"
    return Spec("activation_triton.quick_gelu_kernel", name, types, constants, warps, quick=bias)
