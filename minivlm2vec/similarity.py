"""Cosine similarity of vectors, whoever made them."""

from typing import Any, overload

import numpy as np
import torch
from torch import Tensor


@overload
def similarity(a: np.ndarray, b: np.ndarray | Tensor) -> np.ndarray: ...
@overload
def similarity(a: Tensor, b: np.ndarray | Tensor) -> Tensor: ...
def similarity(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """[A, B] float32 of vectors [A, D] and [B, D]; one vector [D] is [1, D]. A tensor where `a` is one, on its device.

    Raises ValueError for other shapes."""
    x, y = _unit(a), _unit(b)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"vectors are [A, D] and [B, D], got {list(x.shape)} and {list(y.shape)}")
    return _as(a, x @ y.to(x.device).T)


@overload
def similarity_pairwise(a: np.ndarray, b: np.ndarray | Tensor) -> np.ndarray: ...
@overload
def similarity_pairwise(a: Tensor, b: np.ndarray | Tensor) -> Tensor: ...
def similarity_pairwise(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """[N] float32: of row i of `a` [N, D] and row i of `b` [N, D]; otherwise as `similarity`."""
    x, y = _unit(a), _unit(b)
    if x.shape != y.shape:
        raise ValueError(f"vectors are [N, D] and [N, D], got {list(x.shape)} and {list(y.shape)}")
    return _as(a, (x * y.to(x.device)).sum(1))


def _unit(vectors: Any) -> Tensor:
    """As [N, D] float32 of L2 norm 1."""
    try:
        x = torch.as_tensor(vectors).float()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"vectors are an array or a tensor, got {type(vectors).__name__}") from None
    if x.ndim not in (1, 2):
        raise ValueError(f"vectors are [N, D], or one is [D], got {list(x.shape)}")
    return torch.nn.functional.normalize(torch.atleast_2d(x), dim=1)


def _as(like: np.ndarray | Tensor, scores: Tensor) -> np.ndarray | Tensor:
    return scores.cpu().numpy() if isinstance(like, np.ndarray) else scores
