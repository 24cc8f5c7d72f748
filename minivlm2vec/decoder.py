"""The decoder: Phi-3 on packed sequences.

T packed tokens, R rows (as many as tokens, fewer where prefixes are shared), B sequences, D width, N query heads,
Nkv key-value heads, H head dim, F width of the MLP.
"""

import functools
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minivlm2vec_kernels import ops

from .batch import PackedBatch, SharedBatch
from .config import DecoderConfig
from .linear import Embedding, Linear


@dataclass(frozen=True)
class Packing:
    """What every layer needs to know of the batch: where sequences lie, and the rotations of their tokens.

    The last three are for shared prefixes, see `SharedBatch`; without them, R = T and rows are tokens.
    """

    cu_seqlens: Tensor  # [B + 1] int32
    max_seqlen: int
    cos: Tensor  # [R, H / 2]
    sin: Tensor
    causal: bool = True
    backend: str | None = None
    cu_seqlens_q: Tensor | None = None  # [B + 1] int32
    max_seqlen_q: int | None = None
    key_index: Tensor | None = None  # [T]

    @property
    def last(self) -> Tensor:
        """[B] the row of each sequence's last token."""
        return (self.cu_seqlens if self.cu_seqlens_q is None else self.cu_seqlens_q)[1:] - 1

    def per_token(self, x: Tensor) -> Tensor:
        """[R, ...] -> [T, ...]: each token's row."""
        return x if self.key_index is None else x.index_select(0, self.key_index)


class Decoder(nn.Module):
    """Token embeddings, the layers, and the weight of the final norm (which pooling applies)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def packing(self, batch: PackedBatch, *, causal: bool = True, backend: str | None = None) -> Packing:
        """Raises ValueError where prefixes are shared but attention is not causal."""
        cos, sin = (x.to(self.embed_tokens.weight.dtype) for x in rope_tables(batch, self.config))
        packing = Packing(batch.cu_seqlens, batch.max_seqlen, cos, sin, causal, backend)
        if not isinstance(batch, SharedBatch):
            return packing
        if not causal:
            raise ValueError("sequences share prefixes, which only causal attention allows; pack them without")
        return replace(
            packing,
            cu_seqlens_q=batch.cu_seqlens_q,
            max_seqlen_q=max(batch.row_lengths),
            key_index=batch.key_index,
        )

    def forward(
        self, x: Tensor, packing: Packing, *, last_only: bool = False, keep: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """x [R, D], which may be written over -> hidden states after the last layer, before the final norm.

        last_only: the last layer is computed for the last token of each sequence alone; [B, D] is returned.
        keep: layers whose output [R, D] is also returned, under their number (0 is the first).
        """
        kept = {}
        for number, layer in enumerate(self.layers):
            if last_only and number == len(self.layers) - 1:
                x = layer.forward_last(x, packing)
            else:
                x = layer(x, packing)
            if number in keep:
                kept[number] = x.clone()
        return x, kept


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:  # [R, D] -> [R, D]
        x = self.self_attn(x, self.input_layernorm(x, packing.backend), packing)
        return self.mlp(x, self.post_attention_layernorm(x, packing.backend), packing.backend)

    def forward_last(self, x: Tensor, packing: Packing) -> Tensor:  # [R, D] -> [B, D]
        """The same for the last token of each sequence: of the others only keys and values are needed."""
        x = self.self_attn.forward_last(x, self.input_layernorm(x, packing.backend), packing)
        return self.mlp(x, self.post_attention_layernorm(x, packing.backend), packing.backend)


class Attention(nn.Module):
    """Rotary attention. Rows of qkv_proj: N query heads, Nkv key heads, Nkv value heads, H rows each."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        D, self.head_dim = config.hidden_size, config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.qkv_proj = Linear(D, sum(self.heads) * self.head_dim, bias=False)
        self.o_proj = Linear(D, D, bias=False)

    def forward(self, x: Tensor, h: Tensor, p: Packing) -> Tensor:
        """x [R, D] residual stream, h [R, D] its norm -> x + attention."""
        q, k, v = self._heads(self.qkv_proj(h), self.heads)
        q, k = ops.rope(q, k, p.cos, p.sin, backend=p.backend)
        y = ops.attention(
            q, p.per_token(k), p.per_token(v), p.cu_seqlens, p.max_seqlen,
            causal=p.causal, cu_seqlens_q=p.cu_seqlens_q, max_seqlen_q=p.max_seqlen_q, backend=p.backend,
        )  # fmt: skip
        return self.o_proj.add_to(x, y.flatten(1), backend=p.backend)

    def forward_last(self, x: Tensor, h: Tensor, p: Packing) -> Tensor:
        """x, h [R, D] -> [B, D]: queries of the last tokens, keys and values of all."""
        last, (N, Nkv, _) = p.last, self.heads
        q = self.qkv_proj.rows(h[last], 0, N * self.head_dim)
        kv = self.qkv_proj.rows(h, N * self.head_dim, None)
        (q,), (k, v) = self._heads(q, (N,)), self._heads(kv, (Nkv, Nkv))
        q, _ = ops.rope(q, q[:, :0], p.cos[last], p.sin[last], backend=p.backend)
        k, _ = ops.rope(k, k[:, :0], p.cos, p.sin, backend=p.backend)
        one_each = torch.arange(len(last) + 1, dtype=torch.int32, device=x.device)
        y = ops.attention(
            q, p.per_token(k), p.per_token(v), p.cu_seqlens, p.max_seqlen,
            causal=p.causal, cu_seqlens_q=one_each, max_seqlen_q=1, backend=p.backend,
        )  # fmt: skip
        return self.o_proj.add_to(x[last], y.flatten(1), backend=p.backend)

    def _heads(self, qkv: Tensor, heads: tuple[int, ...]) -> tuple[Tensor, ...]:  # views [R, n, H]
        return qkv.unflatten(1, (-1, self.head_dim)).split(heads, dim=1)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(D, 2 * F, bias=False)
        self.down_proj = Linear(F, D, bias=False)

    def forward(self, x: Tensor, h: Tensor, backend: str | None) -> Tensor:
        """x [R, D] residual stream, h [R, D] its norm -> x + down(silu(gate h) * up h)."""
        return self.down_proj.add_to(x, self.gate_up_proj.silu_mul(h, backend=backend), backend=backend)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor, backend: str | None = None) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, backend=backend)


def rope_tables(batch: PackedBatch, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [R, H / 2] float32 of every row's rotation, times the attention factor.

    LongRoPE has two sets of frequencies; a sequence longer than `original_max_position_embeddings` takes the long
    one. The choice is made for each sequence by its own length. (The original makes it once for a padded batch, by
    the longest row, so that there a long neighbour changes a short text's vector; ours equals the original run one
    input at a time.)
    """
    short, long = inverse_frequencies(config, batch.position_ids.device)
    limit = config.original_max_position_embeddings
    is_long = [n > limit for n in batch.lengths]
    if not any(is_long):
        frequencies = short
    elif all(is_long):
        frequencies = long
    else:
        rows = batch.cu_seqlens_q if isinstance(batch, SharedBatch) else batch.cu_seqlens
        choice = batch.cu_seqlens.diff() > limit
        choice = torch.repeat_interleave(choice, rows.diff(), output_size=len(batch.position_ids))
        frequencies = torch.where(choice[:, None], long, short)
    return rotations(batch.position_ids, frequencies, config)


def rotations(position_ids: Tensor, frequencies: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [R, H / 2] float32 of position_ids [R] * frequencies [H / 2] or [R, H / 2], times the factor."""
    angles = position_ids.float()[:, None] * frequencies
    return angles.cos() * config.rope_attention_factor, angles.sin() * config.rope_attention_factor


@functools.lru_cache(maxsize=16)  # copying them to a device waits for it, which no batch but the first should
def inverse_frequencies(config: DecoderConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Those of short and of long sequences, [H / 2] float32 each. Frequency i is 1 / (factor_i * theta^(2 i / H))."""
    H, scaling = config.head_dim, config.rope_scaling
    base = config.rope_theta ** (torch.arange(0, H, 2, dtype=torch.int64, device="cpu").float() / H)
    factors = (1.0,) if scaling is None else (scaling.short_factor, scaling.long_factor)
    sets = [(1.0 / (torch.tensor(f, dtype=torch.float32, device="cpu") * base)).to(device) for f in factors]
    return sets[0], sets[-1]
