"""The golden outputs of the original implementation, and how their inputs are made.

`tests/fixtures/golden` has a few cases and travels with the project; the whole set is read from ../shared/golden
where that exists. Weights are made from a seed (`new_checkpoint`), images from a seed (`synth_image`).
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from minivlm2vec.new_checkpoint import new_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures" / "golden"
SHARED = Path(__file__).parents[2].parent / "shared"

BUNDLED = {variant: list(json.loads((FIXTURES / variant / "cases.json").read_text())["cases"])
           for variant in ("small", "gqa")}  # fmt: skip
ALL = {
    "small": [
        "c01_text_short", "c01b_text_instruction", "c02_text_empty", "c04_image_crops4", "c04r_image_crops4_real",
        "c05_crops16_landscape", "c07_tiny_square", "c09_two_images", "c12_batch_mixed", "c12b_batch_text_only",
        "c12c_batch_two_image_rows", "c13a_over4096_two_images16", "c13b_over4096_text", "c13c_exactly4096_text",
        "c13d_exactly4097_text", "c13e_batch_short_and_over4096", "c15_crops1", "c15b_crops1_portrait",
        "c16_image_tag_alone", "c17_tag_in_the_middle",
    ],
    "gqa": ["c01_text_short", "c04_image_crops4"],
}  # fmt: skip


class Case:
    """One golden case: its inputs, as `Embedder.encode` takes them, and the recorded stages."""

    def __init__(self, variant: str, name: str):
        self.root = FIXTURES if name in BUNDLED[variant] else SHARED / "golden"
        record = json.loads((self.root / variant / "cases.json").read_text())["cases"][name]
        self.name, self.record = name, record
        self.num_crops, self.max_length = record["num_crops"], record["max_length"]
        self.row_lengths, self.last_index = record["row_lengths"], record["last_index"]
        self.tensors = load_file(self.root / variant / f"{name}.safetensors")
        self.images = {image["name"]: image for image in record.get("images", [])}
        self.inputs = [self._input(row) for row in record["rows"]]

    def _input(self, row: dict):
        images = [self.pil(name) for name in row["images"]]
        return {"text": row["text"], "images": images} if images else row["text"]

    def pil(self, name: str) -> Image.Image:
        image = self.images[name]
        if "file" in image:
            return Image.open(self.root / image["file"])
        return Image.fromarray(synth_image(*image["synth"]))


def exists(variant: str, name: str) -> bool:
    return name in BUNDLED[variant] or (SHARED / "golden").is_dir()


def tokenizer_file() -> Path:
    """The published tokenizer, or the bundled one, which is trimmed to the bundled texts."""
    published = SHARED / "tokenizer" / "phi-3-vision" / "tokenizer.json"
    return published if published.is_file() else FIXTURES / "tokenizer.json"


def golden_checkpoint(folder: Path, variant: str) -> Path:
    """The weights of the golden runs, made from their seed."""
    config = {"num_key_value_heads": {"small": 4, "gqa": 2}[variant]}
    return new_checkpoint(folder, preset="small", config=config, seed=1, tokenizer=tokenizer_file())


def sample(x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n values of x at evenly strided flat positions (stride odd), and the positions."""
    n = min(n, x.numel())
    stride = max(1, x.numel() // n)
    stride -= stride % 2 == 0
    index = torch.arange(n) * stride
    return x.flatten()[index], index


def synth_image(width: int, height: int, seed: int) -> np.ndarray:
    """[height, width, 3] uint8: ramps, rectangles and noise, made with integers alone, the same on every machine."""
    rng = np.random.Generator(np.random.PCG64(seed))
    y, x = np.mgrid[0:height, 0:width]
    image = np.empty((height, width, 3), np.int64)
    for channel in range(3):
        a, b, offset = (int(v) for v in rng.integers(1, 400, 3))
        image[..., channel] = (a * x // max(1, width - 1) + b * y // max(1, height - 1) + offset) % 256
    for _ in range(12):
        x0, x1 = sorted(int(v) for v in rng.integers(0, width + 1, 2))
        y0, y1 = sorted(int(v) for v in rng.integers(0, height + 1, 2))
        image[y0:y1, x0:x1] = (image[y0:y1, x0:x1] + rng.integers(0, 256, 3)) // 2
    image += rng.integers(-12, 13, (height, width, 3))
    return np.clip(image, 0, 255).astype(np.uint8)
