"""The decoder: Phi-3 on packed sequences.

T packed tokens, B sequences, D width, N query heads, Nkv key-value heads, H head dim, F width of the MLP.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlm2vec_kernels import ops
from minivlm2vec_kernels.tile_schedule import TileSchedule

from .batch import PackedBatch
from .config import DecoderConfig
from .linear import Embedding, Linear
from .rope import rope_tables


@dataclass(frozen=True)
class Packing:
    """What every layer needs to know of the batch: where sequences lie, and the rotations of their tokens."""

    cu_seqlens: Tensor  # [B + 1] int32
    max_seqlen: int
    cos: Tensor  # [T, H / 2]
    sin: Tensor
    causal: bool = True
    host_cu_seqlens: Tensor | None = None  # the same on the host
    schedule: TileSchedule | None = None  # of attention's kernel, in the model for inference


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
        return Packing(batch.cu_seqlens, batch.max_seqlen, cos.to(dtype), sin.to(dtype), causal, batch.host_cu_seqlens)

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
        q, k, v = self.qkv(x, p)
        y = ops.attention(
            q, k, v, p.cu_seqlens, p.max_seqlen,
            causal=p.causal, host_cu_seqlens=p.host_cu_seqlens, backend=self.backend,
        )  # fmt: skip
        return self.o_proj(y.flatten(1))

    def qkv(self, x: Tensor, p: Packing) -> tuple[Tensor, Tensor, Tensor]:  # [T, D] -> [T, N or Nkv, H]
        q, k, v = self.qkv_proj(x).unflatten(1, (-1, self.head_dim)).split(self.heads, dim=1)  # views
        return *ops.rope(q, k, p.cos, p.sin, backend=self.backend), v


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
