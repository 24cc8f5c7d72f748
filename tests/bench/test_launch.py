"""The bench of launches: every launcher comes to its kernel, by what would be launched on a card."""

import torch

from bench import bench_launch
from minivlm2vec_kernels import attention_triton


@torch.inference_mode()
def test_every_launcher_comes_to_its_kernel(monkeypatch):
    launched = []

    def launch(kernel, grid):
        return lambda *args, **constants: launched.append((kernel.fn.__name__, constants))

    monkeypatch.setattr(type(attention_triton.attention_kernel), "__getitem__", launch)
    for call in bench_launch.launchers().values():
        call()
    names = list(bench_launch.launchers())
    assert [name for name, _ in launched[:2]] == 2 * ["attention_kernel"] and len(launched) == len(names)
    assert dict(zip(names, launched, strict=True))["attention, TMA"][1]["TMA"]


def test_the_least_of_the_rounds(monkeypatch):
    ticks = iter([0, 3e-6, 10, 10 + 1e-6] + 7 * [20, 20 + 8e-6])
    monkeypatch.setattr(bench_launch.time, "thread_time", lambda: next(ticks))
    assert abs(bench_launch.least_us(lambda: None, 1) - 1) < 1e-6
