"""VLM2Vec: PackedBatch -> one vector per sequence.

crops -> VisionTower -> Projector ─┐
input_ids -> embed_tokens ─────────┴─> Decoder -> pooling -> [B, D]
"""

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from .batch import PackedBatch, num_image_tokens
from .config import VLM2VecConfig
from .decoder import Decoder, Packing
from .projector import Projector
from .vision import VisionTower

Pooling = Callable[[Tensor, Tensor], Tensor]


def last_token(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Hidden states x [T, D] of sequences that begin at cu_seqlens [B + 1] -> those of their last tokens [B, D]."""
    return x[cu_seqlens[1:].long() - 1]


class VLM2Vec(nn.Module):
    """The embedder's network. Its parameters are empty until `weights.load_weights` fills them.

    Attributes:
        vision, projector, decoder: its three parts; replace one to change it.
        pooling: pooling(x [T, D] after the final norm, cu_seqlens [B + 1]) -> [B, D]; a function or a module.
        causal: False lets every token see its whole sequence.
        backend: None, "auto", "triton" or "torch", which its modules were given for their ops.
        checkpoint: the folder that it was loaded from, if it was; `weights.save_model` copies its tokenizer.
    """

    def __init__(self, config: VLM2VecConfig, *, backend: str | None = None):
        super().__init__()
        self.config, self.backend = config, backend
        self.vision = VisionTower(config.vision, backend=backend)
        self.projector = Projector(config, backend=backend)
        self.decoder = Decoder(config.decoder, backend=backend)
        self.pooling: Pooling = last_token
        self.causal = True
        self.checkpoint: Path | None = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, batch: PackedBatch, *, normalize: bool = True) -> Tensor:
        """Embeds B sequences: [B, D] float32. normalize: divide by the L2 norm, in float32."""
        x = self.embed(batch)
        x = self.decoder(x, self.packing(batch, x.dtype))
        vectors = self.pooling(x, batch.cu_seqlens).float()
        return nn.functional.normalize(vectors, dim=-1) if normalize else vectors

    def hidden_states(self, batch: PackedBatch, layers: Collection[int]) -> dict[int, Tensor]:
        """Hidden states [T, D] after the chosen decoder layers (0 is the first; the last is before the final
        norm), all tokens of them. Negative numbers count from the end. Raises ValueError for a layer that is none."""
        n = len(self.decoder.layers)
        if unknown := [layer for layer in layers if layer not in range(-n, n)]:
            raise ValueError(f"layers {unknown} are none of the decoder's: it has {n}, from {-n} to {n - 1}")
        wanted = {layer: range(n)[layer] for layer in layers}
        kept: dict[int, Tensor] = {}
        x = self.embed(batch)
        packing = self.packing(batch, x.dtype)
        for number, layer in enumerate(self.decoder.layers):
            x = layer(x, packing)
            kept |= {name: x for name, n in wanted.items() if n == number}
        return kept

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
        m = self.config.vision.merged_per_side
        expected = sum(num_image_tokens(grid, m) for grid in batch.grids)
        if len(tokens) != expected:
            raise ValueError(f"the projector gave {len(tokens)} image tokens, the batch has places for {expected}")
        return tokens
