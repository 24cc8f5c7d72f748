"""activation_triton.py: every block that its launchers choose; the MLPs' widths of decoder and tower are part of the
default tests."""

from minivlm2vec_kernels import activation_triton
from tests.kernels.aot import DTYPES, Spec, in_dtype

NARROW = (128, 256, 512, 1024)  # blocks of fewer features than the table's; all wider rows take that one


def specs() -> list[Spec]:
    found = [f(F) for f in (_silu_mul, _silu_mul_backward) for F in (*NARROW, 8192)]
    found += [_quick_gelu(F, bias) for F in (*NARROW, 4096) for bias in (True, False)]
    return [in_dtype(spec, dtype) for spec in found for dtype in DTYPES]


def _silu_mul(F: int) -> Spec:
    BF, warps = activation_triton.settings("silu_mul", F)
    types = {"gate_up": "*bf16", "out": "*bf16", "F": "i32", "stride": "i32"}
    return Spec("activation_triton.silu_mul_kernel", f"F{F}", types, {"BF": BF}, warps, quick=F == 8192)


def _silu_mul_backward(F: int) -> Spec:
    BF, warps = activation_triton.settings("silu_mul_backward", F)
    types = dict.fromkeys(("dout", "gate_up", "dgate_up"), "*bf16")
    types |= dict.fromkeys(("F", "stride_dout", "stride"), "i32")
    return Spec("activation_triton.silu_mul_backward_kernel", f"F{F}", types, {"BF": BF}, warps, quick=F == 8192)


def _quick_gelu(F: int, bias: bool) -> Spec:
    BF, warps = activation_triton.settings("quick_gelu", F)
    types = {"x": "*bf16", "out": "*bf16", "F": "i32", "stride": "i32"} | ({"bias": "*bf16"} if bias else {})
    constants = {"BIAS": bias, "BF": BF} | ({} if bias else {"bias": None})
    name = f"F{F}{' bias' if bias else ''}"
    return Spec("activation_triton.quick_gelu_kernel", name, types, constants, warps, quick=bias and F == 4096)
