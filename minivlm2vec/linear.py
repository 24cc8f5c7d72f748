"""Matrices and embedding tables. They differ from torch's in one thing: making one draws no random numbers.

Weights come from a checkpoint. (On the meta device torch's own initialisation would also import 150 MB of Python that
inference never needs.) Those of a new layer are drawn when `reset_parameters` is called.
"""

from torch import nn


class Linear(nn.Linear):
    """y = x W^T + b. A plain `nn.Linear`, or anything else that has `forward(x)`, works in its place."""

    made = False

    def reset_parameters(self) -> None:
        if self.made:
            super().reset_parameters()
        self.made = True


class Embedding(nn.Embedding):
    """A table of rows, looked up by number."""

    made = False

    def reset_parameters(self) -> None:
        if self.made:
            super().reset_parameters()
        self.made = True
