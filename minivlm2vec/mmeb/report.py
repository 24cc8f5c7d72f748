"""Tables of results, beside what was published or beside another model's: plain text, Markdown, HTML."""

import textwrap
from collections.abc import Callable, Sequence
from html import escape

from .score import METRICS, Figures
from .subsets import META_TASKS, MMEB, PUBLISHED, PUBLISHED_MODELS, Subset, groups, published_average

TITLES = {"vqa": "VQA", "all": "All"} | {task: task.capitalize() for task in META_TASKS if task != "vqa"}
HEAD = ("", "", "rows", "P@1", "95%", "P@1 orig.", "MRR", "R@5", "R@10")
_LEGEND = (
    "P@1: ties counted against the positive; orig.: as the original evaluator counts (ties are the positive's). "
    "95%: bootstrap interval over rows."
)
DIFFERENCE_HEAD = ("", "", "rows", "A", "B", "B - A", "95%")
_PAIRED_LEGEND = (
    "P@1 over the rows that both have, ties counted against the positive. 95%: paired bootstrap interval of B - A: the "
    "same rows are drawn for both. Where it holds 0, these rows do not tell the models apart."
)
_PUBLISHED = (
    "Published: arXiv 2410.05160 (LoRA: its first version). No table by subset was published for the full fine-tune, "
    "whose averages are of a run with batch 1,024; the released checkpoint was trained with batch 2,048. Averages are "
    "as printed, but from the rows where they contradict them (SigLIP retrieval; UniIR grounding, IND, OOD, all)."
)


def render(
    name: str,
    subsets: dict[str, Subset],
    figures: dict[str, Figures],
    averages: dict[str, Figures],
    notes: Sequence[str],
    form: str,
) -> str:
    """The whole table in one form: "text", "markdown" or "html". Empty strings are what is not known."""
    compared = any(one in PUBLISHED for one in subsets)
    models = PUBLISHED_MODELS if compared else ()
    members = groups(subsets.values())

    def of_subset(one: str) -> list[str]:
        return [*_cells(figures[one]), *(_percent(PUBLISHED.get(one, {}).get(model)) for model in models)]

    def of_group(group: str) -> list[str]:
        known = (published_average(model, group, members[group]) for model in models)
        return [*_cells(averages[group]), *map(_percent, known)]

    lines = _lines(subsets, of_subset, of_group)
    footnotes = [_LEGEND, *([_PUBLISHED] if compared else ()), *notes]
    return _render(f"{'MMEB' if compared else 'Results'}: {name}", (*HEAD, *models), lines, footnotes, form)


def render_differences(
    names: tuple[str, str],
    subsets: dict[str, Subset],
    figures: dict[str, tuple[Figures, Figures, Figures]],
    averages: dict[str, tuple[Figures, Figures, Figures]],
    notes: Sequence[str],
    form: str,
) -> str:
    """Precision@1 of A and of B, and B - A with its interval, in one form as of `render`."""
    lines = _lines(
        subsets, lambda one: _difference_cells(*figures[one]), lambda group: _difference_cells(*averages[group])
    )
    return _render(f"B - A, where A is {names[0]} and B is {names[1]}", DIFFERENCE_HEAD, lines,
                   [_PAIRED_LEGEND, *notes], form)  # fmt: skip


def _render(
    title: str, head: Sequence[str], lines: list[tuple[bool, list[str]]], footnotes: Sequence[str], form: str
) -> str:
    forms = {"text": _text, "markdown": _markdown, "html": _html}
    if form not in forms:
        raise ValueError(f"a table is one of {', '.join(forms)}, not {form!r}")
    return forms[form](title, head, lines, footnotes)


def _lines(
    subsets: dict[str, Subset], of_subset: Callable[[str], list[str]], of_group: Callable[[str], list[str]]
) -> list[tuple[bool, list[str]]]:
    """(is an average, cells) line after line: each meta-task with its average, then IND, OOD, all."""
    members = groups(subsets.values())
    published = any(one in PUBLISHED for one in subsets)

    def average(group: str) -> tuple[bool, list[str]]:
        n, total = len(members[group]), len(groups(MMEB.values()).get(group, ())) if published else 0
        count = f"{n} of {total}" if total > n else f"{n}"
        return True, [f"{TITLES.get(group, group)} ({count})", "", *of_group(group)]

    lines = []
    for task in META_TASKS:
        for one in (one for one in subsets.values() if one.meta_task == task):
            mark = "" if one.averaged else " (not averaged)"
            lines.append((False, [one.name + mark, one.domain, *of_subset(one.name)]))
        lines += [average(task)] if task in members else []
    return lines + [average(group) for group in ("IND", "OOD", "all") if group in members]


def _cells(figures: Figures) -> list[str]:
    mean = dict(zip(METRICS, figures.mean, strict=True))
    low, high = figures.interval()[:, METRICS.index("precision@1")]
    return [
        str(figures.rows),
        _percent(mean["precision@1"]),
        f"{low:.1f}-{high:.1f}",
        _percent(mean["precision@1_original"]),
        *(_percent(mean[name]) for name in ("mrr", "recall@5", "recall@10")),
    ]


def _difference_cells(a: Figures, b: Figures, difference: Figures) -> list[str]:
    at = METRICS.index("precision@1")
    low, high = difference.interval()[:, at]
    means = (_percent(one.mean[at]) for one in (a, b))
    return [str(a.rows), *means, f"{difference.mean[at]:+.1f}", f"{low:+.1f} to {high:+.1f}"]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


# --- forms -----------------------------------------------------------------------------------------------


def _text(title: str, head: Sequence[str], lines: list[tuple[bool, list[str]]], notes: Sequence[str]) -> str:
    """For a terminal of 120 columns: the published scores come in a block of their own, beside our P@1."""
    ours, known = list(range(len(head)))[: len(HEAD)], list(range(len(HEAD), len(head)))
    blocks = [ours] + ([[0, 1, HEAD.index("P@1"), *known]] if known else [])
    tables = [
        _block([head[i] for i in kept], [(bold, [cells[i] for i in kept]) for bold, cells in lines]) for kept in blocks
    ]
    return "\n\n".join([title, *tables, "\n".join(textwrap.fill(note, 120) for note in notes)]) + "\n"


def _block(head: Sequence[str], lines: list[tuple[bool, list[str]]]) -> str:
    widths = [max(len(row[i]) for row in (head, *(cells for _, cells in lines))) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )

    rule = "-" * len(line(head))
    body = []
    for is_average, cells in lines:
        body += [line(cells), rule] if is_average else [line(cells)]
    return "\n".join(one.rstrip() for one in (line(head), rule, *body))


def _markdown(title: str, head: Sequence[str], lines: list[tuple[bool, list[str]]], notes: Sequence[str]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    body = [line([f"**{cell}**" if cell and bold else cell for cell in cells]) for bold, cells in lines]
    aligned = "|" + "|".join(":--" if i < 2 else "--:" for i in range(len(head))) + "|"
    return "\n".join([f"## {title}", "", line(head), aligned, *body, "", *(f"- {note}" for note in notes), ""])


def _html(title: str, head: Sequence[str], lines: list[tuple[bool, list[str]]], notes: Sequence[str]) -> str:
    def line(cells: Sequence[str], tag: str, kind: str = "") -> str:
        return f"<tr{kind}>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = [line(cells, "td", ' class="average"' if bold else "") for bold, cells in lines]
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
        f"<title>{escape(title)}</title>",
        "<style>",
        "body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }",
        "table { border-collapse: collapse; font-variant-numeric: tabular-nums }",
        "th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }",
        "th:first-child, td:first-child { text-align: left }",
        "tr.average td { font-weight: 600; background: #f3f5f8 }",
        "</style>",
        f"<h1>{escape(title)}</h1>\n<table>\n<thead>",
        line(head, "th"),
        "</thead>\n<tbody>",
        *body,
        "</tbody>\n</table>\n<ul>",
        *(f"<li>{escape(note)}</li>" for note in notes),
        "</ul>\n</html>\n",
    ])  # fmt: skip
