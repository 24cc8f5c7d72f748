"""Vectors of distinct pairs, in chunks on disk: resumable at any moment, shared between processes.

A subset's distinct pairs are cut into chunks in a fixed order. A chunk is encoded as one call and written as one file;
each process takes a run of neighbouring chunks. So what a chunk's vectors are does not depend on where an earlier run
was cut off or on how many processes there are, and neither does any score.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..atomic import open_replacing
from ..distributed import Ranks
from ..errors import InputError
from ..rows import Images, Pair, as_input

_PROBES = ("Represent the given text.\n", "<|image_1|>\nRepresent the given image with the following question: what?\n")


class Encoder(Protocol):
    """What is evaluated: an `Embedder`, or anything of one's own with its `encode`."""

    @property
    def encode(self) -> Callable[..., Any]:
        """encode(inputs, *, max_length, num_crops) -> [B, D].

        inputs: a list of texts and of {"text": text, "image": path, bytes of a file, or uint8 [H, W, 3]}. num_crops is
        not given where the options have none. Cosines are taken, so vectors need not have length 1.
        """


@dataclass(frozen=True)
class VectorStore:
    """Where chunks lie: `folder` belongs to one model with one set of options, found by `fingerprint`."""

    encoder: Encoder
    options: dict[str, Any]
    folder: Path
    batch_size: int
    ranks: Ranks

    def vectors(
        self, name: str, pairs: Sequence[Pair], images: Images, progress: Callable[[int], Any] = lambda done: None
    ) -> np.ndarray:
        """[N, D] float32 of the pairs. `progress` is told how many inputs all processes have done, as far as this one
        can tell. Raises InputError with the index of a pair that cannot be embedded."""
        folder = self.folder / f"{name}-{_digest(self.batch_size, [(*p, _stamp(p, images)) for p in pairs])}"
        folder.mkdir(parents=True, exist_ok=True)
        chunks = [pairs[i : i + self.batch_size] for i in range(0, len(pairs), self.batch_size)]
        done = 0
        for number in self.ranks.share(range(len(chunks))):
            progress(min(done * self.ranks.world, len(pairs)))
            path = folder / f"{number:05d}.npy"
            if not _is_complete(path, len(chunks[number])):
                _write(path, self._encode(chunks[number], images, number * self.batch_size))
            done += len(chunks[number])
        self.ranks.barrier()
        progress(len(pairs))
        return np.concatenate([np.load(folder / f"{n:05d}.npy", allow_pickle=False) for n in range(len(chunks))])

    def _encode(self, pairs: Sequence[Pair], images: Images, first: int) -> np.ndarray:
        try:
            inputs = [_input(i, pair, images) for i, pair in enumerate(pairs)]
            vectors = np.asarray(self.encoder.encode(inputs, **self.options), dtype=np.float32)
        except InputError as error:
            if error.index is not None:
                error.at(first + error.index)
            raise
        if vectors.ndim != 2 or len(vectors) != len(pairs):
            raise ValueError(f"encode gave an array of shape {vectors.shape} for {len(pairs)} inputs")
        return vectors


def fingerprint(encoder: Encoder, options: dict[str, Any], ranks: Ranks) -> str:
    """Tells models and options apart by what the model makes of two probes, so that vectors of an earlier run
    are taken up only if this model would give the same."""
    picture = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
    inputs = [_PROBES[0], {"text": _PROBES[1], "image": picture}]
    probe = np.asarray(encoder.encode(inputs, **options), dtype=np.float32)
    digest = hashlib.sha256(probe.tobytes() + json.dumps(options, sort_keys=True).encode()).digest()
    return ranks.agree(digest).hex()[:16]


def _input(index: int, pair: Pair, images: Images) -> Any:
    try:
        return as_input(pair, images)
    except ValueError as error:  # of a damaged zip
        raise InputError(str(error), index=index) from None


def _stamp(pair: Pair, images: Images) -> int:
    return images.stamp(pair.image) if pair.image else 0


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def _is_complete(path: Path, length: int) -> bool:
    return path.exists() and len(np.load(path, mmap_mode="r", allow_pickle=False)) == length


def _write(path: Path, vectors: np.ndarray) -> None:
    with open_replacing(path) as file:
        np.save(file, vectors, allow_pickle=False)
