"""`minivlm2vec search` over .npy, .safetensors and .parquet."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from minivlm2vec import Embedder, files
from minivlm2vec.files import vectors as vectors_module
from minivlm2vec.files.retrieval import neighbours, rounding, top_k
from minivlm2vec.files.rows import printable
from minivlm2vec.files.vectors import open_vectors
from minivlm2vec.files.writers import sampled_digest
from minivlm2vec.new_checkpoint import new_checkpoint
from tests.support.files_data import checkpoint, make_adapter, run, save_pictures, write_jsonl

__all__ = ["checkpoint"]


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def chunks_of(x: torch.Tensor, size: int):
    return ((start, x[start : start + size]) for start in range(0, len(x), size))


def brute_force(query: torch.Tensor, x: torch.Tensor, k: int) -> list[int]:
    """float64 scores of the stored numbers; of equal rows the lower one first."""
    scores = x.double().numpy() @ query.double().numpy()
    order = sorted(np.flatnonzero(~np.isnan(scores)), key=lambda i: (-scores[i], i))
    return [int(i) for i in order[:k]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [7, 100, 5000])
def test_top_k_is_exact(dtype, size):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(unit(rng, 3000, 96)).to(dtype)
    x[::50] = float("nan")
    x[17] = x[2900] = x[123]
    query = torch.nn.functional.normalize(x[123].float() + 0.1 * torch.from_numpy(unit(rng, 96)), dim=0)
    scores, rows = top_k(query, chunks_of(x, size), 25)
    assert rows.tolist()[:3] == [17, 123, 2900]  # equal rows, in order
    assert rows.tolist() == brute_force(query, x, 25)
    assert torch.allclose(scores.double(), x[rows].double() @ query.double(), atol=1e-6)


def test_float16_scan_finds_what_its_rounding_would_have_lost():
    """Scores closer together than float16 can tell apart: the order must still be that of the exact ones."""
    rng = np.random.default_rng(1)
    query = torch.from_numpy(unit(rng, 3072))
    x = torch.from_numpy(unit(rng, 500, 3072)) * 0.002 + query
    x = torch.nn.functional.normalize(x, dim=1).half()
    naive = (x @ query.half()).float().topk(10).indices.tolist()
    exact = brute_force(query, x, 10)
    assert naive != exact, "the case is not hard enough to test anything"
    assert top_k(query, chunks_of(x, 64), 10)[1].tolist() == exact
    error = ((x @ query.half()).double() - x.double() @ query.double()).abs().max().item()
    print(f"error of the scan {error:.2e}, allowed for {rounding(torch.float16, 3072):.2e}")
    assert error < rounding(torch.float16, 3072)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 40), k=st.integers(1, 45), size=st.integers(1, 40), seed=st.integers(0, 99), half=st.booleans())
def test_top_k_of_any_size(n, k, size, seed, half):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(unit(rng, n, 8))
    x = x[torch.from_numpy(rng.integers(0, max(1, n), n))] if n else x  # many duplicates
    x = x.half() if half else x
    query = torch.from_numpy(unit(rng, 8))
    scores, rows = top_k(query, chunks_of(x, size), k)
    expected = brute_force(query, x, k)
    assert len(rows) == min(n, k)
    exact = x.double() @ query.double()
    assert (
        np.allclose(exact[rows].numpy(), exact[expected].numpy(), atol=1e-6)
        and scores.tolist() == sorted(scores.tolist())[::-1]
    )


def test_top_k_refuses_nonsense():
    with pytest.raises(ValueError, match="0 hits"):
        top_k(torch.ones(4), [], 0)
    with pytest.raises(ValueError, match="has 4 numbers, the vectors have 5"):
        top_k(torch.ones(4), [(0, torch.ones(2, 5))], 1)


@pytest.fixture(scope="module")
def collection(checkpoint, tmp_path_factory):
    """Pictures and captions in every format, with one bad row."""
    folder = tmp_path_factory.mktemp("collection")
    save_pictures(folder, [f"p{i}.png" for i in range(9)])
    rows = [{"image": f"p{i}.png", "text": None, "price": i} for i in range(9)]
    rows += [{"image": None, "text": f"caption {i}", "price": 10 + i} for i in range(4)] + [{"image": "missing.png"}]
    source = write_jsonl(folder / "items.jsonl", rows)
    for name in ("f32.npy", "f16.npy", "f32.safetensors", "f16.safetensors", "f32.parquet", "f16.parquet"):
        if name.endswith("parquet") and find_spec("pyarrow") is None:
            continue  # its tests are skipped
        store = "float16" if name.startswith("f16") else "float32"
        code, _, err = run("embed", source, "-o", folder / name, "--model", checkpoint, "--device", "cpu", "--quiet",
                           "--store", store, "--part-rows", 4)  # fmt: skip
        assert code == 3, err
    return folder


def search(path, *argv) -> dict:
    code, out, err = run("search", path, "--json", "--device", "cpu", *argv)
    assert code == 0, err
    return json.loads(out)


def test_another_tables_nulls_are_rows_without_a_vector(tmp_path):
    pa = pytest.importorskip("pyarrow", minversion="26")  # before, it reads no fixed-size lists with nulls
    import pyarrow.parquet as pq

    column = pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32(), 2))
    pq.write_table(pa.table({"embedding": column}), tmp_path / "other.parquet")
    (start, vectors), *rest = open_vectors(tmp_path / "other.parquet").chunks()
    assert (start, rest) == (0, []) and vectors[[0, 2]].tolist() == [[1, 2], [3, 4]] and vectors[1].isnan().all()


@pytest.mark.parametrize(
    "name", ["f32.npy", "f16.npy", "f32.safetensors", "f16.safetensors", "f32.parquet", "f16.parquet"]
)
def test_text_image_and_both(collection, checkpoint, name, monkeypatch):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(vectors_module, "CHUNK_BYTES", 1000)  # several chunks
    embedder = Embedder.from_pretrained(checkpoint, device="cpu", show_progress=False)
    stored = open_vectors(collection / name).vectors(list(range(14))).numpy()
    tolerance = 1e-5 if name.startswith("f32") else 2e-3
    asked = [
        (["--text", "caption 2", "--instruction", ""], {"text": "caption 2"}, None),
        (["--image", collection / "p4.png", "--instruction", ""], {"image": collection / "p4.png"}, None),
        (["--text", "hey", "--image", collection / "p4.png", "--task", "change"],
         {"text": "hey", "image": collection / "p4.png"},
         "Given an image, find a similar everyday image with the described changes: {text}\n"),
    ]  # fmt: skip
    for argv, item, prompt in asked:
        hits = search(collection / name, *argv, "--top", 5)["hits"]
        scores = stored @ embedder.encode([item], prompt=prompt)[0]
        expected = np.sort(scores[~np.isnan(scores)])[::-1][:5]
        assert np.allclose([h["score"] for h in hits], expected, atol=tolerance)
        assert np.allclose(scores[[h["row"] for h in hits]], expected, atol=tolerance)
        assert [h["rank"] for h in hits] == [1, 2, 3, 4, 5]
    first = search(collection / name, "--text", "caption 2", "--instruction", "")["hits"][0]
    assert first["row"] == 11 and first["columns"] == {"image": None, "text": "caption 2", "price": 12}
    assert first["score"] == pytest.approx(1, abs=tolerance)
    assert len(search(collection / name, "--text", "x", "--top", 50)["hits"]) == 13  # the bad row is none


def test_like_a_row_needs_no_model(collection):
    hits = search(collection / "f32.npy", "--like", 3)["hits"]
    stored = np.load(collection / "f32.npy")
    scores = stored @ stored[3]
    scores[3] = np.nan
    assert hits[0]["row"] == int(np.nanargmax(scores)) and 3 not in [h["row"] for h in hits]
    for row, word in ((13, "no vector"), (14, "rows 0 to 13")):
        code, _, err = run("search", collection / "f32.npy", "--like", row)
        assert code == 1 and word in err


def test_the_instruction_fits_the_query(collection):
    assert search(collection / "f32.npy", "--text", "x")["query"]["instruction"].startswith("Find me an everyday image")
    assert search(collection / "f32.npy", "--image", collection / "p1.png")["query"]["instruction"].startswith(
        "Find a day"
    )


def test_another_checkpoint_is_refused_unless_forced(collection, tmp_path):
    from minivlm2vec.new_checkpoint import new_checkpoint

    other = new_checkpoint(tmp_path / "other", seed=1)
    code, _, err = run("search", collection / "f32.npy", "--text", "x", "--model", other)
    assert code == 1 and "cannot be compared" in err and str(other) in err
    assert search(collection / "f32.npy", "--text", "x", "--model", other, "--force")["hits"]


def test_the_adapter_of_the_vectors_is_the_querys(collection, checkpoint, tmp_path):
    adapter = make_adapter(checkpoint, tmp_path / "adapter")
    args = ("-o", tmp_path / "out.npy", "--model", checkpoint, "--device", "cpu", "--quiet")
    assert run("embed", collection / "items.jsonl", *args, "--adapter", adapter)[0] == 3
    hit = search(tmp_path / "out.npy", "--text", "caption 2", "--instruction", "")["hits"][0]
    assert hit["columns"]["text"] == "caption 2" and hit["score"] == pytest.approx(1, abs=1e-5)
    for vectors, model in (("out.npy", [checkpoint]), ("f32.npy", [checkpoint, "--adapter", adapter])):
        path = next(folder / vectors for folder in (tmp_path, collection) if (folder / vectors).exists())
        code, _, err = run("search", path, "--text", "x", "--device", "cpu", "--model", *model)
        assert code == 1 and "cannot be compared" in err and f"{checkpoint} + {adapter} (fingerprint" in err
        assert search(path, "--text", "x", "--force", "--model", *model)["hits"]


def test_a_file_of_other_origin(checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", unit(rng, 30, 64))
    code, _, err = run("search", tmp_path / "x.npy", "--text", "x")
    assert code == 1 and "--model" in err
    assert len(search(tmp_path / "x.npy", "--text", "x", "--model", checkpoint)["hits"]) == 10
    np.save(tmp_path / "long.npy", 3 * unit(rng, 30, 64))
    code, _, err = run("search", tmp_path / "long.npy", "--text", "x", "--model", checkpoint)
    assert code == 1 and "not of length 1" in err
    np.save(tmp_path / "wide.npy", unit(rng, 30, 65))
    code, _, err = run("search", tmp_path / "wide.npy", "--text", "x", "--model", checkpoint)
    assert code == 1 and "64" in err and "65" in err


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.npy", b"junk"), ("a.npy", b""), ("a.safetensors", b"junk"), ("a.safetensors", b"\xff" * 8 + b"{}"),
     ("a.parquet", b"junk"), ("a.txt", b""), ("missing.npy", None)],
)  # fmt: skip
def test_files_that_hold_no_vectors(tmp_path, name, data):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if data is not None:
        (tmp_path / name).write_bytes(data)
    code, _, err = run("search", tmp_path / name, "--like", 0)
    assert code == 1 and name in err and "Traceback" not in err


OTHERS = {
    "before them": {"a": np.ones((4, 8), np.float32)},
    "behind them": {"z": np.ones((4, 8), np.float32)},
    "of odd length": {"a": np.arange(3, dtype=np.uint8), "b": np.arange(7, dtype=np.int64)},
    "on both sides": {"a": np.ones(5, np.float16), "z": np.ones((2, 2), np.float64)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_tensors_in_the_file_do_not_shift_the_vectors(tmp_path, kind):
    vectors = np.eye(4, 8, dtype=np.float32)
    vectors[1] = [0.9, 0.4359, 0, 0, 0, 0, 0, 0]
    save_file(OTHERS[kind] | {"vectors": vectors}, tmp_path / "x.safetensors")
    assert np.array_equal(open_vectors(tmp_path / "x.safetensors").vectors(range(4)).numpy(), vectors)
    (hit,) = search(tmp_path / "x.safetensors", "--like", 0, "--top", 1)["hits"]
    assert (hit["row"], round(hit["score"], 3)) == (1, 0.9)


@pytest.mark.parametrize(
    "record", ["[]", "3", '{"settings": 3}', '{"settings": {}}', '{"model": []}', '"x"', "{", "NaN", "[" * 5000, "{}"]
)
def test_a_damaged_record_in_a_safetensors_header(tmp_path, record):
    save_file({"vectors": np.eye(4, dtype=np.float32)}, tmp_path / "x.safetensors", {"minivlm2vec": record})
    with pytest.raises(ValueError, match=r"x\.safetensors holds no vectors: "):
        open_vectors(tmp_path / "x.safetensors")


def test_a_pickle_in_an_npy_is_never_loaded(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], object), allow_pickle=True)
    code, _, err = run("search", tmp_path / "x.npy", "--like", 0)
    assert code == 1 and "holds no vectors" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [([], "nothing is asked"), (["--text", "a", "--like", 1], "excludes"), (["--like", 1, "--top", 0], "at least 1"),
     (["--like", 1, "--where", "a > 1"], "Lance"), (["--text", "a", "--task", "t2i", "--instruction", "b"], "use one")],
)  # fmt: skip
def test_wrong_arguments(collection, argv, words):
    code, _, err = run("search", collection / "f32.npy", *argv)
    assert code == 1 and words in err


def test_the_table_cannot_steer_the_terminal(checkpoint, tmp_path):
    source = write_jsonl(tmp_path / "items.jsonl", [{"text": "red \x1b[31m\nnew line \u202e"}])
    run("embed", source, "-o", tmp_path / "out.npy", "--model", checkpoint, "--device", "cpu", "--quiet")
    code, out, _ = run("search", tmp_path / "out.npy", "--text", "x")
    assert code == 0 and "\x1b" not in out and "\u202e" not in out and out.count("\n") == 2
    assert "red \\x1b[31m\\nnew line \\u202e" in out
    assert printable("x" * 100) == "x" * 59 + "…"


def test_nearest_neighbours(collection):
    vectors = open_vectors(collection / "f16.npy")
    stored = vectors.vectors(list(range(14))).numpy()
    scores = stored @ stored.T
    np.fill_diagonal(scores, -np.inf)
    ((first, found, rows),) = neighbours(vectors, 3, 14)
    assert first == 0 and rows.shape == (14, 3)
    for i in range(13):
        assert np.allclose(found[i], np.sort(np.nan_to_num(scores[i], nan=-np.inf))[::-1][:3], atol=1e-5)
        assert i not in rows[i] and 13 not in rows[i]
    assert (found[13] == -np.inf).all()


def test_vectors_that_are_cut(tmp_path):
    """`embed --dimensions` records the size with the vectors, and `search` cuts the query alike, without being told."""
    folder = new_checkpoint(tmp_path / "m", config={"minivlm2vec": {"dims": [16]}})
    table = write_jsonl(tmp_path / "t.jsonl", [{"text": f"text number {i}"} for i in range(30)])
    model = ["--model", folder, "--device", "cpu"]
    out = tmp_path / "v.npy"
    code, _, err = run("embed", table, "-o", out, *model, "--dimensions", 12, "--quiet")
    assert code == 1 and "--dimensions is 12; the model's vectors have 64 numbers" in err
    assert "cut to 16 (Matryoshka): --force-dimensions does it all the same" in err and not out.exists()
    assert run("embed", table, "-o", out, *model, "--dimensions", 16, "--quiet")[0] == 0
    vectors = open_vectors(out)
    assert vectors.shape == (30, 16) and vectors.settings["dimension"] == 16

    e = Embedder.from_pretrained(folder, device="cpu", show_progress=False)
    expected = e.encode([f"text number {i}" for i in range(30)])[:, :16]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(np.load(out), expected, atol=2e-6)
    hits = search(out, "--text", "text number 7", "--instruction", "")["hits"]
    assert hits[0]["row"] == 7 and hits[0]["score"] == pytest.approx(1, abs=1e-5)
    again = Embedder.from_pretrained(folder, device="cpu", truncate_dim=16, show_progress=False)
    assert (
        files.embed(table, out, again).already_finished
        and files.embed(table, tmp_path / "b.npy", again).dimension == 16
    )
    query = files.Query(text="text number 7", instruction="")
    for embedder in (e, again):
        assert files.search(out, query, embedder)[0].score == pytest.approx(hits[0]["score"], abs=1e-6)

    code, _, err = run("search", out, "--text", "x", *model, "--dimensions", 64)
    assert code == 1 and "makes vectors of 64 numbers, those of" in err and "have 16" in err
    code, _, err = run("embed", table, "-o", out, *model, "--quiet")
    assert code == 1 and "dimension is 16 there and 64 now" in err
    forced = tmp_path / "forced.npy"
    assert run("embed", table, "-o", forced, *model, "--dimensions", 12, "--force-dimensions", "--quiet")[0] == 0
    assert files.search(forced, query, e)[0].row == 7 and open_vectors(forced).shape == (30, 12)
    foreign = tmp_path / "foreign.npy"  # a file that says nothing of itself
    np.save(foreign, np.load(out))
    assert run("search", foreign, "--text", "x", *model)[0] == 1
    assert run("search", foreign, "--text", "x", *model, "--dimensions", 16)[0] == 0


def test_vectors_behind_another_tensor(tmp_path):
    """Of several tensors in a file each is read from its own place, whatever their order and what stands between."""
    vectors = unit(np.random.default_rng(0), 4, 8)
    for other in ({"a": vectors[::-1].copy()}, {"z": np.zeros(3, np.float16), "a": np.arange(5)}):
        for stored in (vectors, vectors.astype(np.float16)):
            save_file({**other, "vectors": stored}, tmp_path / "two.safetensors")
            found = open_vectors(tmp_path / "two.safetensors")
            assert np.array_equal(found.vectors(range(4)).numpy(), stored.astype(np.float32))
            scores = vectors @ vectors[2]
            hits = search(tmp_path / "two.safetensors", "--like", 2, "--top", 3)["hits"]
            assert [hit["row"] for hit in hits] == [n for n in np.argsort(-scores).tolist() if n != 2]


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("change", ["fewer vectors", "more rows", "rows cut short", "a row is no JSON"])
def test_files_that_do_not_belong_together_are_refused(checkpoint, tmp_path, suffix, change):
    source = write_jsonl(tmp_path / "t.jsonl", [{"text": f"row {i}"} for i in range(4)])
    out, rows = tmp_path / f"out{suffix}", tmp_path / f"out{suffix}.rows.jsonl"
    argv = ("embed", source, "-o", out, "--model", checkpoint, "--device", "cpu", "--quiet")
    assert run(*argv)[0] == 0
    if change == "fewer vectors":
        if suffix == ".npy":
            np.save(out, np.load(out)[[1, 3]])
        else:
            with safe_open(out, "numpy") as f:
                kept, meta = f.get_tensor("vectors")[[1, 3]], f.metadata()
            save_file({"vectors": kept}, out, meta)
    else:
        lines = rows.read_text().splitlines(keepends=True)
        rows.write_text("".join({"more rows": [*lines, lines[0]], "rows cut short": lines[:1],
                                 "a row is no JSON": [*lines[:3], "cut"]}[change]))  # fmt: skip
    words = {"fewer vectors": "[2, 64]", "more rows": "has 5 lines", "rows cut short": "has 1 lines",
             "a row is no JSON": "line 4"}[change]  # fmt: skip
    for more in (["--text", "row 3"], ["--html", tmp_path / "all.html"]):
        code, _, err = run("search", out, "--device", "cpu", *more)
        assert code == 1 and words in err and out.name in err, err
    code, _, err = run(*argv)
    if change == "a row is no JSON":  # the file of the rows is not parsed to see that it is finished
        words = "digest"
    assert code == 1 and words in err and "--overwrite replaces it" in err
    assert run(*argv, "--overwrite")[0] == 0 and run("search", out, "--text", "row 3", "--device", "cpu")[0] == 0


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("change", ["vectors", "rows", "order of rows", "record", "one vector"])
def test_files_of_two_runs_with_as_many_rows_are_told_apart(checkpoint, tmp_path, suffix, change):
    outs, argv = {}, {}
    for name in ("cat", "dog"):
        source = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(3)])
        outs[name] = tmp_path / f"{name}{suffix}"
        argv[name] = ("embed", source, "-o", outs[name], "--model", checkpoint, "--device", "cpu", "--quiet")
        assert run(*argv[name])[0] == 0
    out, rows, record = (tmp_path / f"dog{suffix}{more}" for more in ("", ".rows.jsonl", ".json"))
    if change == "vectors":
        shutil.copy(outs["cat"], out)
    elif change == "rows":
        shutil.copy(tmp_path / f"cat{suffix}.rows.jsonl", rows)
    elif change == "order of rows":
        rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    elif suffix == ".safetensors":
        pytest.skip("its record is in the file of the vectors")
    elif change == "record":
        shutil.copy(tmp_path / "cat.npy.json", record)
    else:
        np.save(out, np.load(out)[[0, 2, 2]])
    code, _, err = run("search", out, "--text", "dog 1", "--device", "cpu")
    assert code == 1 and "not of the same run" in err and out.name in err, err
    code, _, err = run(*argv["dog"])
    assert code == 1 and "not of the same run" in err and "--overwrite replaces it" in err
    assert run(*argv["dog"], "--overwrite")[0] == 0 and run("search", out, "--text", "x", "--device", "cpu")[0] == 0


def test_a_sampled_digest_sees_the_size_and_both_ends(tmp_path):
    size, path = (64 << 20) + 12345, tmp_path / "x"
    seen = set()
    for changed in (None, 0, size // 2 // (1 << 20) << 20, size - 1):
        with open(path, "wb") as f:
            f.truncate(size)  # without taking place on the disk
            if changed is not None:
                f.seek(changed)
                f.write(b"1")
        seen.add(sampled_digest(path))
    os.truncate(path, size + 1)
    assert len(seen | {sampled_digest(path)}) == 5


@pytest.mark.parametrize("kind", ["int8", "uint8", "bool_"])
def test_vectors_of_another_type_are_a_sentence(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    values = pa.array([0, 1] * 32, pa.int8()).cast(getattr(pa, kind)())
    pq.write_table(pa.table({"embedding": pa.FixedSizeListArray.from_arrays(values, 64)}), tmp_path / "x.parquet")
    code, _, err = run("search", tmp_path / "x.parquet", "--like", 0)
    assert code == 1 and f"holds {kind.strip('_')}; vectors are float32 or float16" in err


def test_nothing_steers_the_terminal(checkpoint, tmp_path):
    """Names of files and columns, and what they hold, in tables, JSON and messages; C1 controls too."""
    evil = "\x1b[31m\x9b2J\u202e\x7f"
    source = write_jsonl(tmp_path / f"t{evil}.jsonl", [{"text": evil, evil: evil, "n": float("nan")}, {"text": 7}])
    out = tmp_path / f"out{evil}.npy"
    said = run("embed", source, "-o", out, "--model", checkpoint, "--device", "cpu")
    said += run("embed", source, "-o", out, "--model", checkpoint, "--device", "cpu", "--text-column", f"no{evil}")
    for more in ([], ["--json"], ["--html", tmp_path / f"{evil}.html"]):
        said += run("search", out, "--text", f"x{evil}", "--device", "cpu", *more)
    said += run("search", tmp_path / f"none{evil}.npy", "--text", "x")
    text = "".join(part for part in said if isinstance(part, str))
    assert not [c for c in text if not c.isprintable() and c not in "\n\r"] and "\\x1b[31m" in text
    hits = json.loads(run("search", out, "--text", "x", "--device", "cpu", "--json")[1])["hits"]
    assert hits[0]["columns"] == {"text": evil, evil: evil, "n": None}


def test_a_reader_that_has_read_enough_is_no_error(checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", unit(rng, 5000, 16))
    command = [sys.executable, "-m", "minivlm2vec", "search", str(tmp_path / "x.npy"), "--like", "0", "--top", "4000"]
    path = os.pathsep.join(sys.path)
    env = os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    assert process.stdout is not None and process.stdout.readline().startswith(b"rank")
    process.stdout.close()
    assert process.stderr is not None and process.stderr.read() == b"" and process.wait() == 141
