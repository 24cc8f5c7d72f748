"""Hits and galleries as one self-contained web page: thumbnails are data URIs, and nothing is fetched.

Whatever comes from a file is escaped; beyond that a content security policy lets the browser run this package's own
script, named by its hash, and nothing else.
"""

import base64
import hashlib
import html
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError
from ..images import open_image
from .inputs import Fields
from .search import Hit, Query, nearest, printable
from .sources import Row
from .vectors import VectorFile

THUMBNAIL = 320  # pixels of the longer side
SMALL_THUMBNAIL = 224  # in a gallery
MAX_TEXT = 400  # characters of a text on a card


@dataclass(frozen=True)
class Picture:
    """What a card shows: a thumbnail as data URI, or a text, or why there is neither."""

    uri: str = ""
    text: str = ""
    missing: str = ""

    def __str__(self) -> str:
        if self.uri:
            inner = f'<img src="{self.uri}" alt="" loading="lazy" decoding="async">'
        elif self.text:
            inner = f'<div class="words">{html.escape(self.text[:MAX_TEXT])}</div>'
        else:
            inner = f'<div class="none">{html.escape(self.missing)}</div>'
        return f'<div class="well">{inner}</div>'


def write_hits(path: Path, query: Query, hits: list[Hit], meta: dict[str, Any] | None, *, root: Path) -> None:
    """Writes the page of one search."""
    fields = _fields(meta, root)
    title = query.text if query.text is not None else query.image or f"Like row {query.like}"
    asked = thumbnail(query.image) if query.image else None
    with ThreadPoolExecutor() as pool, replacing(path) as f:
        f.write(head_of(title, script=_asset("page.js")))
        image = f'<img src="{asked.uri}" alt="the query\'s image">' if asked and asked.uri else ""
        f.write(f"<header>{image}<div><h1>{html.escape(title)}</h1>{_asked(query, len(hits))}</div></header>\n")
        f.write('<ol class="grid">\n')
        pictures = pool.map(lambda hit: picture_of(hit.columns, fields, THUMBNAIL), hits)
        f.writelines(_hit_card(hit, picture, fields) for hit, picture in zip(hits, pictures, strict=True))
        f.write("</ol>\n" + _bottom(meta))


def write_gallery(
    path: Path, vectors: VectorFile, *, top: int, limit: int | None, root: Path, device: str = "cpu"
) -> int:
    """Writes the page of a whole collection, or its first `limit` rows. Returns how many it shows."""
    fields = _fields(vectors.meta, root)
    count = vectors.shape[0] if limit is None else min(limit, vectors.shape[0])
    with ThreadPoolExecutor() as pool, replacing(path) as f:
        f.write(head_of(vectors.path.name, script=_asset("page.js")))
        f.write(_gallery_head(vectors, count))
        for first, scores, rows in nearest(vectors, top, count, device):
            numbers = range(first, first + len(rows))
            found = vectors.rows(numbers)
            columns = [found[n] for n in numbers]
            pictures = pool.map(lambda c: picture_of(c, fields, SMALL_THUMBNAIL), columns)
            for number, c, picture, s, r in zip(numbers, columns, pictures, scores, rows, strict=True):
                f.write(_gallery_card(number, caption(c, fields, number), picture, s, r))
        f.write("</ul>\n" + _bottom(vectors.meta) + f"<script>{_asset('page.js')}</script>\n")
    return count


def picture_of(columns: dict[str, Any], fields: Fields, size: int) -> Picture:
    """The first image of a row, or its text."""
    row = Row(0, None, columns)
    try:
        images = fields.images(row)
    except InputError as e:
        return Picture(missing=e.reason)
    if images:
        return thumbnail(images[0], size)
    text = columns.get(fields.text) if fields.text else None
    return Picture(text=text) if isinstance(text, str) and text else Picture(missing="neither text nor image")


def thumbnail(source: Any, size: int = THUMBNAIL) -> Picture:
    """A JPEG of at most size x size pixels, upright, on white where it is transparent."""
    try:
        with open_image(source) as image:
            image.draft("RGB", (size, size))
            image = ImageOps.exif_transpose(image)
            image.thumbnail((size, size), Image.Resampling.BICUBIC)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            data = io.BytesIO()
            image.convert("RGB").save(data, "JPEG", quality=80)
    except InputError as e:
        return Picture(missing=e.reason)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        return Picture(missing=f"the image cannot be shown: {e}")
    return Picture(uri="data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode())


def caption(columns: dict[str, Any], fields: Fields, number: int) -> str:
    """A row's text, or its image's path, or its number."""
    for name in (fields.text, fields.image):
        value = columns.get(name) if name else None
        value = value.get("path") if isinstance(value, dict) else value
        if isinstance(value, list):
            value = ", ".join(v for v in value if isinstance(v, str))
        if isinstance(value, str) and value and not value.startswith("data:"):
            return value[:MAX_TEXT]
    return f"row {number}"


def _fields(meta: dict[str, Any] | None, root: Path) -> Fields:
    settings = meta["settings"] if meta else {"text_column": None, "image_column": None}
    return Fields(settings["text_column"], settings["image_column"], root)


def _asked(query: Query, hits: int) -> str:
    lines = [query.image] if query.image and query.text is not None else []
    lines += [f"instruction: {query.instruction.strip()}"] if query.instruction else []
    lines += [f"{hits:,} nearest of the collection, by cosine similarity"]
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _hit_card(hit: Hit, picture: Picture, fields: Fields) -> str:
    shown = caption(hit.columns, fields, hit.row)
    rest = {k: v for k, v in hit.columns.items() if v is not None and v != "" and v != shown}
    rest = {k: v for k, v in rest.items() if not (isinstance(v, (dict, list)) and k == fields.image)}
    details = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(printable(v, 200))}</dd>" for k, v in rest.items())
    return (
        f'<li class="card">{picture}<div class="about">'
        f'<div class="score"><span>{hit.rank}</span><b>{hit.score:.4f}</b>{_meter(hit.score)}</div>'
        f'<div class="caption" title="{html.escape(shown)}">{html.escape(shown)}</div>'
        f"<dl><dt>row</dt><dd>{hit.row}</dd>{details}</dl></div></li>\n"
    )


def _meter(score: float) -> str:
    return f'<meter min="0" max="1" value="{max(0.0, min(1.0, score)):.4f}"></meter>'


def _gallery_card(number: int, shown: str, picture: Picture, scores: Tensor, rows: Tensor) -> str:
    pairs = zip(rows.tolist(), scores.tolist(), strict=True)
    near = " ".join(f"{r}:{s:.3f}" for r, s in pairs if s > float("-inf"))
    return (
        f'<li><a class="card" href="#r{number}" data-row="{number}" data-near="{near}">{picture}'
        f'<div class="about"><div class="caption" title="{html.escape(shown)}">{html.escape(shown)}</div></div>'
        "</a></li>\n"
    )


def _gallery_head(vectors: VectorFile, count: int) -> str:
    of = f"{count:,} rows" if count == vectors.shape[0] else f"the first {count:,} of {vectors.shape[0]:,} rows"
    return (
        f"<header><div><h1>{html.escape(vectors.path.name)}</h1><p>{of}; click one to see its nearest neighbours</p>"
        "</div>"
        '<input type="search" placeholder="Filter by caption" aria-label="Filter by caption"></header>\n'
        '<section id="near" hidden><header><div class="well"></div><div><h2></h2><p></p>'
        '<button type="button">Close</button></div></header><ul class="grid small"></ul></section>\n'
        '<ul class="grid small" id="all">\n'
    )


def head_of(title: str, *, style: str = "", script: str = "") -> str:
    """Up to the body: a policy that lets nothing be fetched and nothing run but `script`, and the style of all our
    pages with `style` behind it."""
    style = _asset("page.css") + style
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; base-uri 'none'"
    if script:
        policy += f"; script-src '{_hash(script)}'"
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(printable(title))} · minivlm2vec</title>\n<style>{style}</style>\n"
    )


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _bottom(meta: dict[str, Any] | None) -> str:
    if meta is None:
        return ""
    made = f"{meta['model']['name']}, {meta['settings']['num_crops']} crops, minivlm2vec {meta['settings']['version']}"
    return f"<footer>{html.escape(made)}</footer>\n"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file that takes the place of `path` when all went well, and leaves nothing behind otherwise."""
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "w", encoding="utf-8", newline="\n") as f:
            yield f
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
