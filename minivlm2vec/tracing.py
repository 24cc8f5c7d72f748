"""What happened on the way to a vector: hidden states and attention probabilities, layer by layer.

Attention is computed by its formula here, and the model goes on with that, so gradients flow through the probabilities.
"""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minivlm2vec_kernels import reference

from .batch import PackedBatch
from .decoder import Attention, Packing
from .projector import Projector
from .vision import VisionAttention

Layers = bool | Collection[int]  # all, none, or these; negative numbers count from the end


@dataclass(frozen=True)
class Trace:
    """B sequences of L tokens each, T in all; N heads; C crops of P positions. Layers are named as they were asked for.

    Fields:
        batch: what was traced.
        vectors: [B, E] float32.
        hidden_states: {layer: [T, D]} after the decoder's layers.
        attentions: {layer: [N, L, L] of each sequence}; rows are queries, and each sums to one.
        vision_hidden_states: {layer: [C, P, D]} after the tower's layers.
        vision_attentions: {layer: [C, N, P, P]}.
        merged_per_side: rows of image tokens a crop; None where the projector is not the published one.
    """

    batch: PackedBatch
    vectors: Tensor
    merged_per_side: int | None
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    attentions: dict[int, list[Tensor]] = field(default_factory=dict)
    vision_hidden_states: dict[int, Tensor] = field(default_factory=dict)
    vision_attentions: dict[int, Tensor] = field(default_factory=dict)

    def image_map(self, values: Tensor, image: int = 0) -> Tensor:
        """values [T] of all tokens -> [rows, columns] of those that show an image of the batch, as they lie on the
        canvas that the image was put on (`images.hd_size` says where), without those of its global view. Where an image
        stands several times, the mean of its tokens."""
        m, T = self.merged_per_side, self.batch.num_tokens
        if m is None:
            raise ValueError("the projector is not the published one: where its tokens lie in an image is not known")
        if values.shape != (T,):
            raise ValueError(f"values are [T], a number for each of the batch's {T} tokens, got {list(values.shape)}")
        sizes = [(h * m, w * m) for h, w in self.batch.grids]
        if image not in range(len(sizes)):
            raise ValueError(f"image {image} is none of the batch's, which has {len(sizes)}")
        counts = [h * (w + 1) + 1 + m * (m + 1) for h, w in sizes]  # see `batch.num_image_tokens`
        index, shown = self.batch.image_source, values[self.batch.image_index]
        sums, times = (values.new_zeros(sum(counts)).index_add(0, index, x) for x in (shown, torch.ones_like(shown)))
        of_images = sums / times.clamp_min(1)
        h, w = sizes[image]
        start = sum(counts[:image])
        return of_images[start : start + h * (w + 1)].view(h, w + 1)[:, :w]  # without the rows' ends


def trace(
    model: Any,  # a VLM2Vec
    batch: PackedBatch,
    *,
    attentions: Layers = False,
    hidden_states: Layers = False,
    vision: Layers = False,
) -> Trace:
    """Runs the plain model on a batch and keeps what is asked for.

    attentions, hidden_states: of which layers of the decoder; True for all.
    vision: of which layers of the tower too, for whichever of the two is asked for.

    Raises ValueError for a layer that is none, or whose attention is another module than the plain model's.
    """
    if vision is not False and attentions is False and hidden_states is False:
        raise ValueError("vision says of which layers of the tower; attentions or hidden_states says what of them")
    kept: dict[str, dict[int, Any]] = {}
    with ExitStack() as hooks:
        for prefix, part, chosen in (("", model.decoder, True), ("vision_", model.vision, vision)):
            for kind, layers in (("hidden_states", hidden_states), ("attentions", attentions)):
                wanted = layers if chosen is True else chosen if layers is not False else False
                found = kept.setdefault(prefix + kind, {})
                for name, layer in _chosen(part, wanted).items():
                    hook = _keep_output if kind == "hidden_states" else _keep_attention
                    hooks.callback(hook(layer, found, name).remove)
        vectors = model(batch)
    published = isinstance(model.projector, Projector)
    return Trace(batch, vectors, model.config.vision.merged_per_side if published else None, **kept)


def numbered(layers: Collection[int], n: int) -> dict[int, int]:
    """{as it was asked for: which it is, from 0} of n layers. Raises ValueError for a layer that is none."""
    if unknown := [layer for layer in layers if layer not in range(-n, n)]:
        raise ValueError(f"layers {unknown} are none of the {n} that there are, from {-n} to {n - 1}")
    return {layer: range(n)[layer] for layer in layers}


def _chosen(part: nn.Module, layers: Layers) -> dict[int, nn.Module]:
    if layers is False:
        return {}
    if layers is not True and not isinstance(layers, Collection):
        raise ValueError(f"layers are True, False or a list of numbers, got {layers!r}")
    found = getattr(part, "layers", None)
    if found is None:
        raise ValueError(f"a {type(part).__name__} has no `layers` to trace")
    return {name: found[n] for name, n in numbered(range(len(found)) if layers is True else layers, len(found)).items()}


def _keep_output(layer: nn.Module, kept: dict[int, Any], name: int) -> Any:
    return layer.register_forward_hook(lambda module, args, output: kept.update({name: output}))


def _keep_attention(layer: nn.Module, kept: dict[int, Any], name: int) -> Any:
    attention = getattr(layer, "self_attn", None)
    if not isinstance(attention, Attention | VisionAttention):
        raise ValueError(f"layer {name} is a {type(layer).__name__} whose self_attn is a {type(attention).__name__}: "
                         "only the plain model's attention can be traced")  # fmt: skip

    def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        kept[name], again = _by_formula(module, *args)
        return again

    return attention.register_forward_hook(hook)


def _by_formula(attention: Any, x: Tensor, packing: Packing | None = None) -> tuple[Any, Tensor]:
    """Probabilities, and what the module makes of them: of a pack x [T, D], or of crops x [C, P, D]."""
    q, k, v = attention.qkv(x) if packing is None else attention.qkv(x, packing)
    if packing is not None:
        p = reference.attention_probabilities(q, k, packing.cu_seqlens, causal=packing.causal)
        return p, attention.o_proj(_weighted(p, v, q.shape[1]).to(x.dtype))
    C, P, _ = x.shape
    cu_seqlens = torch.arange(0, (C + 1) * P, P, device=x.device)
    stacked = torch.stack(reference.attention_probabilities(q, k, cu_seqlens, causal=False))
    y = _weighted(stacked.unbind(), v, q.shape[1])
    return stacked, attention.out_proj(y.to(x.dtype).view_as(x))


def _weighted(probabilities: Sequence[Tensor], v: Tensor, heads: int) -> Tensor:
    """[N, L, L] of each sequence, v [T, Nkv, H] -> [T, N * H]."""
    values = v.float().repeat_interleave(heads // v.shape[1], dim=1).split([p.shape[-1] for p in probabilities])
    sums = [torch.einsum("nqk,knh->qnh", p, x) for p, x in zip(probabilities, values, strict=True)]
    return torch.cat(sums).flatten(1)
