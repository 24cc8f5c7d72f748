"""Scores of a checkpoint on every set of mini-MMEB, beside chance and nearest neighbours in pixels.

What `measure` returns is what the model card says, as JSON: see `card`.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import read_headers
from ..embedder import Embedder
from ..info import module_rows
from ..mmeb import score
from ..mmeb.dataset import Dataset, Rows
from ..mmeb.encode import Encoder
from ..mmeb.evaluation import EvaluateOptions, evaluate
from ..mmeb.progress import ProgressBars
from ..mmeb.score import Figures
from ..mmeb.subsets import META_TASKS
from ..rows import read_jsonl
from . import pixels
from .world import tasks

GROUPS = ("seen / training", "seen / held out", "held out / training", "held out / held out")  # concepts / styles
SETS = {one.name: one for one in tasks.EVAL}


def measure(
    checkpoint: Path,
    data: Path,
    work: Path,
    *,
    limit: int | None = None,
    allow_collapsed: bool = False,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Scores, baselines and facts of a checkpoint.

    Args:
        checkpoint: its folder.
        data: what `python -m minivlm2vec.mini.world` has written, MMEB-eval/ and MMEB-train/.
        work: where `evaluate` writes its files; an interrupted run goes on from them.
        limit: only the first rows of each set.
        allow_collapsed: score vectors that do not tell inputs apart, too.

    Raises ValueError for data that is not mini-MMEB, and what `Embedder.from_pretrained` and `evaluate` raise.
    """
    start = time.monotonic()
    dataset = Dataset(data / "MMEB-eval")
    unknown = [name for name in dataset.subsets if name not in SETS]
    if unknown:
        raise ValueError(f"{data / 'MMEB-eval'} holds {unknown[0]}, which is no set of mini-MMEB")
    embedder = Embedder.from_pretrained(checkpoint, show_progress=False)
    results = evaluate(
        CachedEncoder(embedder),
        data / "MMEB-eval",
        work,
        EvaluateOptions(batch_size=512, limit=limit, allow_collapsed=allow_collapsed),
        on_progress=ProgressBars() if show_progress else lambda progress: None,
    )
    sets = baselines(dataset, data, limit)
    for name, figures in results.figures.items():
        sets[name] |= _named(figures)
    return {
        "checkpoint": describe(checkpoint, embedder),
        "concepts": {"seen": _count(data, "pictures_seen"), "held out": _count(data, "pictures")},
        "sets": sets,
        "averages": averages(results.figures, sets),
        "notes": results.notes,
        "measured": {
            "seconds": round(time.monotonic() - start),
            "device": str(embedder.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }


class CachedEncoder:
    """An encoder that computes the same text and picture once, whatever sets they are in."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.name = getattr(encoder, "name", "")
        self.known: dict[bytes, np.ndarray] = {}

    def encode(self, inputs: Sequence[Any], **options: Any) -> np.ndarray:
        keys = [_key(one, options) for one in inputs]
        new = {key: one for key, one in zip(keys, inputs, strict=True) if key not in self.known}
        if new:
            vectors = np.asarray(self.encoder.encode(list(new.values()), **options))
            self.known.update(zip(new, vectors, strict=True))
        return np.stack([self.known[key] for key in keys])


def _key(one: Any, options: dict[str, Any]) -> bytes:
    """A digest of a text, or of {"text", "image"} with an image as a path, a file's bytes, or uint8 [H, W, 3]."""
    text, image = (one, "") if isinstance(one, str) else (one["text"], one["image"])
    if isinstance(image, np.ndarray):
        image = repr(image.shape).encode() + image.tobytes()
    content = image if isinstance(image, bytes) else str(image).encode()
    head = json.dumps([text, type(image).__name__, options], sort_keys=True).encode()
    return hashlib.sha256(len(head).to_bytes(8, "big") + head + content).digest()


# --- baselines -------------------------------------------------------------------------------------------


def baselines(dataset: Dataset, data: Path, limit: int | None = None) -> dict[str, dict[str, Any]]:
    """For each set what it is, how many candidates a row has, chance, and nearest neighbours in pixels."""
    read, labelled = pixels.SmallPictures(dataset.images), pixels.read_labelled(data)
    found = {}
    for name, subset in dataset.subsets.items():
        rows = dataset.rows(subset, limit=limit)
        widths = [len(targets) for _, targets in rows.numbered]
        found[name] = {
            "task": SETS[name].set,
            "group": group(SETS[name]),
            "meta_task": subset.meta_task,
            "about": tasks.SETS[SETS[name].set].about,
            "rows": len(rows),
            "candidates": [min(widths), max(widths)],
            "chance": round(100 * float(pixels.chance(rows).mean()), 4),
            "pixels": _pixels(rows, read, labelled.get(SETS[name].set)),
        }
    return found


def group(spec: tasks.EvalSet) -> str:
    """One of GROUPS: "concepts / styles"."""
    styles = "training" if spec.styles is None else "held out"
    return f"{'seen' if spec.concepts == 'seen' else 'held out'} / {styles}"


def _pixels(
    rows: Rows, read: pixels.SmallPictures, labelled: pixels.LabelledPictures | None
) -> dict[str, float] | None:
    hits = pixels.nearest(rows, read, labelled)
    if hits is None:
        return None
    values = 100 * hits[:, None]
    return _interval(values.mean(), score.bootstrap(values, rows.subset.name)[:, 0])


# --- figures ---------------------------------------------------------------------------------------------


def averages(figures: dict[str, Figures], sets: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """{group: {meta-task or "all": P@1 with its interval, number of sets, chance}}: plain means over sets."""
    found: dict[str, dict[str, dict]] = {}
    for one in GROUPS:
        mine = [name for name in figures if sets[name]["group"] == one]
        kinds = {task: [name for name in mine if sets[name]["meta_task"] == task] for task in META_TASKS}
        for kind, names in (kinds | {"all": mine}).items():
            if names:
                mean = _named(score.average([figures[name] for name in names]))
                chance = round(float(np.mean([sets[name]["chance"] for name in names])), 4)
                found.setdefault(one, {})[kind] = mean | {"sets": len(names), "chance": chance}
    return found


def _named(figures: Figures) -> dict[str, Any]:
    return {name: one for name, one in figures.as_dict().items() if name in ("precision@1", "mrr")}


def _interval(mean: float, replicates: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(replicates, [2.5, 97.5])
    return {"mean": round(float(mean), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


# --- facts -----------------------------------------------------------------------------------------------


def describe(checkpoint: Path, embedder: Embedder) -> dict[str, Any]:
    """What the checkpoint is made of: sizes from config.json, parameters of the model that runs, bytes of its files."""
    config = embedder.model.config
    v, d = config.vision, config.decoder
    return {
        "parameters": sum(row.parameters for row in module_rows(config)),
        "bytes": sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")),
        "dtype": config.dtype,
        "stored": ", ".join(sorted({str(one.dtype).removeprefix("torch.") for one in read_headers(checkpoint)})),
        "dimension": d.hidden_size,
        "crops": embedder.processor.num_crops,
        "vision": {"layers": v.num_hidden_layers - 1, "width": v.hidden_size, "heads": v.num_attention_heads,
                   "mlp": v.intermediate_size, "crop": v.image_size, "patch": v.patch_size},
        "decoder": {"layers": d.num_hidden_layers, "width": d.hidden_size, "heads": d.num_attention_heads,
                    "kv_heads": d.num_key_value_heads, "mlp": d.intermediate_size, "vocabulary": d.vocab_size},
    }  # fmt: skip


def _count(data: Path, stem: str) -> int:
    """Concepts in one of the catalogues of pictures."""
    return len({one["label"] for one in read_jsonl(data / "MMEB-eval" / f"{stem}.jsonl")})
