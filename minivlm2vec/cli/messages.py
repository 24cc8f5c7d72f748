"""What the library logs, printed."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
