"""OUT.parts: the finished parts of a run, so that it can be killed at any moment and go on.

Every file here appears whole or not at all, see `atomic`.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..atomic import remove, write_bytes
from ..errors import Option, OptionError
from .pipeline import Result
from .rows import BadRow
from .sources import Index

try:
    import fcntl
except ImportError:  # not on Windows, where two runs into one OUT go unnoticed
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class PartHead:
    """What a part file says besides its vectors.

    Fields:
        errors: rows without a vector, ascending.
        images: digest of the image files' sizes and times of change.
        computed_with: see `embedding.computed_with`.
        run: see `Job.run`; "" in parts of earlier versions, which do not say.
    """

    errors: list[BadRow]
    images: str
    computed_with: str
    run: str


class Parts:
    """The folder beside OUT.

    Files:
        manifest.json: what the run is: settings and source. Written once.
        part-00000000.safetensors, …: [n, D] vectors in OUT's dtype, with the errors of these rows.
        source.jsonl: a folder's listing, or what came through stdin.
        todo.json: the parts that the processes of one torchrun share.
        lock: held by the process that runs.
    """

    def __init__(self, out: Path):
        self.folder = out.with_name(out.name + ".parts")
        self.manifest_path = self.folder / "manifest.json"
        self.spool = self.folder / "source.jsonl"
        self.lock_path = self.folder / "lock"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder, holds its lock, and removes it where no run was begun in it.

        Raises ValueError where another process holds the lock, or a link stands in its place."""
        lock = self._lock()
        try:
            yield
        finally:
            if self._is_lock(lock) and not self.manifest_path.exists():
                self.remove()  # nothing was begun
            os.close(lock)

    def _lock(self) -> int:
        """A descriptor of the lock, held. Another process may remove the folder meanwhile: then it is made again."""
        while True:
            if self.folder.is_symlink():
                raise ValueError(f"{self.folder} is a link, which is not followed; remove it")
            with contextlib.suppress(FileExistsError):  # exist_ok would look again, and may find it gone
                self.folder.mkdir(parents=True)
            try:
                lock = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            except FileNotFoundError:
                continue
            except OSError as e:
                if e.errno != errno.ELOOP:
                    raise
                raise ValueError(f"{self.lock_path} is a link, which is not followed; remove it") from None
            try:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise ValueError(f"another run is writing to {self.folder}") from None
            if self._is_lock(lock):
                return lock
            os.close(lock)

    def _is_lock(self, lock: int) -> bool:
        """Whether the lock in the folder is still the one that was opened."""
        try:
            return os.path.samestat(os.fstat(lock), os.lstat(self.lock_path))
        except FileNotFoundError:
            return False

    def manifest(self) -> dict[str, Any] | None:
        """What the run is, or None where none has begun. Raises OptionError where the file is damaged."""
        try:
            manifest = json.loads(self.manifest_path.read_text(encoding="utf-8"))
            Index(**manifest["source"])
            manifest["settings"].setdefault("adapter", None)  # runs begun before there were adapters
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise OptionError(f"{self.manifest_path} is damaged: remove {self.folder}, or have ", Option("overwrite"),
                              " begin anew") from None  # fmt: skip
        return manifest

    def begin(self, manifest: dict[str, Any]) -> None:
        write_bytes(self.manifest_path, json.dumps(manifest, indent=1).encode())

    def write_todo(self, numbers: list[int]) -> None:
        write_bytes(self.folder / "todo.json", json.dumps(numbers).encode())

    def todo(self) -> list[int]:
        """What `write_todo` wrote, in whichever process."""
        return json.loads((self.folder / "todo.json").read_text(encoding="utf-8"))

    def present(self) -> list[int]:
        """Numbers of the parts that are there, ascending."""
        return sorted(int(p.name[5:13]) for p in self.folder.glob(f"part-{'[0-9]' * 8}.safetensors"))

    def finished(self, number: int, run: str, rows: int, dimension: int, dtype: np.dtype) -> PartHead | None:
        """The head of a part, or None where it is missing, damaged, of another size, number or run, or a link: then it
        is to be computed again."""
        try:
            vectors, head = self.vectors(number), self.head(number)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None
        return head if (head.run, vectors.shape, vectors.dtype) == (run, (rows, dimension), dtype) else None

    def write(self, result: Result, run: str, dtype: np.dtype, computed_with: str) -> None:
        errors = json.dumps([vars(bad) for bad in result.errors])
        head = {"errors": errors, "images": result.images, "computed_with": computed_with, "run": run}
        vectors = result.vectors.astype(dtype)
        checksum = _checksum(result.number, vectors, head)
        write_bytes(self._path(result.number), save({"vectors": vectors}, head | {"checksum": checksum}))

    def head(self, number: int) -> PartHead:
        with self._open(number) as f:
            meta = f.metadata()
        errors = [BadRow(**bad) for bad in json.loads(meta["errors"])]
        return PartHead(errors, meta["images"], meta.get("computed_with", "not recorded"), meta.get("run", ""))

    def vectors(self, number: int) -> np.ndarray:
        """[n, D] in the dtype that they were written in. Raises ValueError where they are not what was written under
        this number."""
        with self._open(number) as f:
            vectors, head = f.get_tensor("vectors"), f.metadata() or {}
        if head.pop("checksum", None) != _checksum(number, vectors, head):
            raise ValueError(f"{self._path(number)} is damaged, or another part (its checksum is another); run the "
                             "command again")  # fmt: skip
        return vectors

    def assembled(self, suffix: str) -> Path:
        """Where OUT is put together."""
        return self.folder / f"out{suffix}"

    def remove_assembled(self) -> None:
        """What an interrupted `assemble` left."""
        for path in self.folder.glob("out*"):
            remove(path)

    def discard(self, number: int) -> None:
        self._path(number).unlink()

    def remove(self) -> None:
        """Removes the folder, whose lock is held; what makes it a run goes first, and the lock last. Whoever has made
        the folder his own by then keeps it."""
        self.manifest_path.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path != self.lock_path:
                remove(path)
        self.lock_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:08d}.safetensors"

    def _open(self, number: int) -> Any:
        path = self._path(number)
        if path.is_symlink():
            raise ValueError(f"{path} is a link, which is not followed")
        try:
            return safe_open(path, framework="numpy")
        except SafetensorError as e:
            raise ValueError(f"{path} is damaged ({e}); run the command again") from None


def _checksum(number: int, vectors: np.ndarray, head: dict[str, str]) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(vectors).data)
    digest.update(json.dumps([number, head], sort_keys=True).encode())
    return digest.hexdigest()
