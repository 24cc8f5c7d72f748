"""Every kernel on this device, at the published model's shapes and at awkward ones, against float64 on the CPU.

Inputs are drawn on the CPU, so that they are the same on every machine, and rounded to the dtype. The specification
(minivlm2vec_kernels/reference.py) computes them on the CPU in float64 and in the dtype itself. A kernel's error may be
twice the latter's, which is the tests' rule; torch's own, which rounds between its operators, eight times; and each
four millionths of the largest value, for sums in another order.

T packed tokens, N query heads, Nkv key-value heads, H head dim, D width, F features, L lengths of sequences.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minivlm2vec_kernels import ops, reference

from . import machine
from .report import Check
from .task import NotRun, Options, Task

EPS = 1e-5
FLOOR = 4e-6  # of the largest value
ALLOWED = {"triton": 2, "torch": 8}  # times the error of the specification in the same dtype
TORCH_INSTEAD = "MINIVLM2VEC_BACKEND=torch"
GRADIENTS_INSTEAD = 'backend="auto": gradients are then torch\'s'
EIGHT_BITS = ("quantize_rows", "rms_norm_quantize")
SM_100 = "two products into one accumulator in a loop, Triton issue 10821"

Outputs = Tensor | tuple[Tensor, ...]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


@dataclass(frozen=True)
class Case:
    """One kernel on one set of inputs.

    Fields:
        name, case: see `Check`.
        make: inputs on the CPU in a dtype.
        call: (op, *inputs) -> outputs; op is `ours`, or `spec` where it is called for the right answer.
        truth: instead of `spec` in float64, what the outputs should be, of the inputs in float64.
        gradient: whether outputs are gradients, for which `backend="triton"` has to be asked.
    """

    name: str
    case: str
    make: Callable[["Maker"], tuple[Any, ...]]
    call: Callable[..., Outputs]
    ours: Callable[..., Outputs]
    spec: Callable[..., Outputs]
    truth: Callable[..., Outputs] | None = None
    gradient: bool = False


class Maker:
    """Random inputs on the CPU, the same everywhere."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.dtype)

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8)


def tasks(options: Options, dtypes: Sequence[torch.dtype], capability: tuple[int, int] | None) -> Iterator[Task]:
    """A check of every kernel in every dtype. Of attention first where Triton has a known fault."""
    chained = capability is not None and capability[0] == 10 and options.triton
    cases = [*attention_cases(options), *attention_gradients(options)]
    others = [*row_cases(options), *image_cases(options), *linear_cases(options)]
    for case in cases + others if chained else others + cases:
        about = f"{case.case} ({SM_100})" if chained and case in cases else case.case
        for dtype in dtypes:
            run = partial(examined, case, about, dtype, options)
            yield Task("kernels", case.name, about, spelled(dtype), run, way_round(case, options))


def spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def examined(case: Case, about: str, dtype: torch.dtype, options: Options) -> Check:
    """Runs one kernel and compares. Raises what the kernel raises."""
    _refuse(case, dtype, options)
    inputs = case.make(Maker(dtype))
    own = [x.clone().to(options.device) if isinstance(x, Tensor) else x for x in inputs]
    raw = _tuple(case.call(case.ours, *own))
    outputs = [y.detach().cpu() for y in raw]
    truth = partial(case.truth or case.call, *(() if case.truth else (case.spec,)))
    exact = [y.detach() for y in _tuple(truth(*map(_wide, inputs)))]
    same = [y.detach() for y in _tuple(case.call(case.spec, *inputs))]
    check = compared(case, about, dtype, outputs, exact, same, options)
    if check.verdict == "passed" and (why := _written(case, inputs, own, raw)):
        return replace(check, verdict="failed", reason=why, way_round=way_round(case, options))
    return check


def _written(case: Case, inputs: Sequence[Any], own: Sequence[Any], outputs: Sequence[Tensor]) -> str:
    """What is wrong with inputs afterwards: an op whose name ends in _ writes its outputs into them, or some, and
    nothing else; another op writes nothing."""
    tensors = [(before, after) for before, after in zip(inputs, own, strict=True) if isinstance(after, Tensor)]
    inside = [(y, *pair) for y in outputs for pair in tensors if case.name.endswith("_") and _one_storage(y, pair[1])]
    if case.name.endswith("_") and not inside:
        return "it writes nothing in place"
    for y, before, _ in inside:  # as it was before
        y.copy_(before.as_strided(y.size(), y.stride(), y.storage_offset()))
    for number, (before, after) in enumerate(tensors, 1):
        if not torch.equal(before, after.cpu()):
            return f"it writes into its input {number}, where it should not"
    return ""


def _one_storage(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def way_round(case: Case, options: Options) -> str:
    if not options.triton:
        return ""
    return GRADIENTS_INSTEAD if case.gradient else TORCH_INSTEAD


def compared(
    case: Case, about: str, dtype: torch.dtype, outputs: Sequence[Tensor], exact: Sequence[Tensor],
    same: Sequence[Tensor], options: Options,
) -> Check:  # fmt: skip
    """outputs: the kernel's; exact: in float64; same: the specification's in the dtype. Of several outputs the one
    that comes nearest to its tolerance, or furthest beyond it, is reported."""
    head, way = ("kernels", case.name, about, spelled(dtype)), way_round(case, options)
    worst = (0.0, FLOOR)
    for y, right, plain in zip(outputs, exact, same, strict=True):
        if y.shape != right.shape:
            why = f"the output is {list(y.shape)}, it should be {list(right.shape)}"
            return Check(*head, "failed", reason=why, way_round=way)
        if y.dtype != plain.dtype:
            why = f"the output is {spelled(y.dtype)}, it should be {spelled(plain.dtype)}"
            return Check(*head, "failed", reason=why, way_round=way)
        if not (right.isfinite().all() and plain.isfinite().all()):
            return Check(*head, "not run", reason="the reference is not finite")
        y = y.double()
        if bad := int((~y.isfinite()).sum()):
            why = f"{bad} of {y.numel()} numbers are NaN or infinite"
            return Check(*head, "failed", reason=why, way_round=way)
        if not y.numel():
            continue
        tolerance = max(ALLOWED[options.backend] * _largest(plain.double() - right), FLOOR * max(_largest(right), 1e-3))
        worst = max(worst, (_largest(y - right), tolerance), key=lambda pair: pair[0] / pair[1])
    passed = worst[0] <= worst[1]
    verdict = "passed" if passed else "failed"
    return Check(*head, verdict, *worst, way_round="" if passed else way)  # type: ignore[arg-type]


def _refuse(case: Case, dtype: torch.dtype, options: Options) -> None:
    if options.interpret and dtype == torch.bfloat16:
        raise NotRun("Triton's interpreter rounds bfloat16 towards zero")
    if case.name in EIGHT_BITS and options.triton and not options.interpret:
        capability = torch.cuda.get_device_capability(options.device)
        if torch.version.hip is None and capability < (8, 9):
            raise NotRun(f"8-bit floats need capability 8.9, this device has {capability[0]}.{capability[1]}")
        if torch.version.hip is not None:
            raise NotRun("e4m3 is NVIDIA's; AMD's 8-bit floats are another format")
    if case.name in EIGHT_BITS and options.interpret:
        raise NotRun("Triton's interpreter rounds 8-bit floats otherwise")


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


# ------------------------------------------------------------------------------------------------------- attention


def cumulated(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def attention_cases(options: Options) -> Iterator[Case]:
    small, host = options.interpret, not options.triton
    N, M = (2, 2) if small else (32, 16)  # heads of the decoder and of the tower
    long, crop, longest = (40, 33, 70) if small else (300, 145, 600) if host else (777, 577, 2529)
    yield _attention("causal", (long, 30, 1, 64, 65) if not small else (40, 7, 1), N, N, 96)
    yield _attention("causal, short", (30, 17, 3), N, N, 96)
    yield _attention("causal, long", (longest,), 4 if not small else 1, 4 if not small else 1, 96)
    yield _attention("full", (crop,) * 2, M, M, 64, causal=False)
    yield _attention("causal, last tokens", (long, 30, 1), N, N, 96, few=(1, 1, 1))
    yield _attention("causal, fewer queries", (80, 17, 9), 2, 2, 96, few=(20, 1, 0))
    yield _attention("causal, grouped, empty ones", (0, 65, 0, 17), 6 if not small else 2, 2 if not small else 1, 128)
    yield _attention("full, grouped", (65, 16), 4 if not small else 2, 1, 80, causal=False)


def attention_gradients(options: Options) -> Iterator[Case]:
    small, host = options.interpret, not options.triton
    long, crop, N, M = (40, 33, 1, 1) if small else (300, 145, 4, 2) if host else (777, 577, 4, 2)
    yield _attention("causal", (long, 30, 1), N, N, 96, gradient=True)
    yield _attention("full", (crop,), M, M, 64, causal=False, gradient=True)
    yield _attention("causal, grouped", (17, 9), 2, 1, 48, gradient=True)


def _attention(
    words: str, lengths: tuple[int, ...], N: int, Nkv: int, H: int, *, causal: bool = True,
    few: tuple[int, ...] | None = None, gradient: bool = False,
) -> Case:  # fmt: skip
    T, Q = sum(lengths), sum(few or lengths)
    seen: list[int] = []  # heads that are compared, where the CPU would take its time for all
    if Nkv == N and max(lengths) * N > 4096 and not gradient:
        seen = [0, N // 2 - 1, N - 1] if N > 8 else [N - 1]

    def make(make: Maker) -> tuple[Any, ...]:
        if few is None:
            return make(T, (N + 2 * Nkv) * H), cumulated(lengths)
        return make(Q, N * H), make(T, 2 * Nkv * H), cumulated(lengths), cumulated(few)

    def call(op: Callable[..., Tensor], *inputs: Tensor) -> Outputs:
        rest = {} if few is None else {"cu_seqlens_q": inputs[-1]}
        if few is None:
            x, cu = inputs
        else:
            q, kv, cu = inputs[0].unflatten(1, (N, H)), inputs[1].unflatten(1, (-1, H)), inputs[2]

        def forward(x: Tensor | None = None) -> Tensor:
            parts = (q, *kv.split([Nkv, Nkv], 1)) if x is None else x.unflatten(1, (-1, H)).split([N, Nkv, Nkv], 1)
            if op is not ours:  # the right answer, of some heads
                return op(*(t[:, seen] if seen else t for t in parts), cu, **rest)
            y = op(*parts, cu, **rest)
            return y[:, seen] if seen else y

        if gradient:
            return _gradients(forward, x)
        return forward() if few else forward(x)

    def ours(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_seqlens_q: Tensor | None = None) -> Tensor:
        return ops.attention(
            q, k, v, cu, max(lengths), causal=causal, cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max(few) if few else None, backend=_backend(q),
        )  # fmt: skip

    heads = f"{N} heads of {H}" if Nkv == N else f"{N} heads of {H} on {Nkv}"
    tokens = ", ".join(map(str, lengths)) + (f" (queries {', '.join(map(str, few))})" if few else "")
    name = "attention backward" if gradient else "attention"
    return Case(name, f"{words}, {heads}, lengths {tokens}", make, call, ours,
                partial(reference.attention, causal=causal), gradient=gradient)  # fmt: skip


def _gradients(forward: Callable[..., Outputs], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of the sum of outputs, each times itself held constant, by every input: every output's gradient is another."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        outs = _tuple(forward(*leaves))
        return torch.autograd.grad(outs, leaves, [y.detach() for y in outs])


def _backend(x: Tensor) -> str:
    """Of the op under examination: on a CPU Triton where its interpreter is on, which no import may change later."""
    import os

    if x.is_cuda:
        return "torch" if machine.refusal(x.device) else "triton"
    return "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"


# ------------------------------------------------------------------------------------------------------------ rows


def row_cases(options: Options) -> Iterator[Case]:
    R, D, V = (17, 96, 64) if options.interpret else (131, 3072, 1024)
    F, W = (64, 128) if options.interpret else (8192, 4096)
    for rows, width in ((R, D), (3, 100)):
        yield _rows("rms_norm", rows, width, "xw")
        yield _rows("add_rms_norm", rows, width, "xrw")
    for rows, width in ((R, V), (3, 100)):
        yield _rows("layer_norm", rows, width, "xwb")
        yield _rows("add_layer_norm", rows, width, "xrwb")
        yield _rows("layer_norm_shift_", rows, width, "xwwb", reference.layer_norm_shift, dense=True)
    for rows, features in ((R, F), (3, 50)):
        yield _rows("silu_mul", rows, 2 * features, "x", eps=False)
    for rows, features in ((R, W), (3, 100)):
        yield _rows("quick_gelu", rows, features, "xb", eps=False)
    yield _rows("rms_norm", R, D, "xw", gradient=True)
    yield _rows("add_rms_norm", R, D, "xrw", gradient=True)
    yield _rows("silu_mul", R, 2 * F, "x", eps=False, gradient=True)
    for name, inputs in (
        ("rms_norm", "xw"),
        ("add_rms_norm", "xrw"),
        ("layer_norm", "xwb"),
        ("add_layer_norm", "xrwb"),
    ):
        yield _rows(name, 3, 100, inputs, scale=100)
    yield _rows("silu_mul", 3, 100, "x", eps=False, scale=30)
    yield _rows("quick_gelu", 3, 100, "xb", eps=False, scale=30)
    for rows, width in ((R, D), (3, 112)):
        yield _quantize_rows(rows, width)
        yield _rms_norm_quantize(rows, width)
    N = 2 if options.interpret else 32
    yield _rope("rope", R, N, N, 96)
    yield _rope("rope", 3, 4, 2, 48)
    yield _rope("rope_", R, N, N, 96)
    yield _rope("rope", R, 2, 2, 96, gradient=True)
    for lengths in ((1, 11, 5), (30,) * 4):
        yield _pool(lengths, D)


def _rows(
    name: str, rows: int, width: int, inputs: str, spec: Callable | None = None, *, eps: bool = True,
    dense: bool = False, gradient: bool = False, scale: float = 1.0,
) -> Case:  # fmt: skip
    """inputs: x and r rows [R, D], w and b vectors [D]. Small ones are views whose rows lie further apart. scale: of
    the rows, so that they hold large numbers, as the model's do; the first is then zeros."""
    gap = 8 if width < 1024 and not dense else 0
    spec = spec or getattr(reference, name)
    last = (EPS,) if eps else ()

    def make(make: Maker) -> tuple[Tensor, ...]:
        tensors = [make(rows, width + gap, scale=scale) if c in "xr" else make(width) for c in inputs]
        if scale != 1:
            for x in tensors:
                if x.dim() == 2:
                    x[0] = 0
        return tuple(tensors)

    def call(op: Callable, *tensors: Tensor) -> Outputs:
        views = [t[:, gap:] if t.dim() == 2 else t for t in tensors]
        return _gradients(lambda *t: op(*t, *last), *views) if gradient else op(*views, *last)

    ours = lambda x, *rest: getattr(ops, name)(x, *rest, backend=_backend(x))  # noqa: E731
    title = f"{name} backward" if gradient else name
    words = f"{rows} x {width}" if scale == 1 else f"{rows} x {width}, large numbers and zeros"
    return Case(title, words, make, call, ours, spec, gradient=gradient)


def _quantize_rows(rows: int, width: int) -> Case:
    def call(op: Callable, x: Tensor) -> Tensor:
        numbers, scale = op(x)
        return numbers.double() * scale.double()[:, None]

    return Case(
        "quantize_rows", f"{rows} x {width}", lambda make: (make(rows, width),), call,
        lambda x: ops.quantize_rows(x, backend=_backend(x)), reference.quantize_rows, truth=lambda x: x,
    )  # fmt: skip


def _rms_norm_quantize(rows: int, width: int) -> Case:
    def call(op: Callable, x: Tensor, weight: Tensor) -> Tensor:
        numbers, scale = op(x, weight, EPS)
        return numbers.double() * scale.double()[:, None]

    return Case(
        "rms_norm_quantize", f"{rows} x {width}", lambda make: (make(rows, width), make(width)), call,
        lambda x, *rest: ops.rms_norm_quantize(x, *rest, backend=_backend(x)), reference.rms_norm_quantize,
        truth=lambda x, weight: reference.rms_norm(x, weight, EPS),
    )  # fmt: skip


def _rope(name: str, T: int, N: int, Nkv: int, H: int, gradient: bool = False) -> Case:
    def make(make: Maker) -> tuple[Tensor, ...]:
        angles = make(T, H // 2).float()
        return make(T, (N + 2 * Nkv) * H), angles.cos().to(make.dtype), angles.sin().to(make.dtype)

    def call(op: Callable, qkv: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
        q, k, _ = qkv.unflatten(1, (-1, H)).split([N, Nkv, Nkv], 1)
        return _gradients(lambda q, k: op(q, k, cos, sin), q, k) if gradient else op(q, k, cos, sin)

    ours = lambda q, *rest: getattr(ops, name)(q, *rest, backend=_backend(q))  # noqa: E731
    title = f"{name} backward" if gradient else name
    return Case(title, f"{T} x ({N} + {Nkv}) x {H}", make, call, ours, reference.rope, gradient=gradient)


def _pool(lengths: tuple[int, ...], D: int) -> Case:
    return Case(
        "pool_last_token", f"{len(lengths)} of {lengths[0]} and more x {D}",
        lambda make: (make(sum(lengths), D), cumulated(lengths), make(D)),
        lambda op, x, cu, weight: op(x, cu, weight, EPS),
        lambda x, *rest: ops.pool_last_token(x, *rest, backend=_backend(x)),
        lambda x, cu, weight, eps: _in_its_own_dtype(x, cu, weight, eps),
    )  # fmt: skip


def _in_its_own_dtype(x: Tensor, cu: Tensor, weight: Tensor, eps: float) -> Tensor:
    """reference.pool_last_token, which ends in float32; of float64 it stays float64."""
    last = reference.rms_norm(x[cu[1:].long() - 1], weight, eps)
    return torch.nn.functional.normalize(reference.wide(last), dim=-1)


# ---------------------------------------------------------------------------------------------- images and products


def image_cases(options: Options) -> Iterator[Case]:
    S, p, D = (12, 2, 20) if options.interpret else (336, 14, 1024)
    for grids in (((1, 1), (2, 1)), ((1, 3),)):
        yield _image_patches(S, p, grids)
    for grids in (((2, 1), (1, 1)), ((1, 2),)):
        yield _merge_crops(S // p, D, grids)


def _words(grids: Sequence[tuple[int, int]]) -> str:
    return " and ".join(f"{h} x {w}" for h, w in grids) + " crops"


def _image_patches(S: int, p: int, grids: tuple[tuple[int, int], ...]) -> Case:
    def make(make: Maker) -> tuple[Any, ...]:
        crops = make.bytes(sum(h * w for h, w in grids), S, S, 3)
        return crops, torch.tensor(MEAN), torch.tensor(STD), torch.empty(0, dtype=make.dtype)

    def call(op: Callable, crops: Tensor, mean: Tensor, std: Tensor, like: Tensor) -> Tensor:
        return op(crops, grids, mean.float(), std.float(), p, like.dtype)

    ours = lambda crops, *rest: ops.image_patches(crops, *rest, backend=_backend(crops))  # noqa: E731
    return Case("image_patches", f"{_words(grids)} of {S}", make, call, ours, reference.image_patches,
                truth=lambda crops, mean, std, _: _wide_patches(crops, grids, mean, std, p))  # fmt: skip


def _wide_patches(
    crops: Tensor, grids: Sequence[tuple[int, int]], mean: Tensor, std: Tensor, p: int
) -> Tensor:  # fmt: skip
    """reference.image_patches in float64."""
    views = []
    for pixels, (rows, cols) in zip(crops.split([h * w for h, w in grids]), grids, strict=True):
        local = (pixels.permute(0, 3, 1, 2).double() / 255 - mean[:, None, None]) / std[:, None, None]
        S = local.shape[-1]
        canvas = local.unflatten(0, (rows, cols)).permute(2, 0, 3, 1, 4).reshape(1, 3, rows * S, cols * S)
        small = torch.nn.functional.interpolate(canvas, (S, S), mode="bicubic", align_corners=False)
        views += [small, local]
    x = torch.cat(views).unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [C, 3, P, p, P, p]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _merge_crops(P: int, D: int, grids: tuple[tuple[int, int], ...]) -> Case:
    crops = sum(1 + h * w for h, w in grids)
    return Case(
        "merge_crops", f"{_words(grids)} x {D}",
        lambda make: (make(crops, 1 + P * P, D), make(4 * D), make(4 * D)),
        lambda op, features, sub, glb: op(features[:, 1:], grids, sub, glb),
        lambda features, *rest: ops.merge_crops(features, *rest, backend=_backend(features)), reference.merge_crops,
    )  # fmt: skip


def linear_cases(options: Options) -> Iterator[Case]:
    """Fused products. Of gate and up fewer features than the model has: the product in float64 takes its time."""
    quick = (33, 48, 64) if options.interpret else (577 if options.triton else 145, 1024, 4096)
    for R, K, F in (quick, (145, 72, 160), (17, 33, 48)):
        yield _linear("linear_quick_gelu", R, K, F)
    silu = (33, 48, 64) if options.interpret else (130, 3072, 2048 if options.triton else 512)
    for R, K, F in (silu, (145, 72, 80), (17, 33, 48)):
        yield _linear("linear_silu_mul", R, K, F)
    R, K, D = (17, 48, 32) if options.interpret else (130, 1024, 1024)
    yield Case(
        "linear_add_", f"{R} x {D} x {K}",
        lambda make: (make(R, D), make(R, K), make(D, K, scale=K**-0.5), make(D)),
        lambda op, *tensors: op(*tensors),
        lambda residual, *rest: ops.linear_add_(residual, *rest, backend=_backend(residual)), reference.linear_add,
    )  # fmt: skip


def _linear(name: str, R: int, K: int, F: int) -> Case:
    both = name == "linear_silu_mul"
    N = 2 * F if both else F

    def make(make: Maker) -> tuple[Tensor, ...]:
        tensors = make(R, K), make(N, K, scale=K**-0.5)
        return tensors if both else (*tensors, make(N))

    ours = lambda x, *rest: getattr(ops, name)(x, *rest, fused=True, backend=_backend(x))  # noqa: E731
    return Case(name, f"{R} x {N} x {K}", make, lambda op, *tensors: op(*tensors), ours, getattr(reference, name))
