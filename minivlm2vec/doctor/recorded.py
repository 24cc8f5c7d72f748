"""Inputs whose vectors are known: those of the bundled checkpoint, recorded in float32 on a CPU.

    python -m minivlm2vec.doctor.recorded     # records them again

Recording takes the plain model, without Triton, one input at a time. What is drawn follows a formula, so that no
library's random numbers decide.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from ..atomic import write_bytes
from ..embedder import Embedder

PATH = Path(__file__).with_name("vectors.safetensors")
COMMON = "Describe the animal that can be seen in the picture, where it stands, what it does and who is with it. "
TEXTS = ("a cat", "x", "a dog and a red car under the sun", "What is it? " * 40)
ALIKE = tuple(COMMON + word for word in ("a cat", "a dog", "a bird with a hat", "a cat on the moon"))  # begin alike


def drawn(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: waves of a colour each."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(3 * x + y) % 256, (x * y // 7) % 256, (5 * y + 2 * x + x * x // 11) % 256], 2).astype(np.uint8)


def inputs() -> list[Any]:
    """Texts, images of several shapes, both, two images, and texts that begin alike: in this order."""
    wide, tall, small = drawn(40, 100), drawn(90, 30), drawn(32, 32)
    return [
        *TEXTS,
        {"image": small},
        {"image": wide},
        {"image": tall},
        {"text": "What is it?", "image": wide},
        {"text": "<|image_1|> and <|image_2|>: what changed?", "images": [tall, small]},
        *ALIKE,
    ]


def compute() -> torch.Tensor:
    """[inputs, D] float32."""
    e = Embedder.from_pretrained("mini", device="cpu", dtype="float32", backend="torch", optimize=False,
                                 show_progress=False)  # fmt: skip
    return torch.cat([e.encode([x], convert_to="torch") for x in inputs()])


def record(path: Path = PATH) -> None:
    """Writes the vectors. A few kB."""
    write_bytes(path, save({"vectors": compute()}))


def vectors() -> torch.Tensor:
    """The recorded ones, [inputs, D] float32."""
    return load_file(PATH)["vectors"]


if __name__ == "__main__":
    record()
