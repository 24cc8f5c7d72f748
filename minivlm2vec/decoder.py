"""The decoder: Phi-3 on packed sequences.

T packed tokens, B sequences, D width, N query heads, Nkv key-value heads, H head dim, F width of the MLP.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlm2vec_kernels import ops

from .batch import PackedBatch
from .config import DecoderConfig
from .linear import Embedding, Linear


@dataclass(frozen=True)
class Packing:
    """What every layer needs to know of the batch: where sequences lie, and the rotations of their tokens."""

    cu_seqlens: Tensor  # [B + 1] int32
    max_seqlen: int
    cos: Tensor  # [T, H / 2]
    sin: Tensor
    causal: bool = True
    backend: str | None = None

    @property
    def last(self) -> Tensor:
        """[B] the place of each sequence's last token."""
        return self.cu_seqlens[1:] - 1


class Decoder(nn.Module):
    """Token embeddings, the layers, and the weight of the final norm (which pooling applies)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def packing(self, batch: PackedBatch, *, causal: bool = True, backend: str | None = None) -> Packing:
        cos, sin = rope_tables(batch, self.config)
        dtype = self.embed_tokens.weight.dtype
        return Packing(batch.cu_seqlens, batch.max_seqlen, cos.to(dtype), sin.to(dtype), causal, backend)

    def forward(
        self, x: Tensor, packing: Packing, *, last_only: bool = False, keep: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """x [T, D], which may be written over -> hidden states after the last layer, before the final norm.

        last_only: the last layer is computed for the last token of each sequence alone; [B, D] is returned.
        keep: layers whose output [T, D] is also returned, under their number (0 is the first).
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

    def forward(self, x: Tensor, packing: Packing) -> Tensor:  # [T, D] -> [T, D]
        x = self.self_attn(x, self.input_layernorm(x, packing.backend), packing)
        return self.mlp(x, self.post_attention_layernorm(x, packing.backend), packing.backend)

    def forward_last(self, x: Tensor, packing: Packing) -> Tensor:  # [T, D] -> [B, D]
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
        """x [T, D] residual stream, h [T, D] its norm -> x + attention."""
        q, k, v = self._heads(self.qkv_proj(h), self.heads)
        q, k = ops.rope(q, k, p.cos, p.sin, backend=p.backend)
        y = ops.attention(q, k, v, p.cu_seqlens, p.max_seqlen, causal=p.causal, backend=p.backend)
        return self.o_proj.add_to(x, y.flatten(1), backend=p.backend)

    def forward_last(self, x: Tensor, h: Tensor, p: Packing) -> Tensor:
        """x, h [T, D] -> [B, D]: queries of the last tokens, keys and values of all."""
        last, (N, Nkv, _) = p.last, self.heads
        q = self.qkv_proj.rows(h[last], 0, N * self.head_dim)
        kv = self.qkv_proj.rows(h, N * self.head_dim, None)
        (q,), (k, v) = self._heads(q, (N,)), self._heads(kv, (Nkv, Nkv))
        q, _ = ops.rope(q, q[:, :0], p.cos[last], p.sin[last], backend=p.backend)
        k, _ = ops.rope(k, k[:, :0], p.cos, p.sin, backend=p.backend)
        one_each = torch.arange(len(last) + 1, dtype=torch.int32, device=x.device)
        y = ops.attention(
            q, k, v, p.cu_seqlens, p.max_seqlen,
            causal=p.causal, cu_seqlens_q=one_each, max_seqlen_q=1, backend=p.backend,
        )  # fmt: skip
        return self.o_proj.add_to(x[last], y.flatten(1), backend=p.backend)

    def _heads(self, qkv: Tensor, heads: tuple[int, ...]) -> tuple[Tensor, ...]:  # views [T, n, H]
        return qkv.unflatten(1, (-1, self.head_dim)).split(heads, dim=1)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(D, 2 * F, bias=False)
        self.down_proj = Linear(F, D, bias=False)

    def forward(self, x: Tensor, h: Tensor, backend: str | None) -> Tensor:
        """x [T, D] residual stream, h [T, D] its norm -> x + down(silu(gate h) * up h)."""
        return self.down_proj.add_to(x, ops.silu_mul(self.gate_up_proj(h), backend=backend), backend=backend)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor, backend: str | None = None) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, backend=backend)


def rope_tables(batch: PackedBatch, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [T, H / 2] float32 of every token's rotation, times the attention factor.

    Frequency i of H / 2 is 1 / (factor_i * theta^(2 i / H)). LongRoPE has two sets of factors; a sequence longer
    than `original_max_position_embeddings` takes the long one. The choice is made for each sequence by its own
    length. (The original makes it once for a padded batch, by the longest row, so that there a long neighbour
    changes a short text's vector; ours equals the original run one input at a time.)
    """
    H, device = config.head_dim, batch.position_ids.device
    base = config.rope_theta ** (torch.arange(0, H, 2, dtype=torch.int64, device=device).float() / H)
    positions = batch.position_ids.float()[:, None]
    scaling, limit = config.rope_scaling, config.original_max_position_embeddings
    if scaling is None:
        angles = positions * (1.0 / base)
    else:
        short, long = (
            1.0 / (torch.tensor(f, dtype=torch.float32, device=device) * base)
            for f in (scaling.short_factor, scaling.long_factor)
        )
        is_long = [n > limit for n in batch.lengths]
        if not any(is_long):
            angles = positions * short
        elif all(is_long):
            angles = positions * long
        else:
            lengths = batch.cu_seqlens.diff()
            choice = torch.repeat_interleave(lengths > limit, lengths, output_size=batch.num_tokens)
            angles = positions * torch.where(choice[:, None], long, short)
    factor = config.rope_attention_factor
    return angles.cos() * factor, angles.sin() * factor
