"""A new op has to be in a dozen places. Each is looked at here, in the order of CONTRIBUTING's checklist."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from triton.runtime import KernelInterface

import minivlm2vec_kernels
from minivlm2vec_kernels import ops, reference, torch_ops
from tests.kernels import aot, every_kernel, test_launch, test_ops

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels/minivlm2vec_kernels"
NO_KERNEL = {"linear_add_": "torch's own product on every backend"}  # nothing of a kernel is asked of these


class Place(NamedTuple):
    step: int  # of the checklist
    file: str  # as the checklist names it

    def __str__(self) -> str:
        return f"step {self.step} of 'Adding an op', {self.file}"


Places = dict[Place, set[str]]  # in the checklist's order: the ops that are there
OF_KERNELS = {
    Place(4, "<op>_triton.py"),
    Place(5, "tests/kernels/test_<op>.py"),
    Place(5, "test_launch.py"),
    Place(6, "tests/kernels/aot/specs/<op>.py"),
    Place(6, "tests/kernels/every_kernel.py"),
    Place(7, "bench/bench_<op>.py"),
}


def lacking(op: str, places: Places) -> list[str]:
    """What is still to be done for an op, in the checklist's order."""
    asked = [place for place in places if not (op in NO_KERNEL and place in OF_KERNELS)]
    return [f"{op} is missing: {place}" for place in asked if op not in places[place]]


def all_ops() -> list[str]:
    """What the package exports, and every function of ops.py that chooses a backend."""
    choosing = {name for name, f in vars(ops).items() if inspect.isfunction(f) and f.__module__ == ops.__name__
                and "backend" in inspect.getfullargspec(f).kwonlyargs}  # fmt: skip
    return sorted((choosing | set(minivlm2vec_kernels.__all__)) - {"choose_backend"})


def find_places() -> Places:
    names = all_ops()
    kernels = {op: kernel_files(op) for op in names}
    specs = {spec.kernel for spec in aot.all_specs()}
    tested = names_in("tests/kernels/test_torch_ops.py")
    benches = [names_in(path) for path in (ROOT / "bench").glob("bench_*.py")]
    return {
        Place(1, "reference.py"): {op for op in names if hasattr(reference, op.rstrip("_"))},
        Place(2, "torch_ops.py"): {op for op in names if hasattr(torch_ops, op)},
        Place(3, "ops.py"): {op for op in names if "choose_backend" in names_of(function(op))},
        Place(3, "__init__.py"): set(minivlm2vec_kernels.__all__),
        Place(4, "<op>_triton.py"): {op for op in names if kernels[op]},
        Place(5, "tests/kernels/test_<op>.py"): {
            op for op in names if kernels[op] and all(op in names_in(f"tests/kernels/test_{k}.py") for k in kernels[op])
        },
        Place(5, "test_torch_ops.py"): {op for op in names if op in tested or is_the_references(op)},
        Place(5, "test_ops.py"): set(test_ops.calls()),
        Place(5, "test_launch.py"): first_words(test_launch.ops_and_arguments("cpu")),
        Place(6, "tests/kernels/aot/specs/<op>.py"): {
            op for op in names if kernels[op] and {name for k in kernels[op] for name in kernels_in(k)} <= specs
        },
        Place(6, "tests/kernels/every_kernel.py"): first_words(
            name for name, _ in every_kernel.launches(torch.Generator(), None)
        ),
        Place(7, "bench/bench_<op>.py"): {op for op in names if any(op in bench for bench in benches)},
    }


def function(op: str) -> ast.AST:
    """The op in ops.py; an empty module where it is not."""
    found = [f for f in ast.parse(inspect.getsource(ops)).body if isinstance(f, ast.FunctionDef) and f.name == op]
    return found[0] if found else ast.Module([], [])


def kernel_files(op: str) -> list[str]:
    """ "rope" for rope_triton.py, of every such file that the op calls."""
    imported = (a.name for n in ast.walk(function(op)) if isinstance(n, ast.ImportFrom) for a in n.names)
    return [name.removesuffix("_triton") for name in imported if name.endswith("_triton")]


def kernels_in(file: str) -> list[str]:
    """ "rope_triton.rope_kernel", of every kernel that the file launches."""
    module = importlib.import_module(f"minivlm2vec_kernels.{file}_triton")
    return [f"{file}_triton.{name}" for name, value in vars(module).items()
            if isinstance(value, KernelInterface) and name.endswith("_kernel")]  # fmt: skip


def is_the_references(op: str) -> bool:
    """Whether what runs without Triton is the specification itself, which test_reference.py holds."""
    return getattr(torch_ops, op, None) is getattr(reference, op, op)


def names_in(path: str | Path) -> set[str]:
    """Names and strings of a file under the root; none where it is not."""
    path = ROOT / path
    return names_of(ast.parse(path.read_text(encoding="utf-8"))) if path.is_file() else set()


def names_of(tree: ast.AST) -> set[str]:
    found = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    found |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    return found | {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def first_words(names) -> set[str]:
    return {re.split(r"[ ,]", name)[0] for name in names}


@pytest.fixture(scope="module")
def places() -> Places:
    return find_places()


@pytest.mark.parametrize("op", all_ops())
def test_every_op_is_everywhere(op, places):
    assert not lacking(op, places), f"see CONTRIBUTING.md: {'; '.join(lacking(op, places))}"


def test_every_kernel_file_belongs_to_an_op():
    used = {file for op in all_ops() for file in kernel_files(op)}
    assert {path.stem.removesuffix("_triton") for path in KERNELS.glob("*_triton.py")} == used


def test_every_launcher_has_a_case_in_test_launch(places):
    """Those of gradients too, which no public op is named after."""
    cases = places[Place(5, "test_launch.py")]
    for file in {file for op in all_ops() for file in kernel_files(op)}:
        module = importlib.import_module(f"minivlm2vec_kernels.{file}_triton")
        launchers = {name for name, value in vars(module).items() if hasattr(value, "op")}
        assert launchers <= cases, f"test_launch.py lacks {launchers - cases} of {file}_triton.py"


# ------------------------------------------------------------------------------------------- would it be noticed?


@pytest.mark.parametrize("number", range(12))
def test_an_op_that_one_place_lacks_is_named_with_it(places, number):
    place = list(places)[number]
    without = places | {place: places[place] - {"rms_norm"}}
    assert lacking("rms_norm", without) == [f"rms_norm is missing: step {place.step} of 'Adding an op', {place.file}"]
    assert lacking("silu_mul", without) == []


def test_a_new_op_lacks_everything_in_the_order_of_the_checklist(places):
    """Every file stands in the step of CONTRIBUTING that the message names, and in that order."""
    said = lacking("new_op", places)
    assert len(said) == len(places) == 12 and all(line.startswith("new_op is missing: step ") for line in said)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    steps = re.split(r"^\d\. ", text.split("## Adding an op")[1].split("\n## ")[0], flags=re.MULTILINE)
    order = [(place.step, steps[place.step].find(f"{place.file}`")) for place in places]
    assert order == sorted(order) and all(at >= 0 for _, at in order), order


def take_away(patch: pytest.MonkeyPatch, file: str) -> None:
    """Patches the real thing so that this place lacks rms_norm."""
    exported, calls = minivlm2vec_kernels.__all__, test_ops.calls()
    patches = {
        "reference.py": lambda: patch.delattr(reference, "rms_norm"),
        "torch_ops.py": lambda: patch.delattr(torch_ops, "rms_norm"),
        "__init__.py": lambda: patch.setattr(minivlm2vec_kernels, "__all__", set(exported) - {"rms_norm"}),
        "test_ops.py": lambda: patch.setattr(test_ops, "calls", lambda: calls.keys() - {"rms_norm"}),
        "test_launch.py": lambda: patch.setattr(test_launch, "ops_and_arguments", lambda _: ["rms_norm_backward"]),
        "tests/kernels/aot/specs/<op>.py": lambda: patch.setattr(aot, "all_specs", list),
        "tests/kernels/every_kernel.py": lambda: patch.setattr(every_kernel, "launches", lambda *_: []),
    }
    patches[file]()


@pytest.mark.parametrize("file", [
    "reference.py", "torch_ops.py", "__init__.py", "test_ops.py", "test_launch.py", "tests/kernels/aot/specs/<op>.py",
    "tests/kernels/every_kernel.py",
])  # fmt: skip
def test_what_is_taken_away_is_missed(file, monkeypatch):
    take_away(monkeypatch, file)
    assert any(line.endswith(f", {file}") for line in lacking("rms_norm", find_places()))


def test_sources_that_are_not_there_hold_no_op(monkeypatch, tmp_path):
    """An op whose tests and bench are not written; one whose function neither chooses a backend nor calls a kernel."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    found = [line.rpartition(", ")[2] for line in lacking("rms_norm", find_places())]
    assert found == ["tests/kernels/test_<op>.py", "bench/bench_<op>.py"]

    def new_op(x, *, backend=None):
        return x

    monkeypatch.setattr(new_op, "__module__", ops.__name__)
    monkeypatch.setattr(ops, "new_op", new_op, raising=False)
    assert "new_op" in all_ops()
    assert len(lacking("new_op", find_places())) == 12
