"""Compile for every card of `minivlm2vec_kernels.cards` what its launchers would choose there. No register may be
spilled, and the shared memory that comes out must be what the card has. Needs no GPU.

    python -m tests.kernels.aot.every_card                      every card, kernel, head dim and dtype (hours)
    python -m tests.kernels.aot.every_card --quick              the model's own shapes in one 16-bit dtype
    python -m tests.kernels.aot.every_card --cards gfx942 sm_75 --only attention
"""

import argparse
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from minivlm2vec_kernels import attention_backward_triton, attention_triton, linear_triton
from minivlm2vec_kernels.cards import CARDS, Card
from tests.kernels import aot
from tests.kernels.aot import Spec
from tests.kernels.aot.specs import attention, attention_backward, linear
from tests.kernels.aot.specs.attention import HEAD_DIMS

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
    for spec in aot.all_specs(quick=quick):  # rows and pixels: the same settings on every card
        shared = spec.kernel.split(".")[0] not in OWN and (card.e4m3 or "quantize" not in spec.kernel)
        if shared and not spec.config.startswith("fp32 "):
            for in_it in [aot.in_dtype(spec, dtype) for dtype in dtypes]:
                found[in_it.key(0)] = in_it
    return list(found.values())


def _attention(card: Card, causal: bool, H: int, dtype: str) -> list[Spec]:
    found = []
    for queries, keys in LENGTHS:
        if not card.tensor_cores:
            tiles = [attention_triton.NO_TENSOR_CORES_TILE]
        elif card.small:
            tiles = [attention_triton.choose_small_tile(H, queries, keys, DTYPES[dtype])]
        else:
            tmas = (False, True) if card.name == "sm_90" else (False,)
            tiles = [attention_triton.choose_tile(H, queries, keys, causal, tma, DTYPES[dtype]) for tma in tmas]
        for t in tiles:
            spec = attention._spec(H, causal, t, one_block=keys <= t.BN, dtype=_other(dtype))
            found.append(aot.in_dtype(spec, dtype))
    for pass_ in ("dq", "dkv"):
        tile = attention_backward_triton.choose_backward_tile(pass_, H, DTYPES[dtype], card)
        found.append(aot.in_dtype(attention_backward._spec(pass_, H, causal, dtype=_other(dtype), tile=tile), dtype))
    return found


def _linear(card: Card, dtype: str) -> list[Spec]:
    paths = ("pointer", "tma") if card.tma and dtype != "fp32" else ("pointer",)
    found = []
    for kernel in linear.KERNELS:
        for path in paths:
            tiles = linear_triton.settings(kernel, DTYPES[dtype], path == "tma", card)
            found.append(aot.in_dtype(linear._spec(kernel, path, tiles, True, bias_first=card.name != "sm_100"), dtype))
    return found


def _other(dtype: str) -> str:
    return "fp32" if dtype == "fp32" else "bf16"  # what specs are written for


def problem(spec: Spec, card: Card) -> str:
    """Why this is not to be launched there; "" if it is."""
    try:
        compiled = aot.compile_kernel(spec, card.name if card.amd else int(card.name[3:]))
    except Exception as e:  # whatever the compiler raises, it is about this kernel
        return f"{spec.key(card.name)}: {type(e).__name__}: {e}"
    shared, spilled = compiled.metadata.shared, spills(compiled.asm)
    if shared > card.shared:
        return f"{spec.key(card.name)}: {shared} bytes of {card.shared}"
    return f"{spec.key(card.name)}: {spilled} spilled" if spilled else ""


def spills(asm: dict[str, bytes | str]) -> int:
    """NVIDIA: instructions that read or write what is spilled. AMD: registers that are."""
    if "cubin" in asm:
        return aot.spills(asm["cubin"])
    return sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", asm["amdgcn"])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the model's own shapes, in one dtype")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--cards", nargs="+", default=list(CARDS), choices=list(CARDS))
    args = parser.parse_args()
    found = 0
    for name in args.cards:
        chosen = [s for s in specs(CARDS[name], args.quick) if args.only in s.kernel]
        wrong = 0
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for i, said in enumerate(pool.map(lambda s, c=CARDS[name]: problem(s, c), chosen), 1):
                wrong += bool(said)
                print(said + "\n" if said else "", end="", flush=True)
                print(f"{name}: {i} of {len(chosen)}", end="\r", file=sys.stderr, flush=True)
        print(f"{name}: {len(chosen)} compiled, {wrong} cannot be launched", flush=True)
        found += wrong
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
