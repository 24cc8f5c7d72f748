"""Hits and galleries as one self-contained web page each."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from ..atomic import open_replacing
from ..errors import InputError, at_least_one
from ..html import MAX_TEXT, Picture, asset, escape, head, meter, thumbnail
from ..images import image_name, is_data_uri
from .options import Query
from .retrieval import Hit, neighbours
from .rows import Columns, Row, printable
from .vectors import VectorFile, Vectors, open_vectors

THUMBNAIL = 320  # pixels of the longer side
SMALL_THUMBNAIL = 224  # in a gallery


def write_hits(
    path: str | Path,
    vectors: str | Path | Vectors,
    query: Query,
    hits: Sequence[Hit],
    *,
    image_root: str | Path | None = None,
) -> None:
    """Writes the page of one search. image_root: where the images are now; default where `embed` found them."""
    collection = vectors if isinstance(vectors, Vectors) else open_vectors(vectors)
    query, columns = query.resolved(images=collection.has_images), _columns(collection, image_root)
    title = _title(query)
    asked = thumbnail(query.image, THUMBNAIL) if query.image is not None else None
    image = f'<img src="{asked.uri}" alt="the query\'s image">' if asked and asked.uri else ""
    with ThreadPoolExecutor() as pool, open_replacing(path, "w") as f:
        f.write(head(printable(title), script=asset(__package__, "page.js")))
        f.write(f"<header>{image}<div><h1>{escape(title)}</h1>{_asked(query, len(hits))}</div></header>\n")
        f.write('<ol class="grid">\n')
        pictures = pool.map(lambda hit: _picture(hit.columns, columns, THUMBNAIL), hits)
        f.writelines(_hit_card(hit, picture, columns) for hit, picture in zip(hits, pictures, strict=True))
        f.write("</ol>\n" + _bottom(collection))


def write_gallery(
    path: str | Path,
    vectors: str | Path | Vectors,
    *,
    top: int = 10,
    limit: int | None = None,
    image_root: str | Path | None = None,
    device: str = "cpu",
) -> int:
    """Writes the page of a whole collection, or of its first `limit` rows, each with its `top` nearest neighbours.
    Returns how many rows it shows. Raises ValueError for a Lance dataset."""
    at_least_one(top=top)
    collection = vectors if isinstance(vectors, Vectors) else open_vectors(vectors)
    if not isinstance(collection, VectorFile):
        raise ValueError("a gallery is made of .npy, .safetensors or .parquet")
    columns, script = _columns(collection, image_root), asset(__package__, "page.js")
    count = collection.shape[0] if limit is None else min(limit, collection.shape[0])
    with ThreadPoolExecutor() as pool, open_replacing(path, "w") as f:
        f.write(head(printable(collection.path.name), script=script))
        f.write(_gallery_head(collection, count))
        for first, scores, rows in neighbours(collection, top, count, device):
            numbers = range(first, first + len(rows))
            found = collection.rows(numbers)
            values = [found[n] for n in numbers]
            pictures = pool.map(lambda v: _picture(v, columns, SMALL_THUMBNAIL), values)
            for number, v, picture, s, r in zip(numbers, values, pictures, scores, rows, strict=True):
                f.write(_gallery_card(number, _caption(v, columns, number), picture, s, r))
        f.write("</ul>\n" + _bottom(collection) + f"<script>{script}</script>\n")
    return count


def _picture(values: dict[str, Any], columns: Columns, size: int) -> Picture:
    """The first image of a row, or its text."""
    try:
        images = columns.images(Row(0, None, values))
    except InputError as e:
        return Picture(missing=e.reason)
    if images:
        return thumbnail(images[0], size)
    text = values.get(columns.text) if columns.text else None
    return Picture(text=text) if isinstance(text, str) and text else Picture(missing="neither text nor image")


def _caption(values: dict[str, Any], columns: Columns, number: int) -> str:
    """A row's text, or its image's path, or its number."""
    for name in (columns.text, columns.image):
        value = values.get(name) if name else None
        value = value.get("path") if isinstance(value, dict) else value
        if isinstance(value, list):
            value = ", ".join(v for v in value if isinstance(v, str))
        if isinstance(value, str) and value and not is_data_uri(value):
            return value[:MAX_TEXT]
    return f"row {number}"


def _columns(collection: Vectors, image_root: str | Path | None) -> Columns:
    settings = collection.settings
    root = Path(image_root or settings.get("image_root", "."))
    return Columns(settings.get("text_column"), settings.get("image_column"), root)


def _title(query: Query) -> str:
    if query.text is not None:
        return query.text
    return f"Like row {query.like}" if query.image is None else image_name(query.image)


def _asked(query: Query, hits: int) -> str:
    lines = [image_name(query.image)] if query.image is not None and query.text is not None else []
    lines += [f"instruction: {query.instruction.strip()}"] if query.instruction else []
    lines += [f"{hits:,} nearest of the collection, by cosine similarity"]
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _hit_card(hit: Hit, picture: Picture, columns: Columns) -> str:
    shown = _caption(hit.columns, columns, hit.row)
    rest = {k: v for k, v in hit.columns.items() if v is not None and v != "" and v != shown}
    rest = {k: v for k, v in rest.items() if not (isinstance(v, (dict, list)) and k == columns.image)}
    details = "".join(f"<dt>{escape(k)}</dt><dd>{escape(printable(v, 200))}</dd>" for k, v in rest.items())
    return (
        f'<li class="card">{picture}<div class="about">'
        f'<div class="score"><span>{hit.rank}</span><b>{hit.score:.4f}</b>{meter(hit.score)}</div>'
        f'<div class="caption" title="{escape(shown)}">{escape(shown)}</div>'
        f"<dl><dt>row</dt><dd>{hit.row}</dd>{details}</dl></div></li>\n"
    )


def _gallery_card(number: int, shown: str, picture: Picture, scores: Tensor, rows: Tensor) -> str:
    pairs = zip(rows.tolist(), scores.tolist(), strict=True)
    near = " ".join(f"{r}:{s:.3f}" for r, s in pairs if s > float("-inf"))
    return (
        f'<li><a class="card" href="#r{number}" data-row="{number}" data-near="{near}">{picture}'
        f'<div class="about"><div class="caption" title="{escape(shown)}">{escape(shown)}</div></div>'
        "</a></li>\n"
    )


def _gallery_head(vectors: VectorFile, count: int) -> str:
    of = f"{count:,} rows" if count == vectors.shape[0] else f"the first {count:,} of {vectors.shape[0]:,} rows"
    return (
        f"<header><div><h1>{escape(vectors.path.name)}</h1><p>{of}; click one to see its nearest neighbours</p>"
        "</div>"
        '<input type="search" placeholder="Filter by caption" aria-label="Filter by caption"></header>\n'
        '<section id="near" hidden><header><div class="well"></div><div><h2></h2><p></p>'
        '<button type="button">Close</button></div></header><ul class="grid small"></ul></section>\n'
        '<ul class="grid small" id="all">\n'
    )


def _bottom(collection: Vectors) -> str:
    if collection.meta is None:
        return ""
    model, settings = collection.meta["model"], collection.settings
    made = f"{model['name']}, {settings['num_crops']} crops, minivlm2vec {settings['version']}"
    return f"<footer>{escape(made)}</footer>\n"
