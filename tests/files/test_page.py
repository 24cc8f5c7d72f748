"""The pages of `search --html`, as text and in a real browser."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from tests.support.files_data import checkpoint, run, save_pictures, write_jsonl

__all__ = ["checkpoint"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = [
    '<script>document.title = "owned"</script>',
    '"><img src=x onerror="document.title=\'owned\'">',
    "</style><script>document.title = 'owned'</script>",
    "' onmouseover='document.title=1' x='",
    "&lt;b&gt; \u2028 </title> ünï 写真",
    "javascript:document.title='owned'",
]


@pytest.fixture(scope="module")
def collection(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    names = ["<b>&bold;.png", "plain.jpg", "x' onerror='alert(1).png"]
    save_pictures(folder, names)
    Image.new("RGBA", (30, 900), (0, 0, 0, 0)).save(folder / "tall.png")
    Image.new("P", (9, 9)).save(folder / "palette.gif")
    rows = [{"image": name, "<i>key</i>": NASTY[0]} for name in [*names, "tall.png", "palette.gif", "gone.png"]]
    rows += [{"text": text, "<i>key</i>": None} for text in NASTY]
    source = write_jsonl(folder / "items.jsonl", rows)
    code, _, err = run("embed", source, "-o", folder / "out.npy", "--model", checkpoint, "--device", "cpu", "--quiet")
    assert code == 3, err
    return folder


@pytest.fixture(scope="module")
def hits(collection):
    query = ["--text", NASTY[1], "--image", collection / "plain.jpg", "--top", 20]
    code, _, err = run("search", collection / "out.npy", *query, "--html", collection / "hits.html")
    assert code == 0, err
    return collection / "hits.html"


@pytest.fixture(scope="module")
def gallery(collection):
    code, _, err = run("search", collection / "out.npy", "--top", 4, "--html", collection / "gallery.html")
    assert code == 0, err
    return collection / "gallery.html"


class Tags(html.parser.HTMLParser):
    """All tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("which", ["hits", "gallery"])
def test_a_page_is_self_contained_and_escapes_what_it_shows(which, request):
    page = Tags(request.getfixturevalue(which))
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == (which == "gallery")  # its own
    allowed = {"html", "meta", "title", "style", "script", "header", "div", "h1", "h2", "p", "img", "ol", "ul", "li",
               "span", "b", "meter", "dl", "dt", "dd", "footer", "a", "section", "input", "button"}  # fmt: skip
    assert set(names) <= allowed
    for tag, attributes in page.tags:
        assert not [a for a in attributes if a.startswith("on")], (tag, attributes)
        if "src" in attributes:
            assert tag == "img" and re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", attributes["src"])
        if "href" in attributes:
            assert re.fullmatch(r"#r\d+", attributes["href"])
    text = "".join(page.text)
    assert all(nasty in text for nasty in NASTY)
    assert ("no such file" in text) == (which == "gallery")  # a row without a vector is no hit


def test_the_page_has_an_order_and_every_column(hits):
    page = Tags(hits)
    scores = [float(a["value"]) for tag, a in page.tags if tag == "meter"]
    assert len(scores) == 11 and scores == sorted(scores, reverse=True)
    assert "<i>key</i>" in "".join(page.text)


def test_every_picture_of_the_gallery_links_to_neighbours(gallery):
    cards = [a for tag, a in Tags(gallery).tags if tag == "a"]
    assert [a["data-row"] for a in cards] == [str(n) for n in range(12)]
    for card in cards:
        near = [pair.split(":") for pair in card["data-near"].split()]
        assert len(near) == (0 if card["data-row"] == "5" else 4)
        assert card["data-row"] not in [row for row, _ in near] and "5" not in [row for row, _ in near]


def test_limit_and_no_rows(collection, checkpoint, tmp_path):
    code, _, err = run("search", collection / "out.npy", "--limit", 3, "--html", tmp_path / "few.html")
    assert (
        code == 0
        and "3 of 12 rows" in err
        and len([1 for tag, _ in Tags(tmp_path / "few.html").tags if tag == "a"]) == 3
    )
    source = write_jsonl(tmp_path / "none.jsonl", [])
    run("embed", source, "-o", tmp_path / "none.npy", "--model", checkpoint, "--device", "cpu", "--quiet")
    assert run("search", tmp_path / "none.npy", "--html", tmp_path / "none.html")[0] == 0


def test_a_page_that_cannot_be_written_leaves_nothing(collection, tmp_path):
    code, _, err = run("search", collection / "out.npy", "--html", tmp_path / "no" / "such.html")
    assert code == 1 and "such.html" in err and not list(tmp_path.iterdir())


PROBE = """
<script>
addEventListener("load", () => {
  const images = [...document.images];
  document.body.dataset.probe = JSON.stringify({
    title: document.title, width: document.documentElement.scrollWidth <= innerWidth,
    loaded: images.filter((i) => i.complete && i.naturalWidth > 0).length, images: images.length,
    near: [...document.querySelectorAll("#near li a")].map((a) => a.getAttribute("href")),
    head: document.querySelector("h2, h1").textContent,
    sheet: getComputedStyle(document.body).backgroundColor,
  });
});
</script>
"""


def in_browser(page, tmp_path, fragment: str = "", *, dark: bool = False, policy: bool = True) -> dict:
    """Loads a page in headless Chromium and asks it what it shows. The probe is let in beside the page's own script."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    text = page.read_text(encoding="utf-8")
    if not policy:
        text = re.sub("<meta http-equiv.*", "", text)
    text = re.sub(r"script-src 'sha256-[^']*'", r"\g<0> 'nonce-probe'", text)
    probed = tmp_path / "probed.html"
    probed.write_text(text + PROBE.replace("<script>", '<script nonce="probe">'), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
             "--virtual-time-budget=3000", "--window-size=1000,800"]  # fmt: skip
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", probed.as_uri() + fragment], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("policy", [True, False])
def test_hits_in_a_browser(hits, tmp_path, policy):
    seen = in_browser(hits, tmp_path, policy=policy)
    assert seen["title"] != "owned" and seen["title"].endswith("minivlm2vec")
    assert seen["images"] == seen["loaded"] == 6  # 5 rows with a picture, and the query's
    assert seen["head"] == NASTY[1] and seen["width"]


def test_gallery_in_a_browser(gallery, tmp_path):
    seen = in_browser(gallery, tmp_path, "#r1", dark=True)
    card = next(a for tag, a in Tags(gallery).tags if tag == "a" and a["data-row"] == "1")
    assert seen["near"] == [f"#r{pair.split(':')[0]}" for pair in card["data-near"].split()]
    assert seen["head"] == "plain.jpg" or seen["head"] == "out.npy"
    assert seen["title"] == "out.npy · minivlm2vec" and seen["width"]
    assert seen["sheet"] == "rgb(22, 21, 19)"  # dark


def test_the_policy_keeps_a_foreign_script_out(gallery, tmp_path):
    """Were escaping ever to fail, the browser still runs nothing but the page's own script."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    page = tmp_path / "injected.html"
    page.write_text(gallery.read_text(encoding="utf-8").replace('<ul class="grid small" id="all">',
                    NASTY[0] + '<ul class="grid small" id="all">'), encoding="utf-8")  # fmt: skip
    assert in_browser(page, tmp_path, policy=False)["title"] == "owned"  # or this would test nothing
    seen = in_browser(page, tmp_path)
    assert seen["title"] == "out.npy · minivlm2vec"
