"""The answers as text, for a terminal of 110 columns."""

import textwrap
from collections.abc import Sequence

from .answers import Answer, Result, Times
from .questions import DemoData, Kind, shown

WIDTH = 110
NEAREST = 3  # answers of a question in a table
HEAD = ("concepts, style", "question", "right answer is", "nearest")
WHAT_IS_SEEN = (
    "Concepts, style: whether the bundled model was trained on them. Seen, seen: on these emoji as drawn here. Seen, "
    "new: on these emoji, drawn in other styles. New, new: neither on these emoji nor on anything in this style."
)


def render(results: Sequence[Result], times: Times, data: DemoData) -> str:
    """A table for each kind of question, then the scores, then the times."""
    kinds = dict.fromkeys(result.question_set.kind for result in results)
    tables = [kind_table(kind, [r for r in results if r.question_set.kind is kind], data) for kind in kinds]
    legend = "*: right. [name]: a picture of it; the page shows it. The questions are evenly spaced over each set."
    return "\n\n".join([*tables, legend, summary(results), times_text(times)]) + "\n"


def kind_table(kind: Kind, results: Sequence[Result], data: DemoData) -> str:
    """Some questions of one kind, with the nearest answers."""
    chosen = [(result, i) for result in results for i in shown(result.question_set)]
    rows = [HEAD[:3], *(_cells(result, i, data) for result, i in chosen)]
    widths = [_width(column, most) for column, most in zip(zip(*rows, strict=True), (15, 36, 30), strict=True)]
    starts = ["  " + "  ".join(map(_fill, row, widths)) + "  " for row in rows]
    nearest = [_nearest(result.answers[i], data, WIDTH - len(starts[0])) for result, i in chosen]
    instruction = kind.instruction.removeprefix("<|image_1|>\n").strip().replace("{}", "...")
    lines = (start + end for start, end in zip(starts, (HEAD[3], *nearest), strict=True))
    return "\n".join([f"{kind.title}:  {instruction}", *lines])


def summary(results: Sequence[Result]) -> str:
    """P@1 of every set beside chance."""
    head = ("nearest answer is right", HEAD[0], "questions", "candidates", "P@1", "95%", "chance")
    body = [summary_cells(result) for result in results]
    widths = [_width(column, WIDTH) for column in zip(head, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(padded).rstrip()

    lines = [line(head), "-" * len(line(head)), *map(line, body)]
    return "\n".join([*lines, *textwrap.wrap(WHAT_IS_SEEN, WIDTH)])


def summary_cells(result: Result) -> tuple[str, ...]:
    """Kind, concepts and style, questions, candidates, P@1, its interval, chance."""
    return (
        result.question_set.kind.title,
        concepts_and_style(result),
        str(len(result.answers)),
        result.candidates,
        f"{result.precision:.0f}%",
        f"{result.low:.0f}-{result.high:.0f}",
        f"{result.chance:.1f}%",
    )


def times_text(times: Times) -> str:
    """The times, as sentences."""
    parts = [] if times.load is None else [f"Model loaded in {times.load:.1f} s"]
    parts.append(_rate(times.pictures, "pictures", times.embed_pictures))
    if times.others:
        parts.append(_rate(times.others, "questions and other candidates", times.embed_others))
    parts.append(f"one text query among {times.pictures} pictures answered in {1000 * times.query:.1f} ms")
    return "\n".join(textwrap.wrap("; ".join(parts) + ".", WIDTH))


def place(answer: Answer) -> str:
    """ "2 of 24": where the first right answer came."""
    return f"{answer.rank} of {len(answer.candidates)}"


def concepts_and_style(result: Result) -> str:
    """ "seen, new": which of the two training has shown."""
    return f"{result.question_set.condition.concepts}, {result.question_set.condition.style}"


def query_name(result: Result, answer: Answer, data: DemoData) -> str:
    """The question's own words, or else what its picture shows."""
    return result.question_set.kind.own(answer.question.query.text) or data.name(answer.question.query)


def _cells(result: Result, index: int, data: DemoData) -> tuple[str, str, str]:
    """Concepts and style, question, the right answer (where the question does not name it) and its place."""
    answer = result.answers[index]
    query = query_name(result, answer, data)
    right = data.name(next(pair for pair in answer.candidates if pair in answer.question.right))
    told = "" if right.strip("[]") == query.strip("[]") else f"{_cut(right, 18)}: "
    return concepts_and_style(result), query, f"{told}{place(answer)}"


def _nearest(answer: Answer, data: DemoData, room: int) -> str:
    """As many of the nearest answers as fit, at least one."""
    items = [
        f"{'*' if answer.is_right(i) else ''}{data.name(pair)} {answer.scores[i]:.2f}"
        for i, pair in enumerate(answer.candidates[:NEAREST])
    ]
    while len(items) > 1 and len(", ".join(items)) > room:
        items.pop()
    return _cut(", ".join(items), room)


def _rate(number: int, what: str, seconds: float) -> str:
    return f"{number} {what} embedded in {seconds:.1f} s ({number / seconds:.0f}/s)"


def _width(column: Sequence[str], most: int) -> int:
    return min(most, max(len(cell) for cell in column))


def _fill(text: str, width: int) -> str:
    return _cut(text, width).ljust(width)


def _cut(text: str, width: int) -> str:
    text = text.replace("\n", " ").strip()
    return text if len(text) <= width else text[: width - 3] + "..."
