"""Files and folders that are whole or absent, whatever happens: the one way in which this package replaces one.

They are written under another name in the same folder, flushed to the disk, and renamed. So a reader finds the old one
or the new one, after a crash and after a power cut too. An error leaves nothing behind; a kill may leave a hidden
".NAME.….tmp".
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, TextIO, overload


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path beside `path` at which to make a file or a folder; it takes the place of `path` when all went
    well. For writers that want a path; see `open_replacing` for those that take a file."""
    path = Path(path)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield new
        flush_tree(new)
        rename(new, path)
    finally:
        remove(new)


@overload
def open_replacing(path: str | os.PathLike, mode: Literal["wb"] = ...) -> AbstractContextManager[BinaryIO]: ...
@overload
def open_replacing(path: str | os.PathLike, mode: Literal["w"]) -> AbstractContextManager[TextIO]: ...
def open_replacing(path: str | os.PathLike, mode: str = "wb") -> AbstractContextManager[Any]:
    """A file that takes the place of `path` when it is closed and all went well. "w" writes UTF-8 with plain \\n."""
    return _open_replacing(path, mode)


@contextmanager
def _open_replacing(path: str | os.PathLike, mode: str) -> Iterator[IO[Any]]:
    text: dict[str, Any] = {"encoding": "utf-8", "newline": "\n"} if mode == "w" else {}
    with replacing(path) as new, open(new, mode, **text) as f:
        yield f


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    with open_replacing(path) as f:
        f.write(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """In UTF-8, line ends as they are."""
    write_bytes(path, text.encode("utf-8"))


def rename(old: Path, new: Path) -> None:
    """Moves a file or a folder over another of its kind. The parent folder remembers it after a power cut too."""
    if new.is_dir() and not new.is_symlink():
        shutil.rmtree(new)
    os.replace(old, new)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(new.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def flush(file: IO[Any]) -> None:
    """Has the disk hold what was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


def flush_tree(path: Path) -> None:
    """Has the disk hold a closed file, or all files of a folder."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb+") as f:
                os.fsync(f.fileno())


def remove(path: Path) -> None:
    """Removes a file, a folder or a link (not what it leads to), if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
