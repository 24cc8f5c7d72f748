"""OUT.parts: the finished parts of a run, so that it can be killed at any moment and go on.

Every file here appears whole or not at all, see `atomic`.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..atomic import remove, write_bytes
from .pipeline import Result
from .rows import BadRow

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
    """

    errors: list[BadRow]
    images: str
    computed_with: str


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

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder, holds its lock, and removes it where no run was begun in it.

        Raises ValueError where another process holds the lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as f:
            if fcntl is not None:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(f"another run is writing to {self.folder}") from None
            try:
                yield
            finally:
                if self.folder.exists() and not self.manifest_path.exists():
                    self.remove()  # nothing was begun

    def manifest(self) -> dict[str, Any] | None:
        """What the run is, or None where none has begun."""
        try:
            manifest = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        manifest["settings"].setdefault("adapter", None)  # runs begun before there were adapters
        return manifest

    def begin(self, manifest: dict[str, Any]) -> None:
        write_bytes(self.manifest_path, json.dumps(manifest, indent=1).encode())

    def write_todo(self, numbers: list[int]) -> None:
        write_bytes(self.folder / "todo.json", json.dumps(numbers).encode())

    def todo(self) -> list[int]:
        """What `write_todo` wrote, in whichever process."""
        return json.loads((self.folder / "todo.json").read_text(encoding="utf-8"))

    def finished(self) -> list[int]:
        """Numbers of the finished parts, ascending."""
        return sorted(int(p.name[5:13]) for p in self.folder.glob("part-*.safetensors"))

    def write(self, result: Result, dtype: np.dtype, computed_with: str) -> None:
        errors = json.dumps([vars(bad) for bad in result.errors])
        head = {"errors": errors, "images": result.images, "computed_with": computed_with}
        write_bytes(self._path(result.number), save({"vectors": result.vectors.astype(dtype)}, head))

    def head(self, number: int) -> PartHead:
        with self._open(number) as f:
            meta = f.metadata()
        errors = [BadRow(**bad) for bad in json.loads(meta["errors"])]
        return PartHead(errors, meta["images"], meta.get("computed_with", "not recorded"))

    def vectors(self, number: int) -> np.ndarray:
        """[n, D] in the dtype that they were written in."""
        with self._open(number) as f:
            return f.get_tensor("vectors")

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
        """Removes the folder; what makes it a run goes first."""
        self.manifest_path.unlink(missing_ok=True)
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:08d}.safetensors"

    def _open(self, number: int) -> Any:
        try:
            return safe_open(self._path(number), framework="numpy")
        except SafetensorError as e:
            raise ValueError(f"{self._path(number)} is damaged ({e}); remove it and run the command again") from None
