"""docs/train.md's Python, run as it is printed there, on the bundled data and a tiny model."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minivlm2vec.checkpoint
import minivlm2vec.train
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.train import DataConfig, OptimConfig

DOCS = (Path(__file__).parents[2] / "docs/train.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
MODEL = "microsoft/Phi-3.5-vision-instruct"


@pytest.fixture
def short(tmp_path, monkeypatch):
    """The documented names, for a run of two steps on a CPU."""
    base, config_class = new_checkpoint(tmp_path / "base"), minivlm2vec.train.TrainConfig
    trainer = minivlm2vec.train.Trainer

    def config(model, out, data):
        assert (model, out, data) == (MODEL, "outputs/run", DataConfig("MMEB-train"))
        data = DataConfig("mini", sets=("Emoji-t2i",), workers=1)
        optim = OptimConfig(batch_size=2, chunk_size=2, steps=2, warmup=1)
        return config_class(str(base), str(tmp_path / "out"), data, optim=optim)

    monkeypatch.setattr(minivlm2vec.train, "TrainConfig", config)
    monkeypatch.setattr(minivlm2vec.train, "Trainer", lambda *a, **k: trainer(*a, device="cpu", **k))
    monkeypatch.setattr(minivlm2vec.train, "train", lambda config: trainer(config, device="cpu").run())
    monkeypatch.setattr(minivlm2vec.checkpoint, "resolve", {MODEL: base}.get)
    return tmp_path


def run(word: str, names: dict) -> dict:
    (block,) = [b for b in BLOCKS if word in b]
    exec(block, names)
    return names


def test_a_run_in_python(short, capsys):
    names = run("check_data", {})
    assert names["folder"] == short / "out/step-000002" and (names["folder"] / "model.safetensors").exists()
    assert capsys.readouterr().out == "32 rows of 1 sets\n"


def test_a_run_of_parts(short):
    config = minivlm2vec.train.TrainConfig(MODEL, "outputs/run", DataConfig("MMEB-train"))
    names = run("optimizer=optimizer", {"config": replace(config, out=str(short / "parts"))})
    assert [group["lr"] for group in names["trainer"].optimizer.param_groups] == [1e-3, 2e-5]
    log = [json.loads(line) for line in (short / "parts/log.jsonl").read_text().splitlines()]
    assert [set(record) >= {"loss", "projector_norm"} for record in log] == [True, True]
    assert not names["trainer"].model.causal and isinstance(names["trainer"].optimizer, torch.optim.AdamW)
