"""The errors that a user's input or files can cause. All are ValueErrors."""

from collections.abc import Sequence


class InputError(ValueError):
    """One input of a call is unusable. The message names it and says why.

    Attributes:
        index: its place in the list that was passed, or None where only one input was passed.
        name: what it is called: a path, "image 2 (PNG bytes)", "text".
        reason: why it cannot be used.
        partial: {index: vector} of the inputs that were finished before it was met (set by `Embedder.encode`).
    """

    def __init__(self, reason: str, *, name: str = "input", index: int | None = None):
        self.reason, self.name, self.index = reason, name, index
        self.partial: dict = {}
        super().__init__(reason)

    def __str__(self) -> str:
        where = self.name if self.index is None else f"input {self.index} ({self.name})"
        return f"{where}: {self.reason}"

    def at(self, index: int) -> "InputError":
        """The same error, placed in a list of inputs."""
        self.index = index
        return self


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or not of this architecture. The message names the file or tensor."""


def some(names: Sequence[str], n: int = 3) -> str:
    """The first n names, and how many more there are: "a, b, c and 4 more"."""
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
