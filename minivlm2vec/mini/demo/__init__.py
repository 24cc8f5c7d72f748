"""What a model finds in the bundled pictures: questions, answers, scores, and a web page of them.

    demonstration = run(Embedder.from_pretrained("mini"), "demo.html")
    print(demonstration.text())

questions.py   what is asked, read from the bundled mini-MMEB
answers.py     the model's answers, scores and times
tables.py      the answers as text
grounded.py    a thing looked for in a picture, for the page
page.py        the answers as a web page

Needs the core's dependencies alone, and no network.
"""

from dataclasses import dataclass
from pathlib import Path

from ...embedder import Embedder
from ...mmeb.dataset import Dataset
from .. import bundled
from . import page, tables
from .answers import Result, Times, answer_all
from .grounded import ground_first
from .questions import DemoData, read_data


@dataclass(frozen=True)
class Demonstration:
    """What was asked, what came out, how long it took."""

    data: DemoData
    results: list[Result]
    times: Times

    def text(self) -> str:
        """Tables of answers, the scores, the times; for 110 columns."""
        return tables.render(self.results, self.times, self.data)


def run(
    embedder: Embedder,
    out: str | Path | None = None,
    *,
    name: str | None = None,
    load_seconds: float | None = None,
    show_progress: bool = False,
) -> Demonstration:
    """Answers questions made of text, of an image and of both about the bundled pictures.

    Args:
        out: the page is written to this file.
        name: what the page calls the model (default: the embedder's name).
        load_seconds: how long loading took, to be told with the other times.
    """
    dataset = Dataset(bundled() / "MMEB-eval")
    data = read_data(dataset)
    grounded = ground_first(embedder, data, dataset.images) if out is not None else None
    results, times = answer_all(embedder, data, dataset.images, load_seconds=load_seconds, show_progress=show_progress)
    if out is not None:
        page.write(
            Path(out), results, times, data, dataset.images,
            model=name or embedder.name, device=str(embedder.device), grounded=grounded,
        )  # fmt: skip
    return Demonstration(data, results, times)
