"""docs/research.md, run as it is printed there: files, Python and commands, in their order, in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minivlm2vec.model  # noqa: F401 (it registers the published parts, before a test replaces the registry)
from minivlm2vec import registry
from tests.support.golden import synth_image

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/research.md").read_text(encoding="utf-8")
JOBS = {int(n): text for n, text in re.findall(r"^## (\d)\. (.*?)(?=^## |\Z)", DOCS, re.DOTALL | re.MULTILINE)}
PRELUDE = "import minivlm2vec\nfrom minivlm2vec import Embedder, VLM2VecConfig\n" \
          "from minivlm2vec.checkpoint import resolve\nfrom minivlm2vec.weights import save_model\n"  # fmt: skip


def blocks(job: int) -> list[tuple[str, str]]:
    return re.findall(r"```(\w+)\n(.*?)```", JOBS[job], re.DOTALL)


def files_of(job: int) -> dict[str, str]:
    """Blocks that begin with the name of a file."""
    named = ((re.match(r"# (\S+\.(?:py|toml))\n", text), text) for _, text in blocks(job))
    return {match[1]: text for match, text in named if match}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with the files of the jobs that others build on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_parts", {kind: dict(parts) for kind, parts in registry._parts.items()})
    for job in (1, 6):
        for name, text in files_of(job).items():
            Path(name).write_text(text)
    Path("texts.csv").write_text("text\na cat\na dog\n")
    return tmp_path


def do(job: int) -> dict:
    """Runs a job's blocks; returns the names that its Python left."""
    torch.manual_seed(0)
    names = {"image": Image.fromarray(synth_image(120, 90, 3))}
    exec(PRELUDE, names)
    for kind, text in blocks(job):
        if name := next((n for n, content in files_of(job).items() if content == text), None):
            Path(name).write_text(text)
        elif kind == "python":
            assert len(text.strip().splitlines()) <= 30
            exec(text, names)
        elif kind == "sh":
            for line in text.strip().splitlines():
                command(line)
    return names


def command(line: str) -> str:
    words = line.split()
    assert words[0] == "minivlm2vec"
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


def test_every_job_is_there():
    assert sorted(JOBS) == [*range(1, 9)]


def test_a_pooling_with_parameters(place):
    names = do(1)
    expected = names["e"].encode(["a cat", "a dog"])
    assert np.abs(np.load("vectors.npy") - expected).max() < 1e-5
    assert Path("run/step-000002/config.json").exists() and Path("scores").is_dir()


def test_another_tower(place):
    names = do(2)
    e, image = names["Embedder"].from_pretrained("convolutions", show_progress=False), names["image"]
    item = {"text": "what is it?", "image": image}
    assert np.abs(e.encode([item]) - names["e"].encode([item])).max() < 1e-5


def test_bidirectional_attention(place):
    names = do(3)
    expected = names["e"].encode(["a cat", "a dog"])
    assert np.abs(np.load("bidirectional.npy") - expected).max() < 1e-5
    causal = names["Embedder"].from_pretrained("mini", show_progress=False).encode(["a cat", "a dog"])
    assert np.abs(causal - expected).max() > 1e-3


def test_a_heat_map(place):
    names = do(4)
    assert Image.open("heat.png").size == names["image"].size
    assert names["heat"].shape == (90, 120, 1) and names["heat"].std() > 0


def test_peft(place):
    pytest.importorskip("peft")
    names = do(5)
    assert all("lora" in n for n in names["names"]) and names["names"]


def test_training_otherwise(place):
    pytest.importorskip("pyarrow", reason="needs the extra `train`")
    names = do(6)
    assert names["folder"] == Path("run/step-000002")
    assert "query_norm" in Path("run/log.jsonl").read_text()


def test_a_kernel_of_ones_own(place):
    names = do(7)
    plain = names["Embedder"].from_pretrained("mini", show_progress=False).encode(["a cat"])
    relu = names["Embedder"].from_pretrained("relu", show_progress=False).encode(["a cat"])
    assert np.abs(relu - names["e"].encode(["a cat"])).max() < 1e-5
    assert np.abs(relu - plain).max() > 1e-3


def test_another_size(place):
    names = do(8)
    e = names["Embedder"].from_pretrained("two-layers", show_progress=False)
    assert len(e.model.decoder.layers) == 2
    assert np.abs(e.encode(["a cat"]) - names["e"].encode(["a cat"])).max() < 1e-5
    assert names["Embedder"].from_pretrained("three-layers", show_progress=False).dimension == 96
