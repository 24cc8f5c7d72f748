"""What the tests of `embed` and `search` share: a tiny checkpoint, pictures, and the command run in this process."""

import contextlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm2vec.cli import main
from minivlm2vec.lora import LoraConfig, add_lora, save_adapter
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.weights import load_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return new_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", preset="tiny")


def make_adapter(checkpoint: Path, folder: Path, seed: int = 0, **options) -> Path:
    """An adapter of random numbers, which changes every vector."""
    config, generator = LoraConfig(r=2, **options), torch.Generator().manual_seed(seed)
    model = add_lora(load_model(checkpoint), config, generator=generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(0, 0.005, generator=generator)
    save_adapter(model, folder, config)
    return folder


def save_pictures(folder: Path, names, seed: int = 0) -> None:
    """Blurred noise, each picture another, of varied sizes."""
    rng = np.random.default_rng(seed)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        size = tuple(int(n) for n in rng.integers(40, 200, 2))
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


def run(*argv, stdin: bytes = b"") -> tuple[int, str, str]:
    """Runs `minivlm2vec …` in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    fake = io.TextIOWrapper(io.BytesIO(stdin))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "stdin", fake):
        code = main([str(a) for a in argv])
    return code, out.getvalue(), err.getvalue()


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def left_behind(folder: Path) -> list[str]:
    """Names that a finished run must not leave."""
    return sorted(p.name for p in folder.iterdir() if p.name.endswith((".parts", ".new", ".tmp")))
