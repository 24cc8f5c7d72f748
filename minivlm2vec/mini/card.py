"""A checkpoint's scores on mini-MMEB as a file, scores.json, and as its model card, README.md.

    python -m minivlm2vec.mini card CHECKPOINT [DATA]

The same scores give the same card; without DATA it is written again from scores.json. How the checkpoint was trained
stands in training.json beside it:

    {"commands": ["minivlm2vec train train.toml"], how it was made
     "runs": [{"config": "train.toml",             one after the other; files beside it, which the card shows
               "steps": 4000, "batch_size": 256}],
     "sets": ["Emoji-t2i", ...],                   as in the configs; all others are unseen tasks
     "seed": 0,
     "hardware": "2 cores of ...", "wall_time_s": 5400, "precision": "float32",
     "commit": "b70aab8", "torch": "2.13.0",
     "more_styles": true,                          if it saw those of `more_styles` too; may be left out
     "notes": ["..."]}                             anything else worth telling; may be left out
"""

import json
import tempfile
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from ..mmeb.report import TITLES
from ..mmeb.subsets import META_TASKS
from . import grounding
from .scores import GROUPS, measure
from .world import sources

SCORES = "scores.json"
TRAINING = ("commands", "runs", "sets", "seed", "hardware", "wall_time_s", "precision", "commit", "torch")
# What the checkpoint is meant to reach: the figure's name, the sets, the least P@1.
AIMS = (
    ("text to image, seen concepts, held-out style", ("Seen-Fluent-t2i",), 80),
    ("image to text, seen concepts, held-out style", ("Seen-Fluent-i2t",), 80),
    ("grounding, seen concepts, held-out style", ("Seen-Fluent-Isolate", "Seen-Fluent-Point"), 60),
    (
        "positional VQA, seen concepts, held-out style",
        ("Seen-Fluent-Where", "Seen-Fluent-Beside", "Seen-Fluent-Position"),
        60,
    ),
    ("classes of held-out concepts", ("Emoji-Subgroup", "Fluent-Subgroup"), 40),
)
TITLE = {
    GROUPS[0]: "Seen concepts, styles of training",
    GROUPS[1]: "Seen concepts, held-out style",
    GROUPS[2]: "Held-out concepts, styles of training",
    GROUPS[3]: "Held-out concepts, held-out style",
}


def card(name: str, scores: dict[str, Any], training: dict[str, Any] | None, configs: list[str]) -> str:
    """The model card in Markdown, with the Hub's YAML header.

    scores: see `scores.measure`. training: see the top of this file. configs: the texts of its runs' configs.
    """
    parts = [
        _HEADER,
        f"# {name}: a small demonstration of minivlm2vec\n",
        _WHAT,
        _architecture(scores["checkpoint"]),
        _data(scores["concepts"], bool(training and training.get("more_styles"))),
        _trained(training, configs),
        _results(scores, training),
        _LIMITS,
        _reproduce(training),
    ]
    return "\n".join(parts)


# --- what it is ------------------------------------------------------------------------------------------

_HEADER = """\
---
license: apache-2.0
library_name: minivlm2vec
pipeline_tag: feature-extraction
language: en
tags:
- multimodal-embeddings
- image-text-retrieval
- vlm2vec
- phi3_v
- demonstration
---
"""
_WHAT = """\
It turns any mix of a short English text and pictures of emoji into one vector of length 1, and the vectors of things
that belong together are near: a name and its picture, a picture and its class, a scene and a question about it and
the answer. It ships with the package so that a fresh machine finds things without any download.

It is **not** VLM2Vec and knows nothing but emoji: not photographs, not documents, not the world. It shows that the
code trains and what an embedder does, and it serves tests. For real work take the published model:
`Embedder.from_pretrained("TIGER-Lab/VLM2Vec-Full")`.
"""


def _architecture(facts: dict[str, Any]) -> str:
    v, d = facts["vision"], facts["decoder"]
    heads = f"{d['heads']} heads" + (f" ({d['kv_heads']} of keys and values)" if d["kv_heads"] != d["heads"] else "")
    crops = (
        f"at most {facts['crops']} crops of {v['crop']} x {v['crop']} pixels and a global view, patches of {v['patch']}"
    )
    return f"""\
## Model

The architecture of Phi-3.5-vision as VLM2Vec uses it, in small: {facts["parameters"]:,} parameters that run,
{facts["bytes"] / 1e6:.1f} MB of safetensors in {facts["stored"]}, run in {facts["dtype"]}. A vector has \
{facts["dimension"]} numbers.

| part | layers | width | heads | MLP | |
|:--|--:|--:|--:|--:|:--|
| image tower (CLIP ViT) | {v["layers"]} | {v["width"]} | {v["heads"]} | {v["mlp"]} | {crops} |
| decoder (Phi-3) | {d["layers"]} | {d["width"]} | {heads} | {d["mlp"]} | {d["vocabulary"]:,} tokens |
"""


def _data(concepts: dict[str, int], more_styles: bool) -> str:
    packages = (*sources.PACKAGES, *(sources.MORE_STYLES if more_styles else ()))
    works = "\n".join(one.credit_row for one in packages)
    more = " and, beyond mini-MMEB's own sets, Noto v1, Firefox OS and EmojiOne where they have a concept"
    credits = "Twemoji and EmojiOne" if more_styles else "Twemoji"
    text = f"""\
mini-MMEB: tasks in MMEB's form, drawn from emoji. {concepts["seen"]:,} concepts were for training and \
{concepts["held out"]:,} held out before anything was drawn, after merging equal drawings and variants of skin, gender \
and direction. Training saw the styles Noto and Twemoji{more if more_styles else ""}; Fluent was held out whole."""
    rights = f"""\
{credits} drawings: Creative Commons Attribution 4.0, https://creativecommons.org/licenses/by/4.0/legalcode. Drawings \
were resized, varied, put on plain backgrounds, combined and cropped. No author endorses this use. Fluent drawings \
were used for evaluation alone (and, with the others, to find equal drawings)."""
    table = f"| work | package | licence |\n|:--|:--|:--|\n{works}"
    return f"## Data\n\n{_wrap(text)}\n\n{table}\n\n{_wrap(rights)}\n"


def _wrap(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


# --- how it was trained ----------------------------------------------------------------------------------


def _trained(training: dict[str, Any] | None, configs: list[str]) -> str:
    if training is None:
        return "## Training\n\nNot recorded: there is no training.json beside the checkpoint.\n"
    minutes = training["wall_time_s"] / 60
    runs = training["runs"]
    pairs = sum(run["steps"] * run["batch_size"] for run in runs)
    rows = {
        "steps": ", then ".join(f"{run['steps']:,} of {run['batch_size']:,} pairs" for run in runs)
        + f": {pairs:,} pairs in all",
        "seed": training["seed"],
        "hardware": training["hardware"],
        "wall time": f"{minutes:.0f} minutes" if minutes < 600 else f"{minutes / 60:.1f} hours",
        "precision": training["precision"],
        "torch": training["torch"],
        "commit": f"`{training['commit']}`",
        "sets": ", ".join(name if n == 1 else f"{name} (x{n})" for name, n in Counter(training["sets"]).items()),
    }
    lines = [
        "## Training\n",
        "By contrast, on pairs of a query and its target.\n",
        "| | |\n|:--|:--|",
    ]
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    lines += ["", *(f"- {note}" for note in training.get("notes", ()))]
    for run, config in zip(runs, configs, strict=True):
        lines.append(f"\n`{run['config']}`:\n\n```toml\n{config.strip()}\n```\n")
    return "\n".join(lines)


# --- scores ----------------------------------------------------------------------------------------------


def _results(scores: dict[str, Any], training: dict[str, Any] | None) -> str:
    trained = set(training["sets"]) if training else None
    parts = [_LEGEND, _aims(scores["sets"], trained), _summary(scores["averages"])]
    parts += [_table(one, scores["sets"], trained) for one in GROUPS]
    measured = scores["measured"]
    if "grounding" in scores:
        parts.append(_grounding(scores["grounding"]))
    parts.append(
        f"Scored in {measured['seconds']} s on {measured['device']} ({measured['threads']} threads, torch "
        f"{measured['torch']}).\n" + "".join(f"\n- {note}" for note in scores["notes"])
    )
    return "\n".join(parts)


_LEGEND = """\
## Scores

Precision@1 in percent over a row's own candidates (ties are counted against the model) with the 95% bootstrap interval
over rows. **Seen** concepts are those of training, in scenes and grids that training did not draw; **held-out**
concepts were never shown. **Chance** is a random order. **Pixels** is the nearest neighbour by the squared distance of
32 x 32 RGB pictures: the nearest candidate picture or, where candidates are texts, the answer of the nearest training
picture of the same task (among answers that are candidates). It ignores the query's text, breaks ties at random, and
has no answer (n/a) without a picture in the query, or where training has none of the right answers. In the styles of
training a single emoji of a seen concept is itself a training picture: there the baseline looks the name or class up,
and the model was trained on that very drawing. † marks tasks that training has not seen.
"""


def _grounding(measured: dict[str, Any]) -> str:
    sets, about = measured["sets"].values(), measured["measured"]
    low, high = min(one["crops"][0] for one in sets), max(one["crops"][1] for one in sets)
    text = f"""\
`tasks.ground` without boxes, in percent of the first rows of the sets *-Isolate: **found** is that the best box has an
IoU of at least 0.5 with the named object's, **chance** that a window drawn at random from those laid over the picture
first has, **reachable** that any of these has (refining moves windows, and may pass it). It embeds {low} to {high}
crops of a picture. Measured on the {about["device"]} (torch {about["torch"]}) by
`python -m minivlm2vec.mini grounding CHECKPOINT`.
"""
    return f"### Grounding without boxes\n\n{text}\n{grounding.table(measured, TITLE)}"


def _aims(sets: dict[str, dict], trained: set[str] | None) -> str:
    lines = ["| aim | at least | set | P@1 | reached |\n|:--|--:|:--|--:|:--|"]
    for what, names, least in AIMS:
        for name in names:
            if name in sets:
                p = sets[name]["precision@1"]
                reached = "yes" if p["mean"] >= least else "no"
                lines.append(f"| {what} | {least} | {name}{_mark(sets[name], trained)} | {_interval(p)} | {reached} |")
    return "\n".join(lines) + "\n"


def _summary(averages: dict[str, dict[str, dict]]) -> str:
    """Means by meta-task, a column for each group."""
    groups = [one for one in GROUPS if one in averages]
    lines = ["Means over sets (in brackets chance):\n",
             "| | " + " | ".join(TITLE[one] for one in groups) + " |",
             "|:--|" + "--:|" * len(groups)]  # fmt: skip
    for task in (*META_TASKS, "all"):
        if any(task in averages[one] for one in groups):
            cells = [_average(averages[one].get(task)) for one in groups]
            lines.append(f"| {TITLES[task]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _average(mean: dict[str, Any] | None) -> str:
    return "" if mean is None else f"{mean['precision@1']['mean']:.1f} ({mean['chance']:.1f})"


def _table(group: str, sets: dict[str, dict], trained: set[str] | None) -> str:
    members = {name: one for name, one in sets.items() if one["group"] == group}
    lines = [f"### {TITLE[group]}\n",
             "| set | | n | candidates | P@1 [95%] | chance | pixels [95%] |",
             "|:--|:--|--:|--:|--:|--:|--:|"]  # fmt: skip
    for task in META_TASKS:
        lines += [_line(name, one, trained) for name, one in members.items() if one["meta_task"] == task]
    return "\n".join(lines) + "\n"


def _line(name: str, one: dict[str, Any], trained: set[str] | None) -> str:
    low, high = one["candidates"]
    width = f"{low}" if low == high else f"{low}-{high}"
    pixels = _interval(one["pixels"]) if one["pixels"] else "n/a"
    return (
        f"| {name}{_mark(one, trained)} | {one['about']} | {one['rows']} | {width} | {_interval(one['precision@1'])} "
        f"| {one['chance']:.1f} | {pixels} |"
    )


def _mark(one: dict[str, Any], trained: set[str] | None) -> str:
    return " †" if trained is not None and one["task"] not in trained else ""


def _interval(p: dict[str, float]) -> str:
    return f"{p['mean']:.1f} [{p['low']:.1f}, {p['high']:.1f}]"


# --- limits, commands ------------------------------------------------------------------------------------

_LIMITS = """
## Limits

- Only emoji on plain backgrounds, alone (64 x 64 pixels) or up to nine on a canvas of 128 x 128, and short English
  phrases as mini-MMEB words them. Other pictures and texts get vectors too, and they mean nothing.
- Names of things it has never seen it can only guess from the words they share with others ("flag of ..."); classes,
  places and likeness carry over better.
- Variants of skin and gender are merged into one emoji before training, so it cannot tell them apart.
- One training run, one seed: the intervals are over rows, not over runs.
- Scores here say nothing about MMEB or about the published VLM2Vec models.
"""


def _reproduce(training: dict[str, Any] | None) -> str:
    train = "".join(f"\n{one}" for one in training["commands"]) if training else ""
    return f"""\
## To reproduce

```sh
pip install 'minivlm2vec[mmeb,mini]'
python -m minivlm2vec.mini.world DATA                   # fetches four npm packages (160 MB)\
{train}
python -m minivlm2vec.mini card CHECKPOINT DATA         # scores.json and this card
```
"""


# --- files -----------------------------------------------------------------------------------------------


def read_training(checkpoint: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """training.json of a checkpoint and the texts of the configs that it names; None where there is none.

    Raises ValueError naming the file and what it lacks.
    """
    path = checkpoint / "training.json"
    if not path.exists():
        return None, []
    try:
        training = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    missing = [key for key in TRAINING if key not in training]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    configs = [checkpoint / run["config"] for run in training["runs"]]
    absent = [config.name for config in configs if not config.exists()]
    if absent:
        raise ValueError(f"{path} names the config {', '.join(absent)}, which is not beside it")
    return training, [config.read_text(encoding="utf-8") for config in configs]


def write_scores(
    checkpoint: Path,
    data: Path,
    out: Path,
    *,
    work: Path | None = None,
    limit: int | None = None,
    allow_collapsed: bool = False,
    show_progress: bool = False,
) -> None:
    """Scores a checkpoint and writes scores.json into `out`. Arguments and errors: see `scores.measure`; without
    `work` an interrupted run begins anew."""
    read_training(checkpoint)  # first: a mistake in it should not wait for the scores
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        scores = measure(
            checkpoint,
            data,
            work or Path(temporary),
            limit=limit,
            allow_collapsed=allow_collapsed,
            show_progress=show_progress,
        )
    (out / SCORES).write_text(json.dumps(scores, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_card(checkpoint: Path, out: Path, *, name: str) -> str:
    """Writes the card, README.md in `out`, from the scores.json there. Returns its overview: what was aimed at, and
    means. Raises ValueError where there are no scores, or training.json is wrong."""
    training, configs = read_training(checkpoint)
    if not (out / SCORES).exists():
        raise ValueError(f"without DATA the card is written from {out / SCORES}, which does not exist")
    scores = json.loads((out / SCORES).read_text(encoding="utf-8"))
    if (out / grounding.GROUNDING).exists():
        scores["grounding"] = json.loads((out / grounding.GROUNDING).read_text(encoding="utf-8"))
    (out / "README.md").write_text(card(name, scores, training, configs), encoding="utf-8")
    trained = set(training["sets"]) if training else None
    return _aims(scores["sets"], trained) + "\n" + _summary(scores["averages"])
