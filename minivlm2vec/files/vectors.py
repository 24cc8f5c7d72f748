"""OUT -> rows and vectors: reads back what `embed` wrote, in chunks, and the columns of single rows."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import Option, OptionError
from ..extras import import_lancedb, import_pyarrow
from .rows import plain_rows
from .writers import KEY, META, ROW_NUMBER, ROWS, beside, sampled_digest

CHUNK_BYTES = 64 << 20
NEEDED = {"checkpoint", "dimension", "image_column", "vector_column"}  # of the settings that `embed` recorded
REFINE = 10  # an index brings so many times as many rows as asked, which are then scored exactly


class Vectors:
    """Vectors [rows, dimension] with the columns of their rows; some rows may have none.

    Attributes:
        path: where they are.
        shape: (rows, dimension).
        meta: what `embed` recorded, or None for a file of other origin: {"model": where it is found again,
            "settings": {…}, "source", "images", "rows", "bad_rows", "computed_with"}, and the digests of its files.
    """

    def __init__(self, path: Path, shape: tuple[int, int], meta: dict[str, Any] | None):
        self.path, self.shape, self.meta = path, shape, meta

    @property
    def settings(self) -> dict[str, Any]:
        """What was decided about the vectors, such as "instruction"; {} for a file of other origin."""
        return self.meta["settings"] if self.meta else {}

    @property
    def has_images(self) -> bool:
        """True where rows have a column for images, and for a file of other origin."""
        return self.meta is None or self.settings["image_column"] is not None

    def vectors(self, numbers: Iterable[int]) -> Tensor:
        """[n, D] float32 of these rows; NaN where there is none."""
        raise NotImplementedError


class VectorFile(Vectors):
    """A file that is scanned from its first vector to its last; a row without a vector is NaN."""

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, vectors [n, D] float32 or float16) through the file, some 64 MiB at a time."""
        raise NotImplementedError

    def rows(self, numbers: Iterable[int]) -> dict[int, dict[str, Any]]:
        """The columns of these rows; {} where none are recorded."""
        raise NotImplementedError


class FlatFile(VectorFile):
    """.npy or .safetensors: the numbers lie in the file as in memory, and are mapped."""

    def __init__(self, path: Path, tensor: Tensor, meta: dict[str, Any] | None):
        super().__init__(path, (tensor.shape[0], tensor.shape[1]), meta)
        self.tensor = tensor
        recorded = (meta["rows"], meta["settings"]["dimension"]) if meta else self.shape
        if recorded != self.shape:
            raise ValueError(f"{path} holds vectors {list(self.shape)}, and {list(recorded)} are recorded for it: one "
                             "of its files is not of the same run")  # fmt: skip
        digest = (meta or {}).get("vectors_digest")  # files of earlier versions have none
        if digest is not None and digest != sampled_digest(path):
            raise ValueError(f"{path} and {beside(path, META)} are not of the same run, or one was changed: the digest "
                             "of the vectors is another than the one recorded")  # fmt: skip

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        step = max(1, CHUNK_BYTES // max(1, self.shape[1] * self.tensor.itemsize))
        for start in range(0, self.shape[0], step):
            yield start, self.tensor[start : start + step]

    def rows(self, numbers: Iterable[int]) -> dict[int, dict[str, Any]]:
        wanted = set(numbers)
        path = beside(self.path, ROWS)
        if not path.is_file():
            return {n: {} for n in wanted}
        found, lines, digest = {}, 0, hashlib.sha256()
        with open(path, "rb") as f:
            for lines, line in enumerate(f, 1):
                digest.update(line)
                if lines - 1 in wanted:
                    found[lines - 1] = _columns_of(path, lines, line)
        if lines != self.shape[0]:
            raise ValueError(f"{path} has {lines:,} lines, {self.path} has {self.shape[0]:,} rows: one of them is not "
                             "of the same run, or was cut")  # fmt: skip
        if (self.meta or {}).get("rows_digest", digest.hexdigest()) != digest.hexdigest():
            raise ValueError(f"{path} and {self.path} are not of the same run, or the rows were changed: their "
                             "digest is another than the one recorded")  # fmt: skip
        return found

    def check_rows(self) -> None:
        """Raises ValueError where the file of the rows is not the one that was written with the vectors."""
        self.rows([])

    def vectors(self, numbers: Iterable[int]) -> Tensor:
        return self.tensor[torch.tensor(list(numbers), dtype=torch.int64)].float()


class ParquetFile(VectorFile):
    """.parquet with a column of fixed-size lists; read a row group at a time."""

    def __init__(self, path: Path):
        self.file = import_pyarrow("to read Parquet").parquet.ParquetFile(path)
        schema = self.file.schema_arrow
        meta = _meta(schema.metadata)
        self.column = meta["settings"]["vector_column"] if meta else "embedding"
        if self.column not in schema.names or not hasattr(schema.field(self.column).type, "list_size"):
            raise ValueError(f"{path} has no column {self.column!r} of fixed-size lists")
        kind = schema.field(self.column).type
        if str(kind.value_type) not in ("halffloat", "float", "double"):
            raise ValueError(f"column {self.column!r} holds {kind.value_type}; vectors are float32 or float16")
        super().__init__(path, (self.file.metadata.num_rows, kind.list_size), meta)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        step = max(1, CHUNK_BYTES // (4 * self.shape[1]))
        start = 0
        for batch in self.file.iter_batches(step, columns=[self.column]):
            yield start, self._vectors(batch.column(0))
            start += batch.num_rows

    def rows(self, numbers: Iterable[int]) -> dict[int, dict[str, Any]]:
        columns = [c for c in self.file.schema_arrow.names if c != self.column]
        return {n: plain_rows(table)[0] for n, table in self._take(sorted(set(numbers)), columns)}

    def vectors(self, numbers: Iterable[int]) -> Tensor:
        numbers = list(numbers)
        found = dict(self._take(sorted(set(numbers)), [self.column]))
        return torch.cat([self._vectors(found[n].column(0).combine_chunks()).float() for n in numbers])

    def _take(self, numbers: list[int], columns: list[str]) -> Iterator[tuple[int, Any]]:
        """(number, table of one row), reading each row group that is needed once."""
        start = 0
        for group in range(self.file.num_row_groups):
            stop = start + self.file.metadata.row_group(group).num_rows
            wanted = [n for n in numbers if start <= n < stop]
            if wanted:
                table = self.file.read_row_group(group, columns=columns)
                yield from ((n, table.slice(n - start, 1)) for n in wanted)
            start = stop

    def _vectors(self, column: Any) -> Tensor:
        n, D = len(column), self.shape[1]
        flat = column.values.to_numpy(zero_copy_only=False)[column.offset * D : (column.offset + n) * D]
        vectors = np.array(flat).reshape(n, D)
        if column.null_count:
            vectors[column.is_null().to_numpy(zero_copy_only=False)] = np.nan
        return torch.from_numpy(vectors)


class LanceDataset(Vectors):
    """.lance: a table of LanceDB, see writers.py; a row without a vector is null. Needs the extra `lance`.

    Raises ValueError for a folder that `embed` did not write.
    """

    def __init__(self, path: Path):
        if not path.is_dir():
            raise ValueError(f"{path} does not exist" if not path.exists() else f"{path} is no Lance dataset")
        check_lance_name(path)
        self.table = import_lancedb().connect(path.parent).open_table(path.stem)
        meta = _meta(self.table.schema.metadata)
        if meta is None:
            raise ValueError(f"{path} does not say what made it; it was not written by minivlm2vec embed")
        self.column = meta["settings"]["vector_column"]
        super().__init__(path, (self.table.count_rows(), meta["settings"]["dimension"]), meta)

    def nearest(
        self, vector: Tensor, k: int, *, where: str | None = None, exact: bool = False, nprobes: int = 20
    ) -> list[tuple[int, float, dict[str, Any]]]:
        """(row, cosine similarity, columns) of the k rows nearest to a vector [D] that fulfil an SQL condition:
        through the index where there is one, unless `exact`."""
        query = self.table.search(vector.numpy().astype(np.float32), vector_column_name=self.column)
        query = query.distance_type("cosine").limit(k)
        if where:
            query = query.where(where, prefilter=True)
        if exact:
            query = query.bypass_vector_index()
        elif self.table.list_indices():
            query = query.nprobes(nprobes).refine_factor(REFINE)
        return [(row[ROW_NUMBER], 1 - row["_distance"], self._columns(row)) for row in plain_rows(query.to_arrow())]

    def vectors(self, numbers: Iterable[int]) -> Tensor:
        numbers = list(numbers)
        where = f"{ROW_NUMBER} IN ({', '.join(map(str, numbers))})"
        query = self.table.search().where(where).select([ROW_NUMBER, self.column]).limit(len(numbers))
        by_row = {row[ROW_NUMBER]: row[self.column] for row in query.to_arrow().to_pylist()}
        missing = [float("nan")] * self.shape[1]
        return torch.tensor([by_row[n] or missing for n in numbers], dtype=torch.float32)

    def _columns(self, row: dict[str, Any]) -> dict[str, Any]:
        return {c: v for c, v in row.items() if not c.startswith("_") and c not in (self.column, ROW_NUMBER)}


def check_lance_name(path: Path) -> None:
    """Refuses names that LanceDB can write and not open again."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", path.name):
        raise OptionError(Option("out"), f" {path}: the name of a Lance dataset has no other characters than the "
                          "letters A to Z, digits, _, - and .; give the folder such a name")  # fmt: skip


def open_vectors(path: str | os.PathLike) -> VectorFile | LanceDataset:
    """Opens what `embed` wrote, or another file of vectors. Raises ValueError for one that holds none, ImportError
    where an extra is needed."""
    if "://" in os.fspath(path):
        raise ValueError(f"{path} is an address; only local files are read")
    path = Path(path)
    if path.is_symlink() and not beside(path, ROWS).exists():  # else its companions lie beside the link
        path = Path(os.path.realpath(path))
    if path.suffix == ".lance":
        return LanceDataset(path)
    if not path.is_file():
        raise ValueError(f"{path} is no ordinary file" if path.exists() else f"{path} does not exist")
    try:
        if path.suffix == ".parquet":
            return ParquetFile(path)
        if path.suffix == ".npy":
            tensor, meta = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False)), _npy_meta(path)
        elif path.suffix == ".safetensors":
            tensor, meta = _map_safetensors(path)
        else:
            raise ValueError("vectors are in .npy, .safetensors, .parquet or .lance")
    except (ValueError, KeyError, TypeError, EOFError, RecursionError, SafetensorError) as e:
        raise ValueError(f"{path} holds no vectors: {e}") from None
    if tensor.ndim != 2 or tensor.dtype not in (torch.float32, torch.float16):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{path} holds {dtype} {list(tensor.shape)}; vectors are float32 or float16 [N, D]")
    return FlatFile(path, tensor, meta)


def _columns_of(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}, line {number}: {e}") from None


def _npy_meta(path: Path) -> dict[str, Any] | None:
    meta = beside(path, META)
    return _known(json.loads(meta.read_text(encoding="utf-8"))) if meta.is_file() else None


def _map_safetensors(path: Path) -> tuple[Tensor, dict[str, Any] | None]:
    with safe_open(path, framework="pt") as f:  # which maps the file, privately
        return f.get_tensor("vectors"), _known(json.loads((f.metadata() or {}).get(KEY, "null")))


def _meta(metadata: dict[bytes, bytes] | None) -> dict[str, Any] | None:
    """What `embed` recorded, from the metadata of an Arrow schema."""
    return _known(json.loads((metadata or {}).get(KEY.encode(), b"null")))


def _known(meta: dict[str, Any] | None) -> dict[str, Any] | None:
    """The record of an earlier version, completed: there were no adapters, and at first the model had no name."""
    if meta is not None:
        whole = isinstance(meta, dict) and isinstance(meta.get("model", {}), dict)
        if not whole or not isinstance(meta.get("settings"), dict) or NEEDED - meta["settings"].keys():
            raise ValueError("what is recorded of how they were made is damaged")
        meta["settings"].setdefault("adapter", None)
        meta["model"] = {"name": None, "revision": None, "adapter": None} | meta.get("model", {})
    return meta
