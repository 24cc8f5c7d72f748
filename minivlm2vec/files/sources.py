"""Where rows come from: a JSONL, CSV or Parquet table, or a folder or stdin, first spooled to a JSONL.

No source is ever held in memory. One pass counts the rows, hashes the file and notes where each part of `part_rows`
rows begins; afterwards any part can be read by itself.
"""

import codecs
import csv
import hashlib
import json
import os
import shutil
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..atomic import open_replacing
from ..errors import some
from ..extras import import_pyarrow
from ..image_files import suffixes
from .rows import Row, as_json, is_unicode, plain_rows, printable

IMAGE_SUFFIXES = suffixes()
MAX_CSV_FIELD = 1 << 24  # characters; bounds what is read in search of a quote's end
PARQUET_SUFFIXES = (".parquet", ".pq")
MAX_LINE = 1 << 27  # bytes; a longer line of a table is a bad row
NOT_UTF8 = {  # how a file begins that is no text in UTF-8 -> what it is
    codecs.BOM_UTF32_LE: "in UTF-32", codecs.BOM_UTF32_BE: "in UTF-32", codecs.BOM_UTF16_LE: "in UTF-16",
    codecs.BOM_UTF16_BE: "in UTF-16", b"\x1f\x8b": "compressed (gzip)", b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"PK\3\4": "a zip, as .xlsx is", b"PAR1": "Parquet",
}  # fmt: skip

Part = tuple[int, list[Row]]  # its number, and its rows
Record = tuple[int, dict[str, Any], str | None]  # where it begins (a line from 1), its columns, why it cannot be read


@dataclass(frozen=True)
class Index:
    """What one pass over a source tells.

    Fields:
        num_rows: how many.
        fingerprint: sha256 of the file.
        columns: {name: type}, in order. Types are null, bool, int, long (integers of which a float64 does not hold
            some), float, string, strings (a list), json (any other or a mixture); for Parquet, whose types are its own
            business, "arrow".
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

    def stat(self) -> tuple[int, int]:
        """Size and time of change."""
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns

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
        with _Lines(self.path, digest) as lines:
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
        with _Lines(self.path) as lines:
            self._header(lines, {})
            for number in numbers:
                lines.seek(*index.starts[number])
                yield number, list(self._rows(islice(self._records(lines), part_rows), number * part_rows))

    def arrow_schema(self, index: Index) -> Any:
        pa = import_pyarrow("for columns of Arrow")
        types = {"null": pa.null(), "bool": pa.bool_(), "int": pa.int64(), "long": pa.int64(), "float": pa.float64(),
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
        while True:
            number = lines.number
            try:
                line = next(lines, None)
                if line is None:
                    return
                if line.strip():
                    yield number, _json_object(line), None
            except (ValueError, RecursionError) as e:
                yield number, {}, str(e) if self.has_lines else f"the file's name is not in UTF-8; rename it: {e}"


class Csv(LineTable):
    """A header and records, in UTF-8, quoted as RFC 4180 has it. Every value is a string; blank lines are no rows.

    Where the quotes of a record are not well-formed, or it goes over several lines and has not the header's number of
    fields, it is one line: that one is reported, and what a quote that is never closed would swallow are rows again.
    """

    delimiter = ","

    def __init__(self, path: Path):
        super().__init__(path)
        self.names: list[str] = []

    def _header(self, lines: "_Lines", columns: dict[str, str]) -> None:
        self.names = []
        line, self.names, error = next(self._fields(lines), (1, [], None))
        if error is not None:
            raise ValueError(f"{self.path}: the header, line {line}, is {error}")
        _check_names(self.path, self.names)
        columns |= dict.fromkeys(self.names, "string")

    def _records(self, lines: "_Lines") -> Iterator[Record]:
        for line, fields, error in self._fields(lines):
            if error is None and len(fields) != len(self.names):
                error = f"{len(fields)} fields where the header has {len(self.names)}"
            if error is None and not is_unicode("".join(fields)):
                error = "not valid UTF-8"
            yield line, {} if error else dict(zip(self.names, fields, strict=True)), error

    def _fields(self, lines: "_Lines") -> Iterator[tuple[int, list[str], str | None]]:
        """(line, fields, why it is no record) of each record."""
        csv.field_size_limit(MAX_CSV_FIELD)
        texts = map(_text, lines)
        while True:
            offset, line = lines.offset, lines.number
            try:
                fields = next(csv.reader(texts, delimiter=self.delimiter, strict=True), None)
                if lines.number > line + 1:
                    self._check_joined(lines, fields or [], (offset, line))
            except (csv.Error, ValueError) as e:
                lines.seek(offset, line)
                yield line, *self._no_record(lines, e)
                continue
            if fields is None:
                return
            if fields:  # else a blank line
                yield line, fields, None

    def _no_record(self, lines: "_Lines", error: Exception) -> tuple[list[str], str | None]:
        """What there is instead of a record; reads one line."""
        lines.skip()
        never = "a quote that is opened here is never closed"
        return [], f"not CSV: {never if 'unexpected end' in str(error) else error}"

    def _check_joined(self, lines: "_Lines", fields: list[str], start: tuple[int, int]) -> None:
        """Raises ValueError where the lines since `start` are not the one record that a quote makes of them."""
        if len(fields) != len(self.names or fields):
            raise ValueError(f"a quote that is opened here is closed in line {lines.number - 1}, and makes "
                             f"{len(fields)} fields where the header has {len(self.names)}")  # fmt: skip


class Tsv(Csv):
    """With tabs. Much of it is written without any quoting, as text/tab-separated-values has it: so quotes are literal
    in a line that is no record when they are not, and where every line that they would join is a record by itself."""

    delimiter = "\t"

    def _no_record(self, lines: "_Lines", error: Exception) -> tuple[list[str], str | None]:
        try:
            return _unquoted(next(lines)), None
        except ValueError as e:
            return [], str(e)

    def _check_joined(self, lines: "_Lines", fields: list[str], start: tuple[int, int]) -> None:
        super()._check_joined(lines, fields, start)
        end = lines.offset, lines.number
        lines.seek(*start)
        joined = [_unquoted(line) for line in islice(lines, end[1] - start[1]) if line.strip()]
        lines.seek(*end)
        if all(len(alone) == len(self.names or fields) for alone in joined):
            raise ValueError("each of the lines is a record")


class Parquet(Table):
    """A Parquet file, or several with the same columns, one after the other. Memory is bounded by a row group."""

    def __init__(self, path: Path, files: list[Path] | None = None):
        super().__init__(path)
        self.files = files or [path]
        self.pa = import_pyarrow("to read Parquet")

    def stat(self) -> tuple[int, int]:
        stats = [file.stat() for file in self.files]
        return sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)

    def index(self, part_rows: int) -> Index:
        digest, rows = hashlib.sha256(), 0
        for path in self.files:
            with open(path, "rb") as f:
                while block := f.read(1 << 20):
                    digest.update(block)
            with self._open(path) as file:
                rows += file.metadata.num_rows
        schema = self._schema()
        names = schema.names
        if len(set(names)) < len(names):
            raise ValueError(f"{self.path} has two columns of the same name: {some(_twice(names))}")
        self._check_fit(schema)
        return Index(rows, digest.hexdigest(), dict.fromkeys(names, "arrow"), [])

    def parts(
        self, index: Index, numbers: Iterable[int], part_rows: int, columns: list[str] | None = None
    ) -> Iterator[Part]:
        for number, table in self._tables(index, numbers, part_rows, columns):
            rows = enumerate(plain_rows(table), number * part_rows)
            yield number, [Row(i, None, values) for i, values in rows]

    def arrow_schema(self, index: Index) -> Any:
        return self._schema()

    def arrow_tables(self, index: Index, numbers: Iterable[int], part_rows: int) -> Iterator[Any]:
        return (table for _, table in self._tables(index, numbers, part_rows, None))

    def _tables(
        self, index: Index, numbers: Iterable[int], part_rows: int, columns: list[str] | None
    ) -> Iterator[tuple[int, Any]]:
        schema = self._schema()
        if columns is not None:
            schema = self.pa.schema([schema.field(name) for name in columns])
        reader = _RowReader(self, schema)
        for number in numbers:
            yield number, reader.read(number * part_rows, min((number + 1) * part_rows, index.num_rows))

    def _schema(self) -> Any:
        """Of all files: a column that some of them lack is null there."""
        schema = None
        for path in self.files:
            with self._open(path) as file:
                schema = file.schema_arrow if schema is None else self._joined(schema, file.schema_arrow, path)
        return schema

    def _joined(self, schema: Any, other: Any, path: Path) -> Any:
        if schema.equals(other):
            return schema
        try:
            return self.pa.unify_schemas([schema, other], promote_options="permissive")
        except (ValueError, TypeError, NotImplementedError) as e:
            raise ValueError(f"{path} has other columns than {self.files[0]}: {e}") from None

    def _check_fit(self, schema: Any) -> None:
        """Refuses values that the type which their column has in all files together does not hold: they are read
        through where a file has another type."""
        for path in self.files:
            with self._open(path) as file:
                own = file.schema_arrow
                other = [name for name in own.names if own.field(name).type != schema.field(name).type]
                for batch in file.iter_batches(columns=other) if other else ():
                    for name in other:
                        self._check_column(batch, schema.field(name), path)

    def _check_column(self, batch: Any, field: Any, path: Path) -> None:
        piece = self.pa.Table.from_batches([batch]).select([field.name])
        try:
            self.pa.concat_tables([self.pa.schema([field]).empty_table(), piece], promote_options="permissive")
        except (ValueError, TypeError, NotImplementedError) as e:
            own = piece.schema.field(0).type
            raise ValueError(f"{path}: its column {field.name!r} is {own}, and {field.type} in {self.path} as a whole, "
                             f"which does not hold it: {e}") from None  # fmt: skip

    def _open(self, path: Path) -> Any:
        try:
            return self.pa.parquet.ParquetFile(path)
        except (OSError, ValueError) as e:
            if isinstance(e, (FileNotFoundError, PermissionError)):
                raise
            raise ValueError(f"{path} is not a Parquet file: {e}") from None


class _RowReader:
    """Reads rows [a, b) for ascending a; goes through a row group once, and skips unwanted ones."""

    def __init__(self, table: Parquet, schema: Any):
        self.table, self.schema = table, schema
        self.groups: list[tuple[Path, int]] = []
        self.bounds = [0]
        for path in table.files:
            with table._open(path) as file:
                for i in range(file.num_row_groups):
                    self.groups.append((path, i))
                    self.bounds.append(self.bounds[-1] + file.metadata.row_group(i).num_rows)
        self.group = -1
        self.at = 0
        self.batches: Iterator = iter(())
        self.rest: Any = None

    def read(self, start: int, stop: int) -> Any:
        pieces = [self.schema.empty_table()]
        while start < stop:
            group = bisect_right(self.bounds, start) - 1
            if group != self.group:
                self._enter(group)
            batch = self._next(start, min(stop, self.bounds[group + 1]))
            pieces.append(self.table.pa.Table.from_batches([batch]))
            start += batch.num_rows
        return self.table.pa.concat_tables(pieces, promote_options="permissive")

    def _enter(self, group: int) -> None:
        self.batches = self._batches(*self.groups[group])
        self.group, self.at, self.rest = group, self.bounds[group], None

    def _batches(self, path: Path, group: int) -> Iterator[Any]:
        with self.table._open(path) as file:
            columns = [name for name in self.schema.names if name in file.schema_arrow.names]
            yield from file.iter_batches(256, row_groups=[group], columns=columns)

    def _next(self, start: int, stop: int) -> Any:
        """The rows from `start` on that the current batch holds, at most to `stop`."""
        while self.rest is None or self.at + self.rest.num_rows <= start:
            self.at += self.rest.num_rows if self.rest is not None else 0
            self.rest = next(self.batches)
        first = start - self.at
        return self.rest.slice(first, stop - start)


def open_table(path: Path) -> Table:
    """The table at a path, by its ending. Raises ValueError for one that is not known."""
    if not path.is_file():
        raise ValueError(f"{path} is neither a folder nor an ordinary file; a pipe is read by - (JSONL on stdin)")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return JsonLines(path)
    if suffix in (".csv", ".tsv"):
        return Tsv(path) if suffix == ".tsv" else Csv(path)
    if suffix in PARQUET_SUFFIXES:
        return Parquet(path)
    raise ValueError(
        f"{path}: a table ends in .jsonl, .csv, .tsv or .parquet; a folder or - (JSONL on stdin) will do too"
    )


def spool_stdin(target: Path) -> None:
    with open_replacing(target) as f:
        shutil.copyfileobj(sys.stdin.buffer, f)


@dataclass(frozen=True)
class Listing:
    """What was found in a folder.

    Fields:
        images: how many; others: how many other files, by their endings.
        tables: the Parquet files among the others, in the order of their names.
        unreadable: folders below it that cannot be listed, and why.
    """

    images: int
    others: dict[str, int]
    tables: list[str]
    unreadable: list[str]


def spool_folder(folder: Path, target: Path) -> Listing:
    """Writes {"image": path below the folder} of every image, in an order that depends on names alone.

    Recursive; files and folders whose name begins with "." are left out. Links are followed, but each real folder is
    entered once, under its own name where that lies below `folder`: so loops end. Raises OSError where `folder` itself
    cannot be listed.
    """
    images, others = 0, Counter[str]()
    tables: list[str] = []
    unreadable: list[str] = []
    with open_replacing(target, "w") as f:
        for path in _walk(folder, unreadable):
            ending = os.path.splitext(path)[1].lower()
            if ending[1:] in IMAGE_SUFFIXES:
                f.write(json.dumps({"image": path}) + "\n")  # ASCII: names that are not UTF-8 survive as surrogates
                images += 1
                continue
            others[ending] += 1
            if ending in PARQUET_SUFFIXES and not os.path.basename(path).startswith("_"):  # "_metadata"
                tables.append(path)
    return Listing(images, dict(others), tables, unreadable)


def images_below(folder: Path) -> Iterator[Path]:
    """The images of a folder and of all below it, as `spool_folder` finds them. Raises OSError where it cannot be
    listed."""
    for path in _walk(folder, []):
        if os.path.splitext(path)[1].lower()[1:] in IMAGE_SUFFIXES:
            yield folder / path


def table_of_folder(folder: Path, listing: Listing) -> Parquet | None:
    """The Parquet files of a folder without images, as one table; None where it holds no file at all. Raises ValueError
    for other files."""
    if listing.tables:
        hive = next((path for path in listing.tables if "=" in os.path.dirname(path)), None)
        if hive is not None:
            raise ValueError(f"{folder} is partitioned by names of folders ({hive}), whose values are not read: write "
                             "them into the files")  # fmt: skip
        return Parquet(folder, [folder / path for path in listing.tables])
    if listing.others:
        kinds = [f"{n:,} {printable(end) or 'without an ending'}" for end, n in Counter(listing.others).most_common()]
        raise ValueError(f"{folder} holds no image that is read, but other files ({some(kinds, 8)}); images end in "
                         f"{', '.join(sorted(IMAGE_SUFFIXES))}")  # fmt: skip
    return None


def _walk(root: Path, unreadable: list[str]) -> Iterator[str]:
    seen: set[tuple[int, int]] = set()
    links: list[str] = [""]  # folders still to be entered; the real ones below them are entered first
    for link in links:
        stack = [link]
        while stack:
            below = stack.pop()
            try:
                stat = os.stat(os.path.join(root, below))
                if (stat.st_dev, stat.st_ino) in seen:
                    continue
                seen.add((stat.st_dev, stat.st_ino))
                with os.scandir(os.path.join(root, below)) as entries:
                    visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
            except OSError as e:
                if not below:
                    raise
                unreadable.append(f"{below}: {e.strerror}")
                continue
            folders = [e for e in visible if e.is_dir()]
            links += [os.path.join(below, e.name) for e in folders if e.is_symlink()]
            stack += [os.path.join(below, e.name) for e in reversed(folders) if not e.is_symlink()]
            yield from (os.path.join(below, e.name) for e in visible if e.is_file() or _is_broken_link(e))


def _is_broken_link(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


class _Lines:
    """Iterates over the lines of a file, as bytes; knows the offset and the number (from 1) of the next one, and can go
    back. Lines end in LF, CRLF or CR. What is read for the first time is added to `digest`.

    Raises ValueError for a file that is no text in UTF-8, as its beginning tells, and for a line that is too long, and
    passed then."""

    def __init__(self, path: Path, digest: Any = None):
        self.text = open(path, encoding="latin-1", newline="")  # noqa: SIM115  (closed by __exit__; a byte a character)
        self.offset, self.number, self.digest, self.digested = 0, 1, digest, 0
        begin = self.text.read(64).encode("latin-1")
        kind = next((what for start, what in NOT_UTF8.items() if begin.startswith(start)), None)
        if kind is None and len(begin) > 3 and not (any(begin[::2]) and any(begin[1::2])):
            kind = "in UTF-16"
        if kind is not None:
            self.text.close()
            raise ValueError(f"{path} is {kind}; a table is text in UTF-8 (for UTF-16: iconv -f UTF-16 -t UTF-8)")
        self.seek(0, 1)

    def seek(self, offset: int, number: int) -> None:
        self.text.seek(offset)
        self.offset, self.number = offset, number

    def skip(self) -> None:
        """Passes the next line, however long it is."""
        self.number += 1
        while piece := self._read(1 << 20):
            if piece.endswith((b"\n", b"\r")):
                return

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: object) -> None:
        self.text.close()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> bytes:
        first = self.offset == 0
        line = self._read(MAX_LINE)
        if not line:
            raise StopIteration
        if len(line) == MAX_LINE and not line.endswith((b"\n", b"\r")):
            self.skip()
            raise ValueError(f"the line is longer than {MAX_LINE:,} bytes")
        self.number += 1
        return line.removeprefix(codecs.BOM_UTF8) if first else line

    def _read(self, size: int) -> bytes:
        """The rest of a line, at most so many bytes."""
        piece = self.text.readline(size).encode("latin-1")
        if self.digest is not None:
            self.digest.update(piece[max(0, self.digested - self.offset) :])
        self.offset += len(piece)
        self.digested = max(self.digested, self.offset)
        return piece


def _text(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")


def _unquoted(line: bytes) -> list[str]:
    return _text(line).rstrip("\r\n").split("\t")


def _check_names(path: Path, names: list[str]) -> None:
    """Refuses names of columns that are in another encoding, or not told apart."""
    for number, name in enumerate(names, 1):
        if not is_unicode(name):
            latin = printable(name.encode("utf-8", "surrogateescape").decode("latin-1"))
            raise ValueError(f"{path}: the name of column {number} is not in UTF-8 (in Latin-1 it is {latin!r}); save "
                             "the table in UTF-8")  # fmt: skip
    unnamed = [str(number) for number, name in enumerate(names, 1) if not name]
    if len(unnamed) > 1:
        raise ValueError(f"{path}: the header leaves columns {some(unnamed)} without a name: name or remove them")
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: the header names a column twice: {some([printable(n) for n in _twice(names)])}")


def _twice(names: list[str]) -> list[str]:
    return [name for name, n in Counter(names).items() if n > 1]


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as e:
        raise ValueError(f"not valid UTF-8 (byte {e.start} of the line)") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON: {e.msg} (column {e.colno})") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but a {type(value).__name__}")
    if b"\\ud" in line.lower() and not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise ValueError(f"not valid Unicode: {json.dumps(value)[:200]}")
    return value


def _merge_types(columns: dict[str, str], values: dict[str, Any]) -> None:
    for name, value in values.items():
        old, new = columns.get(name, "null"), _type_of(value)
        if old != new:
            columns[name] = _wider(old, new)


def _type_of(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return "strings"
    if isinstance(value, int) and abs(value) > 2**53:
        return "long" if -(2**63) <= value < 2**63 else "json"
    return {type(None): "null", bool: "bool", int: "int", float: "float", str: "string"}.get(type(value), "json")


def _wider(a: str, b: str) -> str:
    if "null" in (a, b):
        return b if a == "null" else a
    return {frozenset(("int", "float")): "float", frozenset(("int", "long")): "long"}.get(frozenset((a, b)), "json")


def _as_kind(value: Any, kind: str) -> Any:
    """A value as its column's type in Arrow takes it."""
    if value is None:
        return None
    if kind == "json":
        return as_json(value)
    return float(value) if kind == "float" else value
