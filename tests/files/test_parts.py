"""OUT.parts: its lock, its checksums, and what is not followed."""

import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minivlm2vec.files import EmbedOptions, ModelSpec, embed, plan
from minivlm2vec.files.parts import Parts
from minivlm2vec.files.pipeline import Result
from tests.support.files_data import checkpoint, left_behind, run, write_jsonl

__all__ = ["checkpoint"]
FLOAT32 = np.dtype("<f4")


@pytest.fixture
def parts(tmp_path):
    parts = Parts(tmp_path / "out.npy")
    parts.folder.mkdir()
    parts.write(Result(0, 0, np.eye(3, 8, dtype=np.float32), "images"), "this run", FLOAT32, "a CPU")
    return parts


def test_a_part_is_known_again(parts):
    head = parts.finished(0, "this run", 3, 8, FLOAT32)
    assert (head.errors, head.images, head.computed_with) == ([], "images", "a CPU")
    assert (parts.vectors(0) == np.eye(3, 8)).all()


@pytest.mark.parametrize("damage", ["vectors", "head", "cut", "empty", "no vectors", "link"])
def test_a_part_that_is_not_what_was_written_is_none(parts, tmp_path, damage):
    path = parts.folder / "part-00000000.safetensors"
    data = path.read_bytes()
    at = {"vectors": len(data) - 5, "head": data.index(b"a CPU")}.get(damage)
    if at is not None:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif damage == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif damage == "no vectors":
        save_file({"other": np.eye(3)}, path)
    else:
        path.write_bytes(data[:-7] if damage == "cut" else b"")
    assert parts.finished(0, "this run", 3, 8, FLOAT32) is None
    assert parts.present() == [0]  # it is there, to be computed again


@pytest.mark.parametrize(("rows", "dimension", "dtype"), [(4, 8, "<f4"), (3, 9, "<f4"), (3, 8, "<f2")])
def test_a_part_of_another_size_is_none(parts, rows, dimension, dtype):
    assert parts.finished(0, "this run", rows, dimension, np.dtype(dtype)) is None


def test_a_damaged_part_is_computed_again(checkpoint, tmp_path):
    source, out = write_jsonl(tmp_path / "t.jsonl", [{"text": f"row {i}"} for i in range(12)]), tmp_path / "out.npy"
    options = EmbedOptions(ModelSpec(str(checkpoint), device="cpu"), part_rows=4)
    from minivlm2vec.files import compute

    with plan(source, out, options) as job:
        compute(job, job.checkpoint.load(device="cpu"), numbers=[0, 1])
    path = tmp_path / "out.npy.parts/part-00000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)
    with plan(source, out, options) as job:
        assert job.todo == (1, 2) and job.changed == 1
    embed(source, out, options=options)
    embed(source, tmp_path / "whole.npy", options=options)
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.parametrize("content", ["", "\0" * 900, "{}", "[1]", '{"settings": {}}', '{"settings": [], "source": {}}',
                                     '{"settings": {}, "source": {"num_rows": 12}}', "["  * 100_000])  # fmt: skip
def test_a_damaged_manifest_is_named_and_there_is_a_way_on(checkpoint, tmp_path, content):
    source, out = write_jsonl(tmp_path / "t.jsonl", [{"text": f"row {i}"} for i in range(2)]), tmp_path / "out.npy"
    manifest, part = Parts(out).manifest_path, Parts(out).folder / "part-00000000.safetensors"
    manifest.parent.mkdir()
    manifest.write_text(content)
    part.write_bytes(b"")
    argv = ("embed", source, "-o", out, "--model", checkpoint, "--device", "cpu", "--quiet")
    code, _, err = run(*argv)
    assert code == 1 and f"{manifest} is damaged: remove {manifest.parent}, or have --overwrite begin anew" in err
    assert part.exists(), "what is there is the user's to remove"
    assert run(*argv, "--overwrite")[0] == 0 and len(np.load(out)) == 2 and not left_behind(tmp_path)


# The lock


@pytest.mark.parametrize("what", ["lock", "folder"])
def test_a_link_is_not_followed(tmp_path, what):
    parts, precious = Parts(tmp_path / "out.npy"), tmp_path / "precious"
    if what == "lock":
        precious.write_text("keep")
        parts.folder.mkdir()
        parts.lock_path.symlink_to(precious)
    else:
        precious.mkdir()
        (precious / "file").write_text("keep")
        parts.folder.symlink_to(precious)
    with pytest.raises(ValueError, match="is a link, which is not followed"), parts.locked():
        pass
    assert (precious if what == "lock" else precious / "file").read_text() == "keep"


def test_a_spool_that_is_a_link_is_replaced(checkpoint, tmp_path):
    (tmp_path / "precious").write_text("keep")
    parts = Parts(tmp_path / "out.npy")
    parts.folder.mkdir()
    for name in ("source.jsonl", "out.npy", "todo.json", "part-00000000.safetensors"):
        (parts.folder / name).symlink_to(tmp_path / "precious")
    code, _, err = run("embed", "-", "-o", tmp_path / "out.npy", "--model", checkpoint, "--device", "cpu", "--quiet",
                       stdin=b'{"text": "a"}\n')  # fmt: skip
    assert code == 0 and (tmp_path / "precious").read_text() == "keep" and not left_behind(tmp_path), err


def test_whoever_opened_the_lock_before_the_folder_went_takes_the_new_one(tmp_path, monkeypatch):
    """One process ends and removes the folder between another's opening of the lock and its taking it."""
    pytest.importorskip("fcntl")
    from minivlm2vec.files import parts as module

    parts, flock = Parts(tmp_path / "out.npy"), module.fcntl.flock
    waits = []

    def late(*args):
        if not waits:
            waits.append(1)
            parts.remove()  # what the other process does as it ends
        return flock(*args)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with parts.locked():
        assert waits and parts.lock_path.exists(), "a lock that nobody else can take would be none"
        with pytest.raises(ValueError, match="another run"), Parts(tmp_path / "out.npy").locked():
            pass
    assert not parts.folder.exists()


def test_a_folder_that_another_run_has_taken_over_stays(tmp_path):
    parts = Parts(tmp_path / "out.npy")
    with parts.locked():
        parts.remove()  # as a run does that has published
        parts.folder.mkdir()
        parts.lock_path.write_text("")  # another run has begun
    assert parts.lock_path.exists()


def test_one_at_a_time_holds_the_lock(tmp_path):
    """Threads that begin and end runs as fast as they can: never two inside, and no error but the one that says so."""
    pytest.importorskip("fcntl")
    inside, most, errors = [], [], []

    def runs():
        for _ in range(60):
            try:
                with Parts(tmp_path / "out.npy").locked():
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except Exception as e:  # of whatever kind
                errors.append(str(e))

    threads = [threading.Thread(target=runs) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert max(most) == 1 and all("another run is writing" in e for e in errors)
    assert os.listdir(tmp_path) == []


def test_a_part_without_a_checksum_is_none(parts):
    path = parts.folder / "part-00000000.safetensors"
    save_file(load_file(path), path, {"errors": "[]", "images": "x", "run": "this run"})
    assert parts.finished(0, "this run", 3, 8, FLOAT32) is None


# Parts of another place or run


def test_a_part_under_another_number_or_of_another_run_is_none(parts):
    assert parts.finished(0, "another run", 3, 8, FLOAT32) is None
    shutil.copy(parts.folder / "part-00000000.safetensors", parts.folder / "part-00000001.safetensors")
    assert parts.finished(1, "this run", 3, 8, FLOAT32) is None
    with pytest.raises(ValueError, match=r"part-00000001\.safetensors is damaged, or another part"):
        parts.vectors(1)


@pytest.mark.parametrize("mistake", ["swapped", "other table", "other instruction"])
def test_parts_that_are_not_where_they_were_made_are_computed_again(checkpoint, tmp_path, mistake):
    from minivlm2vec.files import compute

    source = write_jsonl(tmp_path / "t.jsonl", [{"text": f"row {i}"} for i in range(12)])
    options = EmbedOptions(ModelSpec(str(checkpoint), device="cpu"), part_rows=4)
    embed(source, tmp_path / "whole.npy", options=options)

    def begin(source, out, options):
        with plan(source, out, options) as job:
            compute(job, job.checkpoint.load(device="cpu"), numbers=[0, 1])
        return [out.with_name(f"{out.name}.parts") / f"part-0000000{n}.safetensors" for n in (0, 1)]

    out = tmp_path / "out.npy"
    first, second = begin(source, out, options)
    if mistake == "swapped":
        first.rename(tmp_path / "first")
        second.rename(first)
        (tmp_path / "first").rename(second)
    else:
        if mistake == "other table":
            source_2 = write_jsonl(tmp_path / "u.jsonl", [{"text": f"another {i}"} for i in range(12)])
            others = begin(source_2, tmp_path / "other.npy", options)
        else:
            others = begin(source, tmp_path / "other.npy", replace(options, instruction="Say: "))
        shutil.copy(others[0], first)
    with plan(source, out, options) as job:
        assert (job.todo, job.changed) == (((0, 1, 2), 2) if mistake == "swapped" else ((0, 2), 1))
    embed(source, out, options=options)
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()
