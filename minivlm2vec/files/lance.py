"""Lance datasets: where vectors live that do not fit in memory. Needs the extra `lance`.

OUT.lance is a table of LanceDB: the source's columns, `row_number`, and the vectors. A row without a vector is null.
Image paths are absolute there, so that folders can be appended to one another.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .parts import rename, write_durably
from .writers import KEY, Head, Pieces, append_vectors, with_vectors

ROW = "row_number"
INDEX_TYPES = {"IVF_FLAT": "IvfFlat", "IVF_PQ": "IvfPq", "IVF_HNSW_SQ": "HnswSq"}  # LanceDB's names
NOT_COMPARED = {"text_column", "image_column", "image_root", "batch_tokens", "part_rows"}  # may differ when appending
REFINE = 10  # an index brings so many times as many rows as asked, which are then scored exactly


def import_lancedb():
    try:
        import lancedb
        import lancedb.index
    except ImportError:
        raise ImportError("lancedb is needed for Lance datasets: pip install 'minivlm2vec[lance]'") from None
    return lancedb


class Dataset:
    """An existing dataset, as `embed` wrote it.

    Attributes: path; meta, see `embed`; shape, (rows, dimension); column, that of the vectors.
    """

    def __init__(self, path: Path):
        if not path.is_dir():
            raise ValueError(f"{path} does not exist" if not path.exists() else f"{path} is no Lance dataset")
        self.path = path
        self.table = import_lancedb().connect(path.parent).open_table(path.stem)
        self.meta = json.loads((self.table.schema.metadata or {}).get(KEY.encode(), b"null"))
        if self.meta is None:
            raise ValueError(f"{path} does not say what made it; it was not written by minivlm2vec embed")
        self.column = self.meta["settings"]["vector_column"]
        self.shape = (self.table.count_rows(), self.meta["settings"]["dimension"])

    def search(
        self, vector: Tensor, k: int, *, where: str | None = None, exact: bool = False, nprobes: int = 20
    ) -> list:
        """The k nearest rows that fulfil an SQL condition, as `search.Hit`s: through the index where there is one,
        unless `exact`."""
        from .search import Hit

        found = self._nearest(vector, k, where=where, exact=exact, nprobes=nprobes)
        rows = [
            {c: v for c, v in row.items() if not c.startswith("_") and c != self.column} for row in found.to_pylist()
        ]
        scores = [1 - d for d in found["_distance"].to_pylist()]
        return [Hit(rank, row.pop(ROW), s, row) for rank, (row, s) in enumerate(zip(rows, scores, strict=True), 1)]

    def vectors(self, numbers: Iterable[int]) -> Tensor:
        """[n, D] float32 of these rows; NaN where there is none."""
        numbers = list(numbers)
        where = f"{ROW} IN ({', '.join(map(str, numbers))})"
        found = self.table.search().where(where).select([ROW, self.column]).limit(len(numbers)).to_arrow().to_pylist()
        by_row = {row[ROW]: row[self.column] for row in found}
        missing = [float("nan")] * self.shape[1]
        return torch.tensor([by_row[n] or missing for n in numbers], dtype=torch.float32)

    def recall(self, k: int, queries: int, nprobes: int) -> tuple[float, int]:
        """The share of the exact k nearest that the index finds, over about `queries` of the dataset's own vectors,
        and how many these were."""
        step = max(1, self.shape[0] // queries)
        vectors = [v for v in self.vectors(range(0, self.shape[0], step)) if not v.isnan().any()]
        same = total = 0
        for vector in vectors:
            exact, index = ({h.row for h in self.search(vector, k, exact=e, nprobes=nprobes)} for e in (True, False))
            same, total = same + len(exact & index), total + len(exact)
        return (same / total if total else 1.0), len(vectors)

    def _nearest(self, vector: Tensor, k: int, *, where: str | None, exact: bool, nprobes: int):
        query = self.table.search(vector.numpy().astype(np.float32), vector_column_name=self.column)
        query = query.distance_type("cosine").limit(k)
        if where:
            query = query.where(where, prefilter=True)
        if exact:
            query = query.bypass_vector_index()
        elif self.table.list_indices():
            query = query.nprobes(nprobes).refine_factor(REFINE)
        return query.to_arrow()


def publish_dataset(written: Path, out: Path, head: Head, pieces: Pieces, *, append: bool) -> None:
    """Writes the dataset and moves it in place; or, to append, adds to OUT in one commit, once, whatever happens."""
    lancedb = import_lancedb()
    if append and out.exists():
        _append(written, out, head, pieces)
        return
    shutil.rmtree(written, ignore_errors=True)
    reader = _reader(head, pieces, 0)
    lancedb.connect(written.parent).create_table(written.stem, data=reader, schema=reader.schema, on_bad_vectors="null")
    for file in (p for p in written.rglob("*") if p.is_file()):
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    if out.exists():
        shutil.rmtree(out)
    rename(written, out)


def check_append(out: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError where OUT's vectors cannot be compared with those of a run with these settings."""
    old = Dataset(out).meta["settings"]
    differ = [f"{name} is {old.get(name)!r} there and {value!r} now" for name, value in settings.items()
              if name not in NOT_COMPARED and old.get(name) != value]  # fmt: skip
    if differ:
        raise ValueError(f"cannot append to {out}, which was made otherwise: {'; '.join(differ)}")


def build_index(dataset: Dataset, kind: str, *, nprobes: int, k: int) -> None:
    """Builds the index that later searches go through, and prints its recall against exact search."""
    config = getattr(import_lancedb().index, INDEX_TYPES[kind])(distance_type="cosine")
    dataset.table.create_index(dataset.column, config=config, replace=True)
    recall, asked = dataset.recall(k, 100, nprobes)
    print(f"{dataset.path}: index {kind} over {dataset.shape[0]:,} rows; recall@{k} against exact search {recall:.3f} "
          f"({asked} of its own vectors, {nprobes} probes)", file=sys.stderr)  # fmt: skip


def _append(written: Path, out: Path, head: Head, pieces: Pieces) -> None:
    """Adds the rows, unless an earlier, killed attempt did so: the number of rows before the first one tells."""
    dataset = Dataset(out)
    note = written.with_name("append.json")
    if not note.exists():
        write_durably(note, json.dumps(dataset.shape[0]).encode())
    before = json.loads(note.read_text())
    if dataset.shape[0] == before and head.rows:
        dataset.table.add(_reader(head, pieces, before), on_bad_vectors="null")
    elif dataset.shape[0] != before + head.rows:
        raise ValueError(f"{out} had {before:,} rows when appending began and has {dataset.shape[0]:,} now: something "
                         "else is writing to it")  # fmt: skip
    dataset.table.optimize()  # takes the new rows into an index


def _reader(head: Head, pieces: Pieces, first: int):
    """A stream of Arrow batches: the columns, the row's number, the vector."""
    import pyarrow as pa

    if ROW in head.schema.names:
        raise ValueError(f"the table has a column {ROW!r} already; a Lance dataset needs that name for itself")
    numbered = pa.schema([*head.schema, pa.field(ROW, pa.int64())], metadata=head.schema.metadata)
    schema = with_vectors(Head(**{**vars(head), "schema": numbered}))
    settings = head.meta["settings"]

    def batches():
        start = first
        for vectors, table in pieces:
            table = _absolute(table, settings["image_column"], settings["image_root"])
            numbers = pa.array(np.arange(start, start + len(vectors)))
            yield from append_vectors(table.append_column(ROW, numbers), vectors, schema, null=True).to_batches()
            start += len(vectors)

    return pa.RecordBatchReader.from_batches(schema, batches())


def _absolute(table, column: str | None, root: str):
    """The table with absolute paths in its image column."""
    import pyarrow as pa

    if column not in table.column_names or table.schema.field(column).type != pa.string():
        return table
    paths = [os.path.join(root, v) if v and ":" not in v[:6] else v for v in table[column].to_pylist()]
    return table.set_column(table.column_names.index(column), table.schema.field(column), pa.array(paths, pa.string()))
