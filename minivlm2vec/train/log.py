"""What a run tells of its steps: log.jsonl, and TensorBoard's files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from ..atomic import write_text
from ..extras import import_extra


class Log:
    """A context manager that is called with each step's record. Lines after `step` are of a run that was interrupted
    before its next checkpoint, and are taken out.

    Args:
        out: the run's folder; None writes nothing, as all processes but the first do.
        step: how many steps are done.
    """

    def __init__(self, out: Path | None, step: int, *, tensorboard: bool = False):
        self._file: TextIO | None = None
        self._board: Any = None
        if out is None:
            return
        out.mkdir(parents=True, exist_ok=True)
        self._file = _continued(out / "log.jsonl", step)
        if tensorboard:
            import_extra("tensorboard", extra="train", why="for log.tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(out / "tensorboard", purge_step=step + 1)

    def __call__(self, record: Mapping[str, float]) -> None:
        if self._file:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._board:
            for name, value in record.items():
                self._board.add_scalar(name, value, record["step"])

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        for one in (self._file, self._board):
            if one:
                one.close()


def _continued(path: Path, step: int) -> TextIO:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    write_text(path, "".join(line + "\n" for line in kept))
    return path.open("a", encoding="utf-8")
