"""The model as a sentence-transformers module (extra `sentence-transformers`):

    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(modules=[VLM2VecModule("TIGER-Lab/VLM2Vec-Full")])
    model.encode(["a text", Image.open("cat.jpg"), {"text": "what is this?", "image": "cat.jpg"}])

A `str` is always a text here, also where a file of that name exists; a picture by its path is {"image": path}.
It trains with the library's own trainer and losses, the cached ones included. What is saved is whole: a checkpoint in
the published layout, which `Embedder.from_pretrained` reads too, and the options. A saved model is loaded with
trust_remote_code=True, which sentence-transformers wants for every module that is not its own (no code is
downloaded: the class is this one).
"""

import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from ..batch import Grid, PackedBatch, cumulative
from ..embedder import Embedder, truncated
from ..inference import InferenceOnly
from ..model import VLM2Vec
from ..processor import Loaded
from ..weights import save_model


class VLM2VecModule(InputModule):
    """From inputs to "sentence_embedding" [B, D] float32; needs no further module.

    Args:
        name_or_path: of the checkpoint.
        num_crops: the most crops an image is cut into; default the checkpoint's.
        max_seq_length: the most tokens of an input without images; None: all.
        normalize: to L2 norm 1. With `truncate_dim` ask `encode` for normalize_embeddings=True: it cuts afterwards.
        embedder: one that is loaded already. Its weights stay frozen if they are.
        options: for `Embedder.from_pretrained`; optimize is False.

    Raises ValueError for a fast model: sentence-transformers moves, trains and saves what it is given.
    """

    config_file_name = "minivlm2vec_config.json"

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
        self.num_crops = num_crops
        self.max_seq_length = max_seq_length
        self.normalize = normalize
        self.embedder = embedder or Embedder.from_pretrained(name_or_path, **({"optimize": False} | options))
        self.vlm2vec = self.embedder.model  # a submodule, so that it moves and trains with the rest
        if any(isinstance(module, InferenceOnly) for module in self.vlm2vec.modules()):
            raise ValueError("sentence-transformers moves, trains and saves its modules, which a model made fast does "
                             "not allow: load it with optimize=False")  # fmt: skip
        if embedder is None:
            self.vlm2vec.requires_grad_(True)  # as every module of sentence-transformers

    @property
    def modalities(self) -> list:
        return ["text", "image", ("text", "image"), "message"]  # "message": also batches of several kinds

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, *, max_length: int | None = None, **others: Any
    ) -> dict[str, Tensor]:
        """Tokens and crops of a batch. The prompt comes after the tags of the images, before the text.

        max_length: instead of max_seq_length, for this call. Returns what `forward` takes, in the form which the losses
        of sentence-transformers cut into smaller batches: input_ids, attention_mask and image_source [B, L] int64,
        padded at the right; with images also pixel_values [C, S, S, 3] uint8, image_grid_thw [I, 3] and
        num_images_per_sample [B]. Raises InputError, and ValueError for options that have no meaning here.
        """
        if unknown := [name for name, value in others.items() if value and name != "task"]:
            raise ValueError(f"VLM2VecModule has no {', '.join(unknown)}; num_crops and max_seq_length are attributes")
        options = {"prompt": prompt or None, "num_crops": self.num_crops}
        options["max_length"] = self.max_seq_length if max_length is None else max_length
        with ThreadPoolExecutor(self.embedder.num_workers) as pool:
            return _padded(
                list(pool.map(lambda x: self.embedder.load(self.embedder.plan(_plain(x), **options)), inputs))
            )

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        vectors = self.vlm2vec(_packed(features, self.vlm2vec), normalize=self.normalize)
        if (size := self.embedder.truncate_dim) is not None:
            vectors = truncated(vectors, size, normalize=self.normalize)
        return features | {"sentence_embedding": vectors.float()}

    def get_embedding_dimension(self) -> int:
        return self.embedder.dimension

    def get_config_dict(self) -> dict[str, Any]:
        """The options that are saved."""
        processor = self.embedder.processor
        return {
            "num_crops": self.num_crops or processor.num_crops,
            "max_seq_length": self.max_seq_length,
            "normalize": self.normalize,
            "fast_decode": processor.fast_decode,
            "exif_transpose": processor.exif_transpose,
            "truncate_dim": self.embedder.truncate_dim,
            "force_dimensions": self.embedder.force_dimensions,
        }

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Writes the weights as they are now, configuration, tokenizer and options. Raises ValueError for adapters that
        are not merged."""
        folder = Path(output_path)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            files = list(save_model(self.vlm2vec, Path(new) / "checkpoint").iterdir())
            for old in folder.glob("model*.safetensors*"):
                old.unlink()  # of an earlier save in other shards
            for file in files:
                os.replace(file, folder / file.name)
        text = json.dumps(self.get_config_dict(), indent=2)
        (folder / self.config_file_name).write_text(text, encoding="utf-8")

    @classmethod
    def load(  # type: ignore[override]
        cls, model_name_or_path: str, subfolder: str = "", *, model_kwargs: dict[str, Any] | None = None, **where: Any
    ) -> "VLM2VecModule":
        """A saved module. model_kwargs: further options, as for the class; they go before saved ones."""
        known = ("token", "cache_folder", "revision", "local_files_only")
        where = {name: where[name] for name in known if name in where}
        config = cls.load_config(model_name_or_path, subfolder, **where)
        folder = cls.load_dir_path(model_name_or_path, subfolder, **where)
        return cls(folder or model_name_or_path, **(config | (model_kwargs or {})))

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("VLM2VecModule has no gradient checkpointing; a cached loss with a small mini_batch_size "
                         "bounds the memory of a step")  # fmt: skip


def _padded(items: Sequence[Loaded]) -> dict[str, Tensor]:
    """Loaded inputs as `VLM2VecModule.preprocess` gives them. image_source: which of its sample's image tokens, from 1,
    stands there; 0 for a token of the text."""
    plans = [x.planned for x in items]
    lengths = torch.tensor([len(p) for p in plans])
    ids = torch.zeros(len(plans), int(lengths.max()), dtype=torch.int64)
    source = torch.zeros_like(ids)
    for row, plan in enumerate(plans):
        ids[row, : len(plan)] = torch.tensor(plan.input_ids)
        source[row, plan.image_index] = torch.from_numpy(plan.image_source) + 1
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    features = {"input_ids": ids, "attention_mask": mask.long(), "image_source": source}
    if any(p.grids for p in plans):
        features["pixel_values"] = torch.cat([torch.from_numpy(c) for x in items for c in x.crops])
        features["image_grid_thw"] = torch.tensor([(1, h, w) for p in plans for h, w in p.grids])
        features["num_images_per_sample"] = torch.tensor([len(p.grids) for p in plans])
    return features


@torch.compiler.disable  # lengths are read here, so that the model itself is one graph
def _packed(features: dict[str, Any], model: VLM2Vec) -> PackedBatch:
    """The inverse: without padding, and image tokens numbered through the batch; on the model's device."""
    ids, mask, source = features["input_ids"], features["attention_mask"].bool(), features["image_source"]
    lengths = mask.sum(1).tolist()
    grids: tuple[Grid, ...] = ()
    first = [0] * len(ids)  # the number of each sample's first image token
    if "pixel_values" in features:
        grids = tuple((h, w) for _, h, w in features["image_grid_thw"].tolist())
        tokens = list(accumulate(map(model.num_image_tokens, grids), initial=0))
        counts = features["num_images_per_sample"].tolist()
        first = [tokens[n] for n in accumulate(counts[:-1], initial=0)]
    crops = features["pixel_values"] if grids else ids.new_empty(0, 1, 1, 3, dtype=torch.uint8)
    source = torch.where(source > 0, source + torch.tensor(first, device=ids.device)[:, None], 0)[mask]
    image_index = source.nonzero().flatten()
    return PackedBatch(
        input_ids=ids[mask],
        position_ids=torch.arange(ids.shape[1], device=ids.device).expand_as(ids)[mask],
        cu_seqlens=cumulative(lengths),
        lengths=tuple(lengths),
        crops=crops,
        grids=grids,
        image_index=image_index,
        image_source=source[image_index] - 1,
    ).to(model.device)


def _plain(item: Any) -> Any:
    """A chat message, or several, as one text with its images in order; anything else as it is."""
    messages = [item] if isinstance(item, dict) and "role" in item else item
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "content" in m for m in messages):
        return item  # `Embedder.plan` says what is wrong with it
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
