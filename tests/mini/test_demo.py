"""`minivlm2vec demo` on a random checkpoint in the place of the bundled one, and the name "mini"."""

import html.parser
import io
import json
import re
import subprocess
import sys
from base64 import b64decode
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minivlm2vec import Embedder, checkpoint
from minivlm2vec.cli import main
from minivlm2vec.errors import CheckpointError
from minivlm2vec.mini import bundled
from minivlm2vec.mini.demo import page, run, tables
from minivlm2vec.mini.demo.answers import Answer, answer, answer_all
from minivlm2vec.mini.demo.questions import (
    ASKING,
    CONDITIONS,
    GROUNDING,
    NAMING,
    SEARCH,
    SORTING,
    Picture,
    Question,
    about_pictures,
    read_data,
)
from minivlm2vec.mini.world.concepts import HELD_OUT_STYLE
from minivlm2vec.mmeb import EvaluateOptions, evaluate
from minivlm2vec.mmeb.dataset import Dataset
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.rows import Pair

ROOT = Path(__file__).parents[2]
OPTIONAL = ("pyarrow", "fastapi", "uvicorn", "orjson", "prometheus_client", "tensorboard", "tomli", "lancedb", "ray",
            "mteb", "sentence_transformers", "transformers", "peft", "openai", "matplotlib", "jinja2")  # fmt: skip
ALONE = f"""
import socket, sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL}:
            raise ImportError(f"{{name}} is blocked")

def refuse(*args, **kwargs):
    raise AssertionError("the network was asked")

sys.meta_path.insert(0, Blocker())
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from minivlm2vec import checkpoint, cli
checkpoint.MINI = Path(sys.argv[1])
sys.exit(cli.main(["demo", "--device", "cpu", "-o", sys.argv[2]]))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("demo") / "tiny", seed=1)


@pytest.fixture
def mini(tiny, tmp_path, monkeypatch):
    """The name "mini" stands for a random checkpoint; the working folder is empty."""
    monkeypatch.setattr(checkpoint, "MINI", tiny)
    monkeypatch.chdir(tmp_path)
    checkpoint._say_that_mini_is_small.cache_clear()
    return tiny


@pytest.fixture(scope="module")
def dataset():
    return Dataset(bundled() / "MMEB-eval")


@pytest.fixture(scope="module")
def demo(tiny, tmp_path_factory):
    """What the command prints and the page it writes, without optional packages and without a network."""
    out = tmp_path_factory.mktemp("demo") / "page.html"
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE, tiny, out], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("demonstration model") == 1
    return done.stdout, Page(out.read_text(encoding="utf-8")), out


@dataclass
class Card:
    """An answer on the page."""

    right: bool
    number: int = 0
    words: list[str] = field(default_factory=list)


class Page(html.parser.HTMLParser):
    """Tags with their attributes; fails where one is closed that is not the last opened. `questions` are words and
    cards, `cells` those of the table."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.questions, self.cells = [], [], [], []
        self.feed(text)
        assert self.open in ([], ["html"]), self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "article":
            self.questions.append(([], []))
        if tag == "li":
            self.questions[-1][1].append(Card(" right" in attributes["class"]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-2:] == ["div", "span"]:
            self.questions[-1][1][-1].number = int(data)
        elif "li" in self.open:
            self.questions[-1][1][-1].words.append(data)
        elif "article" in self.open and data.strip():
            self.questions[-1][0].append(data)
        elif self.open[-1:] in (["td"], ["b"]) and "td" in self.open:
            self.cells.append(data)


def test_the_page_is_self_contained(demo):
    _, found, path = demo
    images = 0
    for tag, attributes in found.tags:
        assert not {"href", "srcset", "style", "action"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
        if "src" in attributes:
            head, _, data = attributes["src"].partition(",")
            assert tag == "img" and head == "data:image/webp;base64"
            Image.open(io.BytesIO(b64decode(data, validate=True))).load()
            images += 1
    assert images > 50 and {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in found.tags)
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text and not re.search(r"https?://|url\(|@import", text)


def test_tables_show_what_the_page_shows(demo):
    out, found, path = demo
    lines = re.findall(r"^  (?:seen|new), (?:seen|new) +(.+?)  .*?(\d+) of (\d+)", out, re.MULTILINE)
    assert len(lines) == len(found.questions) >= 12
    for (question, place, candidates), (asked, cards) in zip(lines, found.questions, strict=True):
        assert asked[-1].startswith(question.strip("[]").removesuffix("...")), (asked, question)
        assert len(cards) == min(page.CARDS, int(candidates))
        places = [card.number for card in cards]
        assert places == sorted(places)
        assert min(card.number for card in cards if card.right) == int(place)
    table = out[out.index("nearest answer is right") :]
    rows = [re.split(r"  +", line) for line in table.splitlines()[2:] if line.endswith("%")]
    cells = [cell.replace("→", "->") for cell in found.cells]
    assert [cell for row in rows for cell in row] == cells and len(rows) == len(found.questions) / 2
    assert [row[1] for row in rows] == ["seen, seen", "seen, new", "new, new"] * 5
    headings = re.findall(r"<h3>(\w+) concepts, (\w+) style<span>P@1 (\d+%)", path.read_text(encoding="utf-8"))
    assert [(f"{concepts.lower()}, {style}", p1) for concepts, style, p1 in headings] == [(r[1], r[4]) for r in rows]


def test_the_printed_lines(demo):
    out, _, path = demo
    long = [line for line in out.splitlines() if len(line) > tables.WIDTH]
    assert not [line for line in long if str(path) not in line and not line.startswith("Next: ")]
    assert re.search(r"\d+ pictures embedded in [\d.]+ s \(\d+/s\)", out) and re.search(r"answered in [\d.]+ ms", out)
    assert "image_" not in out and "held-out" not in out
    assert f"With pictures: {path} (" in out and "Next: minivlm2vec demo --model TIGER-Lab/VLM2Vec-Full" in out


def test_the_demonstration_from_python(tiny, demo, tmp_path):
    """The same answers as the command's; without a page and without the time of loading where none is asked for."""
    found = run(Embedder.from_pretrained(tiny, device="cpu", show_progress=False))
    printed, _, _ = demo
    answers = found.text().rstrip().rpartition("\n\n")[0]  # the times come last
    assert len(found.results) == 15 and "Model loaded" not in found.text() and "Model loaded" in printed
    assert len(answers) > 5000 and printed.startswith(answers)
    assert not list(tmp_path.iterdir())


def test_scores_are_those_of_the_evaluator(tiny, dataset, tmp_path):
    e = Embedder.from_pretrained(tiny, device="cpu", show_progress=False)
    data = read_data(dataset)
    search = [a for a in data.question_sets if a.kind is SEARCH][-1]
    asking = [a for a in data.question_sets if a.kind is ASKING]
    data = replace(data, question_sets=(search, *asking), collection=search.questions[0].candidates)
    (_, *results), times = answer_all(e, data, dataset.images)
    options = EvaluateOptions(subsets=[a.name for a in asking])
    expected = evaluate(e, bundled() / "MMEB-eval", tmp_path, options).figures
    assert [r.question_set.name for r in results] == ["Seen-Grid-Where", "Seen-Fluent-Where", "Fluent-Where"]
    for result in results:
        low, high = expected[result.question_set.name].interval()[:, 0]
        mean = expected[result.question_set.name].mean[0]
        assert (result.precision, result.low, result.high) == pytest.approx((mean, low, high))
        assert result.chance == pytest.approx(100 / 24) and result.candidates == "24"
        assert len(result.answers) == len(result.question_set.questions)
    assert times.pictures == 240 and times.pictures + times.others == len(data.pairs())


@pytest.fixture(scope="module")
def catalogue(dataset):
    """{"seen" or "new": rows of the file}"""
    names = {"seen": "pictures_seen.jsonl", "new": "pictures.jsonl"}
    lines = {c: (dataset.root / name).read_text(encoding="utf-8").splitlines() for c, name in names.items()}
    return {c: list(map(json.loads, rows)) for c, rows in lines.items()}


@pytest.mark.parametrize(
    "kind, query, candidate, choices",
    [
        (SEARCH, ("Find me an everyday image that matches the given caption: {label}\n", ""),
         ("<|image_1|>\nRepresent the given image.\n", "{path}"), 240),
        (NAMING, ("<|image_1|>\nFind an image caption describing the given everyday image.\n", "{path}"),
         ("{label}", ""), 240),
        (SORTING, ("<|image_1|>\nRepresent the given image for classification\n", "{path}"), ("{class}", ""), 69),
    ],
    ids=["search", "naming", "sorting"],
)  # fmt: skip
def test_questions_about_single_pictures(dataset, catalogue, kind, query, candidate, choices):
    """Each of a condition's 120 pictures or names once; all pictures, names or classes of its style as candidates."""
    data = read_data(dataset)
    asked = [a for a in data.question_sets if a.kind is kind]
    assert [tuple(a.condition) for a in asked] == [("seen", "twemoji"), ("seen", "fluent"), ("new", "fluent")]
    for a in asked:
        concepts, style = a.condition
        drawn = {c: [row for row in rows if row["style"] == style] for c, rows in catalogue.items()}
        candidates = {_pair(candidate, row) for rows in drawn.values() for row in rows}
        assert len(candidates) == choices and len(a.questions) == 120
        expected = {_pair(query, row): frozenset({_pair(candidate, row)}) for row in drawn[concepts]}
        assert {q.query: q.right for q in a.questions} == expected
        for q in a.questions:
            assert len(q.candidates) == choices and set(q.candidates) == candidates
        assert kind is not SEARCH or candidates < set(data.collection)
        assert all(data.name(_pair(("", "{path}"), row)) == f"[{row['label']}]" for row in drawn[concepts])


def _pair(pattern, row):
    return Pair(*(part.format(**row) for part in pattern))


def test_two_pictures_of_one_name_are_both_right():
    pictures = [
        Picture("a", "bat", "mammal", "fluent", "seen"),
        Picture("b", "bat", "sport", "fluent", "new"),
        Picture("c", "cat", "mammal", "fluent", "new"),
        Picture("d", "cat", "mammal", "twemoji", "new"),
    ]
    for condition, names in zip(CONDITIONS, ({}, {"bat": "ab"}, {"bat": "ab", "cat": "c"}), strict=True):
        found = about_pictures(SEARCH, condition, pictures)
        assert {SEARCH.own(q.query.text): "".join(sorted(p.image for p in q.right)) for q in found} == names
        assert all([p.image for p in q.candidates] == ["a", "b", "c"] for q in found)
    (bat, cat) = about_pictures(NAMING, CONDITIONS[2], pictures)
    assert [p.text for p in bat.candidates] == ["bat", "cat"] and {p.text for p in bat.right} == {"bat"}
    assert cat.query.image == "c" and {p.text for p in cat.right} == {"cat"}
    (bat, _) = about_pictures(SORTING, CONDITIONS[2], pictures)
    assert [p.text for p in bat.candidates] == ["mammal", "sport"] and {p.text for p in bat.right} == {"sport"}


def test_sets_are_drawn_as_their_condition_says(dataset):
    about = json.loads((dataset.root / "subsets.json").read_text(encoding="utf-8"))
    asked = [a for a in read_data(dataset).question_sets if a.kind.sets]
    assert len(asked) == 6 and [a.condition for a in asked] == [*CONDITIONS, *CONDITIONS]
    for a in asked:
        assert about[a.name]["concepts"] == {"seen": "seen", "new": "held-out"}[a.condition.concepts]
        assert (about[a.name]["styles"] == [HELD_OUT_STYLE]) == (a.condition.style == "new")
        assert a.condition.style == "new" or HELD_OUT_STYLE not in about[a.name]["styles"]


def test_crops_are_called_what_questions_call_them(dataset):
    data = read_data(dataset)
    asked = [q for a in data.question_sets if a.kind is GROUNDING for q in a.questions]
    told = {pair: f"[{GROUNDING.own(q.query.text)}]" for q in asked for pair in q.right}
    crops = {pair for q in asked for pair in q.candidates}
    assert len(told) > 50 and len(crops) > len(told)
    assert all(data.name(pair) == told.get(pair, "[another crop]") for pair in crops)


def test_what_is_absent_is_not_asked(tmp_path):
    for name in ("images.zip", "pictures.jsonl", "Fluent-Where"):
        (tmp_path / name).symlink_to(bundled() / "MMEB-eval" / name)
    asked = read_data(Dataset(tmp_path)).question_sets
    assert [a.kind for a in asked] == [SEARCH, NAMING, SORTING, ASKING]
    assert {a.condition for a in asked} == {CONDITIONS[2]} and asked[-1].name == "Fluent-Where"
    (tmp_path / "pictures.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no picture to search: pictures_seen\.jsonl and pictures\.jsonl"):
        read_data(Dataset(tmp_path))


def test_ties_count_against_the_right_answer():
    query, *candidates = [Pair(name, "") for name in "qabcd"]
    vectors = np.array([[1.0, 0], [0.6, 0.8], [0.6, -0.8], [0.6, 0.8], [0.8, 0.6]])
    number = {pair: i for i, pair in enumerate([query, *candidates])}
    found, scored = answer(Question(query, tuple(candidates), frozenset(candidates[:1])), vectors, number)
    assert [c.text for c in found.candidates] == ["d", "b", "c", "a"] and found.rank == scored.rank == 4
    assert scored.metrics()[0] is False and [found.is_right(i) for i in range(4)] == [False, False, False, True]
    both = Question(query, tuple(candidates), frozenset(candidates[2:]))
    found, scored = answer(both, vectors, number)
    assert (found.rank, scored.rank) == (1, 1) and tables.place(found) == "1 of 4"
    assert isinstance(found, Answer) and found.scores == pytest.approx((0.8, 0.6, 0.6, 0.6))


def test_an_output_that_cannot_be_written_is_told_before_anything_is_computed(mini, tmp_path, capsys):
    assert main(["demo", "-o", str(tmp_path / "no" / "page.html")]) == 1
    assert "folder" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_mini_is_the_bundled_checkpoint_wherever_one_is(mini, tmp_path):
    assert checkpoint.resolve("mini") == mini
    (tmp_path / "mini").mkdir()
    assert checkpoint.resolve("mini") == mini
    assert checkpoint.resolve("./mini") == checkpoint.resolve(Path("mini")) == Path("mini")


def test_mini_says_once_what_it_is(mini, caplog):
    Path("mini").mkdir()
    for _ in range(2):
        e = Embedder.from_pretrained("mini", device="cpu", show_progress=False)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.name == "minivlm2vec"
    assert "demonstration" in record.message and '"TIGER-Lab/VLM2Vec-Full"' in record.message
    assert "./mini was not taken" in record.message
    assert e.name == "mini" and e.encode(["a cat"]).shape == (1, e.dimension)


def test_info_mini(mini, capsys, caplog):
    assert main(["info", "mini"]) == 0
    assert "decoder.layers" in capsys.readouterr().out and not caplog.records


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_an_incomplete_installation_is_named(mini, tmp_path, monkeypatch, capsys, lost):
    for name in {"config.json", "tokenizer.json", "model.safetensors"} - {lost}:
        (tmp_path / name).write_bytes((mini / name).read_bytes())
    monkeypatch.setattr(checkpoint, "MINI", tmp_path)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(tmp_path))} has no {re.escape(lost)}: install"):
        Embedder.from_pretrained("mini")
    assert main(["demo"]) == 1
    assert f"has no {lost}" in capsys.readouterr().err and not Path("demo.html").exists()


def test_the_page_shows_a_grounded_picture(demo):
    """Its box, drawn, and what was looked for."""
    _, _, path = demo
    text = path.read_text(encoding="utf-8")
    (figure,) = re.findall(r'<figure class="grounded">.*?</figure>', text, re.DOTALL)
    uri = re.search(r'src="data:image/webp;base64,([^"]+)"', figure)
    assert uri and "windows over the picture" in figure
    image = Image.open(io.BytesIO(b64decode(uri[1]))).convert("RGB")
    red = (np.abs(np.asarray(image, dtype=int) - (0xE6, 0x19, 0x4B)).max(axis=2) < 40).sum()
    assert image.size == (384, 384) and red > 200, "the box"
