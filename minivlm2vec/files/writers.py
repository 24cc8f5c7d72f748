"""Parts -> OUT: .npy, .safetensors, .parquet or .lance. Row i of OUT is row i of the source, always.

A row without a vector is NaN; in .lance it is null. Each writer takes (vectors [n, D], content) part by part, where
content is a list of {column: value}, or an Arrow table for the formats of `ARROW`; the bytes that it writes depend on
these alone. It writes elsewhere: OUT appears by `move`, after everything is on the disk.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..atomic import flush, flush_tree, remove, rename, write_bytes
from ..errors import some
from ..extras import import_lancedb, import_pyarrow
from .rows import Columns, as_json, plain_column
from .sources import Index, Table

ROWS = ".rows.jsonl"  # beside .npy and .safetensors: line i has the columns of row i
META = ".json"  # beside .npy: what made it
ERRORS = ".errors.jsonl"  # beside all: the rows without a vector, and why
KEY = "minivlm2vec"  # of the metadata in .safetensors, .parquet and .lance
ROW_NUMBER = "row_number"  # a column of .lance
ARROW = (".parquet", ".lance")


@dataclass(frozen=True)
class Head:
    """What is known before the first vector: [rows, dimension], the dtype, the metadata, and for the formats of
    `ARROW` the pyarrow.Schema of the columns and the name of the vectors' column."""

    rows: int
    dimension: int
    dtype: np.dtype
    meta: dict[str, Any]
    schema: Any = None
    vector_column: str = "embedding"


Pieces = Iterator[tuple[np.ndarray, Any]]


def write_npy(path: Path, head: Head, pieces: Pieces) -> list[str]:
    """Writes `path` and its companions; returns the suffixes of the files, the vectors' own last."""
    with open(path, "wb") as f:
        shape = {"descr": head.dtype.str, "fortran_order": False, "shape": (head.rows, head.dimension)}
        np.lib.format.write_array_header_1_0(f, shape)
        rows = _write_vectors(f, path, pieces)
    with open(beside(path, META), "w", encoding="utf-8", newline="\n") as meta:
        digests = {"vectors_digest": sampled_digest(path), "rows_digest": rows}
        meta.write(as_json(head.meta | digests, indent=1) + "\n")
        flush(meta)
    return [META, ROWS, ""]


def write_safetensors(path: Path, head: Head, pieces: Pieces) -> list[str]:
    """One tensor, "vectors", written piece by piece, which safetensors itself does not do. Returns as `write_npy`."""
    with open(path, "wb") as f:
        f.write(_safetensors_header(head, "0" * 64))
        rows = _write_vectors(f, path, pieces)
        f.seek(0)
        f.write(_safetensors_header(head, rows))  # of the same length
        flush(f)
    return [ROWS, ""]


def _safetensors_header(head: Head, rows_digest: str) -> bytes:
    header = {
        "__metadata__": {KEY: as_json(head.meta | {"rows_digest": rows_digest})},
        "vectors": {
            "dtype": {"<f4": "F32", "<f2": "F16"}[head.dtype.str],
            "shape": [head.rows, head.dimension],
            "data_offsets": [0, head.rows * head.dimension * head.dtype.itemsize],
        },
    }
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_parquet(path: Path, head: Head, pieces: Pieces) -> list[str]:
    """The source's columns, then the vectors as a fixed-size list; a row group per part. Returns as `write_npy`."""
    pa = import_pyarrow("to write Parquet")
    schema = _with_vectors(head)
    vectors_leaf = f"{head.vector_column}.list.element"
    others = [name for name in _leaf_columns(schema) if name != vectors_leaf]
    compression = dict.fromkeys(others, "zstd") | {vectors_leaf: "none"}  # vectors hardly shrink
    options = {"compression": compression, "use_dictionary": others, "write_statistics": others}
    with open(path, "wb") as f:
        with pa.parquet.ParquetWriter(f, schema, **options) as writer:
            for vectors, table in pieces:
                writer.write_table(_append_vectors(table, vectors, schema), row_group_size=max(1, len(vectors)))
        flush(f)
    return [""]


def write_lance(path: Path, head: Head, pieces: Pieces) -> list[str]:
    """A table of LanceDB: the source's columns with absolute paths of images, so that folders can be appended to one
    another, the row's number, and the vectors. Returns as `write_npy`.

    The table is made empty and then added to: create_table with data sets to null what it takes for bad vectors, in the
    source's own columns too."""
    remove(path)
    reader = _numbered(head, pieces, 0)
    table = import_lancedb().connect(path.parent).create_table(path.stem, schema=reader.schema)
    if head.rows:
        table.add(reader)
    flush_tree(path)
    return [""]


def append_lance(out: Path, note: Path, head: Head, pieces: Pieces) -> int:
    """Adds the rows to a .lance in one commit, unless an earlier, killed attempt did so: the number of rows before
    the first attempt, kept in the file `note`, tells. Returns it."""
    table = import_lancedb().connect(out.parent).open_table(out.stem)
    rows = table.count_rows()
    if not note.exists():
        write_bytes(note, json.dumps(rows).encode())
    try:
        before = int(note.read_bytes())
    except ValueError:
        raise ValueError(f"{note} is damaged: whether rows were appended is not known; {out} has {rows:,} rows now. If "
                         f"none of them is of this run, remove {note} and run the command again, else remove "
                         f"{note.parent}") from None  # fmt: skip
    if rows == before and head.rows:
        table.add(_numbered(head, pieces, before, table.schema))
    elif rows != before + head.rows:
        raise ValueError(f"{out} had {before:,} rows when appending began and has {rows:,} now: something else is "
                         "writing to it")  # fmt: skip
    table.optimize()  # takes the new rows into an index
    return before


def check_appended(out: Path, there: Any, table: Table, index: Index, part_rows: int) -> None:
    """Refuses columns that a .lance, of the schema `there`, has not or has of a type that their values do not fit: they
    are read through where the types are not the same."""
    pa = import_pyarrow("for columns of Arrow")
    own = lance_schema(table.arrow_schema(index))
    more = [name for name in own.names if name not in there.names or name == ROW_NUMBER]
    if more:
        raise ValueError(f"cannot append to {out}, which has no column {some([repr(name) for name in more])}")
    lacking = [f.name for f in there if not f.nullable and f.name not in own.names]
    if lacking:
        raise ValueError(f"cannot append to {out}, whose column {lacking[0]!r} is never null")
    other = [field for field in own if field != there.field(field.name)]
    for piece in table.arrow_tables(index, range(-(-index.num_rows // part_rows)), part_rows) if other else ():
        for field in other:
            wanted = there.field(field.name)
            try:
                _check_no_nan(_fitted(_for_lance(piece.select([field.name])), pa.schema([wanted])).column(0))
            except (ValueError, TypeError, NotImplementedError) as e:
                raise ValueError(f"cannot append to {out}: its column {wanted.name!r} is {wanted.type}, that of the "
                                 f"table is {field.type}: {said(e)}") from None  # fmt: skip


def _check_no_nan(column: Any) -> None:
    """Lance takes no NaN in what could be a vector."""
    pa = import_pyarrow("for columns of Arrow")
    vectors = pa.types.is_fixed_size_list(column.type) and pa.types.is_floating(column.type.value_type)
    if vectors and any(np.isnan(c.flatten().to_numpy(zero_copy_only=False)).any() for c in column.chunks):
        raise ValueError("a NaN stands in it")


def said(e: Exception) -> str:
    """What an error of a library says, without where in its sources it says so."""
    return str(e).split(", /")[0].split("\n")[0] or type(e).__name__


WRITERS: dict[str, Callable[[Path, Head, Pieces], list[str]]] = {
    ".npy": write_npy,
    ".safetensors": write_safetensors,
    ".parquet": write_parquet,
    ".lance": write_lance,
}


def require_packages(suffix: str) -> None:
    """Raises ImportError where the extra that a format needs is missing."""
    if suffix == ".parquet":
        import_pyarrow("to write Parquet")
    if suffix == ".lance":
        import_lancedb()


def write_errors(path: Path, bad_rows: list[dict[str, Any]]) -> list[str]:
    """A line of JSON for each row without a vector; no such file where every row has one. Returns as `write_npy`."""
    if not bad_rows:
        return []
    beside(path, ERRORS).unlink(missing_ok=True)
    with open(beside(path, ERRORS), "w", encoding="utf-8", newline="\n") as f:
        f.writelines(as_json(bad) + "\n" for bad in bad_rows)
        flush(f)
    return [ERRORS]


def join_errors(out: Path, written: Path, before: int) -> list[str]:
    """Puts the errors of OUT's first `before` rows in front of those that `written` tells of the rows behind them.
    Returns as `write_npy`."""
    old, new = _read_errors(out), _read_errors(written)
    both = [bad for bad in old if bad["row"] < before] + [bad | {"row": bad["row"] + before} for bad in new]
    return write_errors(written, both)


def _read_errors(path: Path) -> list[dict[str, Any]]:
    errors = beside(path, ERRORS)
    return [json.loads(line) for line in errors.read_text(encoding="utf-8").splitlines()] if errors.is_file() else []


def move(written: Path, out: Path, suffixes: list[str]) -> None:
    """Moves the files in place. OUT itself vanishes first and appears last: where it is, all is."""
    if "" in suffixes:
        remove(out)
    if ERRORS not in suffixes:
        remove(beside(out, ERRORS))
    for suffix in suffixes:
        rename(beside(written, suffix), beside(out, suffix))


def beside(path: Path, suffix: str) -> Path:
    """OUT.npy -> OUT.npy.json."""
    return path.with_name(path.name + suffix)


def sampled_digest(path: Path) -> str:
    """sha256 of a file's size and of 64 MiB of it: all of a smaller one, of a larger one blocks evenly spread. Tells
    files of different runs apart at a price that does not grow with them."""
    size, block = path.stat().st_size, 1 << 20
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as f:
        for i in range(64):
            f.seek(max(i * block, (size - block) * i // 63))
            digest.update(f.read(block))
    return digest.hexdigest()


def _write_vectors(f: IO[bytes], path: Path, pieces: Pieces) -> str:
    """Writes the vectors to `f` and the rows to their own file, whose sha256 it returns."""
    digest = hashlib.sha256()
    with open(beside(path, ROWS), "wb") as rows:
        for vectors, content in pieces:
            f.write(np.ascontiguousarray(vectors).data)
            for line in ((as_json(c) + "\n").encode() for c in content):
                digest.update(line)
                rows.write(line)
        flush(rows)
    flush(f)
    return digest.hexdigest()


def _leaf_columns(schema: Any) -> list[str]:
    """The names that Parquet gives the columns' leaves: "a", "b.list.element"."""
    pa = import_pyarrow("to write Parquet")
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(schema.empty_table(), sink)
    leaves = pa.parquet.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [leaves.column(i).path for i in range(len(leaves))]


def _with_vectors(head: Head) -> Any:
    """The Arrow schema of OUT: the source's columns, the vectors, the metadata."""
    pa = import_pyarrow("for columns of Arrow")
    element = pa.float16() if head.dtype == np.float16 else pa.float32()
    schema = head.schema.append(pa.field(head.vector_column, pa.list_(element, head.dimension)))
    meta = {k: v for k, v in (head.schema.metadata or {}).items() if k != b"pandas"}
    return schema.with_metadata(meta | {KEY: as_json(head.meta)})


def _append_vectors(table: Any, vectors: np.ndarray, schema: Any, *, null: bool = False) -> Any:
    """The table with its vectors. null: not NaN but null where there is none, which pyarrow before 26 reads from no
    Parquet file (apache/arrow#35692)."""
    pa = import_pyarrow("for columns of Arrow")
    bad = np.isnan(vectors).any(axis=1)
    values = pa.array(np.where(bad[:, None], vectors.dtype.type(0 if null else np.nan), vectors).ravel())
    column = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1], mask=pa.array(bad) if null else None)
    return pa.table([*table.columns, column], schema=schema)


def _numbered(head: Head, pieces: Pieces, first: int, there: Any = None) -> Any:
    """A stream of Arrow batches for .lance: the columns, the row's number from `first` on, the vector; of the schema
    `there`, where it is given."""
    pa = import_pyarrow("for columns of Arrow")
    columns = lance_schema(head.schema).append(pa.field(ROW_NUMBER, pa.int64()))
    schema = _with_vectors(replace(head, schema=columns))
    settings = head.meta["settings"]

    def batches() -> Iterator[Any]:
        start = first
        for vectors, table in pieces:
            table = _for_lance(_with_absolute_paths(table, settings["image_column"], settings["image_root"]))
            numbers = pa.array(np.arange(start, start + len(vectors)))
            table = _append_vectors(table.append_column(ROW_NUMBER, numbers), vectors, schema, null=True)
            yield from (table if there is None else _fitted(table, there)).to_batches()
            start += len(vectors)

    return pa.RecordBatchReader.from_batches(schema if there is None else there, batches())


def lance_schema(schema: Any) -> Any:
    """The columns as .lance holds them: a list of a fixed size, of which Lance takes only vectors without a NaN, and a
    view of a list are lists."""
    pa = import_pyarrow("for columns of Arrow")

    def kind(t: Any) -> Any:
        fixed = pa.types.is_fixed_size_list(t) or pa.types.is_list_view(t) or pa.types.is_large_list_view(t)
        return pa.list_(t.value_type) if fixed else t

    return pa.schema([field.with_type(kind(field.type)) for field in schema], schema.metadata)


def _for_lance(table: Any) -> Any:
    """The table as `lance_schema` has it; strings that are not UTF-8, which Lance does not take, with U+FFFD."""
    pa = import_pyarrow("for columns of Arrow")
    table = table.cast(lance_schema(table.schema))
    for number, field in enumerate(table.schema):
        try:
            table.column(number).validate(full=True)
        except ValueError:
            plain = [_valid(value) for value in plain_column(table.column(number))]
            table = table.set_column(number, field, pa.array(plain, field.type))
    return table


def _valid(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, list):
        return [_valid(v) for v in value]
    return {k: _valid(v) for k, v in value.items()} if isinstance(value, dict) else value


def _fitted(table: Any, schema: Any) -> Any:
    """The table with these columns and no others: values are cast, a missing column is null. Raises ValueError where a
    value does not fit."""
    pa = import_pyarrow("for columns of Arrow")
    names, rows = table.column_names, table.num_rows
    for f in schema:
        if f.name in names:
            _check_kind(table.schema.field(f.name).type, f.type)
    columns = [table[f.name].cast(f.type) if f.name in names else pa.nulls(rows, f.type) for f in schema]
    for field, column in zip(schema, columns, strict=True):
        if column.null_count and not field.nullable:
            raise ValueError(f"some rows have no {field.name!r}")
    return pa.table(columns, schema=schema)


def _check_kind(own: Any, wanted: Any) -> None:
    """Refuses what a cast would take for a number or a truth value though it is none: "007" is not 7, true not 1."""
    pa = import_pyarrow("for columns of Arrow")
    own, wanted = (t.value_type if pa.types.is_dictionary(t) else t for t in (own, wanted))
    if hasattr(own, "value_type") and hasattr(wanted, "value_type"):
        return _check_kind(own.value_type, wanted.value_type)
    if pa.types.is_struct(own) and pa.types.is_struct(wanted):
        for field in wanted:
            if own.get_field_index(field.name) >= 0:
                _check_kind(own.field(field.name).type, field.type)
        return None
    kinds = (pa.types.is_boolean, lambda t: pa.types.is_integer(t) or pa.types.is_floating(t) or pa.types.is_decimal(t))
    if not pa.types.is_null(own) and any(kind(wanted) and not kind(own) for kind in kinds):
        raise ValueError(f"{own} is not cast to {wanted}, which changes values")


def _with_absolute_paths(table: Any, column: str | None, root: str) -> Any:
    """The table with absolute paths in its image column, whichever way that holds them."""
    pa = import_pyarrow("for columns of Arrow")
    if column not in table.column_names:
        return table
    field, columns = table.schema.field(column), Columns(None, column, Path(root))
    values = [columns.absolute(_valid(value)) for value in plain_column(table[column])]
    return table.set_column(table.column_names.index(column), field, pa.array(values, field.type))
