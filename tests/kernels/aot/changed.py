"""What a change of launch settings makes of the kernels, on every card: spills, too much shared memory, no code at all.

A folder that holds another minivlm2vec_kernels is imported by a process of its own:

    PYTHONPATH=FOLDER python -m tests.kernels.aot.changed < known.json

known.json is a list of what need not be compiled, as "jobs" of the answer has it; null: nothing is. Prints
{"jobs": a line for each kernel, card and setting there is, "wrong": what is wrong with those that were compiled}.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.kernels import aot
from tests.kernels.aot import every_card

ROOT = Path(__file__).parents[3]


def compile_all_but(known: list[str] | None, kernels: Path) -> tuple[list[str], list[str]]:
    """(jobs, wrong) of the package in the folder `kernels`. Raises ValueError where it cannot be imported."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(kernels), str(ROOT), env.get("PYTHONPATH", "")]
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONHASHSEED": "0"}  # sets print alike
    command = [sys.executable, "-m", "tests.kernels.aot.changed"]
    done = subprocess.run(command, cwd=ROOT, env=env, input=json.dumps(known), text=True, capture_output=True)
    if done.returncode:
        raise ValueError((done.stderr.strip() or "no message").splitlines()[-1])
    found = json.loads(done.stdout.splitlines()[-1])
    return found["jobs"], found["wrong"]


def jobs() -> dict[str, Callable[[], list[str]]]:
    """By a line that says all that it depends on: compiles, and returns what is wrong."""
    found: dict[str, Callable[[], list[str]]] = {}
    for spec in aot.all_specs():
        # what a spec promises of speed is an expectation, and a winner was measured
        spec = replace(spec, quick=False, wgmma=False, blocks=1, ahead=0)
        for arch in spec.archs:
            found[f"{arch} {replace(spec, archs=())}"] = partial(_measured, replace(spec, archs=(arch,)))
    for name, card in every_card.CARDS.items():
        if name not in ("sm_80", "sm_90", "sm_100"):
            for spec in every_card.specs(card, quick=True):
                found[f"{name} {replace(spec, archs=())}"] = partial(_fits, spec, card)
    return found


def _measured(spec: aot.Spec) -> list[str]:
    (arch,) = spec.archs
    try:
        return aot.problems([spec], {spec.key(arch): aot.measure(spec, arch)}, {})
    except Exception as e:  # whatever the compiler raises, it is about this kernel
        return [f"{spec.key(arch)}: {type(e).__name__}: {e}"]


def _fits(spec: aot.Spec, card: every_card.Card) -> list[str]:
    return [wrong] if (wrong := every_card.problem(spec, card)) else []


def main() -> None:
    known, found = json.load(sys.stdin), jobs()
    new = [] if known is None else [job for line, job in found.items() if line not in set(known)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        wrong = [" ".join(w.split()) for each in pool.map(lambda job: job(), new) for w in each]
    print(json.dumps({"jobs": list(found), "wrong": wrong}))


if __name__ == "__main__":
    main()
