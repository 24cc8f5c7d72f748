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
