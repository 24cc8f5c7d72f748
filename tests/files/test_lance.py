"""Lance datasets: create, append, filter, search, index."""

import json
import re

import numpy as np
import pytest

from minivlm2vec.files import LanceDataset, open_vectors
from minivlm2vec.files.retrieval import top_k
from tests.support.files_data import checkpoint, left_behind, run, save_pictures, write_jsonl

pytest.importorskip("lancedb")
__all__ = ["checkpoint"]


@pytest.fixture
def source(tmp_path):
    save_pictures(tmp_path, [f"p{i}.png" for i in range(5)])
    rows = [{"text": f"item {i}", "price": i, "image": f"p{i % 5}.png" if i % 3 == 0 else None} for i in range(30)]
    rows[4] = {"image": "missing.png", "price": 4}
    return write_jsonl(tmp_path / "items.jsonl", rows)


def embed(source, out, checkpoint, *more):
    code, _, err = run(
        "embed", source, "-o", out, "--model", checkpoint, "--device", "cpu", "--quiet", "--part-rows", 8, *more
    )
    return code, err


def search(path, *argv):
    code, out, err = run("search", path, "--json", "--device", "cpu", *argv)
    assert code == 0, err
    return json.loads(out)["hits"]


@pytest.mark.parametrize("store", ["float32", "float16"])
def test_search_is_that_of_the_flat_file(source, checkpoint, tmp_path, store):
    for name in ("out.lance", "out.npy"):
        code, err = embed(source, tmp_path / name, checkpoint, "--store", store)
        assert code == 3, err
    assert not left_behind(tmp_path)
    for asked in (["--text", "item 7"], ["--image", tmp_path / "p2.png"], ["--like", 3]):
        lance, flat = (search(tmp_path / name, *asked, "--top", 12) for name in ("out.lance", "out.npy"))
        assert np.allclose(
            [h["score"] for h in lance], [h["score"] for h in flat], atol=2e-3 if store == "float16" else 1e-5
        )
        if store == "float32":
            assert [h["row"] for h in lance] == [h["row"] for h in flat]
        assert 4 not in [h["row"] for h in lance]
    assert search(tmp_path / "out.lance", "--like", 6)[0]["columns"].keys() == {"text", "price", "image"}


def test_filter(source, checkpoint, tmp_path):
    embed(source, tmp_path / "out.lance", checkpoint)
    hits = search(tmp_path / "out.lance", "--text", "item 7", "--where", "price < 10 AND price > 2", "--top", 30)
    assert sorted(h["row"] for h in hits) == [3, 5, 6, 7, 8, 9]
    code, _, err = run("search", tmp_path / "out.lance", "--text", "x", "--where", "no such column")
    assert code == 1 and "Traceback" not in err


def test_append_once_and_only_the_same_model(source, checkpoint, tmp_path):
    out = tmp_path / "out.lance"
    embed(source, out, checkpoint)
    more = tmp_path / "more"
    save_pictures(more, ["new.png"], seed=5)
    more = write_jsonl(more / "more.jsonl", [{"text": "caption", "image": "new.png", "price": 99}])
    code, err = embed(more, out, checkpoint, "--append", "--num-crops", 2)
    assert code == 1 and "num_crops is 4 there and 2 now" in err
    code, err = embed(more, out, checkpoint, "--append")
    assert code == 0, err
    dataset = LanceDataset(out)
    assert dataset.shape == (31, 64)
    hit = search(out, "--text", "caption", "--image", more.parent / "new.png", "--instruction", "", "--top", 1)[0]
    assert hit["row"] == 30 and hit["score"] == pytest.approx(1, abs=1e-5) and hit["columns"]["price"] == 99
    assert hit["columns"]["image"] == str(more.parent / "new.png")
    assert not left_behind(tmp_path)


def test_an_append_that_was_killed_after_its_commit_is_not_repeated(source, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out.lance"
    embed(source, out, checkpoint)
    more = write_jsonl(tmp_path / "more.jsonl", [{"text": "a", "price": 1}, {"text": "b", "price": 2}])

    class Killed(Exception):
        pass

    def killed(self):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("minivlm2vec.files.parts.Parts.remove", killed)
        embed(more, out, checkpoint, "--append")
    assert LanceDataset(out).shape[0] == 32
    note = tmp_path / "out.lance.parts/append.json"
    said = note.read_bytes()
    note.write_bytes(b"\0" * 8)  # as after a power cut
    code, err = embed(more, out, checkpoint, "--append")
    assert code == 1 and f"{note} is damaged" in err and "has 32 rows now" in err, err
    note.write_bytes(said)
    assert embed(more, out, checkpoint, "--append")[0] == 0
    assert LanceDataset(out).shape[0] == 32
    assert embed(more, out, checkpoint, "--append")[0] == 0  # another command: appends again
    assert LanceDataset(out).shape[0] == 34


def test_existing_dataset_is_left_alone_or_replaced(source, checkpoint, tmp_path):
    out = tmp_path / "out.lance"
    embed(source, out, checkpoint)
    code, err = embed(source, out, checkpoint)
    assert code == 3 and "finished already" in err
    code, err = embed(source, out, checkpoint, "--instruction", "x")
    assert code == 1 and "instruction" in err
    code, err = embed(source, out, checkpoint, "--instruction", "x", "--overwrite")
    assert code == 3 and LanceDataset(out).meta["settings"]["instruction"] == "x"


def test_index_and_its_recall(checkpoint, tmp_path):
    source = write_jsonl(tmp_path / "items.jsonl", [{"text": f"item {i} {'abcdefgh'[i % 8]}"} for i in range(400)])
    embed(source, tmp_path / "out.lance", checkpoint)
    embed(source, tmp_path / "out.npy", checkpoint)
    for kind in ("IVF_FLAT", "IVF_PQ"):
        code, _, err = run("search", tmp_path / "out.lance", "--build-index", kind)
        found = re.search(r"recall@10 against exact search ([\d.]+) \(100 of", err)
        assert code == 0 and found and float(found[1]) > 0.9, err
    vectors = open_vectors(tmp_path / "out.npy")
    exact = set(top_k(vectors.vectors([5])[0], vectors.chunks(), 11)[1].tolist()) - {5}
    assert {h["row"] for h in search(tmp_path / "out.lance", "--like", 5, "--exact")} == exact
    assert len({h["row"] for h in search(tmp_path / "out.lance", "--like", 5)} & exact) >= 8


def test_no_rows_and_no_dataset(checkpoint, tmp_path):
    source = write_jsonl(tmp_path / "items.jsonl", [])
    assert embed(source, tmp_path / "out.lance", checkpoint)[0] == 0
    assert search(tmp_path / "out.lance", "--text", "x") == []
    (tmp_path / "junk.lance").mkdir()
    for name in ("missing.lance", "junk.lance"):
        code, _, err = run("search", tmp_path / name, "--text", "x")
        assert code == 1 and "Traceback" not in err


IMAGES = {  # a type of Arrow that holds a path -> its column of two rows
    "string": lambda pa: pa.array(["0.png", "1.png"]),
    "large_string": lambda pa: pa.array(["0.png", "1.png"], pa.large_string()),
    "string_view": lambda pa: pa.array(["0.png", "1.png"], pa.string_view()),
    "dictionary": lambda pa: pa.array(["0.png", "1.png"]).dictionary_encode(),
    "list": lambda pa: pa.array([["0.png"], ["1.png"]]),
    "large_list": lambda pa: pa.array([["0.png"], ["1.png"]], pa.large_list(pa.large_string())),
    "fixed_size_list": lambda pa: pa.array([["0.png"], ["1.png"]], pa.list_(pa.string(), 1)),
    "struct": lambda pa: pa.array([{"bytes": None, "path": "0.png"}, {"bytes": None, "path": "1.png"}]),
    "list of structs": lambda pa: pa.array([[{"bytes": None, "path": f"{i}.png"}] for i in range(2)]),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_relative_paths_of_every_type_are_made_absolute(checkpoint, tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = tmp_path / "all.lance"
    for n, folder in enumerate("AB"):
        save_pictures(tmp_path / folder, ["0.png", "1.png"], seed=n)
        pq.write_table(pa.table({"image": IMAGES[kind](pa)}), tmp_path / folder / "t.parquet")
        code, err = embed(tmp_path / folder / "t.parquet", out, checkpoint, *(["--append"] if n else []))
        assert code == 0, err
    rows = sorted(LanceDataset(out).table.to_arrow().to_pylist(), key=lambda row: row["row_number"])
    found = [row["image"] for row in rows]
    found = [value[0] if isinstance(value, list) else value for value in found]
    found = [value["path"] if isinstance(value, dict) else value for value in found]
    assert found == [str(tmp_path / folder / f"{i}.png") for folder in "AB" for i in range(2)]


def test_a_users_own_vectors_stay_as_they_are(checkpoint, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    nan = float("nan")
    fixed = [[nan] * 16, [1.0] * 16, None, [2.0] * 16]
    columns = {
        "text": ["a cat", "a dog", "a bird", "a fish"],
        "vector": pa.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0, 1.0], [0.0, nan]], pa.list_(pa.float32())),
        "fixed": pa.array(fixed, pa.list_(pa.float32(), 16)),
        "pairs": pa.array([["a", "b"]] * 4, pa.list_(pa.string(), 2)),
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    out = tmp_path / "out.lance"
    for more in ([], ["--append"]):
        code, err = embed(tmp_path / "t.parquet", out, checkpoint, *more)
        assert code == 0, err
    got = LanceDataset(out).table.to_arrow().sort_by("row_number")
    for name, column in columns.items():
        expected = column if isinstance(column, list) else column.to_pylist()
        assert repr(got[name].to_pylist()) == repr(expected * 2), name


def test_bad_utf8_in_another_column(checkpoint, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = pa.array([b"ok", b"caf\xe9"], pa.binary()).buffers()
    table = pa.table({"text": ["a", "b"], "note": pa.StringArray.from_buffers(2, raw[1], raw[2])})
    pq.write_table(table, tmp_path / "t.parquet")
    code, err = embed(tmp_path / "t.parquet", tmp_path / "out.lance", checkpoint)
    assert code == 0, err
    assert sorted(LanceDataset(tmp_path / "out.lance").table.to_arrow()["note"].to_pylist()) == ["caf\ufffd", "ok"]


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [("my photos.lance", {"text": "a"}, "no other characters"), ("写真.lance", {"text": "a"}, "no other characters"),
     ("out.lance", {"text": "a", "meta.id": 1}, "cannot hold the columns of .*meta.id"),
     ("out.lance", {"text": "a", "": 1}, "cannot hold the columns of "),
     ("out.lance", {"text": "a", "row_number": 1}, "has a column 'row_number' already")],
)  # fmt: skip
def test_names_are_refused_before_the_work(checkpoint, tmp_path, monkeypatch, name, row, words):
    source = write_jsonl(tmp_path / "t.jsonl", [row])
    monkeypatch.setattr("minivlm2vec.files.embedding.compute", None)
    code, err = embed(source, tmp_path / name, checkpoint)
    assert code == 1 and re.search(words, err) and "cargo" not in err, err
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


@pytest.mark.parametrize(
    ("there", "now", "words"),
    [(1, 1.5, "column 'n' is int64, that of the table is double"), (1, "x", "is int64, that of the table is string"),
     (1.5, 2, None), (1.5, 2**60 + 1, "is double, that of the table is int64"), (1, None, None), ("x", None, None),
     (["a"], "x", "is list<item: string>, that of the table is string"),
     (1, "007", "is int64, that of the table is string"), (1, True, "is int64, that of the table is bool"),
     (1.5, "2", "is double, that of the table is string"), (1.5, False, "is double, that of the table is bool"),
     (True, 1, "is bool, that of the table is int64"), (True, "true", "is bool, that of the table is string")],
)  # fmt: skip
def test_types_of_appended_columns_are_checked_before_the_work(checkpoint, tmp_path, monkeypatch, there, now, words):
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "n": there}])
    more = write_jsonl(tmp_path / "b.jsonl", [{"text": "b", "n": None}] * 8 + [{"text": "c", "n": now}])
    out = tmp_path / "out.lance"
    assert embed(first, out, checkpoint)[0] == 0
    if words is not None:
        monkeypatch.setattr("minivlm2vec.files.embedding.compute", None)
    code, err = embed(more, out, checkpoint, "--append")
    if words is not None:
        assert code == 1 and words in err and not left_behind(tmp_path), err
        return
    assert code == 0, err
    assert [row["n"] for row in LanceDataset(out).table.to_arrow().sort_by("row_number").to_pylist()][-1] == now


def test_appending_keeps_the_errors_of_earlier_rows(checkpoint, tmp_path):
    out = tmp_path / "out.lance"
    one = write_jsonl(tmp_path / "1.jsonl", [{"text": "a"}, {"text": ""}])
    two = write_jsonl(tmp_path / "2.jsonl", [{"text": "b"}])
    three = write_jsonl(tmp_path / "3.jsonl", [{"text": ""}, {"text": "c"}])
    codes = [embed(source, out, checkpoint, *more)[0]
             for source, more in ((one, []), (two, ["--append"]), (three, ["--append"]))]  # fmt: skip
    assert codes == [3, 0, 3]
    errors = [json.loads(line) for line in (tmp_path / "out.lance.errors.jsonl").read_text().splitlines()]
    assert [bad["row"] for bad in errors] == [1, 3]
    null = {row["row_number"] for row in LanceDataset(out).table.to_arrow().to_pylist() if row["embedding"] is None}
    assert null == {1, 3}


def test_errors_of_an_append_that_was_killed_stand_there_once(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out.lance"
    one, two = (write_jsonl(tmp_path / f"{n}.jsonl", [{"text": "a", "n": n}, {"text": "", "n": n}]) for n in range(2))
    assert embed(one, out, checkpoint)[0] == 3
    for step in ("minivlm2vec.files.writers.move", "minivlm2vec.files.parts.Parts.remove"):
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(step, None)
            embed(two, out, checkpoint, "--append")
    assert embed(two, out, checkpoint, "--append")[0] == 3
    errors = [json.loads(line) for line in (tmp_path / "out.lance.errors.jsonl").read_text().splitlines()]
    assert [bad["row"] for bad in errors] == [1, 3] and LanceDataset(out).shape[0] == 4
