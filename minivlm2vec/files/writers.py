"""Parts -> OUT: .npy, .safetensors, .parquet or .lance. Row i of OUT is row i of the source, always.

A row without a vector is NaN; in .lance it is null. Each writer takes (vectors [n, D], content) part by part, where
content is a list of {column: value}, or an Arrow table for the formats of `ARROW`; the bytes that it writes depend on
these alone. It writes elsewhere: OUT appears by `move`, after everything is on the disk.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..atomic import flush, flush_tree, remove, rename, write_bytes
from ..extras import import_lancedb, import_pyarrow
from .rows import as_text

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
    with open(beside(path, META), "w", encoding="utf-8", newline="\n") as meta:
        meta.write(json.dumps(head.meta, indent=1, ensure_ascii=False) + "\n")
        flush(meta)
    with open(path, "wb") as f:
        shape = {"descr": head.dtype.str, "fortran_order": False, "shape": (head.rows, head.dimension)}
        np.lib.format.write_array_header_1_0(f, shape)
        _write_vectors(f, path, pieces)
    return [META, ROWS, ""]


def write_safetensors(path: Path, head: Head, pieces: Pieces) -> list[str]:
    """One tensor, "vectors", written piece by piece, which safetensors itself does not do. Returns as `write_npy`."""
    size = head.rows * head.dimension * head.dtype.itemsize
    header = {
        "__metadata__": {KEY: json.dumps(head.meta, ensure_ascii=False)},
        "vectors": {
            "dtype": {"<f4": "F32", "<f2": "F16"}[head.dtype.str],
            "shape": [head.rows, head.dimension],
            "data_offsets": [0, size],
        },
    }
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        _write_vectors(f, path, pieces)
    return [ROWS, ""]


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
    another, the row's number, and the vectors. Returns as `write_npy`."""
    remove(path)
    reader = _numbered(head, pieces, 0)
    database = import_lancedb().connect(path.parent)
    database.create_table(path.stem, data=reader, schema=reader.schema, on_bad_vectors="null")
    flush_tree(path)
    return [""]


def append_lance(out: Path, note: Path, head: Head, pieces: Pieces) -> None:
    """Adds the rows to a .lance in one commit, unless an earlier, killed attempt did so: the number of rows before
    the first attempt, kept in the file `note`, tells."""
    table = import_lancedb().connect(out.parent).open_table(out.stem)
    rows = table.count_rows()
    if not note.exists():
        write_bytes(note, json.dumps(rows).encode())
    before = json.loads(note.read_text())
    if rows == before and head.rows:
        table.add(_numbered(head, pieces, before), on_bad_vectors="null")
    elif rows != before + head.rows:
        raise ValueError(f"{out} had {before:,} rows when appending began and has {rows:,} now: something else is "
                         "writing to it")  # fmt: skip
    table.optimize()  # takes the new rows into an index


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
    with open(beside(path, ERRORS), "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(bad, ensure_ascii=False) + "\n" for bad in bad_rows)
        flush(f)
    return [ERRORS]


def move(written: Path, out: Path, suffixes: list[str]) -> None:
    """Moves the files in place. OUT itself vanishes first and appears last: where it is, all is."""
    if "" in suffixes:
        remove(out)
    remove(beside(out, ERRORS))
    for suffix in suffixes:
        rename(beside(written, suffix), beside(out, suffix))


def beside(path: Path, suffix: str) -> Path:
    """OUT.npy -> OUT.npy.json."""
    return path.with_name(path.name + suffix)


def _write_vectors(f: IO[bytes], path: Path, pieces: Pieces) -> None:
    with open(beside(path, ROWS), "w", encoding="utf-8", newline="\n") as rows:
        for vectors, content in pieces:
            f.write(np.ascontiguousarray(vectors).data)
            rows.writelines(json.dumps(c, ensure_ascii=False, default=as_text) + "\n" for c in content)
        flush(rows)
    flush(f)


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
    return schema.with_metadata(meta | {KEY: json.dumps(head.meta, ensure_ascii=False)})


def _append_vectors(table: Any, vectors: np.ndarray, schema: Any, *, null: bool = False) -> Any:
    """The table with its vectors. null: not NaN but null where there is none, which pyarrow before 26 reads from no
    Parquet file (apache/arrow#35692)."""
    pa = import_pyarrow("for columns of Arrow")
    bad = np.isnan(vectors).any(axis=1)
    values = pa.array(np.where(bad[:, None], vectors.dtype.type(0 if null else np.nan), vectors).ravel())
    column = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1], mask=pa.array(bad) if null else None)
    return pa.table([*table.columns, column], schema=schema)


def _numbered(head: Head, pieces: Pieces, first: int) -> Any:
    """A stream of Arrow batches for .lance: the columns, the row's number from `first` on, the vector."""
    pa = import_pyarrow("for columns of Arrow")
    columns = head.schema.append(pa.field(ROW_NUMBER, pa.int64()))
    schema = _with_vectors(replace(head, schema=columns))
    settings = head.meta["settings"]

    def batches() -> Iterator[Any]:
        start = first
        for vectors, table in pieces:
            table = _with_absolute_paths(table, settings["image_column"], settings["image_root"])
            numbers = pa.array(np.arange(start, start + len(vectors)))
            table = table.append_column(ROW_NUMBER, numbers)
            yield from _append_vectors(table, vectors, schema, null=True).to_batches()
            start += len(vectors)

    return pa.RecordBatchReader.from_batches(schema, batches())


def _with_absolute_paths(table: Any, column: str | None, root: str) -> Any:
    """The table with absolute paths in its image column."""
    pa = import_pyarrow("for columns of Arrow")
    if column not in table.column_names or table.schema.field(column).type != pa.string():
        return table
    paths = [os.path.join(root, v) if v and ":" not in v[:6] else v for v in table[column].to_pylist()]
    return table.set_column(table.column_names.index(column), table.schema.field(column), pa.array(paths, pa.string()))
