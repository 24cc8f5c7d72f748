"""The errors that a user's input or files can cause. All are ValueErrors."""

import difflib
from collections.abc import Iterable, Sequence


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


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelled one is most like, whatever its case; None where none is like it."""
    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[near[0]] if near else None


class Option(str):
    """The name of an option in a message: `max_length` in Python; a command writes --max-length."""


class OptionError(ValueError):
    """Options that cannot be used as they are given, or not together.

    Attributes:
        parts: the message in pieces, in which names of options are of the class Option.
    """

    def __init__(self, *parts: str):
        self.parts = parts
        super().__init__("".join(parts))


def at_least_one(**values: int | None) -> None:
    """Raises OptionError for the first value that is no whole number, or below 1; None is none."""
    for name, value in values.items():
        if value is not None and not (hasattr(value, "__index__") and not isinstance(value, bool)):
            raise OptionError(Option(name), f" is {value!r}; a whole number is needed")
        if value is not None and value < 1:
            raise OptionError(Option(name), f" is {value}; at least 1 is needed")


def one_line(text: str, width: int) -> str:
    """A text on one line, without characters that would steer a terminal, cut to `width`."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= width else text[: width - 1] + "…"
