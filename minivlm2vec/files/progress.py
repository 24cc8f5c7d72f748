"""What a run of `embed` tells while it works. Imports nothing heavy, so that a command can subclass it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .rows import BadRow

if TYPE_CHECKING:
    from .job import Job


@dataclass(frozen=True)
class Timing:
    """How long `compute` took for so many rows, and for how long of that the model had no input: seconds."""

    rows: int
    elapsed: float
    waited: float


class Progress:
    """What `embed` tells while it works. This one hears nothing; a subclass hears what it overrides.

    With torchrun, each process has its own: the first is told everything, the others of their own rows."""

    def planned(self, job: "Job") -> None:
        """All that could be refused was refused; no model is loaded yet."""

    def begun(self, rows: int) -> None:
        """So many rows will now be computed in this process."""

    def advanced(self, rows: int) -> None:
        """So many more are finished."""

    def bad_row(self, bad: BadRow) -> None:
        """This one has no vector."""

    def computed(self, timing: Timing) -> None:
        """This process's rows are finished."""
