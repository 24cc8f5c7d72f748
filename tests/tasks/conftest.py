"""What tests of the tasks share: the bundled model and its pictures."""

import io
import zipfile

import pytest
from PIL import Image

from minivlm2vec import Embedder
from minivlm2vec.rows import MINI


@pytest.fixture(scope="session")
def mini() -> Embedder:
    return Embedder.from_pretrained("mini", device="cpu", show_progress=False)


@pytest.fixture(scope="session")
def picture():
    """Pictures of mini-MMEB by their path."""
    with zipfile.ZipFile(MINI / "MMEB-eval" / "images.zip") as archive:
        yield lambda path: Image.open(io.BytesIO(archive.read(path))).convert("RGB")


@pytest.fixture(scope="session")
def emoji(picture):
    return [picture(f"Emoji-Group/image_{i}.webp") for i in range(6)]
