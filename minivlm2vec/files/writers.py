"""Parts -> one file: .npy, .safetensors or .parquet. Row i of the file is row i of the source, always.

A row without a vector is NaN. Each writer takes (vectors [n, D], content)
part by part, where content is a list of {column: value} or, for .parquet, an Arrow table; the bytes it writes depend
on these alone. Nothing is left where a writer fails: OUT appears by `publish`, after everything is on the disk.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .parts import flush, rename
from .sources import Row, import_pyarrow

ROWS = ".rows.jsonl"  # beside .npy and .safetensors: line i has the columns of row i
META = ".json"  # beside .npy: what made it
KEY = "minivlm2vec"  # of the metadata in .safetensors and .parquet


@dataclass(frozen=True)
class Head:
    """What is known before the first vector: [rows, dimension], the dtype, the metadata, and for Parquet the Arrow
    schema of the columns and the name of the vectors' column."""

    rows: int
    dimension: int
    dtype: np.dtype
    meta: dict[str, Any]
    schema: Any = None
    vector_column: str = "embedding"


Pieces = Iterator[tuple[np.ndarray, Any]]


def write_npy(path: Path, head: Head, pieces: Pieces) -> list[str]:
    """Writes `path` and its companions; returns the suffixes of the files, the vectors' own last."""
    _write_text(path, META, json.dumps(head.meta, indent=1, ensure_ascii=False) + "\n")
    with open(path, "wb") as f:
        shape = {"descr": head.dtype.str, "fortran_order": False, "shape": (head.rows, head.dimension)}
        np.lib.format.write_array_header_1_0(f, shape)
        _write_vectors(f, path, pieces)
    return [META, ROWS, ""]


def write_safetensors(path: Path, head: Head, pieces: Pieces) -> list[str]:
    """One tensor, "vectors". Returns as `write_npy`."""
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
    schema = with_vectors(head)
    element = f"{head.vector_column}.list.element"
    compression = dict.fromkeys(leaf_columns(schema), "zstd") | {element: "none"}  # vectors hardly shrink
    with open(path, "wb") as f:
        with pa.parquet.ParquetWriter(
            f, schema, compression=compression, use_dictionary=[c for c in leaf_columns(schema) if c != element],
            write_statistics=[c for c in leaf_columns(schema) if c != element],
        ) as writer:  # fmt: skip
            for vectors, table in pieces:
                writer.write_table(append_vectors(table, vectors, schema), row_group_size=max(1, len(vectors)))
        flush(f)
    return [""]


def publish(written: Path, out: Path, suffixes: list[str]) -> None:
    """Moves the files in place. OUT itself vanishes first and appears last: where it is, all is."""
    out.unlink(missing_ok=True)
    for suffix in suffixes:
        rename(_beside(written, suffix), _beside(out, suffix))


def leaf_columns(schema) -> list[str]:
    """The names that Parquet gives the columns' leaves: "a", "b.list.element"."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    leaves = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [leaves.column(i).path for i in range(len(leaves))]


def with_vectors(head: Head):
    """The Arrow schema of OUT: the source's columns, the vectors, the metadata."""
    import pyarrow as pa

    if head.vector_column in head.schema.names:
        raise ValueError(
            f"the table has a column {head.vector_column!r} already; --vector-column gives the vectors another name"
        )
    element = pa.float16() if head.dtype == np.float16 else pa.float32()
    schema = head.schema.append(pa.field(head.vector_column, pa.list_(element, head.dimension)))
    meta = {k: v for k, v in (head.schema.metadata or {}).items() if k != b"pandas"}
    return schema.with_metadata(meta | {KEY: json.dumps(head.meta, ensure_ascii=False)})


def append_vectors(table, vectors: np.ndarray, schema, *, null: bool = False):
    """The table with its vectors. null: not NaN but null where there is none, which pyarrow before 26 reads from no
    Parquet file (apache/arrow#35692)."""
    import pyarrow as pa

    bad = np.isnan(vectors).any(axis=1)
    values = pa.array(np.where(bad[:, None], vectors.dtype.type(0 if null else np.nan), vectors).ravel())
    column = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1], mask=pa.array(bad) if null else None)
    return pa.table([*table.columns, column], schema=schema)


def arrow_schema(columns: dict[str, str]):
    """The Arrow schema of a JSONL's or CSV's columns."""
    import pyarrow as pa

    types = {"null": pa.null(), "bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "string": pa.string(),
             "strings": pa.list_(pa.string()), "json": pa.string()}  # fmt: skip
    return pa.schema([(name, types[kind]) for name, kind in columns.items()])


def arrow_table(rows: list[Row], columns: dict[str, str]):
    """Rows of a JSONL or CSV as an Arrow table; a value of a mixed or nested column becomes JSON text."""
    import pyarrow as pa

    schema = arrow_schema(columns)
    arrays = []
    for (name, kind), column in zip(columns.items(), schema, strict=True):
        values = [row.columns.get(name) for row in rows]
        if kind == "json":
            values = [None if v is None else json.dumps(v, ensure_ascii=False) for v in values]
        elif kind == "float":
            values = [None if v is None else float(v) for v in values]
        arrays.append(pa.array(values, column.type))
    return pa.table(arrays, schema=schema)


def _write_vectors(f, path: Path, pieces: Pieces) -> None:
    with open(_beside(path, ROWS), "w", encoding="utf-8", newline="\n") as rows:
        for vectors, content in pieces:
            f.write(np.ascontiguousarray(vectors).data)
            rows.writelines(json.dumps(c, ensure_ascii=False, default=_plain) + "\n" for c in content)
        flush(rows)
    flush(f)


def _write_text(path: Path, suffix: str, text: str) -> None:
    with open(_beside(path, suffix), "w", encoding="utf-8", newline="\n") as f:
        f.write(text)
        flush(f)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _plain(value: Any) -> Any:
    """What JSON has no type for, as text: a date, a decimal; bytes by their number."""
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


WRITERS = {".npy": write_npy, ".safetensors": write_safetensors, ".parquet": write_parquet}
