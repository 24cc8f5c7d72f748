"""`minivlm2vec.files` from Python: typed options, values, errors; silent, and without a command's words."""

import ast
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch

from minivlm2vec import Embedder, files
from minivlm2vec.errors import OptionError
from minivlm2vec.files import EmbedOptions, ModelSpec, Query, SearchOptions
from tests.support.files_data import checkpoint, left_behind, make_adapter, read_jsonl, save_pictures, write_jsonl

__all__ = ["checkpoint"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def embedder(checkpoint) -> Embedder:
    return Embedder.from_pretrained(checkpoint, device="cpu", show_progress=False)


@pytest.fixture
def table(tmp_path) -> Path:
    rows = [{"text": f"caption {i}"} for i in range(10)]
    rows[7] = {"image": "missing.png"}
    return write_jsonl(tmp_path / "items.jsonl", rows)


@pytest.fixture
def no_model(monkeypatch):
    """Fails where a model is loaded."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Embedder, "from_pretrained", load)


def spec(checkpoint, **more) -> ModelSpec:
    return ModelSpec(str(checkpoint), device="cpu", **more)


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, minivlm2vec.files as f; assert 'embed' in dir(f) and set(f.__all__) == set(f._HOMES); "
        "print([m for m in ('torch', 'pyarrow', 'numpy', 'PIL', 'lancedb') if m in sys.modules]); "
        "f.VectorFile; print([m for m in ('pyarrow', 'lancedb') if m in sys.modules])"
    )
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["[]", "[]"], done.stderr


def test_every_public_name_is_there_and_stays_itself():
    """A submodule of the same name would take its place when it is first imported."""
    for name in files.__all__:
        assert not isinstance(getattr(files, name), type(files)), name
    submodules = {f.stem for f in (ROOT / "minivlm2vec/files").glob("*.py")}
    assert not submodules & set(files.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = files.nonsense


@pytest.mark.parametrize("file", sorted((ROOT / "minivlm2vec/files").glob("*.py")), ids=lambda f: f.stem)
def test_the_library_knows_nothing_of_commands(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not [m for m in modules if m.split(".")[0] in ("argparse", "cli")]
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not called & {"print", "exit", "quit"}


def test_embed_and_search_with_one_embedder(table, embedder, tmp_path, capfd):
    out = tmp_path / "out.npy"
    summary = files.embed(table, out, embedder, EmbedOptions(part_rows=4, instruction="Say: "))
    assert summary is not None
    assert (summary.out, summary.rows, summary.dimension, summary.bad_rows) == (out, 10, 64, 1)
    assert summary.errors == tmp_path / "out.npy.errors.jsonl" and not summary.already_finished
    assert read_jsonl(summary.errors)[0]["row"] == 7
    expected = embedder.encode([f"caption {i}" for i in range(7)], prompt="Say: ")
    assert np.abs(np.load(out)[:7] - expected).max() < 2e-6
    again = files.embed(table, out, embedder, EmbedOptions(part_rows=4, instruction="Say: "))
    assert again is not None and again.already_finished and again.bad_rows == 1
    vectors = files.open_vectors(out)
    for query in ("caption 3", Query("caption 3", instruction="Say: ")):
        hits = files.search(vectors, query, embedder, SearchOptions(top=3))
        assert [h.rank for h in hits] == [1, 2, 3] and hits[0].columns.keys() == {"text", "image"}
    assert hits[0].row == 3 and hits[0].score == pytest.approx(1, abs=1e-5)
    like = files.search(out, Query(like=3), options=SearchOptions(top=2))
    assert [h.row for h in like] == [h.row for h in hits[1:]]
    assert capfd.readouterr() == ("", ""), "a library is silent"


def test_the_model_is_loaded_by_its_name(table, checkpoint, embedder, tmp_path):
    out = tmp_path / "out.npy"
    files.embed(table, out, options=EmbedOptions(spec(checkpoint)))
    expected = embedder.encode(["caption 1"])
    assert np.abs(np.load(out)[1] - expected[0]).max() < 2e-6
    hits = files.search(out, Query("caption 1", instruction=""), options=SearchOptions(ModelSpec(device="cpu"), top=1))
    assert hits[0].row == 1


def test_the_four_steps(table, checkpoint, embedder, tmp_path):
    out = tmp_path / "out.safetensors"
    with files.plan(table, out, EmbedOptions(spec(checkpoint), part_rows=4)) as job:
        assert job.todo == (0, 1, 2) and job.settings["dimension"] == 64 and not job.complete
        with pytest.raises(ValueError, match="another run"):
            files.plan(table, out, EmbedOptions(spec(checkpoint), part_rows=4))
        timing = files.compute(job, embedder, numbers=[1])
        assert timing.rows == 4 and timing.elapsed > 0
        with pytest.raises(ValueError, match="2 of 3 parts are not computed yet"):
            files.assemble(job)
    with files.plan(table, out, EmbedOptions(spec(checkpoint), part_rows=4)) as job:
        assert job.todo == (0, 2)
        files.compute(job, embedder)
        assembled = files.assemble(job)
        assert not out.exists()
        summary = files.publish(assembled)
    assert out.exists() and summary.bad_rows == 1 and not left_behind(tmp_path)
    with files.plan(table, out, EmbedOptions(spec(checkpoint), part_rows=4)) as job:
        assert job.complete and job.todo == ()
    assert not left_behind(tmp_path)


def test_progress_is_told(table, checkpoint, embedder, tmp_path):
    class Heard(files.Progress):
        def __init__(self):
            self.told = []

        def planned(self, job):
            self.told.append(("planned", len(job.todo)))

        def begun(self, rows):
            self.told.append(("begun", rows))

        def advanced(self, rows):
            self.told.append(("advanced", rows))

        def bad_row(self, bad):
            self.told.append(("bad", bad.row))

        def computed(self, timing):
            self.told.append(("computed", timing.rows))

    heard = Heard()
    files.embed(table, tmp_path / "out.npy", embedder, EmbedOptions(part_rows=4), heard)
    assert heard.told[:2] == [("planned", 3), ("begun", 10)] and heard.told[-1] == ("computed", 10)
    assert ("bad", 7) in heard.told and sum(n for what, n in heard.told if what == "advanced") == 10


@pytest.mark.parametrize(
    ("out", "options", "words"),
    [("out.txt", {}, "OUT ends in"), ("out.npy", {"append": True}, "append adds to a Lance dataset, and excludes over"),
     ("out.npy", {"text_column": "caption"}, "text_column 'caption' is no column of the table; it has text, image"),
     ("out.parquet", {"vector_column": "text"}, "has a column 'text' already; vector_column gives"),
     ("out.lance", {"vector_column": "row_number"}, "has a column 'row_number' already"), ("folder.npy", {}, "folder"),
     ("made.npy", {}, "does not say what made it; overwrite replaces it")],
)  # fmt: skip
@pytest.mark.usefixtures("no_model")
def test_what_is_refused_before_a_model_is_loaded(table, checkpoint, tmp_path, out, options, words):
    for suffix, package in ((".parquet", "pyarrow"), (".lance", "lancedb")):
        if out.endswith(suffix):
            pytest.importorskip(package)
    (tmp_path / "folder.npy").mkdir()
    np.save(tmp_path / "made.npy", np.zeros((2, 64), np.float32))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OptionError, match=words) as caught:
        files.plan(table, tmp_path / out, EmbedOptions(spec(checkpoint), **options))
    assert "--" not in str(caught.value) and sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("no_model")
def test_other_refusals(table, checkpoint, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())
    options = EmbedOptions(spec(checkpoint))
    with pytest.raises(ValueError, match="does not exist"):
        files.plan(tmp_path / "none", tmp_path / "out.npy", options)
    with pytest.raises(ValueError, match="a table ends in"):
        files.plan(checkpoint / "model.safetensors", tmp_path / "out.npy", options)
    with pytest.raises(ValueError, match="does not exist: a checkpoint is"):
        files.plan(table, tmp_path / "out.npy", EmbedOptions(ModelSpec("./nowhere")))
    with pytest.raises(OptionError, match="model names no checkpoint"):
        files.plan(table, tmp_path / "out.npy")
    for package, suffix, extra in (("pyarrow", ".parquet", "files"), ("lancedb", ".lance", "lance")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"minivlm2vec\[{extra}\]"):
            files.plan(table, tmp_path / f"out{suffix}", options)
    assert sorted(tmp_path.iterdir()) == before


def test_options_are_frozen_and_checked():
    for make, words in [
        (lambda: EmbedOptions(part_rows=0), "part_rows is 0; at least 1 is needed"),
        (lambda: EmbedOptions(ModelSpec(num_crops=0)), "num_crops is 0"),
        (lambda: EmbedOptions(store="float64"), "store is float32 or float16, got 'float64'"),
        (lambda: EmbedOptions("mini"), "model is ModelSpec, got 'mini'"),
        (lambda: EmbedOptions(part_rows="4"), "part_rows is int, got '4'"),
        (lambda: EmbedOptions(batch_tokens=1.5), "batch_tokens is int, got 1.5"),
        (lambda: EmbedOptions(batch_tokens=None), "batch_tokens is int, got None"),
        (lambda: EmbedOptions(workers=True), "workers is int, got True"),
        (lambda: EmbedOptions(image_root=3), "image_root is str or PathLike, got 3"),
        (lambda: EmbedOptions(strict="no"), "strict is bool, got 'no'"),
        (lambda: EmbedOptions(text_column=["a"]), r"text_column is str, got \['a'\]"),
        (lambda: ModelSpec(Path("mini")), "name is str, got PosixPath"),
        (lambda: ModelSpec(dtype=torch.float16), "dtype is float32 or bfloat16 or float16, got torch.float16"),
        (lambda: SearchOptions(nprobes=0), "nprobes is 0"), (lambda: SearchOptions(top="5"), "top is int, got '5'"),
        (lambda: Query(text=7), "text is str, got 7"),
        (lambda: EmbedOptions(task="t2i", instruction="x"), "instruction and task are both given"),
        (lambda: EmbedOptions(task="nonsense"), "no task is named"), (lambda: SearchOptions(top=0), "top is 0"),
        (lambda: Query(), "nothing is asked: give text, image or like"),
        (lambda: Query("x", like=1), "like asks by a row of VECTORS; it excludes text and image"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            make()
    with pytest.raises(FrozenInstanceError):
        EmbedOptions().part_rows = 3
    assert EmbedOptions(part_rows=np.int64(3), image_root=Path()).part_rows == 3


def test_many_queries_at_once(table, embedder, tmp_path):
    out = tmp_path / "out.npy"
    files.embed(table, out, embedder)
    asked = ["caption 2", {"text": "caption 5", "instruction": ""}, Query(like=4), {"like": 1}]
    found = files.search(out, asked, embedder, SearchOptions(top=3))
    assert [len(hits) for hits in found] == [3] * 4 and found[1][0].row == 5
    assert found == [files.search(out, query, embedder, SearchOptions(top=3)) for query in asked]
    assert files.search(out, tuple(asked[:1]), embedder) == [files.search(out, asked[0], embedder)]
    assert files.search(out, [], embedder) == []
    for wrong, words in [
        (7, "a query is a text, a Query or a dict of its fields, got int"), (["a", None], "got NoneType"),
        ([["a"]], "got list"), ({"txt": "a"}, "a query has no txt; it has text, image, like"), ({}, "nothing is asked"),
    ]:  # fmt: skip
        with pytest.raises(OptionError, match=words):
            files.search(out, wrong, embedder)
    with pytest.raises(OptionError, match="options are a SearchOptions, got dict"):
        files.search(out, "a", embedder, {"top": 3})


def test_arguments_of_another_type_are_told(table, embedder, tmp_path):
    with pytest.raises(OptionError, match="options are an EmbedOptions, got dict"):
        files.embed(table, tmp_path / "out.npy", embedder, {"part_rows": 4})
    with pytest.raises(OptionError, match="source is a path, got list"):
        files.embed([{"text": "a"}], tmp_path / "out.npy", embedder)
    with pytest.raises(OptionError, match="out is a path, got NoneType"):
        files.embed(table, None, embedder)


def test_strict(table, embedder, tmp_path):
    with pytest.raises(files.BadRowError, match=r"line 8 \(.*missing.png\): no such file") as caught:
        files.embed(table, tmp_path / "out.npy", embedder, EmbedOptions(strict=True))
    assert caught.value.bad.row == 7 and not (tmp_path / "out.npy").exists()


def test_an_embedder_that_is_not_the_jobs(table, checkpoint, embedder, tmp_path):
    with pytest.raises(ValueError, match="num_crops is 4 in the embedder and 2 in the job"):
        files.embed(table, tmp_path / "out.npy", embedder, EmbedOptions(spec(checkpoint, num_crops=2)))
    half = Embedder.from_pretrained(checkpoint, device="cpu", dtype=torch.bfloat16, show_progress=False)
    with pytest.raises(ValueError, match="computed_in is 'bfloat16' in the embedder and 'float32' in the job"):
        files.embed(table, tmp_path / "other.npy", half, EmbedOptions(spec(checkpoint)))
    files.embed(table, tmp_path / "half.npy", half)
    meta = files.open_vectors(tmp_path / "half.npy").meta
    assert meta is not None and meta["settings"]["computed_in"] == "bfloat16"
    nameless = Embedder(embedder.model, embedder.processor)
    with pytest.raises(OptionError, match="the embedder has no name: model tells which checkpoint it is of"):
        files.embed(table, tmp_path / "none.npy", nameless)
    files.embed(table, tmp_path / "named.npy", nameless, EmbedOptions(spec(checkpoint)))


def test_an_embedders_adapter_is_recorded_and_compared(table, checkpoint, embedder, tmp_path):
    adapter = make_adapter(checkpoint, tmp_path / "adapter")
    adapted = Embedder.from_pretrained(checkpoint, adapter=adapter, device="cpu", show_progress=False)
    out = tmp_path / "out.npy"
    files.embed(table, out, adapted)
    meta = files.open_vectors(out).meta
    assert meta is not None and meta["model"] == {"name": str(checkpoint), "revision": None, "adapter": str(adapter)}
    query = Query("caption 2", instruction="")
    assert files.search(out, query, adapted)[0].score == pytest.approx(1, abs=1e-5)
    with pytest.raises(OptionError, match="cannot be compared; force does it all the same"):
        files.search(out, query, embedder)
    assert files.search(out, query, embedder, SearchOptions(force=True))


def test_a_search_takes_the_vectors_number_of_crops(checkpoint, embedder, tmp_path):
    save_pictures(tmp_path / "pictures", [f"{i}.png" for i in range(4)])
    out = tmp_path / "out.npy"
    files.embed(tmp_path / "pictures", out, options=EmbedOptions(spec(checkpoint, num_crops=1), instruction=""))
    query = Query(image=tmp_path / "pictures/2.png", instruction="")
    hit = files.search(out, query, embedder)[0]  # whose own are 4
    assert hit.row == 2 and hit.score == pytest.approx(1, abs=1e-5)


def test_pages(checkpoint, embedder, tmp_path, capfd):
    save_pictures(tmp_path / "pictures", [f"{i}.png" for i in range(4)])
    out = tmp_path / "out.npy"
    files.embed(tmp_path / "pictures", out, embedder)
    assert files.write_gallery(tmp_path / "all.html", out, top=2, limit=3) == 3
    for query in (Query("a red picture"), Query(image=(tmp_path / "pictures/0.png").read_bytes()), Query(like=1)):
        hits = files.search(out, query, embedder)
        files.write_hits(tmp_path / "hits.html", out, query, hits)
        page = (tmp_path / "hits.html").read_text(encoding="utf-8")
        assert page.count('<li class="card">') == len(hits) and page.count("data:image/jpeg") >= len(hits)
    with pytest.raises(OptionError, match="top is 0"):
        files.write_gallery(tmp_path / "none.html", out, top=0)
    assert capfd.readouterr() == ("", "")


def test_lance_alone(table, embedder, tmp_path):
    out = tmp_path / "out.npy"
    files.embed(table, out, embedder)
    for options in (SearchOptions(where="a > 1"), SearchOptions(exact=True)):
        with pytest.raises(OptionError, match="needs a Lance dataset"):
            files.search(out, "x", embedder, options)
    with pytest.raises(OptionError, match="needs a Lance dataset"):
        files.build_index(out)


@pytest.mark.usefixtures("no_model")
def test_columns_that_a_dataset_has_not_are_refused_before_they_are_embedded(table, checkpoint, embedder, tmp_path):
    pytest.importorskip("lancedb")
    out = tmp_path / "out.lance"
    files.embed(table, out, embedder)
    more = write_jsonl(tmp_path / "more.jsonl", [{"text": "x", "price": 1}])
    with pytest.raises(ValueError, match="which has no column 'price'"):
        files.plan(more, out, EmbedOptions(spec(checkpoint), append=True))
    with pytest.raises(OptionError, match="build_index is one of IVF_FLAT, "):
        files.build_index(out, "NONE")
    with pytest.raises(ValueError, match="a gallery is made of"):
        files.write_gallery(tmp_path / "all.html", out)
    assert not left_behind(tmp_path)
