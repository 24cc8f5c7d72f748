"""Embedder: what most users need. From a checkpoint and any mix of text and images to vectors."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from minivlm2vec_kernels.ops import BACKENDS

from . import prompts
from . import similarity as cosine
from .batch import PackedBatch
from .checkpoint import ADAPTER_CONFIG, log, resolve
from .config import VLM2VecConfig
from .encode_arguments import EncodeOptions, Inputs, one_or_many, translated
from .errors import InputError, Option, OptionError, at_least_one
from .inference import FusedVLM2Vec, check_options, origin
from .inference import optimize as optimized
from .lora import merge_adapter, with_adapters_parts
from .model import VLM2Vec
from .packing import load_ahead, one_ahead
from .packing import pack_by_length as pack_by_length
from .processor import Loaded, Planned, Processor
from .weights import as_dtype, empty_model, load_model

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's own from Python 3.11 on


class Embedder:
    """Embeds inputs with a VLM2Vec model.

    An input is a text (`str`: never taken for a path), a `PIL.Image`, or a dict with "text" and "image" or
    "images", each image a path, a PIL image, a numpy array uint8 [H, W, 3], the bytes of a file, or a data URI.
    In a text, <|image_n|> stands for the n-th image; where images come without any tag,
    "<|image_1|>\\n<|image_2|>\\n…" is put in front (as in the MMEB data; the model card's demo has a space there).

    With a plain model it is copied and pickled whole, weights too. A fast one refuses that, and says what to do.

    Args:
        model: a VLM2Vec, plain or made fast by `inference.optimize`.
        processor: text and images to batches for it.
        num_workers: threads that decode and cut images while the model computes; default: the cores, at most 16.
        name: what the checkpoint is called.
        truncate_dim, force_dimensions: see `from_pretrained`.
    """

    def __init__(
        self,
        model: VLM2Vec,
        processor: Processor,
        *,
        num_workers: int | None = None,
        name: str = "",
        truncate_dim: int | None = None,
        force_dimensions: bool = False,
    ):
        self.truncate_dim, self.force_dimensions = truncate_dim, force_dimensions
        vector_length(truncate_dim, model.config, model.dimension, force=force_dimensions)
        self.model = model
        self.processor = processor
        self.num_workers = num_workers or min(16, os.cpu_count() or 1)
        self.name = name

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        num_crops: int | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        backend: str | None = None,
        model_class: type[VLM2Vec] | None = None,
        config: VLM2VecConfig | None = None,
        skip: Sequence[str] = (),
        adapter: str | os.PathLike | None = None,
        truncate_dim: int | None = None,
        force_dimensions: bool = False,
        fast_decode: bool = False,
        exif_transpose: bool = False,
        optimize: bool = True,
        precision: str | None = None,
        prepack: bool | None = None,
        share_prefixes: bool | None = None,
        cuda_graphs: bool | None = None,
        show_progress: bool = True,
    ) -> "Embedder":
        """Loads a checkpoint in the published Hugging Face layout.

        Args:
            name_or_path: a folder, or a name on the Hub such as "TIGER-Lab/VLM2Vec-Full"; "mini" is the small
                demonstration model that ships with this package ("./mini" is a folder).
            device: default CUDA where there is one, else MPS, else the CPU.
            dtype: torch.float16 or "float16", for example; default the checkpoint's.
            num_crops: the most crops an image is cut into; default that of preprocessor_config.json.
            revision: a branch, tag or commit on the Hub.
            local_files_only: never ask the network.
            backend: "auto", "triton" or "torch" for the kernels; default MINIVLM2VEC_BACKEND, else auto.
            model_class: VLM2Vec or a class derived from it; default the one that config.json names.
            config: instead of config.json's, for other parts; see `weights.load_model`. Default: config.json's, with
                the parts that the adapter was trained for.
            skip: beginnings of names of new parameters, for which the checkpoint has no tensor; see
                `weights.load_weights`.
            adapter: a LoRA or DoRA in PEFT's format, a folder or a name on the Hub such as "TIGER-Lab/VLM2Vec-LoRA"
                (for "microsoft/Phi-3.5-vision-instruct"). It is added to the weights, so vectors cost the same.
            truncate_dim: cut vectors to their first so many numbers, and normalise them again: one of the sizes that
                the model was trained for (Matryoshka; `config.Trained.dims`).
            force_dimensions: any size, whatever the model was trained for.
            fast_decode: decode JPEGs at a reduced scale: faster, not bit for bit what the original sees.
            exif_transpose: honour the EXIF orientation, which the original ignores.
            optimize: make the model fast, for inference alone: `inference.optimize`, which the next four options are
                for. False gives the plain model, to be changed, trained, hooked, copied or saved.
            precision: "fp8": the decoder's large products in 8 bits: faster, other vectors (bfloat16 models only).
                "bf16": that model in bfloat16, whatever the checkpoint's dtype.
            prepack: weights in the CPU's own layout. Default: on a CPU that has it.
            share_prefixes: texts of one pack that begin alike compute what they have in common once (default).
            cuda_graphs: batches of up to 2048 tokens, and up to 8 crops in the tower, of a shape that came before,
                are replayed as CUDA graphs. Default: where the model runs Triton kernels on a CUDA device; True raises
                elsewhere.
            show_progress: progress bars while downloading and loading.

        Raises CheckpointError (a ValueError) naming the file or tensor at fault; every tensor of an adapter must have
        a place in the model. Raises ValueError where options contradict each other.
        """
        options: dict[str, Any] = {"precision": precision, "prepack": prepack, "share_prefixes": share_prefixes,
                   "cuda_graphs": cuda_graphs}  # fmt: skip
        dtype = None if dtype is None else as_dtype(dtype)
        if precision == "bf16":
            dtype = _agreed_dtype(dtype)
        given = {name: value for name, value in options.items() if value is not None}
        check_options(**given)
        at_least_one(num_crops=num_crops)
        if backend not in (None, *BACKENDS):
            raise ValueError(f"backend is one of {', '.join(BACKENDS)}, got {backend!r}")
        if not optimize and any(value and value != "bf16" for value in given.values()):
            raise ValueError(f"optimize=False gives the plain model, which has no {', no '.join(given)}")
        folder = resolve(name_or_path, revision=revision, local_files_only=local_files_only)
        adapter_folder = resolve(adapter, local_files_only=local_files_only) if adapter is not None else None
        if adapter is None and (folder / ADAPTER_CONFIG).is_file():
            log.warning("%s holds an %s, which is not applied: adapter=… applies one", folder, ADAPTER_CONFIG)
        if adapter_folder is not None and config is None:
            config = with_adapters_parts(VLM2VecConfig.from_json(folder), adapter_folder)
        if truncate_dim is not None:  # before weights are read
            about = config or VLM2VecConfig.from_json(folder)
            full = empty_model(about, model_class=model_class).dimension
            vector_length(truncate_dim, about, full, force=force_dimensions)
        processor = Processor.from_pretrained(  # before memory is taken
            folder, config, num_crops=num_crops, fast_decode=fast_decode, exif_transpose=exif_transpose
        )
        model = load_model(
            folder,
            model_class=model_class,
            config=config,
            device=device or default_device(),
            dtype=dtype,
            backend=backend,
            skip=skip,
            show_progress=show_progress,
        )
        if adapter_folder is not None:
            merge_adapter(model, adapter_folder)
        if optimize:
            model = optimized(model, **given)
        processor.num_image_tokens = model.num_image_tokens
        name = str(name_or_path) if adapter is None else f"{name_or_path} + {adapter}"
        return cls(model, processor, name=name, truncate_dim=truncate_dim, force_dimensions=force_dimensions)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dimension(self) -> int:
        """Length of a vector: `truncate_dim`, or the model's."""
        return self.truncate_dim or self.model.dimension

    def get_embedding_dimension(self) -> int:
        """`dimension`, as sentence-transformers calls it."""
        return self.dimension

    def _size(self, truncate_dim: int | None) -> int | None:
        """What vectors are cut to, if they are. Raises OptionError, see `vector_length`."""
        size = truncate_dim or self.truncate_dim
        vector_length(size, self.model.config, self.model.dimension, force=self.force_dimensions)
        return size

    @property
    def fingerprint(self) -> str:
        """Which model it computes with, as its weights are now: `weights.model_fingerprint`."""
        return origin(self.model).fingerprint

    @overload
    def encode(
        self, inputs: Inputs, *, convert_to: Literal["numpy"] = ..., convert_to_tensor: Literal[False] = ...,
        **options: "Unpack[EncodeOptions]",
    ) -> np.ndarray: ...  # fmt: skip
    @overload
    def encode(self, inputs: Inputs, *, convert_to: Literal["torch"], **options: "Unpack[EncodeOptions]") -> Tensor: ...
    @overload
    def encode(
        self, inputs: Inputs, *, convert_to_tensor: Literal[True], **options: "Unpack[EncodeOptions]"
    ) -> Tensor: ...
    def encode(
        self,
        inputs: Inputs,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        num_crops: int | None = None,
        max_length: int | None = None,
        batch_tokens: int = 16384,
        batch_size: int | None = None,
        normalize: bool = True,
        truncate_dim: int | None = None,
        convert_to: str = "numpy",
        show_progress: bool = False,
        **theirs: Any,
    ) -> np.ndarray | Tensor:
        """Embeds inputs; returns float32 [B, D] in their order, and [D] where one input was passed and no list.

        Args:
            inputs: a list of what the class describes, or one. Anything else with an order is taken as a list: a
                tuple, a generator, a view of a dict, an array of texts, a column of a table. A dict is one input.
            prompt: an instruction for all of them, put in front of each text (after the tags of images that begin
                it); where it holds "{text}", the text goes there instead.
            prompt_name: that of a task of `minivlm2vec.prompts.TASKS` instead: "t2i" or "t2i-query" is the query's,
                "t2i-document" the document's.
            num_crops: the most crops an image is cut into, for this call.
            max_length: keeps the first tokens of inputs without images (BOS counts), as in the original.
            batch_tokens: inputs are sorted by length and computed in packs of at most so many tokens (an input
                that is longer gets a pack of its own). The vectors do not depend on it.
            batch_size: the most inputs of a pack; default: as many as `batch_tokens` allows.
            normalize: to L2 norm 1.
            truncate_dim: for this call, see `from_pretrained`.
            convert_to: "numpy", or "torch" for a tensor on the model's device.
            show_progress: a progress bar over inputs.
            theirs: names of sentence-transformers. `normalize_embeddings`, `convert_to_tensor` and `show_progress_bar`
                are the above; others (`encode_arguments`) take the value that is in effect here.

        Raises InputError (a ValueError) with the index and name of the first unusable input: before anything is
        computed where its text or an image's header tells, else with the vectors that were finished in `.partial`.
        TypeError says what to pass where `inputs` cannot be inputs, or an option is unknown.
        """
        items, alone = one_or_many(inputs)
        normalize, convert_to, show_progress = translated(
            theirs, normalize=normalize, convert_to=convert_to, show_progress=show_progress, device=self.device
        )
        if prompt_name is not None:
            prompt = _one_of(prompt, prompts.instruction(prompt_name))
        at_least_one(batch_tokens=batch_tokens, batch_size=batch_size)
        _check_options(prompt, max_length, num_crops, convert_to, truncate_dim)
        size = self._size(truncate_dim)
        options = {"prompt": prompt, "num_crops": num_crops, "max_length": max_length}
        bar = tqdm(total=len(items), desc="Embedding", unit="input", disable=not show_progress)
        try:
            with ThreadPoolExecutor(self.num_workers) as pool, bar:
                plans = self._plan_all(items, options, pool)
                batches = pack_by_length([len(p) for p in plans], batch_tokens, batch_size)
                vectors = self._run(plans, batches, normalize, size, pool, bar.update)
            out = torch.cat(vectors).float() if vectors else torch.empty(0, size or self.dimension, device=self.device)
            order = torch.tensor([i for batch in batches for i in batch], dtype=torch.int64)
            out = out[order.argsort().to(out.device)]
            _check_finite(out, plans)
        except InputError as e:
            e.index = None if alone else e.index
            raise
        out = out[0] if alone else out
        return out.cpu().numpy() if convert_to == "numpy" else out

    @overload
    def encode_query(
        self, inputs: Inputs, *, convert_to: Literal["numpy"] = ..., convert_to_tensor: Literal[False] = ...,
        **options: "Unpack[EncodeOptions]",
    ) -> np.ndarray: ...  # fmt: skip
    @overload
    def encode_query(
        self, inputs: Inputs, *, convert_to: Literal["torch"], **options: "Unpack[EncodeOptions]"
    ) -> Tensor: ...
    @overload
    def encode_query(
        self, inputs: Inputs, *, convert_to_tensor: Literal[True], **options: "Unpack[EncodeOptions]"
    ) -> Tensor: ...
    def encode_query(
        self, inputs: Inputs, *, prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> np.ndarray | Tensor:
        """`encode` with the query instruction of a task of `minivlm2vec.prompts.TASKS`, e.g. prompt_name="t2i"."""
        if prompt_name is not None:
            prompt = _one_of(prompt, prompts.task(prompt_name).query)
        return self.encode(inputs, prompt=prompt, **options)

    @overload
    def encode_document(
        self, inputs: Inputs, *, convert_to: Literal["numpy"] = ..., convert_to_tensor: Literal[False] = ...,
        **options: "Unpack[EncodeOptions]",
    ) -> np.ndarray: ...  # fmt: skip
    @overload
    def encode_document(
        self, inputs: Inputs, *, convert_to: Literal["torch"], **options: "Unpack[EncodeOptions]"
    ) -> Tensor: ...
    @overload
    def encode_document(
        self, inputs: Inputs, *, convert_to_tensor: Literal[True], **options: "Unpack[EncodeOptions]"
    ) -> Tensor: ...
    def encode_document(
        self, inputs: Inputs, *, prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> np.ndarray | Tensor:
        """`encode` with the document instruction of a task, e.g. prompt_name="t2i"."""
        if prompt_name is not None:
            prompt = _one_of(prompt, prompts.task(prompt_name).document)
        return self.encode(inputs, prompt=prompt, **options)

    @overload
    def similarity(self, a: np.ndarray, b: np.ndarray | Tensor) -> np.ndarray: ...
    @overload
    def similarity(self, a: Tensor, b: np.ndarray | Tensor) -> Tensor: ...
    def similarity(self, a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Cosine similarity [A, B] of vectors [A, D] and [B, D]: `minivlm2vec.similarity.similarity`."""
        return cosine.similarity(a, b)

    @overload
    def similarity_pairwise(self, a: np.ndarray, b: np.ndarray | Tensor) -> np.ndarray: ...
    @overload
    def similarity_pairwise(self, a: Tensor, b: np.ndarray | Tensor) -> Tensor: ...
    def similarity_pairwise(self, a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """That of row i and row i: [N] of [N, D] and [N, D]."""
        return cosine.similarity_pairwise(a, b)

    def plan(self, item: Any, **options) -> Planned:
        """Tokenises one input and reads its images' headers: `Processor.plan`, for pipelines of one's own."""
        return self.processor.plan(item, **options)

    def load(self, planned: Planned) -> Loaded:
        """Decodes and cuts a planned input's images; may run in any thread."""
        return self.processor.load(planned)

    def prepare(self, items: Sequence[Loaded]) -> PackedBatch:
        """Lays loaded inputs out as one pack, on the host; may run in any thread."""
        batch = self.processor.pack(items)
        if isinstance(self.model, FusedVLM2Vec):
            batch = self.model.prepare(batch)
        return batch.pin_memory() if self.device.type == "cuda" else batch

    @torch.inference_mode()
    def embed(
        self, items: Sequence[Loaded] | PackedBatch, *, normalize: bool = True, truncate_dim: int | None = None
    ) -> Tensor:
        """Vectors [B, D] float32, on the model's device, of loaded inputs as one pack, or of what `prepare` made of
        them. On CUDA it returns before they are computed: reading them waits."""
        batch = items if isinstance(items, PackedBatch) else self.prepare(items)
        vectors = self.model(batch.to(self.device, non_blocking=True), normalize=normalize)
        if vectors.shape[1] != self.model.dimension:
            raise ValueError(
                f"{type(self.model).__name__} made vectors of {vectors.shape[1]} numbers, and its `dimension` is "
                f"{self.model.dimension}: give its pooling, or the class, that attribute"
            )
        size = self._size(truncate_dim)
        return vectors if size is None else truncated(vectors, size, normalize=normalize)

    def _plan_all(self, inputs: Sequence[Any], options: dict, pool: ThreadPoolExecutor) -> list[Planned]:
        def plan(numbered: tuple[int, Any]) -> Planned:
            index, item = numbered
            try:
                return self.plan(item, **options)
            except InputError as e:
                raise e.at(index) from None

        return list(pool.map(plan, enumerate(inputs)))  # the first error in the list's order is raised

    def _run(
        self,
        plans: list[Planned],
        batches: list[list[int]],
        normalize: bool,
        truncate_dim: int | None,
        pool: ThreadPoolExecutor,
        done: Callable[[int], Any],
    ) -> list[Tensor]:
        """Vectors of each batch. While one computes, the next is packed and images of later ones are decoded; on
        CUDA nothing waits for the device before the last."""
        vectors: list[Tensor] = []
        loading = load_ahead(plans, batches, self.load, pool, ahead=2 * self.num_workers)
        prepared = ((batch, self.prepare(items)) for batch, items in loading)
        try:
            for batch, packed in one_ahead(prepared):
                vectors.append(self.embed(packed, normalize=normalize, truncate_dim=truncate_dim))
                done(len(batch))
        except InputError as e:
            pool.shutdown(wait=False, cancel_futures=True)
            finished = zip(batches, vectors, strict=False)
            e.partial = {i: v.cpu().numpy() for batch, vs in finished for i, v in zip(batch, vs, strict=True)}
            raise
        return vectors


def truncated(vectors: Tensor, size: int, *, normalize: bool = True) -> Tensor:
    """The first `size` numbers of vectors [B, D] -> [B, size], brought to L2 norm 1 again."""
    if size == vectors.shape[1]:
        return vectors
    return torch.nn.functional.normalize(vectors[:, :size], dim=1) if normalize else vectors[:, :size]


def vector_length(size: int | None, config: VLM2VecConfig, full: int, *, force: bool = False) -> int:
    """The length of vectors that are cut to `size` (None: not at all), of a model whose own have `full` numbers.

    Raises OptionError for more than these and, unless `force`, for a size that the model was not trained for."""
    at_least_one(truncate_dim=size)
    if size in (None, full):
        return full
    assert size is not None
    if size > full:
        raise OptionError(Option("truncate_dim"), f" is {size}; the model's vectors have {full} numbers")
    if force or size in config.trained.dims:
        return size
    dims = config.trained.dims
    said = (
        f"was trained to have them cut to {', '.join(map(str, dims))}" if dims else "was not trained to have them cut"
    )
    raise OptionError(Option("truncate_dim"), f" is {size}; the model's vectors have {full} numbers, and it {said} "
                      "(Matryoshka): ", Option("force_dimensions"), " does it all the same")  # fmt: skip


def default_device() -> torch.device:
    """CUDA where there is one, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _agreed_dtype(dtype: torch.dtype | None) -> torch.dtype:
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"precision='bf16' and dtype={dtype} exclude each other")
    return torch.bfloat16


def _check_options(
    prompt: str | None,
    max_length: int | None,
    num_crops: int | None,
    convert_to: str,
    truncate_dim: int | None,
) -> None:
    if not isinstance(prompt, str | None):
        raise ValueError(f"prompt is a text, got {prompt!r}")
    at_least_one(max_length=max_length, num_crops=num_crops, truncate_dim=truncate_dim)
    if convert_to not in ("numpy", "torch"):
        raise ValueError(f"convert_to is 'numpy' or 'torch', got {convert_to!r}")


def _check_finite(vectors: Tensor, plans: list[Planned]) -> None:
    finite = vectors.isfinite().all(dim=1).cpu()  # waits once, where nonzero() on a device would twice
    bad = (~finite).nonzero().flatten().tolist()
    if bad:
        name = ", ".join(plans[bad[0]].names) or "text"
        raise InputError(
            f"its vector holds NaN or infinite values (so do those of {len(bad) - 1} more); float16 overflows where "
            "bfloat16 and float32 do not", name=name, index=bad[0]
        )  # fmt: skip


def _one_of(prompt: str | None, named: str) -> str:
    if prompt is not None:
        raise ValueError("prompt and prompt_name are both given; use one")
    return named
