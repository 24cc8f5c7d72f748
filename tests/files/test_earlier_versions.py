"""Files and interrupted runs of earlier commits, made here by hand as those wrote them."""

import hashlib
import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from minivlm2vec import Embedder, __version__, files
from minivlm2vec.checkpoint import fingerprint
from tests.support.files_data import checkpoint, left_behind, make_adapter, run, write_jsonl

__all__ = ["checkpoint"]
TEXTS = [f"caption {i}" for i in range(6)]
NO_IMAGES = hashlib.sha256(b"[]\n" * 3).hexdigest()  # the stamps of a part of three rows without images
ON_CPU = files.SearchOptions(files.ModelSpec(device="cpu"))
VERSIONS = ["451f553", "before adapters"]


def settings_of(checkpoint, folder, version: str = "451f553") -> dict:
    settings = {
        "checkpoint": fingerprint(checkpoint), "adapter": None, "instruction": "", "num_crops": 4, "max_length": None,
        "computed_in": "float32", "stored_as": "float32", "dimension": 64, "normalized": True, "text_column": "text",
        "image_column": None, "image_root": str(folder), "vector_column": "embedding", "batch_tokens": 16384,
        "part_rows": 3, "version": __version__,
    }  # fmt: skip
    if version != "451f553":
        del settings["adapter"]
    return settings


def meta_of(checkpoint, source, version: str) -> dict:
    meta = {
        "model": {"name": str(checkpoint), "revision": None, "adapter": None},
        "settings": settings_of(checkpoint, source.parent, version),
        "source": {"name": str(source), "num_rows": 6, "fingerprint": hashlib.sha256(source.read_bytes()).hexdigest()},
        "images": hashlib.sha256(f"{NO_IMAGES}\n".encode() * 2).hexdigest(), "rows": 6, "bad_rows": 0,
        "computed_with": ["torch 2.13.0+cpu, cpu, 1 threads, torch kernels"],
    }  # fmt: skip
    if version != "451f553":
        del meta["model"]["adapter"], meta["computed_with"]
    if version == "the first":
        del meta["model"]
    return meta


def write_npy(path, vectors, meta) -> None:
    np.save(path, vectors)
    path.with_name("out.npy.json").write_text(json.dumps(meta, indent=1) + "\n")
    write_jsonl(path.with_name("out.npy.rows.jsonl"), [{"text": text} for text in TEXTS])


def write_safetensors(path, vectors, meta) -> None:
    header = {"__metadata__": {"minivlm2vec": json.dumps(meta)},
              "vectors": {"dtype": "F32", "shape": [6, 64], "data_offsets": [0, 6 * 64 * 4]}}  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + vectors.tobytes())
    write_jsonl(path.with_name("out.safetensors.rows.jsonl"), [{"text": text} for text in TEXTS])


def write_parquet(path, vectors, meta) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 64)
    table = pa.table({"text": TEXTS, "embedding": column})
    pq.write_table(table.replace_schema_metadata({"minivlm2vec": json.dumps(meta)}), path, row_group_size=3)


def write_lance(path, vectors, meta) -> None:
    lancedb, pa = pytest.importorskip("lancedb"), pytest.importorskip("pyarrow")
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 64)
    table = pa.table({"text": TEXTS, "row_number": pa.array(range(6), pa.int64()), "embedding": column})
    table = table.replace_schema_metadata({"minivlm2vec": json.dumps(meta)})
    lancedb.connect(path.parent).create_table("out", data=table, schema=table.schema)


WRITE = {".npy": write_npy, ".safetensors": write_safetensors, ".parquet": write_parquet, ".lance": write_lance}


@pytest.fixture(scope="module")
def vectors(checkpoint) -> np.ndarray:
    return Embedder.from_pretrained(checkpoint, device="cpu", show_progress=False).encode(TEXTS)


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "items.jsonl", [{"text": text} for text in TEXTS])


def embed(source, out, checkpoint, *more) -> tuple[int, str]:
    code, _, err = run("embed", source, "-o", out, "--model", checkpoint, "--device", "cpu", "--quiet",
                       "--part-rows", 3, *more)  # fmt: skip
    return code, err


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("suffix", WRITE)
def test_their_files_open(source, checkpoint, vectors, suffix, version):
    out = source.with_name(f"out{suffix}")
    WRITE[suffix](out, vectors, meta_of(checkpoint, source, version))
    hit = files.search(out, files.Query(text="caption 2", instruction=""), options=ON_CPU)[0]
    assert (hit.row, hit.columns) == (2, {"text": "caption 2"}) and hit.score == pytest.approx(1, abs=1e-5)
    code, err = embed(source, out, checkpoint)
    assert code == 0 and "finished already: 6 rows" in err
    code, err = embed(source, out, checkpoint, "--num-crops", 2)
    assert code == 1 and "num_crops is 4 there and 2 now" in err and "adapter" not in err
    assert not left_behind(source.parent)


def test_another_model_is_refused_where_none_was_recorded(source, checkpoint, vectors, tmp_path):
    out = source.with_name("out.npy")
    write_npy(out, vectors, meta_of(checkpoint, source, "before adapters"))
    adapter = make_adapter(checkpoint, tmp_path / "adapter")
    code, _, err = run("search", out, "--text", "x", "--device", "cpu", "--adapter", adapter)
    assert code == 1 and "cannot be compared" in err and f"{checkpoint} + {adapter}" in err


def test_the_first_commit_recorded_no_model(source, checkpoint, vectors):
    out = source.with_name("out.npy")
    write_npy(out, vectors, meta_of(checkpoint, source, "the first"))
    code, _, err = run("search", out, "--text", "x", "--device", "cpu")
    assert code == 1 and "does not say what made it; --model names the checkpoint" in err
    assert run("search", out, "--text", "x", "--device", "cpu", "--model", checkpoint)[0] == 0


def begin(source, checkpoint, version: str, changed: dict | None = None) -> None:
    """The first of two parts, whose vectors no model made: so it is seen that they are not kept."""
    parts = source.with_name("out.npy.parts")
    parts.mkdir()
    lines = source.read_bytes().splitlines(keepends=True)
    index = {
        "num_rows": 6, "fingerprint": hashlib.sha256(source.read_bytes()).hexdigest(), "columns": {"text": "string"},
        "starts": [[0, 1], [len(b"".join(lines[:3])), 4]],
    }  # fmt: skip
    settings = settings_of(checkpoint, source.parent, version) | (changed or {})
    (parts / "manifest.json").write_text(json.dumps({"settings": settings, "source": index}, indent=1))
    (parts / "todo.json").write_text("[0, 1]")
    (parts / "lock").write_text("")
    (parts / "part-00000001.safetensors.new").write_bytes(b"half of it")
    (parts / "out.npy").write_bytes(b"half of it")
    head = {"errors": "[]", "images": NO_IMAGES, "computed_with": "something else"}
    if version != "451f553":
        del head["computed_with"]
    save_file({"vectors": np.eye(3, 64, dtype=np.float32)}, parts / "part-00000000.safetensors", head)


@pytest.mark.parametrize("version", VERSIONS)
def test_parts_that_do_not_say_of_which_run_they_are_are_computed_again(source, checkpoint, vectors, version):
    begin(source, checkpoint, version)
    out = source.with_name("out.npy")
    code, err = embed(source, out, checkpoint)
    assert code == 0 and "going on: 0 of 2 parts are finished; 1 are done again" in err
    assert np.abs(np.load(out) - vectors).max() < 2e-6
    assert not left_behind(source.parent)


def test_a_run_of_another_version_is_refused(source, checkpoint):
    begin(source, checkpoint, "451f553", {"version": "0.0.9"})
    code, err = embed(source, source.with_name("out.npy"), checkpoint)
    assert code == 1 and "version is '0.0.9' there and" in err and "--overwrite begins anew" in err
