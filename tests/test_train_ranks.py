"""Two processes train as one does: DDP and FSDP2 under torchrun, gloo, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.train.config import read_config
from minivlm2vec.train.trainer import Trainer

ROOT = Path(__file__).parents[1]

# Rows in blocks of one set, so that one process has images only in its queries, and another none at all; chunks of
# 3, so that the last one of a process need not show what the first did. Hard negatives are there for some rows.
CONFIG = """
model = "{model}"
out = "{out}"
distributed = "{kind}"
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
LORA = "[lora]\nr = 2\nuse_dora = true\nlora_dropout = 0.0\n"


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


def config_file(tmp_path: Path, name: str, base: Path, data: Path, kind: str, lora: bool) -> Path:
    path = tmp_path / f"{name}.toml"
    text = CONFIG.format(model=base, out=tmp_path / name, data=data, kind=kind) + (LORA if lora else "")
    path.write_text(text)
    return path


def torchrun(*what: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *what]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def train(config: Path) -> subprocess.CompletedProcess:
    return torchrun("-m", "minivlm2vec", "train", str(config), "--device", "cpu")


def state(out: Path) -> dict[str, torch.Tensor]:
    folder = max(out.glob("step-*"))
    tensors = load_file(folder / "training/state.safetensors")
    return {name: t for name, t in tensors.items() if not name.startswith("random/")}


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "lora"), [("ddp", False), ("fsdp", False), ("ddp", True)])
def test_two_processes_equal_one(base, data, tmp_path, kind, lora):
    Trainer(read_config(config_file(tmp_path, "one", base, data, kind, lora)), device="cpu").run()
    done = train(config_file(tmp_path, "two", base, data, kind, lora))
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert b["hit_rate"] == a["hit_rate"] and b["lr"] == a["lr"]
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        if name.startswith("exp_avg/"):  # sums of gradients, of which Adam's steps keep little but the signs
            scale = float(one[name].abs().max())
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3 * scale + 1e-9, msg=name)
    assert (tmp_path / "two/pictures/step-000002.png").exists()
    assert f"wrote {tmp_path / 'two/step-000003'}\n" in done.stdout and done.stdout.count("wrote") == 1


STOPPED = """
import sys
from minivlm2vec.train.config import read_config
from minivlm2vec.train.trainer import Trainer

trainer = Trainer(read_config(sys.argv[1]), device="cpu")
train_step = trainer.train_step
trainer.train_step = lambda prepared: train_step(prepared) if trainer.step < 2 else sys.exit("stopped")
trainer.run()
"""


def test_two_processes_go_on_exactly(base, data, tmp_path):
    whole, part = (config_file(tmp_path, name, base, data, "fsdp", False) for name in ("whole", "part"))
    assert train(whole).returncode == 0
    (tmp_path / "stopped.py").write_text(STOPPED)
    stopped = torchrun(str(tmp_path / "stopped.py"), str(part))
    assert stopped.returncode != 0 and [r["step"] for r in log(tmp_path / "part")] == [1, 2]
    with pytest.raises(ValueError, match="was written by 2 processes, these are 1"):
        Trainer(read_config(part), device="cpu")
    done = train(part)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "step-000003/training/state.safetensors") for name in ("whole", "part"))
    assert one["random/cpu"].shape[0] == 2 and not torch.equal(*one["random/cpu"])
    assert one.keys() == two.keys() and any(name.startswith("parameter/") for name in one)
    for name in one:
        assert torch.equal(one[name], two[name]), name
