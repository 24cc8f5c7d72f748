"""VLM2Vec: PackedBatch -> one vector per sequence.

crops -> VisionTower -> Projector ─┐
input_ids -> embed_tokens ─────────┴─> Decoder -> pooling -> [B, D]
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from minivlm2vec_kernels.ops import pool_last_token

from .batch import PackedBatch, num_image_tokens
from .config import VLM2VecConfig
from .decoder import Decoder, Packing
from .projector import Projector
from .vision import VisionTower

Pooling = Callable[..., Tensor]


class VLM2Vec(nn.Module):
    """The embedder's network. Its parameters are empty until `weights.load_weights` fills them.

    Attributes:
        vision, projector, decoder: its three parts; replace one to change it.
        backend: None, "auto", "triton" or "torch", for every op.
    """

    def __init__(self, config: VLM2VecConfig, *, backend: str | None = None):
        super().__init__()
        self.config = config
        self.backend = backend
        self.vision = VisionTower(config.vision)
        self.projector = Projector(config)
        self.decoder = Decoder(config.decoder)

    def forward(
        self,
        batch: PackedBatch,
        *,
        pool: Pooling = pool_last_token,
        normalize: bool = True,
        causal: bool = True,
    ) -> Tensor:
        """Embeds B sequences.

        pool(x [T, D], cu_seqlens [B + 1], norm_weight [D], eps, *, normalize) -> [B, D] gets the hidden states
        before the final norm. With the default, the last layer is computed for the last tokens alone.
        normalize: divide by the L2 norm, in float32.
        causal: False lets every token see its whole sequence.
        Returns [B, D] float32 (what `pool` returns).
        """
        packing = self.decoder.packing(batch, causal=causal, backend=self.backend)
        return self.decode(self.embed(batch), packing, pool=pool, normalize=normalize)

    def decode(self, x: Tensor, packing: Packing, *, pool: Pooling = pool_last_token, normalize: bool = True) -> Tensor:
        """Input embeddings x [R, D], which may be written over -> vectors; `forward` without its beginning."""
        last_only = pool is pool_last_token
        x, _ = self.decoder(x, packing, last_only=last_only)
        norm = self.decoder.norm
        if not last_only:
            return pool(packing.per_token(x), packing.cu_seqlens, norm.weight, norm.eps, normalize=normalize)
        one_each = torch.arange(len(x) + 1, dtype=torch.int32, device=x.device)
        return pool(x, one_each, norm.weight, norm.eps, normalize=normalize, backend=self.backend)

    def hidden_states(self, batch: PackedBatch, layers: Collection[int], *, causal: bool = True) -> dict[int, Tensor]:
        """Hidden states [T, D] after the chosen decoder layers (0 is the first; the last is before the final
        norm), all tokens of them. Negative numbers count from the end."""
        n = len(self.decoder.layers)
        wanted = {layer: range(n)[layer] for layer in layers}
        packing = self.decoder.packing(batch, causal=causal, backend=self.backend)
        _, kept = self.decoder(self.embed(batch), packing, keep=set(wanted.values()))
        return {layer: packing.per_token(kept[number]) for layer, number in wanted.items()}

    def embed(self, batch: PackedBatch) -> Tensor:
        """[T, D], a row each where prefixes are shared [R, D]: token embeddings, image tokens in their places."""
        x = self.decoder.embed_tokens(batch.input_ids)
        if not batch.grids:
            return x
        tokens = self.embed_images(batch)
        return x.index_copy(0, batch.image_index, tokens[batch.image_source].to(x.dtype))

    def embed_images(self, batch: PackedBatch) -> Tensor:
        """[I, D]: the tokens of all images of the batch. Raises ValueError where their number is not the one that
        the batch has room for."""
        features = self.vision(batch.crops, batch.grids, backend=self.backend)
        tokens = self.projector(features, batch.grids, backend=self.backend)
        m = self.config.vision.merged_per_side
        expected = sum(num_image_tokens(grid, m) for grid in batch.grids)
        if len(tokens) != expected:
            raise ValueError(f"the projector gave {len(tokens)} image tokens, the batch has places for {expected}")
        return tokens


__all__ = ["Pooling", "VLM2Vec", "pool_last_token"]
