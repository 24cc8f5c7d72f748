"""What the server's tests share."""

import pytest

from minivlm2vec import Embedder
from minivlm2vec.new_checkpoint import new_checkpoint


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """A random model; its folder is called "tiny"."""
    folder = new_checkpoint(tmp_path_factory.mktemp("serve") / "tiny")
    return Embedder.from_pretrained(folder, device="cpu", show_progress=False)
