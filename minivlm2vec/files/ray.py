"""A recipe for clusters: `EmbedBatch`, an actor class for Ray Data. Needs the extra `ray`.

    import ray
    from minivlm2vec.files.ray import EmbedBatch

    items = ray.data.read_parquet("s3://bucket/items/")
    items.map_batches(
        EmbedBatch,
        fn_constructor_kwargs={"model": "TIGER-Lab/VLM2Vec-Full", "instruction": "Represent the given image.\\n"},
        batch_size=256,
        concurrency=8,  # workers
        num_gpus=1,     # of each
    ).write_parquet("s3://bucket/vectors/")

Ray starts a worker that died again and repeats its batch. A vector does not depend on the batch it was computed in.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ..embedder import Embedder
from .pipeline import Pipeline
from .rows import Columns, Row


class EmbedBatch:
    """Adds vectors to batches of rows.

    Args:
        model: a checkpoint's folder or Hub name, as every worker can reach it.
        text_column, image_column: where a row keeps its text and its images (paths, data URIs, bytes, or arrays uint8
            [H, W, 3], [H, W, 4] or [H, W], as `ray.data.read_images` gives them; lists of these); default: text; image,
            images or image_path.
        image_root: what relative paths are relative to.
        instruction, max_length: as for `Embedder.encode`, where the first is called prompt.
        vector_column: name of the column that is added, [n, D] float32.
        dtype: a name such as "bfloat16"; default the checkpoint's.
        options: further ones of `Embedder.from_pretrained`, such as num_crops or device.
    """

    def __init__(
        self,
        model: str,
        *,
        text_column: str | None = None,
        image_column: str | None = None,
        image_root: str = ".",
        instruction: str | None = None,
        max_length: int | None = None,
        batch_tokens: int = 16384,
        vector_column: str = "embedding",
        dtype: str | None = None,
        **options: Any,
    ):
        self.embedder = Embedder.from_pretrained(model, dtype=dtype, show_progress=False, **options)
        self.columns = (text_column, image_column, Path(image_root))
        self.options: dict[str, Any] = {"prompt": instruction or None, "max_length": max_length}
        self.options["batch_tokens"] = batch_tokens
        self.vector_column = vector_column

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with two columns more: the vectors [n, D] float32, and `<vector_column>_error`, which says why a
        row has none (its vector is NaN then) and is empty otherwise. Raises TypeError for batches in another format."""
        if not isinstance(batch, dict):
            raise TypeError(f"a batch is a dict of NumPy arrays, got a {type(batch).__name__}: batch_format='numpy'")
        names = list(batch)
        columns = Columns.choose(names, *self.columns)
        n = len(batch[names[0]])
        rows = [Row(i, None, {c: _plain(batch[c][i]) for c in columns.names()}) for i in range(n)]
        vectors, errors = np.empty((0, self.embedder.dimension), np.float32), [""] * n
        for result in Pipeline(self.embedder, columns, **self.options).run([(0, rows)] if rows else []):
            vectors = result.vectors
            for bad in result.errors:
                errors[bad.row] = f"{bad.name}: {bad.reason}"
        return batch | {self.vector_column: vectors, f"{self.vector_column}_error": np.array(errors, object)}


def _plain(value: Any) -> Any:
    """A value of a column as Python has it; an array of pixels stays one, several of one shape become a list."""
    if isinstance(value, np.ndarray) and value.dtype != object and value.ndim in (2, 3):
        return value[..., None] if value.ndim == 2 else value
    if isinstance(value, np.ndarray | list):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
