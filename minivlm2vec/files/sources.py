"""Where rows come from: a JSONL, CSV or Parquet table, or a folder or stdin, first spooled to a JSONL.

No source is ever held in memory. One pass counts the rows, hashes the file and notes where each part of `part_rows`
rows begins; afterwards any part can be read by itself.
"""

import csv
import hashlib
import json
import os
import shutil
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ..extras import import_pyarrow
from ..image_files import suffixes
from .rows import Row

IMAGE_SUFFIXES = suffixes()
MAX_CSV_FIELD = 1 << 24  # characters; bounds what an unclosed quote can swallow

Part = tuple[int, list[Row]]  # its number, and its rows
Record = tuple[int, dict[str, Any], str | None]  # where it begins (a line from 1), its columns, why it cannot be read


@dataclass(frozen=True)
class Index:
    """What one pass over a source tells.

    Fields:
        num_rows: how many.
        fingerprint: sha256 of the file.
        columns: {name: type}, in order. Types are null, bool, int, float, string, strings (a list), json (any other
            or a mixture); for Parquet, whose types are its own business, "arrow".
        starts: (byte offset, line) where each part begins; empty for Parquet.
    """

    num_rows: int
    fingerprint: str
    columns: dict[str, str]
    starts: list[list[int]]


class Table:
    """A file of rows. It is never held in memory: every method reads it anew, `parts` and `arrow_tables` no more than
    what is asked for. `numbers`, of the wanted parts, ascend."""

    has_lines = False

    def __init__(self, path: Path):
        self.path = path

    def index(self, part_rows: int) -> Index:
        """One pass over the file. Raises OSError, or ValueError for a table that cannot be read."""
        raise NotImplementedError

    def parts(
        self, index: Index, numbers: Iterable[int], part_rows: int, columns: list[str] | None = None
    ) -> Iterator[Part]:
        """The wanted parts, of the named columns where reading only these saves work."""
        raise NotImplementedError

    def arrow_schema(self, index: Index) -> Any:
        """The pyarrow.Schema of `arrow_tables`."""
        raise NotImplementedError

    def arrow_tables(self, index: Index, numbers: Iterable[int], part_rows: int) -> Iterator[Any]:
        """A pyarrow.Table of each wanted part, with all columns."""
        raise NotImplementedError


class LineTable(Table):
    """A table whose rows are one after the other in a text file. Subclasses say how a record is parsed."""

    has_lines = True

    def index(self, part_rows: int) -> Index:
        digest, n = hashlib.sha256(), 0
        columns: dict[str, str] = {}
        starts: list[list[int]] = []
        with open(self.path, "rb") as f:
            lines = _Lines(f, digest=digest)
            self._header(lines, columns)
            records = self._records(lines)
            while True:
                start = [lines.offset, lines.number]
                record = next(records, None)
                if record is None:
                    break
                if n % part_rows == 0:
                    starts.append(start)
                n += 1
                _merge_types(columns, record[1])
        return Index(n, digest.hexdigest(), columns, starts)

    def parts(
        self, index: Index, numbers: Iterable[int], part_rows: int, columns: list[str] | None = None
    ) -> Iterator[Part]:
        with open(self.path, "rb") as f:
            self._header(_Lines(f), {})
            for number in numbers:
                offset, line = index.starts[number]
                f.seek(offset)
                records = islice(self._records(_Lines(f, offset, line)), part_rows)
                yield number, list(self._rows(records, number * part_rows))

    def arrow_schema(self, index: Index) -> Any:
        pa = import_pyarrow("for columns of Arrow")
        types = {"null": pa.null(), "bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(),
                 "string": pa.string(), "strings": pa.list_(pa.string()), "json": pa.string()}  # fmt: skip
        return pa.schema([(name, types[kind]) for name, kind in index.columns.items()])

    def arrow_tables(self, index: Index, numbers: Iterable[int], part_rows: int) -> Iterator[Any]:
        """A value of a mixed or nested column becomes JSON text."""
        pa, schema = import_pyarrow("for columns of Arrow"), self.arrow_schema(index)
        for _, rows in self.parts(index, numbers, part_rows):
            arrays = [
                pa.array([_as_kind(row.columns.get(name), kind) for row in rows], field.type)
                for (name, kind), field in zip(index.columns.items(), schema, strict=True)
            ]
            yield pa.table(arrays, schema=schema)

    def _rows(self, records: Iterable[Record], first: int) -> Iterator[Row]:
        for number, (line, values, error) in enumerate(records, first):
            yield Row(number, line if self.has_lines else None, values, error)

    def _header(self, lines: "_Lines", columns: dict[str, str]) -> None:
        """Reads what precedes the rows, and enters the columns that it names."""

    def _records(self, lines: "_Lines") -> Iterator[Record]:
        """Yields (line, columns, error) from where `lines` stands."""
        raise NotImplementedError


class JsonLines(LineTable):
    """An object per line, in UTF-8; blank lines are no rows."""

    def __init__(self, path: Path, *, has_lines: bool = True):
        super().__init__(path)
        self.has_lines = has_lines

    def _records(self, lines: "_Lines") -> Iterator[Record]:
        for line in lines:
            if line.strip():
                number = lines.number - 1
                try:
                    yield number, _json_object(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line), None
                except (ValueError, RecursionError) as e:
                    yield number, {}, str(e)


class Csv(LineTable):
    """A header and records, in UTF-8, quoted as RFC 4180 has it; .tsv has tabs. Every value is a string."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self.names: list[str] = []

    def _header(self, lines: "_Lines", columns: dict[str, str]) -> None:
        _, names, _ = next(self._fields(lines), (1, [], None))
        self.names = names
        if len(set(names)) < len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise ValueError(f"{self.path}: the header names a column twice: {', '.join(twice)}")
        columns |= dict.fromkeys(names, "string")

    def _records(self, lines: "_Lines") -> Iterator[Record]:
        for line, fields, error in self._fields(lines):
            if error is None and len(fields) != len(self.names):
                error = f"{len(fields)} fields where the header has {len(self.names)}"
            if error is None and not _is_unicode("".join(fields)):
                error = "not valid UTF-8"
            yield line, {} if error else dict(zip(self.names, fields, strict=True)), error

    def _fields(self, lines: "_Lines") -> Iterator[tuple[int, list[str], str | None]]:
        csv.field_size_limit(MAX_CSV_FIELD)
        texts = (line.decode("utf-8-sig" if lines.number == 2 else "utf-8", "surrogateescape") for line in lines)
        reader = csv.reader(texts, delimiter=self.delimiter)
        while True:
            line = lines.number
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as e:
                yield line, [], f"not CSV: {e}"
                continue
            if fields:  # else a blank line
                yield line, fields, None


class Parquet(Table):
    """A Parquet file. Memory is bounded by one of its row groups."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.pq = import_pyarrow("to read Parquet").parquet

    def index(self, part_rows: int) -> Index:
        with open(self.path, "rb") as f:
            digest = _digest(f)
        with self._open() as file:
            return Index(
                file.metadata.num_rows, digest.hexdigest(), dict.fromkeys(file.schema_arrow.names, "arrow"), []
            )

    def parts(
        self, index: Index, numbers: Iterable[int], part_rows: int, columns: list[str] | None = None
    ) -> Iterator[Part]:
        for number, table in self._tables(index, numbers, part_rows, columns):
            rows = enumerate(table.to_pylist(), number * part_rows)
            yield number, [Row(i, None, values) for i, values in rows]

    def arrow_schema(self, index: Index) -> Any:
        with self._open() as file:
            return file.schema_arrow

    def arrow_tables(self, index: Index, numbers: Iterable[int], part_rows: int) -> Iterator[Any]:
        return (table for _, table in self._tables(index, numbers, part_rows, None))

    def _tables(
        self, index: Index, numbers: Iterable[int], part_rows: int, columns: list[str] | None
    ) -> Iterator[tuple[int, Any]]:
        with self._open() as file:
            reader = _RowReader(file, columns)
            for number in numbers:
                yield number, reader.read(number * part_rows, min((number + 1) * part_rows, index.num_rows))

    def _open(self):
        try:
            return self.pq.ParquetFile(self.path)
        except (OSError, ValueError) as e:
            if isinstance(e, (FileNotFoundError, PermissionError)):
                raise
            raise ValueError(f"{self.path} is not a Parquet file: {e}") from None


class _RowReader:
    """Reads rows [a, b) of a Parquet file for ascending a; goes through a row group once, and skips unwanted ones."""

    def __init__(self, file, columns: list[str] | None):
        self.file, self.columns = file, columns
        self.bounds = [0]
        for i in range(file.num_row_groups):
            self.bounds.append(self.bounds[-1] + file.metadata.row_group(i).num_rows)
        self.group = -1
        self.at = 0
        self.batches: Iterator = iter(())
        self.rest: Any = None

    def read(self, start: int, stop: int):
        import pyarrow

        pieces = []
        while start < stop:
            group = bisect_right(self.bounds, start) - 1
            if group != self.group:
                self._enter(group)
            batch = self._next(start, min(stop, self.bounds[group + 1]))
            pieces.append(batch)
            start += batch.num_rows
        schema = self.file.schema_arrow
        if self.columns is not None:
            schema = pyarrow.schema([schema.field(name) for name in self.columns])
        return pyarrow.Table.from_batches(pieces, schema)

    def _enter(self, group: int) -> None:
        self.batches = self.file.iter_batches(256, row_groups=[group], columns=self.columns)
        self.group, self.at, self.rest = group, self.bounds[group], None

    def _next(self, start: int, stop: int):
        """The rows from `start` on that the current batch holds, at most to `stop`."""
        while self.rest is None or self.at + self.rest.num_rows <= start:
            self.at += self.rest.num_rows if self.rest is not None else 0
            self.rest = next(self.batches)
        first = start - self.at
        return self.rest.slice(first, stop - start)


def open_table(path: Path) -> Table:
    """The table at a path, by its ending. Raises ValueError for one that is not known."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return JsonLines(path)
    if suffix in (".csv", ".tsv"):
        return Csv(path)
    if suffix in (".parquet", ".pq"):
        return Parquet(path)
    raise ValueError(
        f"{path}: a table ends in .jsonl, .csv, .tsv or .parquet; a folder or - (JSONL on stdin) will do too"
    )


def spool_stdin(target: Path) -> None:
    with open(target, "wb") as f:
        shutil.copyfileobj(sys.stdin.buffer, f)


def spool_folder(folder: Path, target: Path) -> tuple[int, int]:
    """Writes {"image": path below the folder} of every image, in an order that depends on names alone.

    Recursive; files and folders whose name begins with "." are left out. Links are followed, but each real folder is
    entered once, under its own name where that lies below `folder`: so loops end. Returns the numbers of images and
    of other files. Raises OSError for a folder that cannot be listed.
    """
    images = others = 0
    with open(target, "w", encoding="ascii") as f:
        for path in _walk(folder):
            if os.path.splitext(path)[1][1:].lower() in IMAGE_SUFFIXES:
                f.write(json.dumps({"image": path}) + "\n")  # ASCII: names that are not UTF-8 survive as surrogates
                images += 1
            else:
                others += 1
    return images, others


def _walk(root: Path) -> Iterator[str]:
    seen: set[tuple[int, int]] = set()
    links: list[str] = [""]  # folders still to be entered; the real ones below them are entered first
    for link in links:
        stack = [link]
        while stack:
            below = stack.pop()
            stat = os.stat(os.path.join(root, below))
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(os.path.join(root, below)) as entries:
                visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
            folders = [e for e in visible if e.is_dir()]
            links += [os.path.join(below, e.name) for e in folders if e.is_symlink()]
            stack += [os.path.join(below, e.name) for e in reversed(folders) if not e.is_symlink()]
            yield from (os.path.join(below, e.name) for e in visible if e.is_file() or _is_broken_link(e))


def _is_broken_link(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


class _Lines:
    """Iterates over the lines of a binary file; knows the offset and the number (from 1) of the next one."""

    def __init__(self, file: BinaryIO, offset: int = 0, number: int = 1, digest: Any = None):
        self.file, self.offset, self.number, self.digest = file, offset, number, digest

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> bytes:
        line = self.file.readline()
        if not line:
            raise StopIteration
        if self.digest is not None:
            self.digest.update(line)
        self.offset += len(line)
        self.number += 1
        return line


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as e:
        raise ValueError(f"not valid UTF-8 (byte {e.start} of the line)") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON: {e.msg} (column {e.colno})") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but a {type(value).__name__}")
    if b"\\ud" in line.lower() and not _is_unicode(json.dumps(value, ensure_ascii=False)):
        raise ValueError(f"not valid Unicode: {json.dumps(value)[:200]}")
    return value


def _is_unicode(text: str) -> bool:
    """False where a text holds half a surrogate pair: bytes that were not UTF-8, or a lone \\ud800 in JSON."""
    try:
        text.encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False


def _merge_types(columns: dict[str, str], values: dict[str, Any]) -> None:
    for name, value in values.items():
        old, new = columns.get(name, "null"), _type_of(value)
        if old != new:
            columns[name] = _wider(old, new)


def _type_of(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return "strings"
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return "json"
    return {type(None): "null", bool: "bool", int: "int", float: "float", str: "string"}.get(type(value), "json")


def _wider(a: str, b: str) -> str:
    if "null" in (a, b):
        return b if a == "null" else a
    return "float" if {a, b} == {"int", "float"} else "json"


def _as_kind(value: Any, kind: str) -> Any:
    """A value as its column's type in Arrow takes it."""
    if value is None:
        return None
    if kind == "json":
        return json.dumps(value, ensure_ascii=False)
    return float(value) if kind == "float" else value


def _digest(file: BinaryIO):
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest
