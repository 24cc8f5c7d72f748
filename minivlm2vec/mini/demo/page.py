"""The answers as one self-contained web page, in the style of `minivlm2vec search --html`."""

import io
from collections.abc import Sequence
from pathlib import Path

from ... import __version__
from ...atomic import open_replacing
from ...html import asset, data_uri, escape, head
from ...rows import Images, Pair
from ...tasks import Grounding
from ..world.sources import PACKAGES
from .answers import Answer, Result, Times
from .questions import DemoData, Kind, shown
from .tables import WHAT_IS_SEEN, query_name, summary_cells, times_text

CARDS = 6  # answers of a question on the page
TYPES = {".webp": "image/webp", ".png": "image/png"}


def write(
    path: Path,
    results: Sequence[Result],
    times: Times,
    data: DemoData,
    images: Images,
    *,
    model: str,
    device: str,
    grounded: Grounding | None = None,
) -> None:
    """Writes the page; it takes the place of an older one when it is complete."""
    with open_replacing(path, "w") as f:
        f.write(head(f"{model}: a demonstration", style=asset(__package__, "page.css")))
        f.write(_intro(results, times, data, images, model))
        for kind in dict.fromkeys(result.question_set.kind for result in results):
            f.write(_section(kind, [r for r in results if r.question_set.kind is kind], data, images))
        f.write(_grounded(grounded) if grounded else "")
        f.write(_footer(model, device))


def _intro(results: Sequence[Result], times: Times, data: DemoData, images: Images, model: str) -> str:
    strip = "".join(_img(pair, data, images) for pair in data.collection[:: max(1, times.pictures // 24)][:24])
    rows = "".join(_summary_row(result) for result in results)
    return (
        f"<header><div><h1>What {escape(model)} finds in {times.pictures} pictures of emoji</h1>"
        "<p>Text, an image, or both become one vector; the nearest vector is the answer. "
        f"{WHAT_IS_SEEN}</p></div></header>\n"
        f'<div class="strip">{strip}</div>\n'
        '<div class="scores"><table><thead><tr><th>Nearest answer is right</th><th>Concepts, style</th>'
        "<th>Questions</th><th>Candidates</th><th>P@1</th><th></th><th>95%</th><th>Chance</th></tr></thead>\n"
        f"<tbody>{rows}</tbody></table></div>\n<p>{escape(times_text(times))}</p>\n"
    )


def _summary_row(result: Result) -> str:
    kind, seen, questions, candidates, precision, interval, chance = map(_arrow, summary_cells(result))
    bar = f'<meter min="0" max="100" value="{result.precision:.1f}"></meter>'
    return (
        f"<tr><td>{kind}</td><td>{seen}</td><td>{questions}</td><td>{candidates}</td><td><b>{precision}</b></td>"
        f"<td>{bar}</td><td>{interval}</td><td>{chance}</td></tr>\n"
    )


def _section(kind: Kind, results: Sequence[Result], data: DemoData, images: Images) -> str:
    """One kind: for each set, some questions and what is nearest to them."""
    instruction = kind.instruction.removeprefix("<|image_1|>\n").strip().replace("{}", "…")
    parts = [f"<section><h2>{_arrow(kind.title)}</h2><p>Instruction: “{escape(instruction)}”</p>\n"]
    for result in results:
        *_, precision, _, chance = summary_cells(result)
        condition = result.question_set.condition
        parts.append(
            f"<h3>{condition.concepts.capitalize()} concepts, {condition.style} style<span>P@1 {precision}, "
            f"chance {chance}, {len(result.answers)} questions, {result.candidates} candidates</span></h3>\n"
        )
        parts += [_question(result, result.answers[i], data, images) for i in shown(result.question_set)]
    return "".join([*parts, "</section>\n"])


def _question(result: Result, answer: Answer, data: DemoData, images: Images) -> str:
    """The question and its nearest candidates; the last gives way to the first right one, where none is among them."""
    places = list(range(min(CARDS, len(answer.candidates))))
    if not any(map(answer.is_right, places)):
        places[-1] = next(i for i in range(len(answer.candidates)) if answer.is_right(i))
    cards = "".join(_card(answer, i, data, images) for i in places)
    return (
        f'<article><div class="asked">{_query(result, answer, data, images)}</div>'
        f'<ol class="found{"" if answer.candidates[0].image else " texts"}">{cards}</ol></article>\n'
    )


def _query(result: Result, answer: Answer, data: DemoData, images: Images) -> str:
    query = answer.question.query
    own = result.question_set.kind.own(query.text)
    picture = f'<div class="well">{_img(query, data, images)}</div>' if query.image else ""
    words = own or query_name(result, answer, data).strip("[]")
    return f'{picture}<div class="{"words" if own else "quiet"}">{escape(words)}</div>'


def _card(answer: Answer, i: int, data: DemoData, images: Images) -> str:
    """A candidate: its place, its score, what it is."""
    pair, right = answer.candidates[i], answer.is_right(i)
    inner = _img(pair, data, images) if pair.image else f'<div class="words">{escape(pair.text)}</div>'
    name = data.names.get(pair.image, "")
    caption = f'<div class="caption" title="{escape(name)}">{escape(name)}</div>' if pair.image else ""
    mark = "<em>right</em>" if right else ""
    return (
        f'<li class="card{" right" if right else ""}"><div class="well">{inner}</div><div class="about">'
        f'<div class="score"><span>{i + 1}</span><b>{answer.scores[i]:.2f}</b>{mark}</div>{caption}</div></li>'
    )


def _grounded(found: Grounding) -> str:
    """What was looked for without boxes, in the picture with the box that was found."""
    buffer = io.BytesIO()
    found.draw().save(buffer, "WEBP", quality=90)
    picture = f'<img src="{data_uri(buffer.getvalue(), "image/webp")}" alt="{escape(found.text)}" decoding="async">'
    told = f"the nearest of {found.crops} windows over the picture, score {found.score:.2f}"
    figure = f'<figure class="grounded">{picture}<figcaption><b>{escape(found.text)}</b> {told}</figcaption></figure>'
    return (
        "<section><h2>Image + name → box</h2><p>Without boxes: windows of several sizes and shapes are embedded, and "
        f"the best ones refined (<code>minivlm2vec ground</code>).</p>\n{figure}</section>\n"
    )


def _arrow(text: str) -> str:
    return escape(text.replace("->", "→"))


def _img(pair: Pair, data: DemoData, images: Images) -> str:
    source = images.source(pair.image)
    content = source if isinstance(source, bytes) else source.read_bytes()
    uri = data_uri(content, TYPES[Path(pair.image).suffix])
    return f'<img src="{uri}" alt="{escape(data.names.get(pair.image, ""))}" decoding="async">'


def _footer(model: str, device: str) -> str:
    credits = "; ".join(f"{package.credit}: {package.licence}" for package in PACKAGES[:3])
    made = f"{model} on {device}, minivlm2vec {__version__}."
    return f"<footer>{escape(made)} Pictures, resized and combined: {escape(credits)}.</footer>\n"
