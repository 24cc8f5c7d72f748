"""The model as a sentence-transformers module (extra `sentence-transformers`):

    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(modules=[VLM2VecModule("TIGER-Lab/VLM2Vec-Full")])
    model.encode(["a text", Image.open("cat.jpg"), {"text": "what is this?", "image": "cat.jpg"}])

A `str` is always a text here, also where a file of that name exists; a picture by its path is {"image": path}.
Weights are loaded frozen: model.requires_grad_(True) before training. A saved model is loaded with
trust_remote_code=True, which sentence-transformers wants for every module that is not its own (no code is
downloaded: the class is this one).
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sentence_transformers.base.modules import InputModule

from ..embedder import Embedder, truncated


class VLM2VecModule(InputModule):
    """From inputs to "sentence_embedding" [B, D] float32; needs no further module.

    Args:
        name_or_path: of the checkpoint.
        num_crops: the most crops an image is cut into; default the checkpoint's.
        max_seq_length: the most tokens of an input without images; None: all.
        normalize: to L2 norm 1. With `truncate_dim` ask `encode` for normalize_embeddings=True: it cuts afterwards.
        embedder: one that is loaded already.
        options: for `Embedder.from_pretrained`.
    """

    config_file_name = "minivlm2vec_config.json"
    config_keys = ["name_or_path", "num_crops", "max_seq_length", "normalize"]  # noqa: RUF012 (the base's form)

    def __init__(
        self,
        name_or_path: str,
        *,
        num_crops: int | None = None,
        max_seq_length: int | None = None,
        normalize: bool = True,
        embedder: Embedder | None = None,
        **options: Any,
    ):
        super().__init__()
        self.name_or_path = str(name_or_path)
        self.num_crops = num_crops
        self.max_seq_length = max_seq_length
        self.normalize = normalize
        options = {"optimize": False} | options  # a fast model cannot be trained, which sentence-transformers may do
        self.embedder = embedder or Embedder.from_pretrained(name_or_path, **options)
        self.vlm2vec = self.embedder.model  # a submodule, so that it moves and trains with the rest

    @property
    def modalities(self) -> list:
        return ["text", "image", ("text", "image"), "message"]  # "message": also batches of several kinds

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Tokens and crops of a batch, packed. The prompt comes after the tags of the images, before the text."""
        options = {"prompt": prompt or None, "num_crops": self.num_crops, "max_length": self.max_seq_length}
        with ThreadPoolExecutor(self.embedder.num_workers) as pool:
            loaded = list(pool.map(lambda x: self.embedder.load(self.embedder.plan(_plain(x), **options)), inputs))
        return {"packed": self.embedder.processor.pack(loaded)}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        batch = features["packed"].to(self.embedder.device)
        vectors, size = self.vlm2vec(batch, normalize=self.normalize), self.embedder.truncate_dim
        vectors = vectors if size is None else truncated(vectors, size, normalize=self.normalize)
        return {"sentence_embedding": vectors.float()}

    def get_embedding_dimension(self) -> int:
        return self.embedder.dimension

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Writes the settings and the checkpoint's name; the weights stay where they are."""
        text = json.dumps(self.get_config_dict(), indent=2)
        (Path(output_path) / self.config_file_name).write_text(text, encoding="utf-8")


def _plain(item: Any) -> Any:
    """A chat message, or several, as one text with its images in order; anything else as it is."""
    messages = [item] if isinstance(item, dict) and "role" in item else item
    if not isinstance(messages, list):
        return item
    texts, images = [], []
    for message in messages:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "image":
                images.append(part["image"])
            elif part["type"] == "text":
                texts.append(part["text"])
            else:
                raise ValueError(f"a message's content is of type text or image, got {part['type']!r}")
    return {"text": "\n".join(texts), "images": images}
