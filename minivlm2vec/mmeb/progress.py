"""How far an evaluation is, and bars that show it."""

from dataclasses import dataclass

from huggingface_hub.utils import tqdm


@dataclass(frozen=True)
class Progress:
    """`done` of the `inputs` distinct inputs of a subset, which is number `number` (from 1) of `subsets`."""

    subset: str
    number: int
    subsets: int
    done: int
    inputs: int


class ProgressBars:
    """A bar on stderr for each subset: `evaluate(..., on_progress=ProgressBars())`."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, at: Progress) -> None:
        if self._bar is None:
            self._bar = tqdm(total=at.inputs, desc=f"{at.subset} [{at.number}/{at.subsets}]", unit="input")
        self._bar.update(at.done - self._bar.n)
        if at.done == at.inputs:
            self._bar.close()
            self._bar = None
