"""InfoNCE over a batch, with what research changes about it.

B queries, N targets (the positives of all queries and their hard negatives), D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import Trained
from .config import LossConfig

MAX_SCALE = 100.0  # of similarities, where the temperature is learned; CLIP's (arXiv 2103.00020)


@dataclass(frozen=True)
class Targets:
    """What each of the N targets is to the B queries.

    Fields:
        owner: [N] int64, the query that a target belongs to.
        positive: [N] bool, whether it is a positive of that query; else it is one of its hard negatives.
        content: [N] int64, equal for targets that are the same text and image.
    """

    owner: Tensor
    positive: Tensor
    content: Tensor

    def positives(self, num_queries: int) -> Tensor:
        """[B, N] bool: target n is a positive of query b."""
        own = self.owner[None] == torch.arange(num_queries, device=self.owner.device)[:, None]
        return own & self.positive

    def alike(self, num_queries: int) -> Tensor:
        """[B, N] bool: target n has the content of a positive of query b, be it one or not."""
        same = self.content[:, None] == self.content[None]
        return (self.positives(num_queries).float() @ same.float()) > 0


class Loss(Protocol):
    """What a run minimises: a function, or an `nn.Module`, whose parameters are trained and saved with the run's state.

    It is called once a step in every process, each time with the vectors of all processes. So it must be the same
    everywhere, and draw no random numbers. Where it has a method `trained() -> config.Trained`, the checkpoints'
    config.json says what that returns: to which sizes vectors may be cut, which temperature was learned.
    """

    def __call__(self, queries: Tensor, targets: Tensor, about: Targets, /) -> Tensor:
        """queries [B, D], targets [N, D] as the model gives them, not normalised -> scalar."""


class ContrastiveLoss(nn.Module):
    """`contrastive_loss` with the settings of a [loss] table; the default of a run.

    Attributes:
        log_scale: -log of the temperature, a parameter where that is learned.
    """

    def __init__(self, config: LossConfig):
        super().__init__()
        self.config = config
        if config.learn_temperature:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    @property
    def temperature(self) -> float:
        if not self.config.learn_temperature:
            return self.config.temperature
        return math.exp(-min(self.log_scale.item(), math.log(MAX_SCALE)))

    def trained(self) -> Trained:
        return Trained(self.config.dims, self.temperature if self.config.learn_temperature else None)

    def forward(self, queries: Tensor, targets: Tensor, about: Targets) -> Tensor:
        c = self.config
        temperature: float | Tensor = c.temperature
        if c.learn_temperature:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(MAX_SCALE))
            temperature = (-self.log_scale).exp()
        return contrastive_loss(
            queries, targets, about,
            temperature=temperature, symmetric=c.symmetric, mask_duplicates=c.mask_duplicates, dims=c.dims,
        )  # fmt: skip


def contrastive_loss(
    queries: Tensor,
    targets: Tensor,
    about: Targets,
    *,
    temperature: float | Tensor = 0.02,
    symmetric: bool = False,
    mask_duplicates: bool = False,
    dims: Sequence[int] = (),
) -> Tensor:
    """InfoNCE: the mean over queries q and their positives p of

        -log( exp(q.p / t) / (exp(q.p / t) + sum over negatives n of exp(q.n / t)) )

    with vectors divided by their norms. With one positive a query and no hard negatives it is VLM2Vec's (arXiv
    2410.05160, equation 1): cross-entropy of q.t^T / 0.02 to the diagonal. Negatives are all targets of the batch but
    the query's own positives; its hard negatives are among them, and those of others too.

    queries [B, D], targets [N, D], of any length and dtype; computed in float32.
    symmetric: the mean of that and of the same from positives to queries.
    mask_duplicates: a target that says and shows the same as a positive of the query is none of its negatives.
    dims: the mean over the first d numbers of all vectors for each d (Matryoshka, arXiv 2205.13147); default all.
    Returns a float32 scalar. Raises ValueError where a query has no positive or a d is beyond D.
    """
    B, D = queries.shape
    positive = about.positives(B)
    if not positive.any(dim=1).all():
        raise ValueError(f"query {int(positive.any(dim=1).int().argmin())} of {B} has no positive")
    if any(not 1 <= d <= D for d in dims):
        raise ValueError(f"dims are {list(dims)}; vectors have {D} numbers")
    same = about.alike(B) if mask_duplicates else positive
    losses = []
    for d in dims or (D,):
        q, t = (F.normalize(x[:, :d].float(), dim=1) for x in (queries, targets))
        scores = q @ t.T / temperature
        loss = _info_nce(scores, positive, ~same)
        if symmetric:
            anchors = about.positive
            loss = (loss + _info_nce(scores.T[anchors], positive.T[anchors], ~same.T[anchors])) / 2
        losses.append(loss)
    return torch.stack(losses).mean()


def _info_nce(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Scores [A, C] of A anchors and C candidates -> the mean over anchors of the mean over their positives."""
    others = scores.masked_fill(~negative, -torch.inf).logsumexp(1, keepdim=True)
    each = torch.logaddexp(scores, others) - scores
    return (each.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


@torch.no_grad()
def hit_rate(queries: Tensor, targets: Tensor, about: Targets) -> float:
    """The share of queries whose nearest target of the batch is a positive, or the same as one; ties count for it."""
    scores = F.normalize(queries.float(), dim=1) @ F.normalize(targets.float(), dim=1).T
    same = about.alike(len(queries))
    best = scores.masked_fill(~same, -torch.inf).amax(1)
    return float((best >= scores.amax(1)).float().mean())
