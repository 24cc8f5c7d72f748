"""Self-contained web pages: their head, the style that all of them share, pictures as data URIs. Nothing is fetched.

A page is written from top to bottom: `head(title)`, then the body's parts. Whatever comes from a file goes through
`escape`; beyond that the head's content security policy lets the browser run the one script that was named there, by
its hash, and nothing else.
"""

import base64
import hashlib
import html
import io
from dataclasses import dataclass
from importlib import resources
from typing import Any

from PIL import Image

from .errors import InputError
from .images import decoded, decoding, open_image

MAX_TEXT = 400  # characters of a text on a card

escape = html.escape


@dataclass(frozen=True)
class Picture:
    """What a card shows: a thumbnail as data URI, or a text, or why there is neither. `str` gives its HTML."""

    uri: str = ""
    text: str = ""
    missing: str = ""

    def __str__(self) -> str:
        if self.uri:
            inner = f'<img src="{self.uri}" alt="" loading="lazy" decoding="async">'
        elif self.text:
            inner = f'<div class="words">{escape(self.text[:MAX_TEXT])}</div>'
        else:
            inner = f'<div class="none">{escape(self.missing)}</div>'
        return f'<div class="well">{inner}</div>'


def head(title: str, *, style: str = "", script: str = "") -> str:
    """Everything before the body: the policy, the title, and the style of all our pages with `style` (CSS) behind it.

    script: the one that the page may run; the caller puts it into the body as <script>…</script>, unchanged.
    """
    style = asset(__package__, "html.css") + style
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; base-uri 'none'"
    if script:
        policy += f"; script-src '{_hash(script)}'"
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · minivlm2vec</title>\n<style>{style}</style>\n"
    )


def asset(package: str, name: str) -> str:
    """The text of a file that lies in a package, such as asset(__package__, "page.js")."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def meter(score: float) -> str:
    """A bar for a score of 0 to 1."""
    return f'<meter min="0" max="1" value="{max(0.0, min(1.0, score)):.4f}"></meter>'


def data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def thumbnail(source: Any, size: int) -> Picture:
    """A JPEG of at most size x size pixels, upright, on white where it is transparent. source: what `Embedder.encode`
    takes as an image; one that cannot be shown gives a Picture that says why."""
    try:
        image = open_image(source)
        with decoding(image):
            own = image.copy() if image is source else image  # the caller's own stays as it is
            return Picture(uri=data_uri(_small_jpeg(own, size), "image/jpeg"))
    except InputError as e:
        return Picture(missing=e.reason)


def _small_jpeg(image: Image.Image, size: int) -> bytes:
    image.draft("RGB", (size, size))
    image = decoded(image, exif_transpose=True)
    image.thumbnail((size, size), Image.Resampling.BICUBIC)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    data = io.BytesIO()
    image.convert("RGB").save(data, "JPEG", quality=80)
    return data.getvalue()


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
