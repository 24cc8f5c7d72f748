"""The bundled toy world: emoji, a small benchmark made of them, a small model trained on them. Only `cli` imports it.

    world/        mini-MMEB: what is drawn, what is asked, and how its files are built
    data/         a trimmed copy of these files, with the licences of the pictures
    drawn.py      training rows without end, drawn as they are needed
    checkpoint/   the model that was trained on them, its training configs and its model card
    scores.py     scores of a checkpoint, beside chance and nearest neighbours in pixels (pixels.py)
    card.py       the model card, made from the scores
    demo/         what `minivlm2vec demo` shows

How the checkpoint was made:

    python -m minivlm2vec.mini start outputs/mini-start                 # tokenizer, configuration, random weights
    minivlm2vec train minivlm2vec/mini/checkpoint/train-1.toml          # single drawings
    torchrun --nproc-per-node 2 -m minivlm2vec train minivlm2vec/mini/checkpoint/train-2.toml  # all sets, more styles
    minivlm2vec train minivlm2vec/mini/checkpoint/train-3.toml          # the same once more, from a smaller rate
    minivlm2vec train minivlm2vec/mini/checkpoint/train-4.toml          # and again, drawings varied more
    python -m minivlm2vec.mini package outputs/mini-4/step-002600 minivlm2vec/mini/checkpoint

train-gpu.toml is for a larger one, and has not been run.
"""

from pathlib import Path

from ..rows import MINI

CHECKPOINT = Path(__file__).parent / "checkpoint"


def bundled() -> Path:
    """The trimmed copy of mini-MMEB that ships with the package: MMEB-eval/ and MMEB-train/, as `world.write` makes
    them."""
    return MINI
