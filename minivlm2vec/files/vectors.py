"""Reads vectors back from .npy, .safetensors and .parquet, in chunks, and the columns of single rows."""

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .sources import import_pyarrow
from .writers import KEY, META, ROWS

CHUNK_BYTES = 64 << 20


class VectorFile:
    """A file of vectors [rows, dimension]; a NaN row has none.

    Attributes:
        path: where it is.
        shape: (rows, dimension).
        meta: what `embed` recorded, or None for a file of other origin.
    """

    def __init__(self, path: Path, shape: tuple[int, int], meta: dict[str, Any] | None):
        self.path, self.shape, self.meta = path, shape, meta

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, vectors [n, D]) through the file, some 64 MiB at a time."""
        raise NotImplementedError

    def rows(self, numbers: Iterable[int]) -> dict[int, dict[str, Any]]:
        """The columns of these rows; {} where none are recorded."""
        raise NotImplementedError

    def vectors(self, numbers: list[int]) -> Tensor:
        """[len(numbers), D] float32 of these rows."""
        raise NotImplementedError


class FlatFile(VectorFile):
    """.npy or .safetensors: the numbers lie in the file as in memory, and are mapped (copy-on-write, as torch wants
    memory that may be written; nothing is)."""

    def __init__(self, path: Path, array: np.ndarray, meta: dict[str, Any] | None):
        super().__init__(path, array.shape, meta)
        self.array = array

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        step = max(1, CHUNK_BYTES // max(1, self.shape[1] * self.array.itemsize))
        for start in range(0, self.shape[0], step):
            yield start, torch.from_numpy(self.array[start : start + step])

    def rows(self, numbers: Iterable[int]) -> dict[int, dict[str, Any]]:
        wanted = set(numbers)
        path = self.path.with_name(self.path.name + ROWS)
        if not path.is_file():
            return {n: {} for n in wanted}
        with open(path, "rb") as f:
            return {i: json.loads(line) for i, line in enumerate(f) if i in wanted}

    def vectors(self, numbers: list[int]) -> Tensor:
        return torch.from_numpy(self.array[numbers].astype(np.float32))


class ParquetFile(VectorFile):
    """.parquet with a column of fixed-size lists; read a row group at a time."""

    def __init__(self, path: Path):
        pq = import_pyarrow("to read Parquet").parquet
        self.file = pq.ParquetFile(path)
        schema = self.file.schema_arrow
        meta = json.loads((schema.metadata or {}).get(KEY.encode(), b"null"))
        self.column = meta["settings"]["vector_column"] if meta else "embedding"
        if self.column not in schema.names or not hasattr(schema.field(self.column).type, "list_size"):
            raise ValueError(f"{path} has no column {self.column!r} of fixed-size lists")
        super().__init__(path, (self.file.metadata.num_rows, schema.field(self.column).type.list_size), meta)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        step = max(1, CHUNK_BYTES // (4 * self.shape[1]))
        start = 0
        for batch in self.file.iter_batches(step, columns=[self.column]):
            yield start, self._vectors(batch.column(0))
            start += batch.num_rows

    def rows(self, numbers: Iterable[int]) -> dict[int, dict[str, Any]]:
        columns = [c for c in self.file.schema_arrow.names if c != self.column]
        return {n: table.to_pylist()[0] for n, table in self._take(sorted(set(numbers)), columns)}

    def vectors(self, numbers: list[int]) -> Tensor:
        found = dict(self._take(sorted(set(numbers)), [self.column]))
        return torch.cat([self._vectors(found[n].column(0).combine_chunks()).float() for n in numbers])

    def _take(self, numbers: list[int], columns: list[str]) -> Iterator[tuple[int, Any]]:
        """(number, table of one row), reading each row group that is needed once."""
        start = 0
        for group in range(self.file.num_row_groups):
            stop = start + self.file.metadata.row_group(group).num_rows
            wanted = [n for n in numbers if start <= n < stop]
            table = self.file.read_row_group(group, columns=columns) if wanted else None
            yield from ((n, table.slice(n - start, 1)) for n in wanted)
            start = stop

    def _vectors(self, column) -> Tensor:
        n, D = len(column), self.shape[1]
        flat = column.values.to_numpy(zero_copy_only=False)[column.offset * D : (column.offset + n) * D]
        vectors = np.array(flat).reshape(n, D)
        if column.null_count:
            vectors[column.is_null().to_numpy(zero_copy_only=False)] = np.nan
        return torch.from_numpy(vectors)


def open_vectors(path: Path) -> VectorFile:
    """Opens a file of vectors. Raises ValueError for one that is not."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        if path.suffix == ".npy":
            array, meta = np.load(path, mmap_mode="c", allow_pickle=False), _npy_meta(path)
        elif path.suffix == ".safetensors":
            array, meta = _map_safetensors(path)
        elif path.suffix == ".parquet":
            return ParquetFile(path)
        else:
            raise ValueError("vectors are in .npy, .safetensors, .parquet or .lance")
    except (ValueError, KeyError, TypeError, EOFError, struct.error) as e:
        raise ValueError(f"{path} holds no vectors: {e}") from None
    if array.ndim != 2 or array.dtype not in (np.float32, np.float16):
        raise ValueError(f"{path} holds {array.dtype} {list(array.shape)}; vectors are float32 or float16 [N, D]")
    return FlatFile(path, array, meta)


def read_meta(path: Path) -> dict[str, Any] | None:
    """What `embed` recorded of a file that it wrote, or None."""
    if path.suffix == ".lance":
        from .lance import Dataset

        return Dataset(path).meta
    return open_vectors(path).meta


def _npy_meta(path: Path) -> dict[str, Any] | None:
    meta = path.with_name(path.name + META)
    return json.loads(meta.read_text(encoding="utf-8")) if meta.is_file() else None


def _map_safetensors(path: Path) -> tuple[np.ndarray, dict[str, Any] | None]:
    with open(path, "rb") as f:
        length = struct.unpack("<Q", f.read(8))[0]
        if length > path.stat().st_size:
            raise ValueError("it is truncated, or no safetensors file")
        header = json.loads(f.read(length))
    tensor = header["vectors"]
    dtype, shape, start = np.dtype({"F32": "<f4", "F16": "<f2"}[tensor["dtype"]]), tensor["shape"], 8 + length
    meta = json.loads(header.get("__metadata__", {}).get(KEY, "null"))
    if 0 in shape:
        return np.empty(shape, dtype), meta
    return np.memmap(path, dtype, "c", start, tuple(shape)), meta
