"""A row of a table, what the Embedder takes of it, and what its image files looked like then."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, Option, OptionError, one_line
from ..images import is_data_uri

TEXT_COLUMNS = ("text",)
IMAGE_COLUMNS = ("image", "images", "image_path")
URL = re.compile("[A-Za-z][A-Za-z0-9+.-]+://")
UNHOLDABLE = (ValueError, OverflowError, NotImplementedError)  # raised for values of Arrow that Python cannot hold


@dataclass(frozen=True)
class Row:
    """One row: its number (from 0), the line where it begins (from 1, None where there are no lines), its columns,
    and, where it cannot be read at all, the reason (it then has no columns)."""

    number: int
    line: int | None
    columns: dict[str, Any]
    error: str | None = None


@dataclass(frozen=True)
class BadRow:
    """A row without a vector: its number (from 0), its line (from 1) where the source has lines, what is at fault
    (a path, "text"), and why."""

    row: int
    line: int | None
    name: str
    reason: str

    def as_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v is not None}

    def __str__(self) -> str:
        where = f"row {self.row}" if self.line is None else f"line {self.line}"
        return f"{where} ({self.name}): {self.reason}"


class BadRowError(ValueError):
    """A row has no vector, and `EmbedOptions.strict` asked to stop there. Attribute: bad, a BadRow."""

    def __init__(self, bad: BadRow):
        self.bad = bad
        super().__init__(str(bad))


@dataclass(frozen=True)
class Columns:
    """Which columns hold the text and the image(s), and what relative paths are relative to."""

    text: str | None
    image: str | None
    root: Path

    @classmethod
    def choose(cls, names: Iterable[str], text: str | None, image: str | None, root: Path) -> "Columns":
        """The named columns, or the usual ones where none is named. Raises OptionError where they do not exist."""
        names = list(names)
        for option, name in (("text_column", text), ("image_column", image)):
            if name is not None and names and name not in names:
                raise OptionError(
                    Option(option), f" {name!r} is no column of the table; it has {', '.join(names)}{_hint(names)}"
                )
        if text is None and image is None:
            text = next((c for c in TEXT_COLUMNS if c in names), None)
            image = next((c for c in IMAGE_COLUMNS if c in names), None)
            if names and text is None and image is None:
                raise OptionError(
                    "which column holds the texts or images? Name it (", Option("text_column"), ", ",
                    Option("image_column"), f"); the table has {', '.join(names)}{_hint(names)}",
                )  # fmt: skip
        return cls(text, image, root)

    def names(self) -> list[str]:
        return [c for c in (self.text, self.image) if c is not None]

    def images(self, row: Row) -> list[Any]:
        """The images of a row: absolute paths, data URIs, bytes or arrays. Raises InputError."""
        value = row.columns.get(self.image) if self.image else None
        values = value if isinstance(value, list) else [value]
        found = [self._image(v) for v in values]
        return [f for f in found if f is not None]

    def absolute(self, value: Any) -> Any:
        """What an image column holds, with absolute paths; anything else stays as it is."""
        if isinstance(value, list):
            return [self.absolute(v) for v in value]
        if isinstance(value, dict) and not value.get("bytes") and isinstance(value.get("path"), str):
            return value | {"path": self.absolute(value["path"])}
        if not isinstance(value, str) or not value or not _is_path(value):
            return value
        return os.path.join(self.root, value)

    def item(self, row: Row) -> dict[str, Any]:
        """The input for `Embedder.plan`. Raises InputError."""
        if row.error is not None:
            raise InputError(row.error, name="row")
        text = row.columns.get(self.text) if self.text else None
        return {"text": text if text != "" else None, "images": self.images(row)}

    def stamp(self, row: Row) -> str:
        """Path, size and time of change of each image file of a row, to notice later that one was replaced."""
        try:
            images = self.images(row)
        except InputError:
            return ""
        return json.dumps([(image, *_size_and_time(image)) for image in images if _is_path(image)])

    def stamps(self, rows: Iterable[Row]) -> str:
        """The digest of the stamps of some rows."""
        return digest_of(map(self.stamp, rows))

    def _image(self, value: Any) -> Any:
        if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:  # as Hugging Face datasets keep them
            value = value.get("bytes") or value.get("path")
        if isinstance(value, np.ndarray):
            return value
        if value is None or value == "":
            return None
        if isinstance(value, bytes) or is_data_uri(value):
            return value
        if not isinstance(value, str):
            raise InputError(f"an image is a path, a data URI or bytes, got {type(value).__name__}", name="image")
        if not _is_path(value):
            raise InputError("is a URL; only files are read, by their paths, so download it first", name=value)
        return os.path.join(self.root, value)


def digest_of(stamps: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for stamp in stamps:
        digest.update(stamp.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def as_text(value: Any) -> str:
    """What JSON has no type for, as text: a date, a decimal; bytes by their number."""
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


def as_json(value: Any, **options: Any) -> str:
    """JSON of a value: null for a NaN or an infinity, text for what JSON has no type for, lone surrogates (names that
    are not in UTF-8) escaped. options: of `json.dumps`."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=as_text, **options)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, default=as_text, **options)
    return text if is_unicode(text) else re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def is_unicode(text: str) -> bool:
    """False where a text holds half a surrogate pair: bytes that were not UTF-8, or a lone \\ud800 in JSON."""
    try:
        text.encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False


def plain_rows(table: Any) -> list[dict[str, Any]]:
    """The rows of a pyarrow.Table. What Python cannot hold, such as a date after 9999, becomes text; bytes of a string
    that are not UTF-8 become lone surrogates."""
    rows: list[dict[str, Any]] = [{} for _ in range(table.num_rows)]
    for name, column in zip(table.column_names, table.columns, strict=True):
        for row, value in zip(rows, plain_column(column), strict=True):
            row[name] = value
    return rows


def plain_column(column: Any) -> list[Any]:
    """As `plain_rows`, of one column."""
    try:
        return column.to_pylist()
    except UNHOLDABLE:
        return [_plain(scalar) for scalar in column]


def _plain(scalar: Any) -> Any:
    """A scalar of Arrow, and what it holds, as Python has it or as text."""
    try:
        return scalar.as_py()
    except UNHOLDABLE:
        pass
    if hasattr(scalar, "dictionary"):
        return _plain(scalar.value)
    if hasattr(scalar, "as_buffer"):
        return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
    if not callable(items := getattr(scalar, "values", len)):  # of a list or a map
        return [_plain(value) for value in items]
    if isinstance(scalar, Mapping):
        return {name: _plain(value) for name, value in scalar.items()}
    try:
        return str(scalar.cast("string"))
    except UNHOLDABLE:
        return f"<{scalar.type}>"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(value: Any, width: int = 60) -> str:
    """A value on one line, without characters that would steer a terminal."""
    if not isinstance(value, str):
        value = "" if value is None else json.dumps(value, ensure_ascii=False, default=as_text)
    return one_line(value, width)


def _hint(names: list[str]) -> str:
    """What may be wrong with a table whose columns are these, where that shows."""
    if names[0].lower().startswith("sep="):
        return ". Its first line is a note for Excel: remove it"
    found = next((mark for mark in (";", "\t", "|", ",") if len(names) == 1 and mark in names[0]), None)
    return "" if found is None else f". Is {found!r} what parts its fields? A .csv has commas there, a .tsv tabs"


def _is_path(image: Any) -> bool:
    return isinstance(image, str) and not is_data_uri(image) and not URL.match(image)


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    except (OSError, ValueError):  # it is not there, or its name is none (ValueError: a NUL in it)
        return -1, -1
