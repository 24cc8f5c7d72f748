"""Two processes train as one does: DDP and FSDP2 under torchrun, gloo, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minivlm2vec.lora import PREFIX, LoraConfig, adapter_tensors, add_lora
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.train.config import read_config
from minivlm2vec.train.trainer import Trainer
from minivlm2vec.weights import load_model

ROOT = Path(__file__).parents[2]

# Rows in blocks of one set, so that one process has images only in its queries, and another none at all; chunks of
# 3, so that the last one of a process need not show what the first did. Hard negatives are there for some rows.
CONFIG = """
model = "{model}"
out = "{out}"
distributed = "{distributed}"
freeze = {freeze}
[data]
root = "{data}"
sub_batch = 2
workers = 1
[loss]
learn_temperature = true
symmetric = true
mask_duplicates = true
[optim]
batch_size = 4
chunk_size = 3
steps = 3
warmup = 1
lr = 1e-3
[log]
save = 1
pictures = 2
picture_rows = 4
"""
# Rank 3: two processes have shards of different sizes.
LORA = "[lora]\nr = 3\nuse_dora = true\nlora_dropout = 0.0\n"
KINDS = {
    "ddp": ("ddp", [], ""),
    "fsdp": ("fsdp", [], ""),
    "ddp-lora": ("ddp", [], LORA),
    "fsdp-lora": ("fsdp", ["vision.layers.0"], LORA),
}
RESUMED = ("fsdp", "fsdp-lora")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("base") / "m", seed=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A set of pictures with hard negatives, and one of text alone."""
    from PIL import Image

    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    rows = {"Pictures": [], "Texts": []}
    for i in range(4):
        Image.new("RGB", (40 + 30 * i, 50), (60 * i, 0, 200)).save(root / f"images/{i}.png")
        negative = {"neg_text": f"not {i}", "neg_image_path": ""} if i % 2 else {}
        rows["Pictures"].append({"qry": "<|image_1|>\nwhat?", "qry_image_path": f"images/{i}.png",
                                 "pos_text": f"this is {i}", "pos_image_path": "", **negative})  # fmt: skip
        rows["Texts"].append({"qry": f"number {i}", "qry_image_path": "", "pos_text": "abcd"[i] * (i + 1),
                              "pos_image_path": ""})  # fmt: skip
    for name, lines in rows.items():
        (root / name).mkdir()
        (root / name / "original.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


# Starting processes takes longer than what they do, so each start trains several configurations, one after the other.
SCRIPT = """
import sys
from unittest import mock
from minivlm2vec.cli import main
from minivlm2vec.train.config import read_config
from minivlm2vec.train.trainer import Trainer

class Stopped(Exception):
    pass

for path in sys.argv[1:]:
    if not path.startswith("stop:"):
        assert main(["train", path, "--device", "cpu"]) == 0
        continue
    trainer = Trainer(read_config(path[5:]), device="cpu")
    train_step = trainer.train_step
    def stop_after_two(prepared):
        if trainer.step == 2:
            raise Stopped
        return train_step(prepared)
    with mock.patch.object(trainer, "train_step", stop_after_two):
        try:
            trainer.run()
            raise SystemExit("it was not stopped")
        except Stopped:
            pass
"""


def torchrun(folder: Path, *configs: str) -> list[str]:
    """Trains by each of the files in two processes; one that is named "stop:…" for two steps. Returns the lines of
    stdout, but Gloo's own (torch 2.10)."""
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command += [str(folder / "script.py"), *map(str, configs)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]


@pytest.fixture(scope="module")
def runs(base, data, tmp_path_factory):
    """Folder with <number of processes>-<kind>.toml and what was trained by it; part-<kind> was stopped."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, (distributed, freeze, lora) in KINDS.items():
        for name in (f"1-{kind}", f"2-{kind}", f"part-{kind}"):
            settings = {"model": base, "out": folder / name, "data": data, "distributed": distributed, "freeze": freeze}
            (folder / f"{name}.toml").write_text(CONFIG.format(**settings) + lora)
    stopped = [f"stop:{folder}/part-{kind}.toml" for kind in RESUMED]
    printed = torchrun(folder, *(folder / f"2-{kind}.toml" for kind in KINDS), *stopped)
    assert printed == [f"wrote {folder}/2-{kind}/step-000003" for kind in KINDS]
    return folder


def state(out: Path) -> dict[str, torch.Tensor]:
    return load_file(max(out.glob("step-*")) / "training/state.safetensors")


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(runs, kind):
    Trainer(read_config(runs / f"1-{kind}.toml"), device="cpu").run()
    for a, b in zip(log(runs / f"1-{kind}"), log(runs / f"2-{kind}"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert b["hit_rate"] == a["hit_rate"] and b["lr"] == a["lr"]
    one, two = state(runs / f"1-{kind}"), state(runs / f"2-{kind}")
    assert one.keys() == two.keys()
    for name in one:
        if name.startswith("optimizer/exp_avg/"):  # sums of gradients, of which Adam's steps keep little but the signs
            scale = float(one[name].abs().max())
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3 * scale + 1e-9, msg=name)
    assert (runs / f"2-{kind}/pictures/step-000002.png").exists()


def test_an_adapter_written_by_two_processes_is_whole(base, runs):
    """Every shard of every tensor, and nothing of the frozen layer."""
    folder, model = runs / "2-fsdp-lora/step-000003", load_model(base)
    add_lora(model, LoraConfig.from_json(folder / "adapter_config.json"))
    trained = {n.removeprefix("parameter/"): p for n, p in state(runs / "2-fsdp-lora").items()}
    model.load_state_dict({n: p for n, p in trained.items() if n.startswith(("vision.", "decoder."))}, strict=False)
    expected, written = dict(adapter_tensors(model)), load_file(folder / "adapter_model.safetensors")
    assert {PREFIX + name for name in expected} == written.keys()
    assert any(".layers.1.self_attn.q_proj." in n for n in written)
    assert not any("vision_model.encoder.layers.0." in n for n in written)
    for name, p in expected.items():
        assert torch.equal(written[PREFIX + name], p), name
        assert p.any(), name  # B was zero


def test_two_processes_go_on_exactly(runs):
    for kind in RESUMED:
        assert [r["step"] for r in log(runs / f"part-{kind}")] == [1, 2]
        with pytest.raises(ValueError, match="was written by 2 processes, these are 1"):
            Trainer(read_config(runs / f"part-{kind}.toml"), device="cpu")
    torchrun(runs, *(runs / f"part-{kind}.toml" for kind in RESUMED))
    for kind in RESUMED:
        whole, part = state(runs / f"2-{kind}"), state(runs / f"part-{kind}")
        assert whole["random/cpu"].shape[0] == 2 and not torch.equal(*whole["random/cpu"])
        assert whole.keys() == part.keys() and any(name.startswith("parameter/") for name in whole)
        for name in whole:
            assert torch.equal(whole[name], part[name]), (kind, name)
