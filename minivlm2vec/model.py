"""VLM2Vec: PackedBatch -> one vector per sequence.

crops -> VisionTower -> Projector ─┐
input_ids -> embed_tokens ─────────┴─> Decoder -> pooling -> [B, D]
"""

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from . import projector, vision  # noqa: F401 (they register the published parts)
from .batch import Grid, PackedBatch, num_image_tokens
from .config import VLM2VecConfig
from .decoder import Decoder, Packing
from .registry import find, register
from .tracing import Layers, Trace, numbered, trace

Pooling = Callable[[Tensor, Tensor], Tensor]


@register("pooling", "last_token")
def last_token(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Hidden states x [T, D] of sequences that begin at cu_seqlens [B + 1] -> those of their last tokens [B, D]."""
    return x[cu_seqlens[1:].long() - 1]


@register("model", "vlm2vec")
class VLM2Vec(nn.Module):
    """The embedder's network. Its parameters are empty until `weights.load_weights` fills them.

    Attributes:
        vision, projector, decoder: its three parts; replace one to change it. `config.parts` names them (registry.py).
        pooling: pooling(x [T, D] after the final norm, cu_seqlens [B + 1]) -> [B, E]; a function or a module.
        causal: False lets every token see its whole sequence.
        backend: None, "auto", "triton" or "torch", which its modules were given for their ops.
        checkpoint: the folder that it was loaded from, if it was; `weights.save_model` copies its tokenizer.
    """

    def __init__(self, config: VLM2VecConfig, *, backend: str | None = None):
        super().__init__()
        self.config, self.backend = config, backend
        self.vision = find("tower", config.parts.tower)(config.vision, backend=backend)
        self.projector = find("projector", config.parts.projector)(config, backend=backend)
        self.decoder = Decoder(config.decoder, backend=backend)
        pooling = find("pooling", config.parts.pooling)
        self.pooling: Pooling = pooling(config, backend=backend) if isinstance(pooling, type) else pooling
        self.causal = config.parts.causal
        self.checkpoint: Path | None = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def dimension(self) -> int:
        """E, of a vector: what the pooling says, the decoder's width where it says nothing."""
        return getattr(self.pooling, "dimension", self.config.decoder.hidden_size)

    def num_image_tokens(self, grid: Grid) -> int:
        """How many tokens the projector makes of an image: what it says, or as published."""
        count = getattr(self.projector, "num_tokens", None)
        return count(grid) if count else num_image_tokens(grid, self.config.vision.merged_per_side)

    def forward(self, batch: PackedBatch, *, normalize: bool = True) -> Tensor:
        """Embeds B sequences: [B, E] float32. normalize: divide by the L2 norm, in float32."""
        x = self.embed(batch)
        x = self.decoder(x, self.packing(batch, x.dtype))
        vectors = self.pooling(x, batch.cu_seqlens).float()
        return nn.functional.normalize(vectors, dim=-1) if normalize else vectors

    def hidden_states(self, batch: PackedBatch, layers: Collection[int]) -> dict[int, Tensor]:
        """Hidden states [T, D] after the chosen decoder layers (0 is the first; the last is before the final
        norm), all tokens of them. Negative numbers count from the end. Raises ValueError for a layer that is none."""
        wanted = numbered(layers, len(self.decoder.layers))
        kept: dict[int, Tensor] = {}
        x = self.embed(batch)
        packing = self.packing(batch, x.dtype)
        for number, layer in enumerate(self.decoder.layers):
            x = layer(x, packing)
            kept |= {name: x for name, n in wanted.items() if n == number}
        return kept

    def trace(self, batch: PackedBatch, **wanted: Layers) -> Trace:
        """Vectors, and the hidden states and attention probabilities on the way to them: see `tracing.trace`."""
        return trace(self, batch, **wanted)

    def packing(self, batch: PackedBatch, dtype: torch.dtype) -> Packing:
        return self.decoder.packing(batch, dtype=dtype, causal=self.causal)

    def embed(self, batch: PackedBatch) -> Tensor:
        """[T, D]: token embeddings, image tokens in their places."""
        x = self.decoder.embed_tokens(batch.input_ids)
        if not batch.grids:
            return x
        tokens = self.embed_images(batch)
        return x.index_copy(0, batch.image_index, tokens[batch.image_source].to(x.dtype))

    def embed_images(self, batch: PackedBatch) -> Tensor:
        """[I, D]: the tokens of all images of the batch. Raises ValueError where their number is not the one that
        the batch has room for."""
        tokens = self.projector(self.vision(batch.crops, batch.grids), batch.grids)
        expected = sum(map(self.num_image_tokens, batch.grids))
        if len(tokens) != expected:
            raise ValueError(f"the projector gave {len(tokens)} image tokens, the batch has places for {expected}")
        return tokens
