"""`minivlm2vec doctor` on a card that is not there (tests/kernels/pretended/card.py), of any compute capability:

    python -m tests.doctor.on_pretended_card 8.6                   # every kernel is compiled: minutes
    python -m tests.doctor.on_pretended_card 8.6 rms_norm,attention # these kernels

Kernels are compiled and launched, nothing computes: so the report has to say that torch is wrong on this device.
"""

import sys

import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensor

from minivlm2vec import doctor
from minivlm2vec.doctor import kernels, model
from minivlm2vec.inference import fused
from tests.kernels.pretended import card


def main(capability: str, only: str = "") -> int:
    report = examine(capability, only)
    print(report.text(100))
    return 0 if report.passed else 1


def examine(capability: str, only: str = "") -> doctor.Report:
    major, minor = map(int, capability.split("."))
    with card.pretend_card((major, minor)):
        fused.type = lambda x: torch.nn.Parameter if isinstance(x, FakeTensor) and _is_parameter(x) else type(x)
        if only:
            keep(only.split(","))
        return doctor.examine(quick=True, isolate=False)


def _is_parameter(x: FakeTensor) -> bool:
    return isinstance(x, torch.nn.Parameter)


def keep(names: list[str]) -> None:
    """Leaves out all other kernels, which take minutes to compile, and the model's forms."""
    plain = kernels.tasks
    kernels.tasks = lambda *a: (t for t in plain(*a) if t.name in names)
    forms = model.tasks
    model.tasks = lambda *a: (t for t in forms(*a) if "model" in names or t.name == "fp8")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
