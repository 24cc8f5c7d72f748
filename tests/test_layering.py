"""Who may import whom, and what the tree must never hold."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "minivlm2vec", ROOT / "kernels" / "minivlm2vec_kernels"

# What the core may import from elsewhere. Other packages are for the parts that have an extra.
THIRD_PARTY = {"torch", "numpy", "PIL", "einops", "safetensors", "tokenizers", "huggingface_hub", "minivlm2vec_kernels"}
TYPES = {"typing_extensions"}  # for type checkers, of whom none runs without it; torch brings it too
CORE = [*PACKAGE.glob("*.py"), *(PACKAGE / "inference").glob("*.py")]


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Full names of what a file imports; relative ones begin with a dot."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            names |= {dots + node.module} if node.module else {dots + a.name for a in node.names}
    return names


def test_the_contracts_between_parts_are_kept():
    """[tool.importlinter] in pyproject.toml: layers, independent parts, no circles."""
    pytest.importorskip("importlinter")
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports as lint; raise SystemExit(lint(no_cache=True))",
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert out.returncode == 0, out.stdout + out.stderr


@pytest.mark.parametrize("file", CORE, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_the_core_imports_few_other_packages(file):
    outside = {n.split(".")[0] for n in imports(file) if not n.startswith(".")} - set(sys.stdlib_module_names)
    assert outside <= THIRD_PARTY | TYPES, f"{file.name} imports {outside - THIRD_PARTY}"
    assert not TYPES & {n.split(".")[0] for n in imports(file, top_level=True)}, "under TYPE_CHECKING alone"


def test_only_commands_parse_arguments_and_print():
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name == "cli":
            continue
        assert "argparse" not in imports(file), file
        called = [n.func for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id == "print" for f in called), file


def test_nobody_imports_transformers_tests_or_bench():
    for file in [*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")]:
        roots = {n.split(".")[0] for n in imports(file)}
        assert not roots & {"transformers", "tests", "bench"}, file


def test_triton_is_imported_by_kernel_files_alone():
    for file in [*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")]:
        if "triton" in {n.split(".")[0] for n in imports(file)}:
            assert file.parent == KERNELS and (file.stem.endswith("_triton") or file.stem == "launch"), file


def test_importing_the_core_imports_no_triton():
    code = "import sys, minivlm2vec; assert 'triton' not in sys.modules or 'torch._dynamo' in sys.modules; print(1)"
    path = f"{ROOT}:{ROOT / 'kernels'}"
    out = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path, "PATH": ""}, capture_output=True, text=True
    )
    assert out.stdout.strip() == "1", out.stderr


def test_the_kernels_folder_is_no_package():
    """`kernels` is the import name of another project, which transformers imports where it is installed."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_submodule_has_the_name_of_an_op():
    """The first import of such a file would put the module in the place of the function."""
    import minivlm2vec_kernels

    files = {f.stem for f in KERNELS.glob("*.py")}
    assert not files & set(minivlm2vec_kernels.__all__)


def test_no_utils():
    assert not [f for f in ROOT.rglob("*.py") if f.stem in ("utils", "util", "common_utils") and ".venv" not in f.parts]
