"""Runs a module on a pretended card, for the rehearsal of `bench.first_hour`; benches with few runs and a tiny model.

python -m tests.bench.on_pretended_card -m bench.run --only rms_norm
"""

import runpy
import sys
from dataclasses import replace


def main(arguments: list[str]) -> None:
    module, *rest = arguments[1:]
    if module == "pytest":  # its plugin makes the card, and reports what needs numbers as skipped
        rest = ["-p", "tests.kernels.pretended.plugin", *rest]
    sys.argv = [module, *rest]
    if module.startswith("bench.run"):
        pretend_for_the_bench()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def pretend_for_the_bench() -> None:
    import tests.kernels.pretended.plugin  # noqa: F401
    from bench import bench_model, common
    from minivlm2vec.new_checkpoint import base_config

    for name in ("REPETITIONS", "FEWEST", "WARM_UPS"):
        setattr(common, name, 1)
    sizes = base_config("tiny")
    sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    bench_model.base_config = lambda preset: sizes
    some = slice(-9, -7)
    bench_model.FULL = {
        name: replace(w, texts=w.texts[some] or w.texts, grids=w.grids[some] or w.grids)
        for name, w in bench_model.FULL.items()
    }
    bench_model.WARM_UPS, bench_model.FP8_COSINE = 1, -1
    plain = common.Session.run
    common.Session.run = lambda self, cases: plain(self, (c for c in cases if "backward" not in c.kernel))


if __name__ == "__main__":
    main(sys.argv[1:])
