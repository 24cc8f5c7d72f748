"""The MMEB evaluator: scores by hand and against the original's algorithm, files, damage, resuming, processes."""

import json
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlm2vec.distributed import Ranks
from minivlm2vec.errors import InputError
from minivlm2vec.extras import import_pyarrow
from minivlm2vec.mini import bundled
from minivlm2vec.mini.world import build
from minivlm2vec.mmeb import (
    EvaluateOptions,
    Progress,
    ProgressBars,
    Results,
    compare,
    dataset,
    evaluate,
    report,
    score,
    subsets,
)
from minivlm2vec.mmeb.dataset import Dataset, open_dataset
from minivlm2vec.mmeb.encode import VectorStore, fingerprint
from minivlm2vec.mmeb.results import read_results, write_predictions, write_results
from minivlm2vec.mmeb.score import METRICS, CollapsedEmbeddings, figures, score_rows
from minivlm2vec.rows import Images, Pair, as_input
from tests.support.files_data import make_adapter

MINI = bundled() / "MMEB-eval"


class Hashing:
    """A fake embedder: every input has its own pseudo-random vector. Counts what it is asked for."""

    name = "hashing"

    def __init__(self, dimension: int = 16, fail_after: int | None = None):
        self.dimension, self.fail_after, self.inputs = dimension, fail_after, []

    def encode(self, inputs, **options):
        if self.fail_after is not None and len(self.inputs) >= self.fail_after:
            raise KeyboardInterrupt
        self.inputs += [x for x in inputs if not _is_probe(x)]
        return np.stack([self._vector(x) for x in inputs])

    def _vector(self, x):
        if isinstance(x, dict):
            image = x["image"]
            content = image.tobytes() if isinstance(image, np.ndarray) else _content(image)
            seed = x["text"].encode() + content
        else:
            seed = x.encode()
        rng = np.random.default_rng(np.frombuffer(seed.ljust(8), np.uint8))
        return rng.standard_normal(self.dimension).astype(np.float32)


def _content(image):
    return image.read_bytes() if isinstance(image, Path) else image


def _is_probe(x):
    return x == "Represent the given text.\n" or (isinstance(x, dict) and isinstance(x["image"], np.ndarray))


class Constant(Hashing):
    def _vector(self, x):
        return np.ones(self.dimension, np.float32)


@pytest.fixture
def data(tmp_path):
    """Two subsets of 30 rows with 5 candidates, one with pictures in a folder."""
    root = tmp_path / "data"
    for name in ("CIRR", "WebQA"):
        (root / name).mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(root / "CIRR" / f"image_{i}.png")
    write_rows(root, "CIRR", [image_row(i) for i in range(30)])
    tag = "<|image_1|>\nFind a Wikipedia image that answers this question: {}\n"
    webqa = [{"qry_text": tag.format(i), "qry_img_path": "", "tgt_text": [f"{i} {j}" for j in range(5)],
              "tgt_img_path": [""] * 5} for i in range(30)]  # fmt: skip
    write_rows(root, "WebQA", webqa)
    return root


def image_row(i):
    paths = [f"CIRR/image_{(i + j) % 8}.png" for j in range(5)]
    return {"qry_text": f"<|image_1|>\nchange {i}\n", "qry_img_path": f"CIRR/image_{i % 8}.png",
            "tgt_text": ["<|image_1|>\nRepresent the given image.\n"] * 5, "tgt_img_path": paths}  # fmt: skip


def write_rows(root, name, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / name / "test.jsonl").write_text(text, encoding="utf-8")


def run(data, out, encoder=None, **options):
    pytest.importorskip("pyarrow")
    return evaluate(encoder or Hashing(), data, out, EvaluateOptions(**options))


# --- scoring ---------------------------------------------------------------------------------------------


def test_scores_by_hand():
    """Three rows over unit vectors in the plane, figures worked out on paper."""
    at = {name: (np.cos(np.radians(a)), np.sin(np.radians(a))) for name, a in
          {"q": 0, "near": 10, "far": 60, "back": 180, "mirror": -10}.items()}  # fmt: skip
    names = list(at)
    vectors = 3 * np.array([at[name] for name in names], np.float32)  # lengths must not matter
    index = names.index
    rows = [
        (index("q"), [index("near"), index("far"), index("back")]),  # rank 1
        (index("q"), [index("far"), index("near"), index("back")]),  # rank 2
        (index("q"), [index("near"), index("mirror"), index("far")]),  # a tie: rank 2, 1 as the original counts
    ]
    scored = score_rows(vectors, rows)
    assert [one.rank for one in scored] == [1, 2, 2]
    assert [one.rank_original for one in scored] == [1, 2, 1]
    assert [one.predicted for one in scored] == [0, 1, 0]
    np.testing.assert_allclose(scored[0].scores, [0.9848078, 0.5, -1.0], atol=1e-6)
    mean = dict(zip(METRICS, figures(scored, "x").mean, strict=True))
    assert mean["precision@1"] == pytest.approx(100 / 3)
    assert mean["precision@1_original"] == pytest.approx(200 / 3)
    assert mean["mrr"] == pytest.approx(100 * (1 + 0.5 + 0.5) / 3)
    assert mean["recall@5"] == mean["recall@10"] == 100


def original_algorithm(query, targets):
    """What the published evaluator does with one row: normalised dot products and numpy's first maximum."""
    norms = np.linalg.norm(targets, axis=1) * np.linalg.norm(query)
    return int(np.argmax(np.dot(targets, query) / norms))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), candidates=st.integers(1, 40), copies=st.integers(0, 20))
def test_agrees_with_the_originals_algorithm_ties_included(seed, candidates, copies):
    """Vectors of small whole numbers, whose dot products float32 holds exactly: with others, numpy may give equal
    candidates scores that differ in the last bit, by their place in memory."""
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-9, 10, (1 + candidates + copies, 24)).astype(np.float32)
    vectors[1 + candidates :] = vectors[rng.integers(1, 1 + candidates, copies)]  # ties, the positive's too
    order = [1, *(2 + rng.permutation(candidates + copies - 1))]
    (one,) = score_rows(vectors, [(0, order)])
    assert one.predicted == original_algorithm(vectors[0], vectors[order])
    cosines = vectors[order].astype(np.float64) @ vectors[0] / np.linalg.norm(vectors[order], axis=1)
    tied = sum(np.array_equal(vectors[i], vectors[1]) for i in order[1:])
    above = sum(cosines[1:] > cosines[0] + 1e-6)
    assert (one.rank_original, one.rank) == (1 + above, 1 + above + tied)


def test_equal_vectors_tie_at_a_cosine_of_zero():
    """Sums of products that cancel come out as 1e-17 or so, and not alike for all columns of a matrix product."""
    rng = np.random.default_rng(3)
    query = rng.integers(-9, 10, 48).astype(np.float32)
    across = np.concatenate([query[24:], -query[:24]])
    vectors = np.stack([query, *[across] * 37])
    (one,) = score_rows(vectors, [(0, range(1, 38))])
    assert (one.rank_original, one.rank, one.predicted) == (1, 37, 0) and not one.scores.any()


def test_agrees_with_the_originals_algorithm_on_random_vectors():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((300, 64)).astype(np.float32)
    rows = [(i, 100 + rng.permutation(200)[: 1 + i]) for i in range(100)]
    for (query, targets), one in zip(rows, score_rows(vectors, rows, block=7), strict=True):
        assert one.predicted == original_algorithm(vectors[query], vectors[targets])


def test_a_constant_vector_scores_nothing_here_and_everything_there():
    scored = score_rows(np.ones((6, 4), np.float32), [(0, [1, 2, 3]), (4, [5, 2, 3])])
    mean = dict(zip(METRICS, figures(scored, "x").mean, strict=True))
    assert mean["precision@1"] == 0
    assert mean["precision@1_original"] == 100


def test_the_positive_listed_again_is_no_wrong_answer():
    vectors = np.eye(3, dtype=np.float32) + 0.1
    (one,) = score_rows(vectors, [(1, [1, 2, 1])])
    assert (one.rank, one.rank_original) == (1, 1)


@pytest.mark.parametrize(("value", "words"), [(np.nan, "not finite"), (0, "zero")])
def test_vectors_that_cannot_be_compared(value, words):
    vectors = np.ones((3, 4), np.float32)
    vectors[1] = value
    with pytest.raises(ValueError, match=f"1 of 3 vectors are {words}, the first is number 1"):
        score_rows(vectors, [(0, [1, 2])])


def test_bootstrap_intervals():
    """The interval of a proportion of 1,000 rows is near the normal one; averages are narrower; same every time."""
    hit, miss = (score.Scored(np.zeros(2, np.float32), rank, rank, rank - 1) for rank in (1, 2))
    one = figures([hit] * 400 + [miss] * 600, "a")
    low, high = one.interval()[:, 0]
    half = 1.96 * 100 * np.sqrt(0.4 * 0.6 / 1000)
    assert (low, high) == pytest.approx((40 - half, 40 + half), abs=0.4)
    both = score.average([one, figures([hit] * 400 + [miss] * 600, "b")])
    assert both.mean[0] == pytest.approx(40)
    assert np.ptp(both.interval()[:, 0]) == pytest.approx((high - low) / np.sqrt(2), rel=0.1)
    again = figures([hit] * 400 + [miss] * 600, "a")
    np.testing.assert_array_equal(one.replicates, again.replicates)


def test_collapse_is_found():
    rng = np.random.default_rng(0)
    rows = [(i, [30 + i, *(30 + (i + j) % 200 for j in range(1, 120))]) for i in range(30)]
    healthy = rng.standard_normal((230, 32)).astype(np.float32)
    score.check_collapse(healthy, rows, score_rows(healthy, rows), "x")

    same = 1 + 1e-4 * rng.standard_normal((230, 32)).astype(np.float32)
    with pytest.raises(CollapsedEmbeddings, match="30 different queries are nearly the same"):
        score.check_collapse(same, rows, score_rows(same, rows), "x")

    one_answer = healthy.copy()
    one_answer[:30, 0] += 50
    one_answer[30:, 0] = 0
    one_answer[40, 0] = 50
    always = [(i, [30 + i, *(30 + j for j in range(120) if j != i)]) for i in range(30)]
    with pytest.raises(CollapsedEmbeddings, match=r"30 queries all get the same answer .*hit@1 = 1/30"):
        score.check_collapse(one_answer, always, score_rows(one_answer, always), "x")


# --- reading ---------------------------------------------------------------------------------------------


def test_images_from_a_folder_and_from_a_zip_are_the_same(data, tmp_path):
    zipped = tmp_path / "pictures.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        for path in (data / "CIRR").glob("*.png"):
            archive.write(path, f"some/top/CIRR/{path.name}")
    (tmp_path / "nested" / "images").mkdir(parents=True)
    (data / "CIRR").rename(tmp_path / "nested" / "images" / "CIRR")
    folder, inside = Images(tmp_path / "nested"), Images(zipped)
    for i in range(8):
        path = f"CIRR/image_{i}.png"
        assert folder.source(path).read_bytes() == inside.source(path)
    with pytest.raises(FileNotFoundError, match=r"CIRR/none\.png is not in .*pictures\.zip"):
        inside.source("CIRR/none.png")
    with pytest.raises(ValueError, match="leaves the image folder"):
        folder.source("../secret.png")


def test_a_damaged_zip_is_named_or_skipped(data, tmp_path):
    zipped = data / "images.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        for path in sorted((data / "CIRR").glob("*.png")):
            archive.write(path, f"CIRR/{path.name}")
        place = archive.getinfo("CIRR/image_3.png").header_offset + 60
    content = bytearray(zipped.read_bytes())
    content[place] ^= 0xFF
    zipped.write_bytes(content)
    with pytest.raises(ValueError, match=r"CIRR, row 0: .*image_3\.png in .*images\.zip cannot be read: Bad CRC-32"):
        run(data, tmp_path / "out", subsets=["CIRR"])
    assert Dataset(data).rows(subsets.MMEB["CIRR"], skip_damaged=True).damaged
    zipped.write_bytes(b"PK, but no zip")
    with pytest.raises(ValueError, match="neither a folder nor a zip"):
        Dataset(data)


def test_parquet_and_json_lines_give_the_same_rows(data):
    pyarrow = import_pyarrow("in this test") if pytest.importorskip("pyarrow") else None
    before = {name: list(Dataset(data).rows(one)) for name, one in Dataset(data).subsets.items()}
    for name in before:
        lines = (data / name / "test.jsonl").read_text(encoding="utf-8").splitlines()
        table = pyarrow.Table.from_pylist([json.loads(line) for line in lines])
        pyarrow.parquet.write_table(table, data / name / "test-00000-of-00001.parquet")
        (data / name / "test.jsonl").unlink()
    after = {name: list(Dataset(data).rows(one)) for name, one in Dataset(data).subsets.items()}
    assert before == after
    assert len(after["CIRR"]) == 30
    assert after["CIRR"][1].targets[0] == Pair("<|image_1|>\nRepresent the given image.\n", "CIRR/image_1.png")


def test_a_damaged_parquet_file_is_named(data):
    pytest.importorskip("pyarrow")
    (data / "WebQA" / "test.jsonl").unlink()
    (data / "WebQA" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"WebQA.*parquet is not a readable parquet file"):
        Dataset(data).rows(subsets.MMEB["WebQA"])


DAMAGE = {
    "column": (lambda row: row.pop("tgt_img_path"), ValueError, "column tgt_img_path is missing"),
    "lengths": (lambda row: row["tgt_text"].pop(), ValueError, "tgt_text has 4 entries, tgt_img_path 5"),
    "empty": (lambda row: row.update(tgt_text=[], tgt_img_path=[]), ValueError, "there are no candidates"),
    "scalar": (lambda row: row.update(tgt_text="a"), ValueError, "tgt_text is a list, got str"),
    "number": (lambda row: row.update(qry_text=7), ValueError, "query: text and image path are strings, got int"),
    "nothing": (lambda row: row.update(qry_text="", qry_img_path=None), ValueError, "neither text nor image"),
    "missing": (lambda row: row.update(qry_img_path="CIRR/gone.png"), FileNotFoundError, "CIRR/gone.png is not in"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_rows_are_named_or_skipped(data, kind):
    change, error, words = DAMAGE[kind]
    rows = [image_row(i) for i in range(4)]
    change(rows[2])
    write_rows(data, "CIRR", rows)
    with pytest.raises(error, match=f"CIRR, row 2: .*{words}"):
        Dataset(data).rows(subsets.MMEB["CIRR"])
    found = Dataset(data).rows(subsets.MMEB["CIRR"], skip_damaged=True)
    assert [row.index for row in found] == [0, 1, 3]
    assert len(found.damaged) == 1 and "CIRR, row 2" in found.damaged[0]


def test_an_unreadable_image_is_skipped_or_named(data, tmp_path):
    (data / "CIRR" / "image_3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    found = Dataset(data).rows(subsets.MMEB["CIRR"], skip_damaged=True)
    touching = [i for i in range(30) if any((i + j) % 8 == 3 for j in range(5))]
    assert len(found.damaged) == len(touching)
    assert not {row.index for row in found} & set(touching)

    class Refusing(Hashing):
        def encode(self, inputs, **options):
            for i, x in enumerate(inputs):
                if isinstance(x, dict) and isinstance(x["image"], Path) and x["image"].name == "image_3.png":
                    raise InputError("cannot identify image file", name=str(x["image"]), index=i)
            return super().encode(inputs, **options)

    with pytest.raises(ValueError, match=r"CIRR, row 0: CIRR/image_3\.png: .*\(skip_damaged leaves such rows out\)"):
        run(data, tmp_path / "out", Refusing(), subsets=["CIRR"])
    assert run(data, tmp_path / "out", Refusing(), subsets=["CIRR"], skip_damaged=True).figures[
        "CIRR"
    ].rows == 30 - len(touching)


def test_an_input_that_only_the_model_refuses_is_named_without_false_hope(data, tmp_path):
    """skip_damaged does not leave out what the model cannot take, so the message does not say so. The row is the first
    that has it, also where the input stands in a later chunk."""

    class Refusing(Hashing):
        def encode(self, inputs, **options):
            if "7 2" in inputs:
                raise InputError("the text is too long", index=inputs.index("7 2"))
            return super().encode(inputs, **options)

    for skip in (False, True):
        with pytest.raises(ValueError, match=r"^WebQA, row 7: text '7 2': the text is too long$"):
            run(data, tmp_path, Refusing(), subsets=["WebQA"], batch_size=16, skip_damaged=skip)


def test_unknown_names_suggest_the_nearest(data):
    with pytest.raises(ValueError, match=r"no subset is named 'webqa'; did you mean WebQA\?"):
        open_dataset(data, names=["webqa"])
    with pytest.raises(ValueError, match="no subset is named 'zzzz'; there are CIRR, WebQA"):
        open_dataset(data, names=["zzzz"])
    with pytest.raises(ValueError, match=r"did you mean retrieval\?"):
        open_dataset(data, meta_tasks=["retrival"])
    with pytest.raises(FileNotFoundError, match="neither a folder nor a dataset's name"):
        open_dataset(data / "nowhere" / "at" / "all")
    _, chosen = open_dataset(MINI, meta_tasks=["grounding"])
    assert {one.meta_task for one in chosen} == {"grounding"} and len(chosen) == 8


def test_only_what_is_needed_is_fetched_from_the_hub(monkeypatch, data):
    asked = {}

    def fake(name, **options):
        asked.update(options, name=name)
        return str(data)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    _, chosen = open_dataset(names=["CIRR"], image_dir=data)
    assert [one.name for one in chosen] == ["CIRR"]
    assert asked["name"] == "TIGER-Lab/MMEB-eval" and asked["repo_type"] == "dataset"
    assert asked["allow_patterns"] == ["CIRR/test*"]
    open_dataset(names=["WebQA"])
    assert asked["allow_patterns"] == ["WebQA/test*", "images.zip"]


def test_a_tag_without_an_image_stays_text(data):
    """WebQA's and EDIS' queries name <|image_1|> and have no image: literal text, as in the original."""
    found = Dataset(data)
    row = next(iter(found.rows(subsets.MMEB["WebQA"])))
    assert as_input(row.query, found.images) == "<|image_1|>\nFind a Wikipedia image that answers this question: 0\n"
    row = next(iter(found.rows(subsets.MMEB["CIRR"])))
    assert as_input(row.query, found.images) == {"text": row.query.text, "image": data / "CIRR" / "image_0.png"}


# --- encoding --------------------------------------------------------------------------------------------


def test_each_distinct_pair_is_encoded_once(data, tmp_path):
    encoder = Hashing()
    run(data, tmp_path / "out", encoder, batch_size=7)
    asked = [x if isinstance(x, str) else (x["text"], str(x["image"])) for x in encoder.inputs]
    assert len(asked) == len(set(asked)) == (30 + 8) + (30 + 150)


def test_a_run_that_was_cut_off_goes_on_and_gives_the_same(data, tmp_path):
    whole = run(data, tmp_path / "whole", batch_size=16)
    broken = Hashing(fail_after=60)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "cut", broken, batch_size=16)
    (tmp_path / "cut" / "vectors").joinpath("left.123.tmp").write_bytes(b"half a chunk")
    resumed = Hashing()
    again = run(data, tmp_path / "cut", resumed, batch_size=16)
    assert len(broken.inputs) + len(resumed.inputs) == 38 + 180
    assert again.as_dict() == whole.as_dict()
    for name in ("CIRR_pred.parquet", "WebQA_pred.parquet", "results.json", "table.html"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    finished = Hashing()
    run(data, tmp_path / "cut", finished, batch_size=16)
    assert finished.inputs == []


def test_vectors_of_another_model_option_or_picture_are_not_taken_up(data, tmp_path):
    def encoded(encoder=None, **options):
        encoder = encoder or Hashing()
        (tmp_path / "out" / "results.json").unlink(missing_ok=True)
        run(data, tmp_path / "out", encoder, subsets=["CIRR"], **options)
        return len(encoder.inputs)

    assert encoded() == 38
    assert encoded() == 0
    assert encoded(Hashing(dimension=17)) == 38
    assert encoded(max_length=100) == 38
    Image.new("RGB", (9, 30), (1, 2, 3)).save(data / "CIRR" / "image_3.png")
    assert encoded() == 38


def test_results_of_another_model_are_not_overwritten(data, tmp_path):
    """Neither finished ones nor those of a run that was cut off; both models are named. The same model goes on."""
    broken = Hashing(fail_after=60)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, broken, batch_size=16, name="one")
    files = {path.name for path in tmp_path.iterdir()}
    assert {"results.json", "CIRR_pred.parquet"} <= files and "WebQA_pred.parquet" not in files
    before = (tmp_path / "CIRR_pred.parquet").read_bytes()
    other = Hashing(dimension=17)
    brackets = r"\(fingerprint \w{12}, max_length 256\)"
    with pytest.raises(ValueError, match=f"holds results of one {brackets}, this is two {brackets}"):
        run(data, tmp_path, other, name="two")
    with pytest.raises(ValueError, match=r"max_length 256.*max_length 100"):
        run(data, tmp_path, max_length=100, name="one")
    assert (tmp_path / "CIRR_pred.parquet").read_bytes() == before and not other.inputs
    assert list(run(data, tmp_path, batch_size=16, name="one").figures) == ["CIRR", "WebQA"]
    (tmp_path / "results.json").write_text('{"model": "one"}')
    with pytest.raises(ValueError, match=r"results\.json does not say dimension, fingerprint, notes and 2 more"):
        run(data, tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match=r"results\.json is not what `evaluate` writes"):
        run(data, tmp_path)


def test_progress_is_told_of_each_subset(data, tmp_path, capsys):
    told = []
    evaluate(Hashing(), data, tmp_path / "a", EvaluateOptions(batch_size=100), on_progress=told.append)
    assert told == [
        Progress("CIRR", 1, 2, 0, 38),
        Progress("CIRR", 1, 2, 38, 38),
        *(Progress("WebQA", 2, 2, done, 180) for done in (0, 100, 180)),
    ]
    assert capsys.readouterr() == ("", "")
    evaluate(Hashing(), data, tmp_path / "b", on_progress=ProgressBars())
    out, err = capsys.readouterr()
    assert out == "" and "CIRR [1/2]: 100%" in err and "WebQA [2/2]: 100%" in err and "180/180" in err


def test_wrong_number_of_vectors_is_refused(tmp_path):
    class Short:
        def encode(self, inputs, **options):
            return np.ones((len(inputs) - 1, 3), np.float32)

    store = VectorStore(Short(), {}, tmp_path, 8, Ranks())
    with pytest.raises(ValueError, match=r"shape \(1, 3\) for 2 inputs"):
        store.vectors("x", [Pair("a", ""), Pair("b", "")], Images(tmp_path))


def test_processes_share_the_work_and_score_the_same(data, tmp_path):
    """Two processes under torchrun's variables write what one writes."""
    run(data, tmp_path / "one", batch_size=16)
    script = tmp_path / "work.py"
    script.write_text(
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from pathlib import Path\nfrom tests.mmeb.test_mmeb import Hashing, run\nencoder = Hashing()\n"
        f"results = run(Path({str(data)!r}), Path({str(tmp_path / 'two')!r}), encoder, batch_size=16)\n"
        "print(len(encoder.inputs), hash(str(results.as_dict())))\n",
        encoding="utf-8",
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, script],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    counts = [int(line.split()[0]) for line in (text.strip().splitlines()[-1] for text in said)]
    assert sum(counts) == 38 + 180 and min(counts) > 60
    assert len({text.split()[-1] for text in said}) == 1, "both have the results"
    for name in ("CIRR_score.json", "CIRR_pred.parquet", "WebQA_pred.parquet", "results.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


# --- the whole -------------------------------------------------------------------------------------------


def test_files_and_figures_agree_with_the_originals_evaluator(data, tmp_path):
    """Every file, recomputed here from the fake's vectors in the original's way."""
    import pyarrow.parquet

    results = run(data, tmp_path)
    encoder, found = Hashing(), Dataset(data)
    for name in ("CIRR", "WebQA"):
        rows = list(found.rows(found.subsets[name]))
        predicted = []
        for row in rows:
            vectors = encoder.encode([as_input(pair, found.images) for pair in (row.query, *row.targets)])
            predicted.append(original_algorithm(vectors[0], vectors[1:]))
        correct = predicted.count(0)
        text = (tmp_path / f"{name}_score.json").read_text()
        assert text == json.dumps({"acc": correct / 30, "num_correct": correct, "num_pred": 30}, indent=4)
        table = pyarrow.parquet.read_table(tmp_path / f"{name}_pred.parquet").to_pydict()
        assert table["pred"] == predicted
        assert table["pred_text"] == [row.targets[i].text for row, i in zip(rows, predicted, strict=True)]
        assert [len(scores) for scores in table["scores"]] == [5] * 30
        assert results.figures[name].mean[1] == pytest.approx(100 * correct / 30)
        assert results.as_dict()["subsets"][name]["precision@1_original"]["mean"] == pytest.approx(
            100 * correct / 30, abs=1e-3
        )
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored == results.as_dict()
    assert set(stored["averages"]) == {"retrieval", "IND", "all"}
    both = [stored["subsets"][name]["mrr"]["mean"] for name in ("CIRR", "WebQA")]
    assert stored["averages"]["all"]["mrr"]["mean"] == pytest.approx(np.mean(both), abs=1e-3)


def test_collapsed_models_fail_loudly(data, tmp_path):
    with pytest.raises(CollapsedEmbeddings, match="CIRR: the vectors of 30 different queries are nearly the same"):
        run(data, tmp_path, Constant())
    results = run(data, tmp_path, Constant(), allow_collapsed=True)
    assert results.figures["CIRR"].mean[:2].tolist() == [0, 100]
    assert results.notes[0].startswith("COLLAPSED: CIRR")
    assert "COLLAPSED" in (tmp_path / "table.txt").read_text()


def test_skipped_and_limited_rows_show_in_the_table(data, tmp_path):
    (data / "CIRR" / "image_7.png").unlink()
    results = run(data, tmp_path, skip_damaged=True, limit=20, subsets=["CIRR"])
    assert results.figures["CIRR"].rows < 20
    table = (tmp_path / "table.md").read_text()
    assert f"damaged rows left out: {20 - results.figures['CIRR'].rows}; the first: CIRR, row" in table
    assert "only the first 20 rows were asked for; there are more" in table
    for limit in (30, 100):  # there are not more
        assert run(data, tmp_path, limit=limit, subsets=["WebQA"]).notes == []


# --- comparing -------------------------------------------------------------------------------------------


def folder_of(folder, model, **subsets_rows):
    """What `evaluate` writes, with ranks as given: {subset: {row: rank}}."""
    results = Results(model, f"fingerprint of {model}", {"max_length": 256}, dimension=64)
    for name, ranks in subsets_rows.items():
        rows = dataset.Rows(subsets.MMEB[name])
        for i in ranks:
            rows.add(dataset.Row(i, Pair(f"q{i}", ""), tuple(Pair(f"{i} {j}", "") for j in range(20))))
        scored = [score.Scored(np.zeros(20, np.float32), rank, rank, rank - 1) for rank in ranks.values()]
        results.subsets[name], results.figures[name] = rows.subset, figures(scored, name)
        folder.mkdir(exist_ok=True)
        write_predictions(folder / f"{name}_pred.parquet", rows, scored)
    write_results(results, folder)
    return folder


def ranks(right, n=100):
    return {i: 1 if i in right else 2 for i in range(n)}


def test_a_comparison_is_paired(tmp_path):
    """B is right wherever A is, and in 6 rows of 100 more: the interval of the difference is that of 6 rows in 100 and
    leaves out 0, while the models' own overlap. The same six points from 47 rows won and 41 lost prove nothing."""
    pytest.importorskip("pyarrow")
    a = folder_of(tmp_path / "a", "before", WebQA=ranks(range(50)))
    b = folder_of(tmp_path / "b", "after", WebQA=ranks(range(56)))
    c = folder_of(tmp_path / "c", "elsewhere", WebQA=ranks(range(41, 97)))
    sure, unsure = (compare(a, other).as_dict()["subsets"]["WebQA"]["precision@1"] for other in (b, c))
    assert (sure["a"], sure["b"], sure["difference"]) == (50, 56, 6) and unsure["difference"] == 6
    half = 196 * np.sqrt(0.06 * 0.94 / 100)
    assert (sure["low"], sure["high"]) == pytest.approx((6 - half, 6 + half), abs=1.1) and sure["low"] > 0
    half = 196 * np.sqrt((0.47 + 0.41 - 0.06**2) / 100)
    assert (unsure["low"], unsure["high"]) == pytest.approx((6 - half, 6 + half), abs=1.5) and unsure["low"] < 0
    assert compare(b, a).as_dict()["subsets"]["WebQA"]["precision@1"]["high"] == -sure["low"]
    same = compare(a, a).as_dict()["subsets"]["WebQA"]["mrr"]
    assert (same["difference"], same["low"], same["high"]) == (0, 0, 0) and same["a"] == 75


def test_a_comparison_by_meta_task(tmp_path):
    """Averages are plain means over subsets, and have intervals of their own; CIFAR-100 is shown and not counted."""
    pytest.importorskip("pyarrow")
    rows = {
        "WebQA": ranks(range(50)),
        "CIRR": ranks(range(10), 50),
        "GQA": ranks(range(20), 40),
        "CIFAR-100": ranks([1]),
    }
    a = folder_of(tmp_path / "a", "one", **rows)
    b = folder_of(tmp_path / "b", "two", **rows | {"CIRR": ranks(range(20), 50), "CIFAR-100": ranks([])})
    found = compare(a, b)
    differences = {name: one["precision@1"]["difference"] for name, one in found.as_dict()["averages"].items()}
    assert differences == {"vqa": 0, "retrieval": 10, "IND": 10, "OOD": 0, "all": pytest.approx(20 / 3, abs=1e-3)}
    low, high = (found.as_dict()["averages"]["retrieval"]["precision@1"][end] for end in ("low", "high"))
    cirr = found.as_dict()["subsets"]["CIRR"]["precision@1"]
    assert (low, high) == pytest.approx((cirr["low"] / 2, cirr["high"] / 2))
    text = found.table()
    assert "B - A, where A is one and B is two" in text and "CIFAR-100 (not averaged)" in text and "-1.0" in text
    line = next(line for line in text.splitlines() if line.startswith("Retrieval (2 of 12)")).split()
    assert line[4:8] == ["150", "35.0", "45.0", "+10.0"]
    for form in ("markdown", "html"):
        assert "+10.0" in found.table(form)


def test_what_cannot_be_compared_is_said(tmp_path):
    """Rows and subsets that only one has, other options, other data, and folders that hold nothing."""
    pa = import_pyarrow("in this test") if pytest.importorskip("pyarrow") else None
    a = folder_of(tmp_path / "a", "one", WebQA=ranks([1], 20), CIRR=ranks([1], 5))
    b = folder_of(tmp_path / "b", "two", WebQA=ranks([1, 2], 15), GQA=ranks([1], 5))
    stored = json.loads((b / "results.json").read_text())
    (b / "results.json").write_text(json.dumps(stored | {"options": {"max_length": 100}, "notes": ["COLLAPSED: GQA"]}))
    found = compare(a, b)
    assert found.figures["WebQA"][0].rows == 15 and list(found.figures) == ["WebQA"]
    assert found.notes == ["only A has CIRR", "only B has GQA", "B: COLLAPSED: GQA",
                           "options differ between A and B: max_length 256 and 100",
                           "WebQA: compared are the 15 rows that both have; A has 20, B 15"]  # fmt: skip
    with pytest.raises(ValueError, match=r"no subset is in both: .*a has WebQA, CIRR, .*c has GQA"):
        compare(a, folder_of(tmp_path / "c", "three", GQA=ranks([1], 5)))
    with pytest.raises(ValueError, match=r"nothing holds no results of `evaluate`: there is no results\.json"):
        compare(a, tmp_path / "nothing")
    table = pa.parquet.read_table(b / "WebQA_pred.parquet").to_pylist()
    for change, words in (
        ({"qry_text": "another question"}, "WebQA: row 3 is another one; the two evaluations are of different data"),
        ({"scores": [0.0]}, "WebQA: row 3 is another one"),
        ({"row": 1}, "has 14 rows and results.json says 15: the evaluation was cut off"),
    ):
        changed = [row | change if row["row"] == 3 else row for row in table]
        pa.parquet.write_table(pa.Table.from_pylist(changed), b / "WebQA_pred.parquet")
        with pytest.raises(ValueError, match=words):
            compare(a, b)


def test_published_table():
    """The averages that the paper prints follow from its rows, but for those that are marked."""
    groups = subsets.groups(subsets.MMEB.values())
    sizes = {name: len(members) for name, members in groups.items()}
    assert sizes == {"classification": 10, "vqa": 10, "retrieval": 12, "grounding": 4, "IND": 20, "OOD": 16, "all": 36}
    for model, averages in subsets.PUBLISHED_AVERAGES.items():
        for group, value in averages.items() if model != "VLM2Vec Full" else ():
            from_rows = np.mean([subsets.PUBLISHED[name][model] for name in groups[group]])
            assert from_rows == pytest.approx(value, abs=0.11), (model, group)
    assert subsets.published_average("VLM2Vec Full", "all", groups["all"]) == 55.9
    assert subsets.published_average("SigLIP", "retrieval", groups["retrieval"]) == pytest.approx(44.1, abs=0.05)
    assert subsets.published_average("UniIR", "grounding", groups["grounding"]) == pytest.approx(62.2, abs=0.1)
    assert subsets.published_average("VLM2Vec Full", "all", ["CIRR"]) is None
    assert subsets.published_average("CLIP", "all", ["CIRR", "WebQA"]) == pytest.approx((12.6 + 67.5) / 2)


@pytest.mark.parametrize("form", ["text", "markdown", "html"])
def test_table_of_the_whole_benchmark(form):
    hit, miss = (score.Scored(np.zeros(2, np.float32), rank, rank, rank - 1) for rank in (1, 2))
    got = {name: figures([hit] * (i % 5) + [miss] * 5, name) for i, name in enumerate(subsets.MMEB)}
    members = subsets.groups(subsets.MMEB.values())
    averages = {group: score.average([got[name] for name in names]) for group, names in members.items()}
    table = report.render("a <model>", subsets.MMEB, got, averages, ["a note"], form)
    for name in subsets.MMEB:
        assert name in table
    for words in ("CIFAR-100 (not averaged)", "Classification (10)", "All (36)", "55.9", "60.1", "44.3", "a note"):
        assert words in table
    assert ("a <model>" in table) != (form == "html")
    if form == "text":
        lines = table.splitlines()
        assert len({len(line) for line in lines if line.startswith("----")}) == 2
        assert all(len(line) <= 120 for line in lines)


def test_command_on_the_bundled_data_with_a_tiny_checkpoint(tmp_path, capsys):
    """`minivlm2vec mmeb`, end to end: a random checkpoint, real pictures, all four meta-tasks."""
    pytest.importorskip("pyarrow")
    from minivlm2vec.cli import main
    from minivlm2vec.new_checkpoint import new_checkpoint

    new_checkpoint(tmp_path / "tiny", preset="tiny")
    names = [one.name for one in build.eval_sets(build.TRIMMED)]
    arguments = ["mmeb", "--model", str(tmp_path / "tiny"), "--data", "mini", "-o", str(tmp_path / "out"), "--quiet",
                 "--limit", "6", "--device", "cpu", "--num-crops", "1"]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for words in (*names, "Classification (5)", "VQA (10)", "Retrieval (11)", "Grounding (6)", "IND (13)", "All (32)"):
        assert words in printed
    scores = [json.loads((tmp_path / "out" / f"{name}_score.json").read_text()) for name in names]
    assert [one["num_pred"] for one in scores] == [6] * 41
    assert main([*arguments, "--subsets", "Emoji-Gruop"]) == 1
    assert "did you mean Emoji-Group?" in capsys.readouterr().err

    new_checkpoint(tmp_path / "other", preset="tiny", seed=1)
    other = [*arguments, "--model", str(tmp_path / "other"), "--subsets", "Emoji-Group", "Emoji-t2i"]
    assert main(other) == 1
    err = capsys.readouterr().err
    assert f"holds results of {tmp_path / 'tiny'} (" in err and f"this is {tmp_path / 'other'} (" in err
    assert main([*other, "-o", str(tmp_path / "out2")]) == 0
    capsys.readouterr()
    assert main(["mmeb", "--compare", str(tmp_path / "out"), str(tmp_path / "out2")]) == 0
    printed = capsys.readouterr().out
    assert "B - A" in printed and "Classification (1)" in printed and "Emoji-t2i" in printed
    for arguments in (["mmeb", "--compare", "a", "b", "-o", "c"], ["mmeb"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2


def test_mini_means_the_same_in_python(tmp_path):
    """`evaluate(..., "mini", ...)` takes the bundled sets, as `--data mini` does; a Path is a folder of that name."""
    pytest.importorskip("pyarrow")
    results = evaluate(Hashing(), "mini", tmp_path, EvaluateOptions(subsets=["Emoji-Group"]))
    assert results.figures["Emoji-Group"].rows == 24
    with pytest.raises(FileNotFoundError, match="mini is neither a folder"):
        evaluate(Hashing(), Path("mini"), tmp_path)


def test_vectors_that_are_cut_are_recorded(tmp_path, capsys):
    """`mmeb --dimensions`; a comparison says that A and B have vectors of other lengths."""
    pytest.importorskip("pyarrow")
    from minivlm2vec.cli import main
    from minivlm2vec.new_checkpoint import new_checkpoint

    folder = new_checkpoint(tmp_path / "m", config={"minivlm2vec": {"dims": [16]}})
    shared = ["mmeb", "--model", str(folder), "--data", "mini", "--quiet", "--limit", "6", "--device", "cpu",
              "--num-crops", "1", "--subsets", "Emoji-t2i", "--allow-collapsed"]  # fmt: skip
    assert main([*shared, "-o", str(tmp_path / "16"), "--dimensions", "16"]) == 0
    assert main([*shared, "-o", str(tmp_path / "64")]) == 0
    assert [read_results(tmp_path / name)["dimension"] for name in ("16", "64")] == [16, 64]
    assert "options differ between A and B: dimension 16 and 64" in compare(tmp_path / "16", tmp_path / "64").notes
    assert main([*shared, "-o", str(tmp_path / "16"), "--dimensions", "64"]) == 1
    assert "holds results of" in capsys.readouterr().err
    assert main([*shared, "-o", str(tmp_path / "12"), "--dimensions", "12"]) == 1
    assert "--force-dimensions" in capsys.readouterr().err and not (tmp_path / "12").exists()


def test_fingerprint_tells_models_apart():
    options = {"max_length": 256}
    one, same, other = (fingerprint(Hashing(d), options, Ranks()) for d in (4, 4, 5))
    assert one == same != other


def test_fingerprint_tells_adapters_apart(tmp_path):
    """Also one that changes the image tower alone."""
    from minivlm2vec import Embedder
    from minivlm2vec.new_checkpoint import new_checkpoint

    folder = new_checkpoint(tmp_path / "m")
    tower = make_adapter(folder, tmp_path / "tower", target_modules=("out_proj",))
    both = make_adapter(folder, tmp_path / "both")
    found = set()
    for adapter in (None, tower, both):
        e = Embedder.from_pretrained(folder, adapter=adapter, device="cpu", show_progress=False)
        found.add(fingerprint(e, {"max_length": 256}, Ranks()))
    assert len(found) == 3


def test_rows_share_their_pairs():
    found = dataset.Rows(subsets.MMEB["CIRR"])
    rows = [
        dataset.Row(0, Pair("q", ""), (Pair("a", ""), Pair("b", ""))),
        dataset.Row(3, Pair("b", ""), (Pair("q", ""),)),
    ]
    for row in rows:
        found.add(row)
    assert found.pairs == [Pair("q", ""), Pair("a", ""), Pair("b", "")]
    assert [(query, list(targets)) for query, targets in found.numbered] == [(0, [1, 2]), (2, [0])]
    assert list(found) == rows and len(found) == 2
