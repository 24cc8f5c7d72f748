"""What commands that take images share: paths, folders, "-" for paths on stdin; and lists of texts."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def image_paths(given: Iterable[str]) -> Iterator[str]:
    """The images: a folder is all its images with those below it, "-" a path on each line of stdin. Raises ValueError
    for a folder without any."""
    for one in given:
        if one == "-":
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        elif Path(one).is_dir():
            from ..files.sources import images_below

            number = 0
            for path in images_below(Path(one)):
                number += 1
                yield str(path)
            if not number:
                raise ValueError(f"{one} holds no image")
        else:
            yield one


def check_paths(given: Iterable[str]) -> None:
    """Raises ValueError, before a model is loaded, for a path that is blank; and for the only one, where nothing
    is there, or a folder without an image."""
    from ..images import is_data_uri

    paths = list(given)
    for i, one in enumerate(paths):
        if not one.strip():
            raise ValueError(f"image {i} is {one!r}; a path is needed")
    if len(paths) != 1 or paths[0] == "-" or is_data_uri(paths[0]):
        return
    if Path(paths[0]).is_dir():
        next(image_paths(paths))
    elif not Path(paths[0]).exists():
        raise ValueError(f"{paths[0]}: no such file")


def add_forms(parser: argparse.ArgumentParser, json: str, csv: str) -> None:
    """--json and --csv, of which one may be given; json, csv: their help."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help=json)
    form.add_argument("--csv", action="store_true", help=csv)


def instruction_named(name: str) -> str | None:
    """A task's name, or None for "none". Raises OptionError for a name that there is not."""
    from ..tasks.common import as_task

    chosen = None if name == "none" else name
    as_task(chosen)
    return chosen


def texts_of(given: str, what: str) -> list[str]:
    """ "A,B,C", or the lines of a file that are not blank. what: what errors call it."""
    path = Path(given)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long, or of characters that no name has
        is_file = False
    if not is_file:
        return [part.strip() for part in given.split(",")] if given.strip() else []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as e:
        raise ValueError(f"{what} {given} is not UTF-8: {e.reason} at byte {e.start}") from None


def runs(items: Iterable[T], length: int) -> Iterator[list[T]]:
    """Lists of up to `length` items."""
    iterator = iter(items)
    while some := list(islice(iterator, length)):
        yield some
