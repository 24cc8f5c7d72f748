"""The decoder: Phi-3 on packed sequences.

T packed tokens, B sequences, D width, N query heads, Nkv key-value heads, H head dim, F width of the MLP.
"""

import functools
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


class Decoder(nn.Module):
    """Token embeddings, the layers, and the final norm."""

    def __init__(self, config: DecoderConfig, *, backend: str | None = None):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, backend) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)

    def packing(self, batch: PackedBatch, *, dtype: torch.dtype, causal: bool = True) -> Packing:
        """dtype: of the hidden states, to which cos and sin are rounded."""
        cos, sin = rope_tables(batch.position_ids, batch.cu_seqlens, self.config)
        return Packing(batch.cu_seqlens, batch.max_seqlen, cos.to(dtype), sin.to(dtype), causal)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """Input embeddings [T, D] -> hidden states [T, D] after the final norm."""
        for layer in self.layers:
            x = layer(x, packing)
        return self.norm(x)


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, backend: str | None = None):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)
        self.self_attn = Attention(config, backend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)
        self.mlp = MLP(config, backend)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:  # [T, D] -> [T, D]
        h = self.self_attn(self.input_layernorm(x), packing)
        h, x = self.post_attention_layernorm(h, residual=x)  # the norm of x + h, and x + h
        return x + self.mlp(h)


class Attention(nn.Module):
    """Rotary attention. Rows of qkv_proj: N query heads, Nkv key heads, Nkv value heads, H rows each."""

    def __init__(self, config: DecoderConfig, backend: str | None = None):
        super().__init__()
        D, self.head_dim, self.backend = config.hidden_size, config.head_dim, backend
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.qkv_proj = Linear(D, sum(self.heads) * self.head_dim, bias=False)
        self.o_proj = Linear(D, D, bias=False)

    def forward(self, x: Tensor, p: Packing) -> Tensor:  # [T, D] -> [T, D]
        q, k, v = self.qkv_proj(x).unflatten(1, (-1, self.head_dim)).split(self.heads, dim=1)  # views [T, n, H]
        q, k = ops.rope(q, k, p.cos, p.sin, backend=self.backend)
        y = ops.attention(q, k, v, p.cu_seqlens, p.max_seqlen, causal=p.causal, backend=self.backend)
        return self.o_proj(y.flatten(1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: DecoderConfig, backend: str | None = None):
        super().__init__()
        D, F, self.backend = config.hidden_size, config.intermediate_size, backend
        self.gate_up_proj = Linear(D, 2 * F, bias=False)
        self.down_proj = Linear(F, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [T, D] -> [T, D]
        return self.down_proj(ops.silu_mul(self.gate_up_proj(x), backend=self.backend))


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, backend: str | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.backend = eps, backend

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x [..., D]; with a residual, a pair: the norm of x + residual, and x + residual."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps, backend=self.backend)
        return ops.add_rms_norm(x, residual, self.weight, self.eps, backend=self.backend)


def rope_tables(position_ids: Tensor, cu_seqlens: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [T, H / 2] float32 of every token's rotation, times the attention factor.

    LongRoPE has two sets of frequencies; a sequence longer than `original_max_position_embeddings` takes the long
    one. The choice is made for each sequence by its own length. (The original makes it once for a padded batch, by
    the longest row, so that there a long neighbour changes a short text's vector; ours equals the original run one
    input at a time.)
    """
    frequencies, long = inverse_frequencies(config, position_ids.device)
    if config.rope_scaling is not None:
        lengths = cu_seqlens.diff()
        is_long = lengths > config.original_max_position_embeddings
        is_long = torch.repeat_interleave(is_long, lengths, output_size=len(position_ids))
        frequencies = torch.where(is_long[:, None], long, frequencies)
    return rotations(position_ids, frequencies, config)


def rotations(position_ids: Tensor, frequencies: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [T, H / 2] float32 of position_ids [T] * frequencies [H / 2] or [T, H / 2], times the factor."""
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
