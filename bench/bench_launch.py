"""What a launch costs the host, without a card: from the call of a launcher to where the driver would come, in us.

    python -m bench.bench_launch                 # this checkout
    python -m bench.bench_launch --repeat 2000

"launcher" is this project's part (checks, the output's allocation, grid and constants), with Triton's dispatch replaced
by nothing. "with dispatch" has Triton's too: it binds the arguments, looks the compiled kernel up and calls a launcher
that does nothing. Tensors are on the CPU, of the published widths. CPU time of this thread, the least of nine
rounds, as other programs can only add to it.
"""

import argparse
import time
from collections.abc import Callable
from unittest import mock

import torch
import triton

from bench.bench_encode import commit
from minivlm2vec_kernels import (
    activation_triton,
    attention_triton,
    image_patches_triton,
    layer_norm_triton,
    linear_triton,
    merge_crops_triton,
    pooling_triton,
    quantize_rows_triton,
    rms_norm_triton,
    rope_triton,
)


def launchers(rows: int = 30, D: int = 3072) -> dict[str, Callable[[], object]]:
    x = torch.randn(rows, D).bfloat16()
    weight, square = torch.randn(D).bfloat16(), torch.randn(D, D).bfloat16()
    q, k, v = torch.randn(rows, 96, 96).bfloat16().split(32, dim=1)
    cos, sin = torch.randn(2, rows, 48).bfloat16()
    lengths, scalars = torch.tensor([0, rows], dtype=torch.int32), (rows, True, None, None, None)
    long = torch.randn(777, 96, 96).bfloat16().split(32, dim=1)
    of_long = torch.tensor([0, 777], dtype=torch.int32)
    described = attention_triton.choose_tile(q.shape[2], 777, 777, True, True, q.dtype)
    crops = torch.zeros(4, 336, 336, 3, dtype=torch.uint8)
    statistics, features = torch.ones(3), torch.randn(5, 577, 1024).bfloat16()[:, 1:]
    separator = torch.randn(4096).bfloat16()
    positions, narrow = torch.randn(577, 1024).bfloat16(), torch.randn(1024).bfloat16()
    return {
        "attention": lambda: attention_triton.attention(q, k, v, lengths, *scalars),
        "attention, TMA": lambda: attention_triton.launch(*long, of_long, 777, of_long, 777, True, None, described),
        "layer_norm": lambda: layer_norm_triton.layer_norm(positions, narrow, narrow, 1e-5),
        "layer_norm_shift_": lambda: layer_norm_triton.layer_norm_shift_(positions, narrow, narrow, narrow, 1e-5),
        "image_patches": lambda: image_patches_triton.image_patches(
            crops, [2, 2], statistics, statistics, 14, torch.bfloat16
        ),
        "merge_crops": lambda: merge_crops_triton.merge_crops(features, [2, 2], separator, separator),
        "pool_last_token": lambda: pooling_triton.pool_last_token(x, lengths, weight, 1e-5, True),
        "rms_norm": lambda: rms_norm_triton.rms_norm(x, weight, 1e-5),
        "rms_norm_quantize": lambda: rms_norm_triton.rms_norm_quantize(x, weight, 1e-5),
        "quantize_rows": lambda: quantize_rows_triton.quantize_rows(x),
        "silu_mul": lambda: activation_triton.silu_mul(x),
        "rope_": lambda: rope_triton.rope_(q, k, cos, sin),
        "linear_quick_gelu": lambda: linear_triton.linear_quick_gelu(x, square, weight),
    }


def least_us(call: Callable[[], object], repeat: int) -> float:
    rounds = []
    for _ in range(9):
        start = time.thread_time()
        for _ in range(repeat):
            call()
        rounds.append((time.thread_time() - start) / repeat * 1e6)
    return min(rounds)


def without_dispatch() -> mock._patch:
    return mock.patch.object(triton.JITFunction, "__getitem__", lambda self, grid: lambda *_, **__: None, create=True)


def without_driver() -> mock._patch:
    from tests.kernels.pretended.card import Card, _driver

    active = _driver(Card((9, 0)))
    active.launcher_cls = lambda source, metadata: lambda *_: None
    return mock.patch.object(triton.runtime.driver, "_active", active)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=1000, help="calls of a round")
    args = parser.parse_args()
    print(f"commit {commit()}, torch {torch.__version__}, triton {triton.__version__}")
    for name, call in launchers().items():
        found = []
        for patch in (without_dispatch(), without_driver()):
            with patch:
                call()  # compiles
                found.append(least_us(call, args.repeat))
        print(f"{name:20s} launcher {found[0]:6.2f} us, with dispatch {found[1]:6.2f} us", flush=True)


if __name__ == "__main__":
    main()
