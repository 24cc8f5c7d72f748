"""The model as mteb wants one, so that MIEB and any other of its tasks run with it (extra `mteb`):

import mteb
from minivlm2vec.mmeb.mteb_model import VLM2VecModel
model = VLM2VecModel("TIGER-Lab/VLM2Vec-Full")
mteb.evaluate(model, mteb.get_benchmark("MIEB(lite)"))
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from .. import prompts
from ..embedder import Embedder
from ..inference import origin, stored_bytes

FULL = "TIGER-Lab/VLM2Vec-Full"
INSTRUCTIONS = ("task", "fixed")
_FIXED_IMAGE = "<|image_1|> Represent the given image."
_FIXED_BOTH = "<|image_1|> Represent the given image with the following question: {text}"


class VLM2VecModel(AbsEncoder):
    """An mteb encoder.

    Args:
        model_name: of the checkpoint, or a folder; default the embedder's, else VLM2Vec-Full.
        revision: on the Hub.
        device: default the best there is.
        instructions: "task": the instruction that VLM2Vec was trained with for that kind of task, see
            `instruction`. "fixed": what mteb's own wrapper of this model puts around every input, to compare with
            its published results.
        prompts_dict: instructions of your own, by mteb's keys: task name, task type or "query"/"document"; they go
            before `instructions`. "{text}" is where the text goes; without it the text comes after.
        num_crops, max_length: 4 and 256 as in mteb's wrapper; the latter cuts texts without images only.
        embedder: one that is loaded already.
        options: for `Embedder.from_pretrained`, such as adapter.

    mteb keeps results by name, revision and `experiment_kwargs`. The revision here is told from the weights, as they
    are when this object is made, and from every option that changes vectors; so no other model's results are taken.
    """

    def __init__(
        self,
        model_name: str | None = None,
        revision: str | None = None,
        device: str | None = None,
        *,
        instructions: str = "task",
        prompts_dict: dict[str, str] | None = None,
        num_crops: int | None = 4,
        max_length: int | None = 256,
        embedder: Embedder | None = None,
        **options: Any,
    ):
        if instructions not in INSTRUCTIONS:
            raise ValueError(f"instructions is one of {', '.join(INSTRUCTIONS)}, got {instructions!r}")
        loading = {"revision": revision, "device": device, **options}
        self.model = embedder or Embedder.from_pretrained(model_name or FULL, **loading)
        self.instructions = instructions
        self.prompts_dict = prompts_dict
        self.options = {"num_crops": num_crops, "max_length": max_length}
        name, _, adapter = str(model_name or self.model.name or FULL).partition(" + ")  # as an Embedder is called
        asked: dict[str, Any] = {"instructions": instructions, **self.options}
        asked |= {"prompts": prompts_dict} if prompts_dict else {}
        self.mteb_model_meta = model_meta(name, revision, self.model, asked, str(options.get("adapter") or adapter))

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Vectors float32 [B, D] of the batches of an mteb loader (dicts with "text", "image" or both)."""
        vectors = [
            self.model.encode(
                [self._input(one, task_metadata, prompt_type) for one in _items(batch)],
                show_progress=bool(kwargs.get("show_progress_bar", False)),
                **self.options,
            )
            for batch in inputs
        ]
        return np.concatenate(vectors) if vectors else np.empty((0, self.model.dimension), np.float32)

    def _input(self, item: dict[str, Any], task_metadata: Any, prompt_type: PromptType | None) -> str | dict:
        text, image = item.get("text") or "", item.get("image")
        wrapped = self._template(task_metadata, prompt_type, bool(text), image is not None)
        text = wrapped.replace(prompts.TEXT, text) if prompts.TEXT in wrapped else wrapped + text
        return text if image is None else {"text": text, "image": image}

    def _template(self, task_metadata: Any, prompt_type: PromptType | None, has_text: bool, has_image: bool) -> str:
        """What to put around an input; "{text}" stands for its text."""
        own = self.prompts_dict or {}
        kind = prompt_type.value if prompt_type else None
        for key in (task_metadata.name, task_metadata.type, kind):
            if key in own:
                return own[key]
        if self.instructions == "fixed":
            return (_FIXED_BOTH if has_text else _FIXED_IMAGE) if has_image else prompts.TEXT
        return instruction(task_metadata.type, task_metadata.category, kind, has_text=has_text, has_image=has_image)


def instruction(
    task_type: str, category: str | None, prompt_type: str | None, *, has_text: bool, has_image: bool
) -> str:
    """The instruction of MMEB that fits an mteb task; "{text}" stands for the input's own text.

    category: mteb's, what is compared with what: "t2i", "it2t", … Documents and labels are wrapped as MMEB's
    candidates, queries by what they are and what they look for.
    """
    is_query = prompt_type == "query"
    if not has_image:
        wanted = (category or "").partition("2")[2]
        if not is_query or wanted not in ("i", "it"):
            return prompts.TEXT  # a label, an answer, a caption, or text against text: as it is
        return prompts.task("document" if task_type == "DocumentUnderstanding" else "t2i").query
    if has_text:
        if prompt_type == "document":
            return prompts.WIKIPEDIA
        return prompts.task("change" if category == "it2i" else "vqa").query
    if task_type in ("ImageClassification", "ZeroShotClassification", "ImageClustering"):
        return prompts.task("classify").query
    if is_query and category in ("i2t", "i2i"):
        return prompts.task(category).query
    return prompts.IMAGE


def model_meta(
    name: str, revision: str | None, embedder: Embedder, asked: dict[str, Any], adapter: str = ""
) -> ModelMeta:
    """A description for mteb's result files; a folder is called "local/<its name>". With an adapter the name is the
    adapter's, and the model's is what it is adapted from. revision: on the Hub.

    asked: the options of the call.
    """
    model, published = embedder.model, name == FULL and not adapter
    return ModelMeta(
        loader=None,
        name=_named(adapter or name),
        adapted_from=_named(name) if adapter else None,
        revision=_revision(revision, embedder, asked),
        release_date=None,
        languages=["eng-Latn"],
        n_parameters=origin(model).num_parameters,
        n_embedding_parameters=model.decoder.embed_tokens.weight.numel(),
        memory_usage_mb=stored_bytes(model) / 2**20,
        max_tokens=model.config.decoder.max_position_embeddings,
        embed_dim=embedder.dimension,
        license=None,
        open_weights=True,
        public_training_code="https://github.com/TIGER-AI-Lab/VLM2Vec" if published else None,
        public_training_data="https://huggingface.co/datasets/TIGER-Lab/MMEB-train" if published else None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=True,
        training_datasets=None,
        modalities=["image", "text"],
        experiment_kwargs=asked,
    )


def _named(name: str) -> str:
    is_hub_name = name.count("/") == 1 and not Path(name).exists()
    return name if is_hub_name else f"local/{Path(name).name or 'model'}"


def _revision(revision: str | None, embedder: Embedder, asked: dict[str, Any]) -> str:
    """The Hub's, where one was asked for, and a digest of everything that decides the vectors."""
    p = embedder.processor
    settings = (p.tokenizer.content_hash(), p.num_crops, p.fast_decode, p.exif_transpose, embedder.dimension)
    digest = hashlib.sha256(repr([embedder.fingerprint, settings, sorted(asked.items())]).encode()).hexdigest()[:16]
    return f"{revision}-{digest}" if revision else digest


def _items(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """A dict of columns as a list of inputs."""
    columns = {name: batch[name] for name in ("text", "image") if name in batch}
    if not columns:
        raise ValueError(f"a batch has text or image, got {', '.join(batch)}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
