"""The layout of the Kernel Hub: others load the kernels from it, beside our own copy."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minivlm2vec_kernels
from minivlm2vec_kernels import hub

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the command writes."""
    folder = tmp_path_factory.mktemp("hub") / "minivlm2vec-kernels"
    command = [sys.executable, "-m", "minivlm2vec_kernels.hub", str(folder)]
    out = subprocess.run(command, cwd=ROOT / "kernels", capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert Path(out.stdout.strip()) == folder / "build" / "torch-universal"
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    """The package as the library `kernels` loads it."""
    kernels = pytest.importorskip("kernels", reason="needs the package kernels (extra `test`)")
    return kernels.get_local_kernel(folder)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_attention_norm_and_activation_in_one_line(loaded, device, backend):
    q, k, v = torch.randn(3, 50, 2, 32, device=device).unbind()
    cu_seqlens = torch.tensor([0, 37, 50], device=device, dtype=torch.int32)
    weight = torch.randn(32, device=device)

    def one_line(o):
        return o.silu_mul(o.rms_norm(o.attention(q, k, v, cu_seqlens, 37, causal=True, backend=backend), weight, 1e-5))

    assert loaded.attention is not minivlm2vec_kernels.attention
    torch.testing.assert_close(one_line(loaded), one_line(minivlm2vec_kernels), rtol=0, atol=0)


def test_all_ops_are_there(loaded):
    assert loaded.__all__ == minivlm2vec_kernels.__all__ and all(hasattr(loaded, op) for op in loaded.__all__)


def test_its_custom_ops_are_its_own(loaded):
    """One that both copies registered under the same name would be the second one's for both."""
    import minivlm2vec_kernels.torch_ops as ours

    theirs = sys.modules[f"{loaded.__name__}.torch_ops"]
    assert ours._attention.op._qualname == "minivlm2vec::torch_attention"
    assert theirs._attention.op._qualname == f"{loaded.__name__}::torch_attention"


def test_it_compiles_without_a_graph_break(loaded):
    x, weight = torch.randn(5, 64), torch.ones(64)
    norm = torch.compile(lambda x: loaded.rms_norm(x, weight, 1e-5), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(norm(x), minivlm2vec_kernels.rms_norm(x, weight, 1e-5))


def test_the_files_are_those_of_the_digest(folder):
    rust = pytest.importorskip("kernels._rust", reason="needs the package kernels (extra `test`)")
    build = folder / "build" / "torch-universal"
    metadata = rust.Metadata.read_from_file(build / "metadata.json")
    assert metadata.name.python_name == "minivlm2vec_kernels" and metadata.license == "Apache-2.0"
    found = rust.Digest.hash_variant(metadata.digest.algorithm, build)
    metadata.digest.validate(found)
    (build / "ops.py").write_text("changed")
    try:
        with pytest.raises(rust.DigestValidationError):
            metadata.digest.validate(rust.Digest.hash_variant(metadata.digest.algorithm, build))
    finally:
        (build / "ops.py").write_bytes(Path(minivlm2vec_kernels.ops.__file__).read_bytes())


def test_what_is_written(folder):
    """Also where `kernels` is not installed."""
    build = folder / "build" / "torch-universal"
    metadata = json.loads((build / "metadata.json").read_text())
    assert metadata["id"].isidentifier() and metadata["version"] == 0
    sources = {p.name for p in Path(hub.__file__).parent.glob("*.py")} - {"hub.py"}
    assert {p.name for p in build.glob("*.py")} == sources
    assert set(metadata["digest"]["files"]) == sources | {"py.typed", "minivlm2vec_kernels/__init__.py"}
    absolute = re.compile(r"^\s*(from|import) minivlm2vec_kernels\b", re.MULTILINE)
    assert not [p.name for p in build.glob("*.py") if absolute.search(p.read_text())]
    assert "`attention`" in (folder / "README.md").read_text()


def test_old_loaders_find_the_same(folder):
    path = folder / "build" / "torch-universal" / "minivlm2vec_kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location("old_loader", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x = torch.randn(3, 8)
    torch.testing.assert_close(module.silu_mul(x), minivlm2vec_kernels.silu_mul(x))


def refusal(folder: Path, monkeypatch, capsys) -> str:
    """What the command says on stderr, which is one line."""
    monkeypatch.setattr(sys, "argv", ["hub", str(folder)])
    assert hub.main() == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("python -m minivlm2vec_kernels.hub: ")
    return line


def test_a_build_is_not_overwritten(folder, monkeypatch, capsys):
    with pytest.raises(FileExistsError):
        hub.write_build(folder)
    assert f"{folder / 'build' / 'torch-universal'} is there already" in refusal(folder, monkeypatch, capsys)


def test_a_file_in_the_way_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refusal(tmp_path / "file", monkeypatch, capsys)
    assert str(tmp_path / "file" / "below") in refusal(tmp_path / "file" / "below", monkeypatch, capsys)
    (tmp_path / "build").write_text("mine")
    assert str(tmp_path / "build") in refusal(tmp_path, monkeypatch, capsys)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "mine", "build": "mine"}


def test_a_readme_of_others_is_not_overwritten(tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_bytes(b"mine \xff")
    assert f"{tmp_path / 'README.md'} has another text" in refusal(tmp_path, monkeypatch, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_bytes() == b"mine \xff"


def test_a_build_that_was_removed_is_written_again(tmp_path):
    shutil.rmtree(hub.write_build(tmp_path))
    assert (hub.write_build(tmp_path) / "metadata.json").is_file()
