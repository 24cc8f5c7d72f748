"""Every Triton kernel, once in each of its forms, over awkward sizes: what test_sanitizer.py runs under the tools of
compute-sanitizer. On the card where there is one, else in the interpreter.

    python -m tests.kernels.every_kernel

No tensor ends before its memory does, so that a read past the last row is one past the allocation.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minivlm2vec_kernels import ops
from tests.conftest import DEVICE  # also turns the interpreter on where there is no card

Launch = tuple[str, Callable[[], Tensor | tuple[Tensor, ...]]]


def main() -> None:
    """Prints a line for each launch, which is done when the next begins. Raises where a result is not finite."""
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else None
    for name, launch in launches(torch.Generator(DEVICE).manual_seed(0), capability):
        print(name, flush=True)
        results = launch()
        for result in results if isinstance(results, tuple) else (results,):
            assert result.float().isfinite().all(), name


def launches(generator: torch.Generator, capability: tuple[int, int] | None) -> Iterator[Launch]:
    """(name, call) of each; capability: the card's, None for the interpreter, which takes every form."""
    # The interpreter multiplies matrices of bfloat16 wrongly.
    make = Maker(generator, torch.float16 if capability is None else torch.bfloat16)
    yield from of_rows(make, capability)
    yield from of_images(make)
    yield from of_attention(make, capability)
    yield from of_gradients(make)
    yield from of_linear(make, capability)


class Maker:
    """Random tensors. `strided` ones have rows that lie further apart than they are long."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype):
        self.generator, self.device, self.dtype = generator, generator.device, dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator).to(self.dtype)

    def strided(self, *shape: int) -> Tensor:
        return self(*shape[:-1], shape[-1] + 8)[..., 8:]

    def sequences(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths], device=self.device).cumsum(0).int()


def of_rows(make: Maker, capability: tuple[int, int] | None) -> Iterator[Launch]:
    R, D = 17, 100
    x, residual, weight, bias = make.strided(R, D), make.strided(R, D), make(D), make(D)
    options = {"backend": "triton"}
    yield "rms_norm", lambda: ops.rms_norm(x, weight, 1e-5, **options)
    yield "add_rms_norm", lambda: ops.add_rms_norm(x, residual, weight, 1e-5, **options)
    yield "layer_norm", lambda: ops.layer_norm(x, weight, bias, 1e-5, **options)
    shifted = make(R, D)
    yield "layer_norm_shift_", lambda: ops.layer_norm_shift_(shifted, weight, weight, bias, 1e-5, **options)
    yield "add_layer_norm", lambda: ops.add_layer_norm(x, residual, weight, bias, 1e-5, **options)
    yield "silu_mul", lambda: ops.silu_mul(x, **options)
    yield "quick_gelu", lambda: ops.quick_gelu(x, **options)
    yield "quick_gelu with bias", lambda: ops.quick_gelu(x, bias, **options)
    if capability is None or capability >= (8, 9):
        yield "quantize_rows", lambda: ops.quantize_rows(x, **options)
        yield "rms_norm_quantize", lambda: ops.rms_norm_quantize(x, weight, 1e-5, **options)
    cu_seqlens = make.sequences([1, 11, 5])
    for normalize in (True, False):
        pool = {"normalize": normalize, **options}
        yield f"pool_last_token {pool}", lambda pool=pool: ops.pool_last_token(x, cu_seqlens, weight, 1e-5, **pool)
    q, k = make.strided(R, 3 * 48).unflatten(1, (3, 48)), make.strided(R, 48).unflatten(1, (1, 48))
    cos, sin = make(R, 24), make(R, 24)
    yield "rope", lambda: ops.rope(q, k, cos, sin, **options)
    yield "rope of q alone", lambda: ops.rope(q, q[:, :0], cos, sin, **options)
    yield "rope_", lambda: ops.rope_(q, k, cos, sin, **options)


def of_images(make: Maker) -> Iterator[Launch]:
    grids, size, patch = [(1, 1), (2, 1)], 12, 2
    crops = torch.randint(0, 256, (3, size, size, 3), device=make.device, generator=make.generator).byte()
    mean, std = make(3).float(), make(3).float().abs() + 0.1
    yield "image_patches", lambda: ops.image_patches(crops, grids, mean, std, patch, make.dtype, backend="triton")
    P, D = size // patch, 20
    features = make(5, 1 + P * P, D)[:, 1:]  # a view, as of the tower's output less its first token
    sub, glb = make(4 * D), make(4 * D)
    yield "merge_crops", lambda: ops.merge_crops(features, grids, sub, glb, backend="triton")


def of_attention(make: Maker, capability: tuple[int, int] | None) -> Iterator[Launch]:
    """Every tile of the tables, grouped heads, as many queries as keys and fewer."""
    from minivlm2vec_kernels.attention_triton import TILES, launch

    lengths, few, (N, Nkv) = [65, 1, 17, 80], [3, 1, 0, 20], (2, 1)
    cu, cu_few = make.sequences(lengths), make.sequences(few)
    for causal, H in ((True, 96), (False, 64)):
        q, k, v = make(sum(lengths), (N + 2 * Nkv) * H).unflatten(1, (-1, H)).split([N, Nkv, Nkv], dim=1)
        for tile in dict.fromkeys((*TILES[causal, False].values(), *TILES[causal, True].values())):
            if tile.tma and capability is not None and capability[0] != 9:
                continue
            a = (q, k, v, cu, 80, cu, 80, causal, None, tile)
            yield f"attention {causal=} {tile}", lambda a=a: launch(*a)
        last = {"causal": causal, "cu_seqlens_q": cu_few, "max_seqlen_q": 20, "backend": "triton"}
        a = (make(sum(few), N, H), k, v, cu, 80)
        yield f"attention {causal=} of {few} queries", lambda a=a, last=last: ops.attention(*a, **last)
    x, whole = make.strided(83, 3 * 48).unflatten(1, (3, 48)), make.sequences([65, 1, 17])
    yield "attention, head dim 48", lambda: ops.attention(*x.split(1, dim=1), whole, 65, causal=True, backend="triton")
    y = x.float()
    yield "attention, float32", lambda: ops.attention(*y.split(1, dim=1), whole, 65, causal=True, backend="triton")


def of_gradients(make: Maker) -> Iterator[Launch]:
    """What goes back through each op that has kernels for it."""
    R, D = 17, 100
    x, residual, weight = make.strided(R, D), make.strided(R, D), make(D)
    options = {"backend": "triton"}
    yield "gradient of rms_norm", lambda: gradients(lambda *a: ops.rms_norm(*a, 1e-5, **options), x, weight)
    yield (
        "gradient of add_rms_norm",
        lambda: gradients(lambda *a: ops.add_rms_norm(*a, 1e-5, **options), x, residual, weight),
    )
    yield "gradient of silu_mul", lambda: gradients(lambda a: ops.silu_mul(a, **options), x)
    q, k = make(R, 3, 48), make(R, 1, 48)
    cos, sin = make(R, 24), make(R, 24)
    yield "gradient of rope", lambda: gradients(lambda q, k: ops.rope(q, k, cos, sin, **options), q, k)
    lengths, few = [65, 1, 17], [3, 1, 0]
    cu, cu_few = make.sequences(lengths), make.sequences(few)
    for causal, H, last in ((True, 96, {}), (False, 64, {}), (True, 96, {"cu_seqlens_q": cu_few, "max_seqlen_q": 3})):
        k, v = make(83, 2 * H).unflatten(1, (2, H)).split(1, dim=1)
        q = make(4 if last else 83, 2, H)
        call = {"causal": causal, **last, **options}
        yield (
            f"gradient of attention {causal=} {H=} {len(q)} queries",
            lambda a=(q, k, v), call=call: gradients(lambda *qkv: ops.attention(*qkv, cu, 65, **call), *a),
        )


def gradients(op: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        outs = op(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        return torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])


def of_linear(make: Maker, capability: tuple[int, int] | None) -> Iterator[Launch]:
    """Both ways of loading; K of 72 is no multiple of a tile, of 33 no multiple of 16 bytes."""
    for K, tma in ((33, False), (72, False), (72, True)):
        if tma and capability is not None and capability[0] not in (9, 10):
            continue
        x, weight, bias = make(145, K), make(160, K), make(160)
        yield f"linear_quick_gelu {K=} {tma=}", lambda a=(x, weight, bias, tma): _quick_gelu(*a)
        yield f"linear_silu_mul {K=} {tma=}", lambda a=(x, weight, tma): _silu_mul(*a)


def _quick_gelu(x: Tensor, weight: Tensor, bias: Tensor, tma: bool) -> Tensor:
    from minivlm2vec_kernels.linear_triton import run_quick_gelu

    out = x.new_empty(len(x), len(weight))
    run_quick_gelu(x, weight, out, bias, tma=tma)
    return out


def _silu_mul(x: Tensor, weight: Tensor, tma: bool) -> Tensor:
    from minivlm2vec_kernels.linear_triton import run_silu_mul

    out = x.new_empty(len(x), len(weight) // 2)
    run_silu_mul(x, weight, out, tma=tma)
    return out


if __name__ == "__main__":
    main()
