"""What a command says: printed so that nothing in it steers a terminal."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def visible(text: str) -> str:
    """The text with every character that is not printable, but for the ends of lines, as an escape: the names of files
    and columns are a stranger's."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def say(text: str) -> None:
    """Tells the user on stderr."""
    print(visible(text), file=sys.stderr)


class Printer(logging.Handler):
    def __init__(self, line: Callable[[str], str]):
        super().__init__()
        self.line = line

    def emit(self, record: logging.LogRecord) -> None:
        print(self.line(record.getMessage()), flush=True)


@contextmanager
def printed(name: str, line: Callable[[str], str] = str) -> Iterator[None]:
    """What the logger of this name is told meanwhile appears on stdout; `line` makes a line of a message."""
    logger, printer = logging.getLogger(name), Printer(line)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(printer)
    try:
        yield
    finally:
        logger.removeHandler(printer)
        logger.setLevel(level)
