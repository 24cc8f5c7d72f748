"""Any torch, Triton and Python of the ranges: what they may take away, and what they say that they will."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from minivlm2vec.inference import fp8
from minivlm2vec.inference.prepack import _works, can_prepack

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_torch_and_triton_are_capped_at_the_next_major_version_alone():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ranges = {r.name: r.specifier for r in map(Requirement, re.findall(r'^ {4}"(t(?:orch|riton)>.*)",', project, re.M))}
    assert all(v in ranges["torch"] for v in ("2.10.0", "2.14.1", "2.99")) and "3.0" not in ranges["torch"]
    assert all(v in ranges["triton"] for v in ("3.6.0", "3.8.0", "3.99")) and "4.0" not in ranges["triton"]


# ------------------------------------------------------------------------------------- operators without a promise


@pytest.fixture
def fresh_answer():
    """What was found out about this torch is forgotten before and after."""
    _works.cache_clear()
    yield
    _works.cache_clear()


@pytest.mark.skipif(not can_prepack(CPU, torch.float32), reason="this torch has no oneDNN")
@pytest.mark.parametrize("operator", ["_linear_pointwise", "_reorder_linear_weight"])
@pytest.mark.parametrize("change", ["gone", "other arguments", "other numbers"])
def test_packed_products_are_tried_before_use(monkeypatch, fresh_answer, operator, change):
    def other(*args):
        raise TypeError("other arguments")

    if change == "gone":
        monkeypatch.delattr(torch.ops.mkldnn, operator)
        monkeypatch.setattr(
            type(torch.ops.mkldnn), "__getattr__", lambda self, name: object.__getattribute__(self, name)
        )
    elif change == "other arguments":
        monkeypatch.setattr(torch.ops.mkldnn, operator, other)
    else:
        real = getattr(torch.ops.mkldnn, operator)
        wrong = lambda *args: real(*args) * 2  # noqa: E731
        wrong.binary = getattr(real, "binary", None)
        monkeypatch.setattr(torch.ops.mkldnn, operator, wrong)
    with pytest.warns(UserWarning, match=r"packed weights.*stay as they are") as said:
        assert not can_prepack(CPU, torch.float32)
        assert not can_prepack(CPU, torch.float32)
    assert len(said) == 1


def test_without_packed_products_the_vectors_are_the_same(monkeypatch, fresh_answer):
    from minivlm2vec import Embedder

    before = Embedder.from_pretrained("mini", device="cpu").encode(["a cat"])
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    _works.cache_clear()
    with pytest.warns(UserWarning, match="packed weights") if torch.backends.mkldnn.is_available() else warnings.catch_warnings():  # fmt: skip  # noqa: E501
        e = Embedder.from_pretrained("mini", device="cpu")
    torch.testing.assert_close(torch.tensor(e.encode(["a cat"])), torch.tensor(before), rtol=0, atol=1e-5)


def test_fp8_products_by_the_public_function(monkeypatch):
    a, b = (torch.randn(rows, 64).to(torch.float8_e4m3fn) for rows in (32, 48))
    arguments = (a, b.t(), torch.rand(32, 1), torch.rand(1, 48), torch.randn(48).bfloat16(), torch.bfloat16)
    exact = a.float() @ b.float().t() * arguments[2] * arguments[3] + arguments[4].float()
    try:
        products = [fp8.scaled_mm(*arguments)]
    except (RuntimeError, ValueError) as e:
        pytest.skip(f"torch {torch.__version__} has no scales for rows on a CPU: {e}")
    monkeypatch.delattr(torch, "_scaled_mm")
    products.append(fp8.scaled_mm(*arguments))
    for y in products:
        torch.testing.assert_close(y.float(), exact, rtol=1e-2, atol=1e-2)


def test_a_torch_without_private_pytrees_imports():
    code = (
        "import sys, torch, warnings; sys.modules['torch.utils._pytree'] = None; del torch.utils._pytree\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always'); from minivlm2vec.batch import PackedBatch\n"
        "print([str(w.message) for w in said if 'torch.export takes no batch' in str(w.message)].__len__())"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "1", out.stderr


# ---------------------------------------------------------------------------------------- what is going to be dropped


@pytest.mark.parametrize("module", ["minivlm2vec.model", "minivlm2vec_kernels.ops", "tests.conftest", "bench.common"])
@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning, UserWarning])
def test_a_deprecation_that_points_at_our_files_is_an_error(module, category):
    with pytest.raises(category, match="deprecated"):
        warnings.warn_explicit("torch.thing is deprecated", category, f"{module}.py", 1, module)


def test_other_warnings_are_none():
    with pytest.warns(UserWarning):
        warnings.warn_explicit("slow here", UserWarning, "model.py", 1, "minivlm2vec.model")
    with pytest.warns(FutureWarning):
        warnings.warn_explicit("torch.thing is deprecated", FutureWarning, "x.py", 1, "transformers.x")
