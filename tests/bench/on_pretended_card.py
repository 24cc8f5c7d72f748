"""Runs a module on a pretended card, for the rehearsal of `bench.first_hour`, with little of everything.

python -m tests.bench.on_pretended_card -m bench.run --only rms_norm

The doctor has few kernels. Benches run once, with a tiny model and without gradients; of a sweep the first case of each
kernel, with a few candidates, the later the faster.
"""

import itertools
import runpy
import sys
from dataclasses import replace


def main(arguments: list[str]) -> int:
    module, *rest = arguments[1:]
    if module == "minivlm2vec":
        return doctor()
    if module == "pytest":  # its plugin makes the card, and reports what needs numbers as skipped
        rest = ["-p", "tests.kernels.pretended.plugin", *rest]
    sys.argv = [module, *rest]
    if module == "bench.run":
        pretend_for_the_bench()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def doctor() -> int:
    """1 unless all that is wrong is that nothing computes."""
    from tests.doctor.on_pretended_card import examine

    report = examine("9.0", "rms_norm,quantize_rows")
    print(report.text(100))
    return 0 if [check.name for check in report.failed] == ["torch alone: sums and products"] else 1


def pretend_for_the_bench() -> None:
    import torch

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
    later = itertools.count(1)
    torch.cuda.Event.elapsed_time = lambda start, end: 100 / next(later)
    torch.cuda.Event.query = lambda event: False  # a card that sleeps has not come to it
    plain = common.Session.run
    seen: set[str] = set()

    def run(session: common.Session, cases) -> None:
        for case in cases:
            if "backward" in case.kernel or ("--sweep" in sys.argv and case.kernel in seen):
                continue
            seen.add(case.kernel)
            plain(session, [replace(case, build=lambda case=case: few(case.build()))])

    common.Session.run = run


def few(work):
    """Of a sweep's candidates the first and the last two; every peer of a bench."""
    if "--sweep" not in sys.argv:
        return work
    names = list(work.providers)
    kept = dict.fromkeys((*names[:3], *names[-2:]))
    return replace(work, providers={name: work.providers[name] for name in kept})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
