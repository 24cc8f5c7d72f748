"""`minivlm2vec.files.ray.EmbedBatch`, by itself and on a local Ray with two workers and its own reader of images."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minivlm2vec import Embedder
from minivlm2vec.files.ray import EmbedBatch
from tests.support.files_data import checkpoint, save_pictures

__all__ = ["checkpoint"]
ROOT = Path(__file__).parents[2]
TOLERANCE = 2e-6  # float32 sums in another order

CLUSTER = """
import json, os, signal, sys
import numpy as np, ray
from minivlm2vec.files.ray import EmbedBatch

folder, checkpoint = sys.argv[1:]

class DiesOnce(EmbedBatch):
    calls = 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls == 2:
            try:
                os.close(os.open(f"{folder}/died", os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        return super().__call__(batch)

ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
ray.data.DataContext.get_current().enable_progress_bars = False
rows = [{"n": i, "image": f"p{i}.png"} for i in range(12)] + [{"n": 12, "image": "missing.png"}]
found = ray.data.from_items(rows).map_batches(
    DiesOnce, fn_constructor_args=[checkpoint], fn_constructor_kwargs={"image_root": folder, "device": "cpu"},
    batch_size=3, compute=ray.data.ActorPoolStrategy(size=2),
).take_all()
found = [{**row, "embedding": np.asarray(row["embedding"]).tolist()} for row in sorted(found, key=lambda r: r["n"])]
json.dump(found, open(f"{folder}/found.json", "w"))

def read(**options):
    rows = ray.data.read_images(folder, include_paths=True, **options).map_batches(
        EmbedBatch, fn_constructor_args=[checkpoint], fn_constructor_kwargs={"device": "cpu"}, batch_size=8,
        compute=ray.data.ActorPoolStrategy(size=1),
    ).take_all()
    rows = sorted(rows, key=lambda r: int(r["path"].rpartition("/p")[2][:-4]))
    return [(np.asarray(row["embedding"]).tolist(), row["embedding_error"]) for row in rows]

json.dump([read(mode="RGB"), read(mode="L"), read(mode="RGB", size=(48, 80))], open(f"{folder}/images.json", "w"))
"""


def test_a_batch(checkpoint, tmp_path):
    save_pictures(tmp_path, ["a.png", "b.png"])
    actor = EmbedBatch(str(checkpoint), image_root=str(tmp_path), instruction="Say.\n", device="cpu")
    images = np.empty(3, object)
    images[:] = ["a.png", ["a.png", "b.png"], "none.png"]
    batch = {"image": images, "text": np.array(["x", "y", "z"], object), "n": np.arange(3)}
    got = actor(batch)
    inputs = [
        {"text": "x", "image": tmp_path / "a.png"},
        {"text": "y", "images": [tmp_path / "a.png", tmp_path / "b.png"]},
    ]
    expected = Embedder.from_pretrained(checkpoint, device="cpu").encode(inputs, prompt="Say.\n")
    assert np.abs(got["embedding"][:2] - expected).max() < TOLERANCE and np.isnan(got["embedding"][2]).all()
    assert got["embedding_error"].tolist()[:2] == ["", ""] and "no such file" in got["embedding_error"][2]
    assert (got["n"] == batch["n"]).all() and got["embedding"].dtype == np.float32
    empty = actor({"text": np.array([], object)})
    assert empty["embedding"].shape == (0, 64) and empty["embedding_error"].shape == (0,)
    with pytest.raises(ValueError, match="which column"):
        actor({"caption": np.array(["x"], object)})


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def column(*values):
    """As Ray has a column of values that differ in shape."""
    out = np.empty(len(values), object)
    out[:] = values
    return out


IMAGES = {
    "of one size": (pixels(3, 50, 60, 3), None),
    "of several sizes": (column(pixels(50, 60, 3), pixels(70, 40, 3, seed=1)), None),
    "grey": (pixels(2, 50, 60), lambda a: a[..., None]),
    "grey and RGBA": (column(pixels(50, 60), pixels(40, 60, 4)), lambda a: a[..., None] if a.ndim == 2 else a),
    "with one channel": (pixels(2, 50, 60, 1), None),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_as_arrays(checkpoint, name):
    images, as_input = IMAGES[name]
    got = EmbedBatch(str(checkpoint), device="cpu")({"image": images})
    inputs = [{"image": as_input(a) if as_input else a} for a in images]
    expected = Embedder.from_pretrained(checkpoint, device="cpu").encode(inputs)
    assert got["embedding_error"].tolist() == [""] * len(images)
    assert np.abs(got["embedding"] - expected).max() < TOLERANCE


def test_several_arrays_in_a_row_and_arrays_that_are_no_image(checkpoint, tmp_path):
    save_pictures(tmp_path, ["a.png"])
    rows = [
        pixels(2, 50, 60, 3),
        [pixels(50, 60, 3, seed=1), "a.png"],
        pixels(50, 60, 3) / 255,
        pixels(5, 6, 7),
        [],
        None,
    ]
    got = EmbedBatch(str(checkpoint), image_root=str(tmp_path), device="cpu")(
        {"image": column(*rows), "text": column(*"uvwxyz")}
    )
    inputs = [
        {"text": "u", "images": list(rows[0])},
        {"text": "v", "images": [rows[1][0], tmp_path / "a.png"]},
        "y",
        "z",
    ]
    expected = Embedder.from_pretrained(checkpoint, device="cpu").encode(inputs)
    assert np.abs(got["embedding"][[0, 1, 4, 5]] - expected).max() < TOLERANCE
    assert np.isnan(got["embedding"][2:4]).all()
    for error, what in zip(got["embedding_error"][2:4], ["float64 [50, 60, 3]", "uint8 [5, 6, 7]"], strict=True):
        assert f"a numpy image is uint8 [height, width, 3], got {what}" in error


def test_a_batch_in_another_format_is_named(checkpoint):
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match="got a DataFrame: batch_format='numpy'"):
        EmbedBatch(str(checkpoint), device="cpu")(pandas.DataFrame({"text": ["a"]}))


def test_two_workers_one_of_which_is_killed(checkpoint, tmp_path):
    pytest.importorskip("ray")
    save_pictures(tmp_path, [f"p{i}.png" for i in range(12)])
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    # Ray gives its workers niceness 15: beside other work they would hardly run
    env = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, str(tmp_path), str(checkpoint)],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | env, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists(), "no worker was killed"
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["n"] for row in found] == list(range(13))
    vectors = np.array([row["embedding"] for row in found], np.float32)
    expected = Embedder.from_pretrained(checkpoint, device="cpu").encode(
        [{"image": tmp_path / f"p{i}.png"} for i in range(12)]
    )
    assert np.abs(vectors[:12] - expected).max() < TOLERANCE
    assert np.isnan(vectors[12]).all() and "no such file" in found[12]["embedding_error"]
    colour, grey, resized = json.loads((tmp_path / "images.json").read_text())
    for rows, inputs in (
        (colour, [Image.open(tmp_path / f"p{i}.png") for i in range(12)]),
        (grey, [Image.open(tmp_path / f"p{i}.png").convert("L") for i in range(12)]),
    ):
        expected = Embedder.from_pretrained(checkpoint, device="cpu").encode(inputs)
        assert [error for _, error in rows] == [""] * 12
        assert np.abs(np.array([vector for vector, _ in rows], np.float32) - expected).max() < TOLERANCE
    assert [error for _, error in resized] == [""] * 12 and np.isfinite([vector for vector, _ in resized]).all()


def test_the_name_that_it_had_first():
    assert importlib.import_module("minivlm2vec.ray").EmbedBatch is EmbedBatch
