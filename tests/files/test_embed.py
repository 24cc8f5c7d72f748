"""`minivlm2vec embed`."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from minivlm2vec import Embedder, prompts
from minivlm2vec.files import open_vectors
from minivlm2vec.files.parts import Parts
from tests.support.files_data import checkpoint, left_behind, make_adapter, read_jsonl, run, save_pictures, write_jsonl

__all__ = ["checkpoint"]
TESTS = Path(__file__).parent
ROOT = TESTS.parents[1]
Disk = namedtuple("Disk", "total used free")
TOLERANCE = 2e-6  # float32 sums in another order: the vectors are of length 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """18 pictures with names that trip up careless code, one that is none, a loop of links."""
    folder = tmp_path_factory.mktemp("a folder with spaces") / "bilder – 写真"
    save_pictures(folder, [f"p {i}.jpg" for i in range(6)])
    save_pictures(folder, [f"ünder/ス/{i}.png" for i in range(6)], seed=1)
    save_pictures(folder, [f"z/new\nline'\"{i}.PNG" for i in range(6)], seed=2)
    (folder / "ünder/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "z/loop").symlink_to(folder, target_is_directory=True)
    (folder / "z/gone.jpg").symlink_to("nowhere.jpg")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.jpg").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def embedder(checkpoint) -> Embedder:
    return Embedder.from_pretrained(checkpoint, device="cpu", show_progress=False)


def embed(source, out, checkpoint, *more, stdin: bytes = b"") -> tuple[int, str]:
    options = ["--model", checkpoint, "--device", "cpu", "--quiet", "--part-rows", 4]
    code, _, err = run("embed", source, "-o", out, *options, *more, stdin=stdin)
    return code, err


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes that are started here: the last bit of a sum depends on how many threads share it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# What comes out


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_a_folder_in_every_format(pictures, checkpoint, embedder, tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"out{suffix}"
    code, err = embed(pictures, out, checkpoint)
    assert code == 3, err
    paths = sorted(p for p in pictures.rglob("*") if p.suffix.lower() in (".jpg", ".png") and p.name[0] != ".")
    vectors = open_vectors(out)
    rows = vectors.rows(range(vectors.shape[0]))
    names = [rows[i]["image"] for i in range(len(rows))]
    assert sorted(str(pictures / n) for n in names) == sorted(str(p) for p in paths if "loop" not in p.parts)
    got = np.concatenate([chunk.numpy() for _, chunk in vectors.chunks()])
    bad = {i for i, n in enumerate(names) if n in ("ünder/broken.png", "z/gone.jpg")}
    assert {i for i in range(len(got)) if np.isnan(got[i]).all()} == bad
    good = [i for i in range(len(got)) if i not in bad]
    expected = embedder.encode([{"image": pictures / names[i]} for i in good], prompt=prompts.IMAGE)
    assert np.abs(got[good] - expected).max() < TOLERANCE
    errors = read_jsonl(tmp_path / f"out{suffix}.errors.jsonl")
    assert {e["row"] for e in errors} == bad and all(e["reason"] and "line" not in e for e in errors)
    assert vectors.meta["settings"]["num_crops"] == 4 and vectors.meta["rows"] == len(names)
    assert not left_behind(tmp_path)


def test_the_order_of_a_folder_depends_on_names_alone(pictures, checkpoint, tmp_path):
    embed(pictures, tmp_path / "out.npy", checkpoint)
    names = [row["image"] for row in read_jsonl(tmp_path / "out.npy.rows.jsonl")]
    assert names[:7] == [f"p {i}.jpg" for i in range(6)] + ["z/gone.jpg"]
    assert names[-7:] == ["ünder/broken.png", *(f"ünder/ス/{i}.png" for i in range(6))]


def test_csv_with_quotes_newlines_and_missing_fields(checkpoint, embedder, tmp_path):
    save_pictures(tmp_path, ["a, b.jpg"])
    table = tmp_path / "items.csv"
    table.write_bytes(
        b'\xef\xbb\xbftext,image,price\r\n"two\r\nlines, and ""quotes""",,1\r\n\r\n'
        b'caption,"a, b.jpg",2\r\n,,3\r\ntoo,many,fields,here\r\n"caf\xff",,5\r\n=HYPERLINK(),,\r\n'
    )
    code, err = embed(table, tmp_path / "out.npy", checkpoint)
    assert code == 3, err
    got = np.load(tmp_path / "out.npy")
    expected = embedder.encode(
        ['two\r\nlines, and "quotes"', {"text": "caption", "image": tmp_path / "a, b.jpg"}, "=HYPERLINK()"]
    )
    assert np.abs(got[[0, 1, 5]] - expected).max() < TOLERANCE
    errors = read_jsonl(tmp_path / "out.npy.errors.jsonl")
    assert [(e["row"], e["line"]) for e in errors] == [(2, 6), (3, 7), (4, 8)]
    assert [e["reason"] for e in errors] == [
        "neither text nor image", "4 fields where the header has 3", "not valid UTF-8"
    ]  # fmt: skip
    rows = read_jsonl(tmp_path / "out.npy.rows.jsonl")
    assert rows[0] == {"text": 'two\r\nlines, and "quotes"', "image": "", "price": "1"}
    assert rows[3] == {"text": None, "image": None, "price": None}


def test_jsonl_lines_that_are_no_rows(checkpoint, embedder, tmp_path):
    lines = [b'{"text": "fine"}', b"", b"not json", b"[1]", b'{"text": "\\ud800"}', b'{"text": "\xff"}', b'{"text": 7}',
             b'{"image": "missing.jpg"}', b'{"image": "https://example.org/x.jpg"}', b'{"text": "fine"}']  # fmt: skip
    table = tmp_path / "items.jsonl"
    table.write_bytes(b"\n".join(lines))
    code, _ = embed(table, tmp_path / "out.npy", checkpoint)
    errors = read_jsonl(tmp_path / "out.npy.errors.jsonl")
    got = np.load(tmp_path / "out.npy")
    assert code == 3 and len(got) == 9
    assert [(e["row"], e["line"]) for e in errors] == [(n, n + 2) for n in range(1, 8)]
    assert "no such file" in errors[5]["reason"] and "URL" in errors[6]["reason"] and "int" in errors[4]["reason"]
    assert np.abs(got[[0, 8]] - embedder.encode(["fine"])).max() < TOLERANCE  # duplicates stay two rows


def test_stdin_is_a_jsonl(checkpoint, embedder, tmp_path):
    data = b'{"text": "eins"}\n{"text": "zwei"}\n'
    code, err = embed("-", tmp_path / "out.safetensors", checkpoint, stdin=data)
    assert code == 0, err
    got = load_file(tmp_path / "out.safetensors")["vectors"]
    assert np.abs(got - embedder.encode(["eins", "zwei"])).max() < TOLERANCE
    assert not (tmp_path / "out.safetensors.errors.jsonl").exists()


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
@pytest.mark.parametrize("source", ["folder", "jsonl", "csv"])
def test_no_rows(checkpoint, tmp_path, source, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"items.{source}"
    path.mkdir() if source == "folder" else path.write_text("text\n" if source == "csv" else "")
    code, err = embed(path, tmp_path / f"out{suffix}", checkpoint)
    assert code == 0, err
    assert open_vectors(tmp_path / f"out{suffix}").shape == (0, 64)
    assert run("search", tmp_path / f"out{suffix}", "--text", "x", "--json")[0] == 0


def test_parquet_passes_every_column_through(checkpoint, embedder, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    save_pictures(tmp_path, [f"{i}.png" for i in range(3)])
    table = pa.table({
        "id": pa.array([7, None, 9, 10], pa.int16()),
        "image": [{"bytes": (tmp_path / "0.png").read_bytes(), "path": None}, {"bytes": None, "path": "1.png"},
                  {"bytes": None, "path": None}, {"bytes": b"junk", "path": "x"}],
        "text": ["a", None, "c", "d"],
        "tags": [["x", "y"], [], None, ["z"]],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "items.parquet", row_group_size=3)
    code, err = embed(
        tmp_path / "items.parquet", tmp_path / "out.parquet", checkpoint, "--part-rows", 2, "--store", "float16"
    )
    assert code == 3, err
    got = pq.read_table(tmp_path / "out.parquet")
    assert got.drop_columns("embedding").equals(table)
    assert got.schema.field("embedding").type == pa.list_(pa.float16(), 64)
    assert got["embedding"].null_count == 0 and np.isnan(got["embedding"][3].values.to_numpy()).all()
    expected = embedder.encode([{"text": "a", "image": tmp_path / "0.png"}, {"image": tmp_path / "1.png"}, "c"])
    vectors = np.array([v.as_py() if hasattr(v, "as_py") else v for v in got["embedding"][:3]], np.float32)
    assert np.abs(vectors - expected).max() < 2e-3  # float16


def test_parquet_source_parts_do_not_depend_on_row_groups(checkpoint, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table, written = pa.table({"text": [f"row {i}" for i in range(23)]}), []
    for size in (1, 5, 100):
        pq.write_table(table, tmp_path / "items.parquet", row_group_size=size)
        code, err = embed(tmp_path / "items.parquet", tmp_path / f"{size}.npy", checkpoint)
        assert code == 0, err
        written.append((tmp_path / f"{size}.npy").read_bytes())
    assert written[0] == written[1] == written[2]


def test_jsonl_columns_get_types(checkpoint, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"text": "a", "n": 1, "mix": 1, "tags": ["x"], "big": 2**70, "late": None},
            {"text": "b", "n": 2.5, "mix": "one", "deep": {"k": [1]}, "late": True}]  # fmt: skip
    embed(write_jsonl(tmp_path / "items.jsonl", rows), tmp_path / "out.parquet", checkpoint)
    got = pq.read_table(tmp_path / "out.parquet")
    assert got["n"].to_pylist() == [1.0, 2.5] and got["mix"].to_pylist() == ["1", '"one"']
    assert got["deep"].to_pylist() == [None, '{"k": [1]}'] and got["tags"].to_pylist() == [["x"], None]
    assert got["late"].type == pa.bool_() and got["big"].to_pylist() == [str(2**70), None]


# Interruptions


@pytest.mark.parametrize(("suffix", "stride", "fewest"), [(".npy", 1, 20), (".parquet", 4, 4)])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_step_and_resumed_is_byte_identical(checkpoint, tmp_path, suffix, stride, fewest):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    save_pictures(tmp_path, ["a.png"])
    rows = [{"text": "a"}, {"image": "missing.png"}, {"text": "b", "image": "a.png"}, {"text": "c"}]
    source = write_jsonl(tmp_path / "items.jsonl", rows)
    argv = ["embed", str(source), "--model", str(checkpoint), "--device", "cpu", "--part-rows", "2", "--quiet",
            "--workers", "1"]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert run(*argv, "-o", whole / f"0{suffix}")[0] == 3
    command = [sys.executable, TESTS / "kill_at_every_step.py", str(stride), killed, suffix, *argv]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [int(n) for n in done.stdout.split()]
    assert len(steps) >= fewest
    expected = {p.name[1:]: p.read_bytes() for p in whole.iterdir()}
    for step in [*steps, steps[-1] + stride]:
        got = {p.name.removeprefix(str(step)): p.read_bytes() for p in killed.glob(f"{step}.*") if p.is_file()}
        assert got == expected, f"killed at step {step}"
    assert not left_behind(killed)
    print(f"{len(steps)} kills, {len(expected)} files each, all alike")


def test_killed_from_outside_while_it_computes(checkpoint, tmp_path):
    rows = [{"text": f"a rather long text number {i} " * 20} for i in range(240)]
    source = write_jsonl(tmp_path / "items.jsonl", rows)
    argv = ["embed", str(source), "--model", str(checkpoint), "--device", "cpu", "--part-rows", "8", "--quiet"]
    command = [sys.executable, "-m", "minivlm2vec", *argv, "-o", str(tmp_path / "killed.npy")]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    parts = tmp_path / "killed.npy.parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("part-*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
    finished = len(list(parts.glob("part-*.safetensors")))
    assert 3 <= finished < 30 and not (tmp_path / "killed.npy").exists()
    code, _, err = run(*argv, "-o", tmp_path / "killed.npy")
    assert code == 0 and f"{finished} of 30 parts are finished" in err
    assert run(*argv, "-o", tmp_path / "whole.npy")[0] == 0
    assert (tmp_path / "killed.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


class Stop(Exception):
    """Ends a run from within, as a kill would."""


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(n): the next runs end after their n-th part was written; stop_after(None): no more."""
    write = Parts.write

    def set_limit(limit):
        written = []

        def limited(self, result, *more):
            write(self, result, *more)
            written.append(result.number)
            if limit is not None and len(written) >= limit:
                raise Stop

        monkeypatch.setattr(Parts, "write", limited)
        return written

    return set_limit


def interrupted(stop_after, source, out, checkpoint, *more) -> None:
    stop_after(2)
    with pytest.raises(Stop):
        embed(source, out, checkpoint, *more)
    stop_after(None)
    assert (out.parent / (out.name + ".parts")).is_dir() and not out.exists()


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [("--num-crops", 2, "num_crops is 4 there and 2 now"), ("--instruction", "Other.", "instruction"),
     ("--store", "float16", "stored_as"),
     ("--model", None, "checkpoint"), ("--adapter", None, "adapter is None there and ")],
)  # fmt: skip
def test_refuses_to_go_on_with_other_settings(pictures, checkpoint, tmp_path, stop_after, option, value, word):
    from minivlm2vec.new_checkpoint import new_checkpoint

    if value is None:
        make = {"--model": lambda: new_checkpoint(tmp_path / "other", seed=1),
                "--adapter": lambda: make_adapter(checkpoint, tmp_path / "adapter")}  # fmt: skip
        value = make[option]()
    out = tmp_path / "out.npy"
    interrupted(stop_after, pictures, out, checkpoint)
    code, err = embed(pictures, out, checkpoint, option, value)
    assert code == 1 and word in err and "--overwrite" in err  # an unfinished run
    assert embed(pictures, out, checkpoint)[0] == 3
    before, settings = out.read_bytes(), open_vectors(out).meta["settings"]
    code, err = embed(pictures, out, checkpoint, option, value)
    assert code == 1 and word in err and out.read_bytes() == before  # a finished file
    assert not left_behind(tmp_path)
    code, err = embed(pictures, out, checkpoint, option, value, "--overwrite")
    assert code == 3 and open_vectors(out).meta["settings"] != settings and not left_behind(tmp_path)


@pytest.mark.parametrize(
    ("option", "value"), [("--part-rows", 5), ("--batch-tokens", 4096), ("--vector-column", "vec"), ("--workers", 1)]
)
def test_options_that_change_no_vector_keep_what_is_finished(checkpoint, tmp_path, stop_after, option, value):
    pytest.importorskip("pyarrow")
    source = write_jsonl(tmp_path / "items.jsonl", [{"text": f"row {i}"} for i in range(19)])
    for suffix in (".npy", ".parquet"):
        out, whole = tmp_path / f"out{suffix}", tmp_path / f"whole{suffix}"
        interrupted(stop_after, source, out, checkpoint)
        code, err = embed(source, out, checkpoint, option, value)
        assert code == 0 and "2 of 5 parts are finished" in err, err
        assert embed(source, whole, checkpoint)[0] == 0
        got, expected = (open_vectors(path).vectors(range(19)).numpy() for path in (out, whole))
        assert np.abs(got - expected).max() < TOLERANCE
        code, err = embed(source, out, checkpoint, option, value)
        assert code == 0 and "finished already" in err
        code, err = embed(source, out, checkpoint)
        renamed = option == "--vector-column" and suffix == ".parquet"  # there it is how the file looks
        assert (code, "finished already" in err) == ((1, False) if renamed else (0, True)), err


def test_a_name_that_is_taken_leaves_what_is_finished(checkpoint, tmp_path, stop_after):
    pytest.importorskip("pyarrow")
    source = write_jsonl(tmp_path / "items.jsonl", [{"text": f"row {i}", "embedding": i} for i in range(12)])
    out = tmp_path / "out.parquet"
    code, err = embed(source, out, checkpoint)
    assert code == 1 and "has a column 'embedding' already; --vector-column gives" in err and not left_behind(tmp_path)
    interrupted(stop_after, source, out, checkpoint, "--vector-column", "one")
    assert embed(source, out, checkpoint)[0] == 1
    code, err = embed(source, out, checkpoint, "--vector-column", "two")
    assert code == 0 and "2 of 3 parts are finished" in err and open_vectors(out).shape == (12, 64)


def test_adapters_are_told_apart(checkpoint, tmp_path, stop_after):
    """With an adapter the vectors are the merged model's, and a run goes on with that adapter alone."""
    source = write_jsonl(tmp_path / "items.jsonl", [{"text": f"row {i}"} for i in range(12)])
    one, other = (make_adapter(checkpoint, tmp_path / f"adapter{i}", seed=i) for i in range(2))
    out = tmp_path / "out.npy"
    interrupted(stop_after, source, out, checkpoint, "--adapter", one)
    for wrong in (["--adapter", other], []):
        code, err = embed(source, out, checkpoint, *wrong)
        assert code == 1 and "adapter is " in err and "checkpoint" not in err
    code, err = embed(source, out, checkpoint, "--adapter", one)
    assert code == 0 and "2 of 3 parts are finished" in err
    adapted = Embedder.from_pretrained(checkpoint, adapter=one, device="cpu", show_progress=False)
    got, texts = np.load(out), [f"row {i}" for i in range(12)]
    assert np.abs(got - adapted.encode(texts)).max() < TOLERANCE
    embed(source, tmp_path / "plain.npy", checkpoint)
    assert np.abs(got - np.load(tmp_path / "plain.npy")).max() > 100 * TOLERANCE
    assert open_vectors(out).meta["model"]["adapter"] == str(one)
    code, err = embed(source, tmp_path / "none.npy", checkpoint, "--adapter", checkpoint)
    assert code == 1 and "adapter_model.safetensors does not exist" in err


def test_a_run_goes_on_with_another_number_of_threads_and_says_so(checkpoint, tmp_path, stop_after):
    source, out = write_jsonl(tmp_path / "items.jsonl", [{"text": f"row {i}"} for i in range(12)]), tmp_path / "out.npy"
    interrupted(stop_after, source, out, checkpoint)
    torch.set_num_threads(2)
    code, err = embed(source, out, checkpoint)
    assert code == 0 and "2 of 3 parts are finished" in err and "computed in part with" in err
    told = open_vectors(out).meta["computed_with"]
    assert [f"{n} threads, torch kernels" in t for n, t in enumerate(told, 1)] == [True, True]
    assert embed(source, out, checkpoint)[0] == 0  # it is finished, whoever asks


def test_a_finished_file_is_left_alone(pictures, checkpoint, tmp_path):
    out = tmp_path / "out.npy"
    embed(pictures, out, checkpoint)
    before = out.stat()
    code, err = embed(pictures, out, checkpoint)
    assert code == 3 and "finished already" in err and out.stat().st_mtime_ns == before.st_mtime_ns
    assert not left_behind(tmp_path)


def test_images_that_changed_between_runs_are_done_again(checkpoint, tmp_path, stop_after):
    folder = tmp_path / "pictures"
    save_pictures(folder, [f"{i:02}.png" for i in range(12)])
    out = tmp_path / "out.npy"
    interrupted(stop_after, folder, out, checkpoint)
    save_pictures(folder, ["01.png"], seed=9)
    code, err = embed(folder, out, checkpoint)
    assert code == 0 and "1 are done again" in err
    embed(folder, tmp_path / "new.npy", checkpoint)
    assert out.read_bytes() == (tmp_path / "new.npy").read_bytes()
    save_pictures(folder, ["02.png"], seed=10)
    code, err = embed(folder, out, checkpoint)
    assert code == 1 and "have changed since" in err


def test_a_source_that_changed_between_runs_is_refused(checkpoint, tmp_path, stop_after):
    folder = tmp_path / "pictures"
    save_pictures(folder, [f"{i:02}.png" for i in range(12)])
    interrupted(stop_after, folder, tmp_path / "out.npy", checkpoint)
    save_pictures(folder, ["00b.png"])
    code, err = embed(folder, tmp_path / "out.npy", checkpoint)
    assert code == 1 and "12 rows then, 13 now" in err


def test_strict_stops_and_what_is_finished_stays(checkpoint, tmp_path):
    rows = [{"text": f"row {i}"} for i in range(12)]
    rows[9] = {"image": "missing.jpg"}
    source = write_jsonl(tmp_path / "items.jsonl", rows)
    code, err = embed(source, tmp_path / "out.npy", checkpoint, "--strict")
    assert code == 4 and "line 10" in err and "no such file" in err and not (tmp_path / "out.npy").exists()
    code, err = embed(source, tmp_path / "out.npy", checkpoint)
    assert code == 3
    code, err = embed(source, tmp_path / "again.npy", checkpoint)
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "again.npy").read_bytes()


def test_two_runs_at_once_are_refused(checkpoint, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    source = write_jsonl(tmp_path / "items.jsonl", [{"text": "a"}])
    (tmp_path / "out.npy.parts").mkdir()
    with open(tmp_path / "out.npy.parts/lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        code, err = embed(source, tmp_path / "out.npy", checkpoint)
    assert code == 1 and "another run" in err


# The disk


def test_a_file_that_may_not_grow_any_more(checkpoint, tmp_path):
    """A limit on file sizes stands in for a full disk where nothing can be mounted."""
    source = write_jsonl(tmp_path / "items.jsonl", [{"text": f"row {i}"} for i in range(40)])

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "minivlm2vec", "embed", source, "-o", tmp_path / "out.npy", "--model", checkpoint,
               "--device", "cpu", "--quiet", "--part-rows", "4"]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 1 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out.npy").exists()
    code, err = embed(source, tmp_path / "out.npy", checkpoint)
    assert code == 0 and "10 of 10 parts are finished" in err  # only OUT itself, 10 kB, was too large
    assert np.load(tmp_path / "out.npy").shape == (40, 64)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_too_small_is_refused_before_the_work(checkpoint, tmp_path, monkeypatch):
    """Parts and OUT take 2 * 60 * 64 * 4 bytes at least; what is finished counts no more."""
    source = write_jsonl(tmp_path / "items.jsonl", [{"text": f"row {i}"} for i in range(60)])
    out, free = tmp_path / "out.npy", 2 * 60 * 64 * 4
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Disk(10**9, 10**9, free - 1))
        patch.setattr("minivlm2vec.files.embedding.compute", None)  # no model is loaded, nothing is computed
        code, err = embed(source, out, checkpoint)
    assert code == 1 and "No space left" in err and "goes on from there" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["items.jsonl"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**9, 10**9, free))
    assert embed(source, out, checkpoint)[0] == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**9, 10**9, 0))
    code, err = embed(source, out, checkpoint)
    assert code == 0 and "finished already" in err


def test_a_full_disk(checkpoint, tmp_path, small_disk, monkeypatch):
    """Something else fills it meanwhile, or the file system does not tell how much is free."""
    source = write_jsonl(tmp_path / "items.jsonl", [{"text": f"row {i}"} for i in range(60)])
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 36_864)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Disk(0, 0, 0))
        code, err = embed(source, small_disk / "out.npy", checkpoint)
    assert code == 1 and "No space left" in err and not (small_disk / "out.npy").exists()
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    code, err = embed(source, small_disk / "out.npy", checkpoint)
    assert code == 0 and "parts are finished" in err
    embed(source, tmp_path / "out.npy", checkpoint)
    assert (small_disk / "out.npy").read_bytes() == (tmp_path / "out.npy").read_bytes()


def test_a_read_only_target(checkpoint, tmp_path, small_disk):
    source = write_jsonl(tmp_path / "items.jsonl", [{"text": "a"}])
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, err = embed(source, small_disk / "out.npy", checkpoint)
    assert code == 1 and "Read-only" in err


@pytest.mark.parametrize(
    ("out", "more", "words"),
    [("out.txt", [], "OUT ends in"), ("out", [], "OUT ends in"), ("out.npy", ["--part-rows", 0], "at least 1"),
     ("out.npy", ["--text-column", "caption"], "no column"), ("out.npy", ["--append"], "Lance"),
     ("missing/dir/out.npy", [], None), ("out.npy", ["--task", "nonsense"], "no task"),
     ("out.npy", ["--task", "t2i", "--instruction", "x"], "use one")],
)  # fmt: skip
def test_wrong_arguments(checkpoint, tmp_path, out, more, words):
    source = write_jsonl(tmp_path / "items.jsonl", [{"text": "a"}])
    code, err = embed(source, tmp_path / out, checkpoint, *more)
    assert (code == 1 and words in err) if words else code == 0  # a missing folder is made
    assert not left_behind(tmp_path)


def test_a_foreign_file_is_not_overwritten(checkpoint, tmp_path):
    source = write_jsonl(tmp_path / "items.jsonl", [{"text": "a"}])
    np.save(tmp_path / "out.npy", np.zeros((2, 64), np.float32))
    code, err = embed(source, tmp_path / "out.npy", checkpoint)
    assert code == 1 and "does not say what made it" in err and np.load(tmp_path / "out.npy").shape == (2, 64)
    assert embed(source, tmp_path / "out.npy", checkpoint, "--overwrite")[0] == 0


# Several processes


def test_two_ranks_of_torchrun_make_the_same_file(pictures, checkpoint, tmp_path):
    argv = ["embed", str(pictures), "--model", str(checkpoint), "--device", "cpu", "--part-rows", "3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "minivlm2vec", *argv, "-o", tmp_path / "two.npy"]
    two, again = (subprocess.run(command, env=environment(), capture_output=True, text=True) for _ in range(2))
    assert "rank 0 of 2" in two.stderr and (tmp_path / "two.npy").exists(), two.stderr[-3000:]
    assert "is finished already" in again.stderr and "rank 0 of 2" not in again.stderr
    for done in (two, again):  # torchrun has no other code for a process that ends with 3
        assert done.returncode == 1 and set(re.findall(r"exitcode *: (\d+)", done.stderr)) == {"3"}, done.stderr[-3000:]
    assert run(*argv, "-o", tmp_path / "one.npy")[0] == 3
    for suffix in ("", ".json", ".rows.jsonl", ".errors.jsonl"):
        assert (tmp_path / f"two.npy{suffix}").read_bytes() == (tmp_path / f"one.npy{suffix}").read_bytes()
    assert not left_behind(tmp_path)


# Memory


def test_memory_is_bounded_by_the_batch_and_not_by_the_input(checkpoint, tmp_path):
    """Four times the rows, nearly the same peak."""
    script = (
        "import resource, sys; from minivlm2vec.cli import main; code = main(sys.argv[1:]); "
        "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for n in (1500, 6000):
        source = tmp_path / f"{n}.jsonl"
        with open(source, "w") as f:
            f.writelines(json.dumps({"text": "a", "n": i, "pad": "x" * 4000}) + "\n" for i in range(n))
        command = [sys.executable, "-c", script, "embed", source, "-o", tmp_path / f"{n}.npy", "--model", checkpoint,
                   "--device", "cpu", "--quiet", "--part-rows", "64", "--workers", "1"]  # fmt: skip
        done = subprocess.run(
            command, env=environment(MALLOC_ARENA_MAX="1"), capture_output=True, text=True, check=True
        )
        code, peak = map(int, done.stdout.split())
        assert code == 0
        peaks.append(peak * 1024)
    added = 4500 * (4000 + 64 * 4)
    print(
        f"peaks {peaks[0] / 1e6:.1f} and {peaks[1] / 1e6:.1f} MB; {added / 1e6:.1f} MB of rows and vectors were added"
    )
    assert peaks[1] - peaks[0] < added / 4  # what the allocator keeps, and the index of the parts
