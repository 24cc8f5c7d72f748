"""Files that are whole or absent."""

import os
import stat

import pytest

from minivlm2vec import atomic


def test_files_take_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    atomic.write_text(path, "älter\n")
    with atomic.open_replacing(path, "w") as f:
        f.write("new\n")
        assert path.read_bytes() == "älter\n".encode()
    assert path.read_bytes() == b"new\n"
    with atomic.open_replacing(path) as f:
        f.write(b"\x00")
    assert path.read_bytes() == b"\x00" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic.open_replacing(path, "w") as f:
        f.write("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "step-1"
    for names in (["a", "b"], ["c"]):
        with atomic.replacing(path) as new:
            new.mkdir()
            for name in names:
                (new / name).write_text(name)
        assert sorted(os.listdir(path)) == names
    with pytest.raises(ValueError), atomic.replacing(path) as new:
        new.mkdir()
        raise ValueError
    assert os.listdir(path) == ["c"] and os.listdir(tmp_path) == ["step-1"]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "a"
    with atomic.open_replacing(path) as one, atomic.open_replacing(path) as two:
        one.write(b"1" * 10)
        two.write(b"2" * 20)
    assert path.read_bytes() == b"1" * 10  # the last to finish


def test_it_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor):
        mode = os.fstat(descriptor).st_mode
        steps.append("folder" if stat.S_ISDIR(mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append("rename"), replace(old, new)))
    atomic.write_bytes(tmp_path / "a", b"x")
    assert steps == ["file", "rename", *(["folder"] if os.name == "posix" else [])]


def test_permissions_are_those_of_any_new_file(tmp_path):
    atomic.write_bytes(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
