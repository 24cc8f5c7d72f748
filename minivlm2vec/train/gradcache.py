"""GradCache (arXiv 2101.06983): the gradient of one large batch, in the memory of a small one.

A contrastive loss couples all vectors of a batch, so it cannot be summed over parts. But it reaches the parameters
through the vectors alone:

    dL/dparameters = sum over chunks of (dL/dvectors of the chunk) (dvectors of the chunk/dparameters)

1. Encode chunk after chunk, keep the vectors, forget the graphs.      3. Encode each chunk again, from the random
2. Compute the loss of all vectors, and its gradient by them.             state it had, and go on back from there.

Both passes run with gradients enabled, so that both take the same code: without, other kernels would be chosen, and
the gradient would be that of slightly different vectors. N vectors in all, D width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Encode = Callable[[Any], Tensor]


def cached_backward(
    encode: Encode,
    chunks: Sequence[Any],
    loss: Callable[[Tensor], Tensor],
    *,
    device: torch.device | str = "cpu",
    again: Encode | None = None,
    hold: Callable[[], AbstractContextManager] = nullcontext,
    scale: float = 1.0,
    dummies: int = 0,
) -> tuple[Tensor, Tensor]:
    """Adds the gradient of `loss`, times `scale`, to the parameters that `encode` uses and those of the loss itself
    (the latter without `scale`).

    encode(chunk) -> [n, D]; loss(vectors [N, D], in the chunks' order) -> scalar.
    device: whose random state is replayed, besides the CPU's.
    again: what encodes in the second pass; default `encode`. Under DDP the wrapped model, which the first pass has
        no use for.
    hold: the context of all backward passes but the last, such as DDP's `no_sync`.
    dummies: how many more chunks to pretend, for engines whose ranks must all compute equally often: the first chunk
        is encoded again and counts for nothing.
    Returns (loss, vectors [N, D]), without graph.
    """
    again = again or encode
    if len(chunks) == 1 and not dummies:  # one pass, and its graph is still there
        vectors = again(chunks[0])
        value, gradient = _gradient(vectors, loss)
        vectors.backward(gradient * scale)
        return value, vectors.detach()
    passes = [*chunks, *[chunks[0]] * dummies]
    states, parts = [], []
    for chunk in passes:
        states.append(RandomState.now(device))
        parts.append(encode(chunk).detach())
    vectors = torch.cat(parts[: len(chunks)])
    value, gradient = _gradient(vectors, loss)
    gradients = list((gradient * scale).split([len(p) for p in parts[: len(chunks)]]))
    gradients += [gradients[0] * 0] * dummies
    work = list(zip(passes, states, gradients, strict=True))
    for i, (chunk, state, gradient) in enumerate(work):
        with state.replayed(), hold() if i < len(work) - 1 else nullcontext():
            again(chunk).backward(gradient)
    return value, vectors


def _gradient(vectors: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    leaf = vectors.detach().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None, "the loss depends on the vectors"
    return value.detach(), leaf.grad


@dataclass(frozen=True)
class RandomState:
    """The generators of the CPU and of one CUDA device."""

    cpu: Tensor
    device: torch.device
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device | str = "cpu") -> "RandomState":
        device = torch.device(device)
        return cls(torch.get_rng_state(), device, torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    @contextmanager
    def replayed(self):
        """Inside, random numbers are those that came after this state; afterwards all is as before."""
        before = RandomState.now(self.device)
        self.restore()
        try:
            yield
        finally:
            before.restore()
