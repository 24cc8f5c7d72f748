"""From files to vectors to answers: embed a folder or a table, search in what came out. docs/files.md shows it.

options.py     what a caller says: model, embedding, query, search
sources.py     folders and tables: rows, and where each part of them begins
rows.py        a row -> what the Embedder takes
pipeline.py    rows -> vectors, images decoded ahead of the model
parts.py       OUT.parts: what is finished, so that a killed run goes on
writers.py     parts -> .npy, .safetensors, .parquet, .lance
progress.py    what it tells meanwhile
job.py         what one run has to do
embedding.py   plan, compute, assemble, publish: all of the above in a row
vectors.py     reads back what was written
retrieval.py   exact search, and Lance's index
classification.py  the labels of a folder's or table's images, through `embed`
page.py        hits and galleries as a web page
ray.py         the same in a Ray Data pipeline
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .classification import classify
    from .embedding import Summary, assemble, compute, embed, plan, publish
    from .job import Job
    from .options import EmbedOptions, ModelSpec, Query, SearchOptions
    from .page import write_gallery, write_hits
    from .progress import Progress, Timing
    from .retrieval import Hit, IndexReport, build_index, search
    from .rows import BadRow, BadRowError
    from .vectors import LanceDataset, VectorFile, open_vectors

__all__ = [
    "BadRow",
    "BadRowError",
    "EmbedOptions",
    "Hit",
    "IndexReport",
    "Job",
    "LanceDataset",
    "ModelSpec",
    "Progress",
    "Query",
    "SearchOptions",
    "Summary",
    "Timing",
    "VectorFile",
    "assemble",
    "build_index",
    "classify",
    "compute",
    "embed",
    "open_vectors",
    "plan",
    "publish",
    "search",
    "write_gallery",
    "write_hits",
]
_NAMES = {
    "classification": ("classify",),
    "embedding": ("Summary", "assemble", "compute", "embed", "plan", "publish"),
    "job": ("Job",),
    "options": ("EmbedOptions", "ModelSpec", "Query", "SearchOptions"),
    "page": ("write_gallery", "write_hits"),
    "progress": ("Progress", "Timing"),
    "retrieval": ("Hit", "IndexReport", "build_index", "search"),
    "rows": ("BadRow", "BadRowError"),
    "vectors": ("LanceDataset", "VectorFile", "open_vectors"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}

__getattr__ = lazy_names(__name__, _HOMES)  # `import minivlm2vec.files` imports neither torch nor pyarrow


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
