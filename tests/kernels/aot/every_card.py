"""Compile for every card of `minivlm2vec_kernels.cards` what its launchers would choose there, and compare the shared
memory that comes out with what the card has. Needs no GPU.

    python -m tests.kernels.aot.every_card                      every card, kernel, head dim and dtype (hours)
    python -m tests.kernels.aot.every_card --quick              the model's own shapes in one 16-bit dtype
    python -m tests.kernels.aot.every_card --cards gfx942 sm_75 --only attention
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from minivlm2vec_kernels import attention_backward_triton, attention_triton, linear_triton
from minivlm2vec_kernels.cards import CARDS, Card
from tests.kernels import aot
from tests.kernels.aot import Spec
from tests.kernels.aot.specs import attention, attention_backward, linear

HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128, 144, 160, 192)
MODEL = {True: 96, False: 64}  # causal -> head dim: decoder, tower
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LENGTHS = ((1, 1), (40, 40), (1, 3000), (777, 777), (3000, 3000))  # (queries, keys), one for each row of every table
OWN = ("attention_triton", "attention_backward_triton", "linear_triton")  # whose tiles depend on the card


def specs(card: Card, quick: bool) -> list[Spec]:
    """What its launchers choose; each once."""
    dtypes = [d for d in DTYPES if d != "bf16" or card.bfloat16]
    dtypes = dtypes[:1] if quick else dtypes
    found = {}
    for dtype in dtypes:
        head_dims = MODEL.items() if quick else [(c, H) for c in (True, False) for H in HEAD_DIMS]
        for spec in [s for c, H in head_dims for s in _attention(card, c, H, dtype)] + _linear(card, dtype):
            found[spec.key(0)] = spec
    for spec in aot.all_specs(quick=True):  # rows and pixels: the same settings on every card
        if spec.kernel.split(".")[0] not in OWN and (card.e4m3 or "quantize" not in spec.kernel):
            for dtype in dtypes:
                found[f"{spec.key(0)}{dtype}"] = _in(spec, dtype)
    return list(found.values())


def _attention(card: Card, causal: bool, H: int, dtype: str) -> list[Spec]:
    found = []
    for queries, keys in LENGTHS:
        if card.small:
            tiles = [attention_triton.choose_small_tile(H, queries, keys, DTYPES[dtype])]
        else:
            tmas = (False, True) if card.name == "sm_90" else (False,)
            tiles = [attention_triton.choose_tile(queries, keys, causal, tma, DTYPES[dtype]) for tma in tmas]
        for t in tiles:
            spec = attention._spec(H, causal, t, one_block=keys <= t.BN, dtype=_other(dtype))
            found.append(_in(spec, dtype))
    for pass_ in ("dq", "dkv"):
        tile = attention_backward_triton.choose_backward_tile(pass_, H, DTYPES[dtype], card.small)
        found.append(_in(attention_backward._spec(pass_, H, causal, dtype=_other(dtype), tile=tile), dtype))
    return found


def _linear(card: Card, dtype: str) -> list[Spec]:
    paths = ("pointer", "tma") if card.tma and dtype != "fp32" else ("pointer",)
    found = []
    for kernel in linear.KERNELS:
        for path in paths:
            tiles = linear_triton.settings(kernel, DTYPES[dtype], path == "tma", card.small)
            found.append(_in(linear._spec(kernel, path, tiles, True, bias_first=card.name != "sm_100"), dtype))
    return found


def _other(dtype: str) -> str:
    return "fp32" if dtype == "fp32" else "bf16"  # what specs are written for


def _in(spec: Spec, dtype: str) -> Spec:
    """The same in another dtype than bfloat16."""

    def other(x: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return x.replace("bf16", dtype) if isinstance(x, str) else x

    types = {name: other(x) for name, x in spec.types.items()}
    return replace(spec, types=types, config=f"{dtype} {spec.config.removeprefix('bf16 ').removeprefix('fp32 ')}")


def problem(spec: Spec, card: Card) -> str:
    """Why this cannot be launched there; "" if it can."""
    try:
        shared = aot.compile_kernel(spec, card.name if card.amd else int(card.name[3:])).metadata.shared
    except Exception as e:  # whatever the compiler raises, it is about this kernel
        return f"{spec.key(card.name)}: {type(e).__name__}: {e}"
    return f"{spec.key(card.name)}: {shared} bytes of {card.shared}" if shared > card.shared else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the model's own shapes, in one dtype")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--cards", nargs="+", default=list(CARDS), choices=list(CARDS))
    args = parser.parse_args()
    found = []
    for name in args.cards:
        chosen = [s for s in specs(CARDS[name], args.quick) if args.only in s.kernel]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            wrong = [p for p in pool.map(lambda s, c=CARDS[name]: problem(s, c), chosen) if p]
        print(f"{name}: {len(chosen)} compiled, {len(wrong)} cannot be launched", flush=True)
        found += wrong
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
