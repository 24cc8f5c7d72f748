"""Pages' heads, and pictures on them."""

import base64
import hashlib
import io
import re

import numpy as np
from PIL import Image

from minivlm2vec import html


def sha256(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def test_the_policy_names_the_style_and_the_script_and_nothing_else():
    page = html.head("</title><script>", style="p { margin: 0 }", script="let a = 1;")
    policy = re.search('http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    style = re.search("<style>(.*)</style>", page, re.DOTALL)
    assert policy and style and style[1].endswith("p { margin: 0 }") and ":root" in style[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'",
                     "style-src": f"'{sha256(style[1])}'", "script-src": f"'{sha256('let a = 1;')}'"}  # fmt: skip
    assert "script-src" not in html.head("x") and "<script" not in page and "&lt;script&gt;" in page


def decoded(picture: html.Picture) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture.uri.removeprefix("data:image/jpeg;base64,"))))


def test_thumbnails():
    clear = Image.new("RGBA", (90, 30), (0, 0, 0, 0))
    small = decoded(html.thumbnail(clear, 30))
    assert small.size == (30, 10) and np.asarray(small).min() > 250  # on white
    assert clear.size == (90, 30) and clear.getpixel((0, 0)) == (0, 0, 0, 0), "the caller's own stays as it is"
    turned = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    turned.save(data, "JPEG", exif=exif)
    assert decoded(html.thumbnail(data.getvalue(), 100)).size == (20, 40)


def test_what_cannot_be_shown_says_why_and_is_escaped():
    assert html.thumbnail("no/such.png", 30).missing == "no such file"
    assert html.thumbnail(b"\x89PNG\r\n\x1a\n", 30).missing
    assert "<b>" not in str(html.Picture(missing="<b>")) and "<b>" not in str(html.Picture(text="<b>"))
    assert len(str(html.Picture(text="x" * 9999))) < 500
