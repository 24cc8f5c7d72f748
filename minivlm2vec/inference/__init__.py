"""The same model, faster: `optimize`. All tricks for speed live in this folder, each in its file.

fused.py     residuals and activations inside products, the last layer for last tokens alone
prepack.py   weights in the CPU's own layout
fp8.py       large products in 8 bits: other vectors, so only on request
prefix.py    texts that begin alike compute that once
graphs.py    CUDA graphs for small batches
origin.py    what the model was before

Each is held to the plain model by the same recorded outputs, and applies only to what it knows.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ..decoder import Decoder, DecoderLayer
from ..model import VLM2Vec, last_token
from ..projector import Projector
from ..vision import VisionLayer, VisionTower
from .fp8 import KEEP, check_fp8, check_sizes, quantize, takes_fp8
from .fused import FUSED, FusedVisionTower, FusedVLM2Vec, InferenceOnly, fuse, is_plain
from .graphs import GraphedModel, GraphedTower, can_graph
from .origin import keep_origin, origin, stored_bytes
from .prepack import can_prepack
from .prepack import prepack as pack

PRECISIONS = (None, "bf16", "fp8")


def optimize(
    model: VLM2Vec,
    *,
    precision: str | None = None,
    fp8_keep: Sequence[str] = KEEP,
    prepack: bool | None = None,
    share_prefixes: bool = True,
    cuda_graphs: bool | None = None,
) -> VLM2Vec:
    """Makes a model fast, in place, for inference alone, and returns it. The vectors are the same up to rounding.

    What is not the plain model's (a subclass, a layer of one's own, one with hooks, an adapted or quantised matrix)
    stays as it is and is called as before; so does the whole model where its pooling is another. Modules that are
    changed raise where they could show or do something else than the plain ones: hooks, `train()`, `state_dict()`,
    `to()`, pickling, copying, and parts that are replaced.

    Args:
        precision: "fp8": the decoder's large products in 8 bits, which gives other vectors; see fp8.py.
            "bf16" asks that the model be bfloat16.
        fp8_keep: matrices that "fp8" leaves as they are, by name; see fp8.py.
        prepack: bring weights into the CPU's own layout, see prepack.py. Default: on a CPU that has it, but for fp8.
        share_prefixes: texts of one pack that begin alike compute what they have in common once, where that pays; see
            prefix.py.
        cuda_graphs: replay small batches, and the tower's layers for few crops, as CUDA graphs; see graphs.py.
            Default: where the model runs Triton kernels on a CUDA device. True raises elsewhere, and where a graph
            cannot be captured.

    Raises ValueError where an option does not fit the model, before anything is changed.
    """
    _check(model, precision, prepack, cuda_graphs)
    if precision == "fp8":
        _check_sizes(model, fp8_keep)
    keep_origin(model, precision, fp8_keep)
    model.eval().requires_grad_(False)
    whole = _is_wholly_plain(model)
    packs = precision != "fp8" and (can_prepack(model.device, model.dtype) if prepack is None else prepack)
    keep = fp8_keep if precision == "fp8" else ("*",)
    layers = {n: m for n, m in model.named_modules() if type(m) in (VisionLayer, DecoderLayer) and is_plain(m)}
    for name, layer in layers.items():
        for inner, module in list(layer.named_modules(prefix=name)):
            if isinstance(module, InferenceOnly):  # layers may share it
                continue
            if not _store_otherwise(model, inner, module, packs=packs, keep=keep):
                fuse(module, model.backend)
    if type(model.projector) is Projector:
        for inner, module in list(model.projector.named_modules(prefix="projector")):
            if type(module) in FUSED and is_plain(module):
                _store_otherwise(model, inner, module, packs=packs, keep=keep)
    if type(model.vision) is VisionTower and all(isinstance(layer, InferenceOnly) for layer in model.vision.layers):
        fuse(model.vision.layers, model.backend)
        fuse(model.vision, model.backend)
    return _fuse_whole(model, share_prefixes, cuda_graphs) if whole else model


def _check_sizes(model: VLM2Vec, keep: Sequence[str]) -> None:
    """Of the matrices that are to be multiplied in 8 bits."""
    L = model.config.decoder.num_hidden_layers
    for name, layer in model.named_modules():
        if type(layer) is Projector or (type(layer) in (VisionLayer, DecoderLayer) and is_plain(layer)):
            for inner, module in layer.named_modules(prefix=name):
                if isinstance(module, nn.Linear) and is_plain(module) and takes_fp8(inner, L, keep):
                    check_sizes(module, inner)


def check_options(*, precision: str | None = None, prepack: bool | None = None, **_: object) -> None:
    """Raises ValueError for options of `optimize` that fit no model."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is 'bf16' or 'fp8', got {precision!r}")
    if precision == "fp8" and prepack:
        raise ValueError("precision='fp8' and prepack=True exclude each other")


def _check(model: VLM2Vec, precision: str | None, prepack: bool | None, cuda_graphs: bool | None) -> None:
    check_options(precision=precision, prepack=prepack)
    device, dtype = model.device, model.dtype
    if precision == "bf16" and dtype != torch.bfloat16:
        raise ValueError(f"precision 'bf16' is for bfloat16 models, got {dtype}; dtype=torch.bfloat16 loads one")
    if precision == "fp8":
        check_fp8(device, dtype)
    if prepack and not can_prepack(device, dtype):
        raise ValueError(f"prepack is for float32 and bfloat16 on a CPU with oneDNN, got {dtype} on {device}")
    if any(isinstance(module, InferenceOnly) for module in model.modules()):
        raise ValueError("the model is optimized already")
    if cuda_graphs and not (can_graph(model) and _is_wholly_plain(model)):
        what = f"{type(model).__name__} on {device}"
        raise ValueError(f"CUDA graphs need the plain model with Triton kernels on a CUDA device, got {what}")


def _is_wholly_plain(model: VLM2Vec) -> bool:
    """Whether FusedVLM2Vec may take its place: nothing but the tower and the projector is another's."""
    decoder = model.decoder
    return (
        is_plain(model, inside=False)
        and type(decoder) is Decoder
        and all(is_plain(part) for part in (decoder.layers, decoder.norm))
        and is_plain(decoder, inside=False)
        and model.pooling is last_token
        and len(decoder.layers) > 0
    )


def _store_otherwise(model: VLM2Vec, name: str, module: nn.Module, *, packs: bool, keep: Sequence[str]) -> bool:
    """Brings a matrix into 8 bits or into the CPU's layout where that is asked for; returns whether it did."""
    if not isinstance(module, nn.Linear):
        return False
    d = model.config.decoder
    if takes_fp8(name, d.num_hidden_layers, keep):
        quantize(module, model.backend)
    elif packs:  # queries apart from keys and values in the last layer, where they are for different tokens
        last = name == f"decoder.layers.{d.num_hidden_layers - 1}.self_attn.qkv_proj"
        parts = (d.num_attention_heads * d.head_dim, 2 * d.num_key_value_heads * d.head_dim) if last else ()
        pack(module, model.backend, parts)
    else:
        return False
    return True


def _fuse_whole(model: VLM2Vec, share_prefixes: bool, cuda_graphs: bool | None) -> VLM2Vec:
    for part in (model.decoder.layers, model.decoder.norm, model.decoder, model):
        fuse(part, model.backend)
    assert isinstance(model, FusedVLM2Vec)
    model.sharing, model.graphs = share_prefixes and model.causal, None
    if model.causal and (can_graph(model) if cuda_graphs is None else cuda_graphs):
        model.graphs = GraphedModel(model, strict=cuda_graphs is True)
        if isinstance(model.vision, FusedVisionTower):
            model.vision.graphs = GraphedTower(model, strict=cuda_graphs is True)
    return model


__all__ = ["FusedVLM2Vec", "InferenceOnly", "check_options", "optimize", "origin", "stored_bytes"]
