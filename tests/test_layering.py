"""Who may import whom, and what the tree must never hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "minivlm2vec", ROOT / "kernels" / "minivlm2vec_kernels"

# The parts of the core that may know of each other; a file may import what stands in its row.
CORE = {
    "errors": set(),
    "config": {"errors"},
    "batch": set(),
    "images": {"batch", "errors"},
    "tokenizer": {"errors"},
    "processor": {"batch", "config", "errors", "images", "tokenizer"},
    "linear": set(),
    "vision": {"batch", "config", "linear"},
    "projector": {"batch", "config", "linear"},
    "decoder": {"batch", "config", "linear"},
    "model": {"batch", "config", "decoder", "projector", "vision"},
    "weights": {"atomic", "config", "errors", "model"},
    "lora": {"errors", "linear", "weights"},
    "prompts": set(),
    "inference": {"batch", "config", "decoder", "linear", "model", "projector", "vision"},
    "distributed": set(),
    "rows": {"extras"},
    "embedder": {
        "batch",
        "errors",
        "inference",
        "lora",
        "model",
        "processor",
        "prompts",
        "weights",
    },
}
THIRD_PARTY = {"torch", "numpy", "PIL", "einops", "safetensors", "tokenizers", "huggingface_hub", "minivlm2vec_kernels"}


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


@pytest.mark.parametrize("name", CORE)
def test_core_files_import_their_row(name):
    files = [PACKAGE / f"{name}.py"] if (PACKAGE / f"{name}.py").exists() else [*(PACKAGE / name).glob("*.py")]
    found = set().union(*map(imports, files))
    level = "." if len(files) == 1 else ".."
    inside = {n.removeprefix(level).split(".")[0] for n in found if n.startswith(level)}
    assert inside <= CORE[name], f"{name} imports {inside - CORE[name]}"
    outside = {n.split(".")[0] for n in found if not n.startswith(".")} - set(sys.stdlib_module_names)
    assert outside <= THIRD_PARTY, f"{name} imports {outside - THIRD_PARTY}"


def test_core_never_imports_optional_parts():
    for file in PACKAGE.glob("*.py"):
        for name in imports(file):
            optional = name.startswith(".") and name.split(".")[1] in ("serve", "mmeb", "train", "files", "mini")
            assert not optional, (file, name)


def test_only_commands_import_the_toy_world():
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).parts[0] not in ("mini", "cli"):
            assert not any("mini" in name.split(".") for name in imports(file)), file


def test_the_toy_world_neither_parses_arguments_nor_prints():
    for file in (PACKAGE / "mini").rglob("*.py"):
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


def test_kernels_never_import_the_package():
    for file in KERNELS.rglob("*.py"):
        assert not any(n.split(".")[0] == "minivlm2vec" for n in imports(file)), file


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
