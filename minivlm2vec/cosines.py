"""Cosines of vectors, rounded so that equal inputs tie whatever order their sums were taken in."""

import numpy as np


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """[N, D] -> float64 rows of length 1. Raises ValueError for rows that are not finite or zero."""
    wide = np.asarray(vectors, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(wide).all(axis=1))
    if len(bad):
        raise ValueError(f"{len(bad)} of {len(wide)} vectors are not finite, the first is number {bad[0]}")
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    zero = np.flatnonzero(norms[:, 0] == 0)
    if len(zero):
        raise ValueError(f"{len(zero)} of {len(wide)} vectors are zero, the first is number {zero[0]}")
    return wide / norms


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines [A, B] float32 of float64 unit rows [A, D] and [B, D], from float64 products rounded to 12 places: equal
    vectors tie, also where their cosine is 0."""
    return (a @ b.T).round(12).astype(np.float32)
