"""The image tower: CLIP ViT-L/14-336, up to its last layer but one.

C crops, P patches per side, L = P * P + 1 positions (the class token first), D width, N heads, H head dim.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from minivlm2vec_kernels import ops

from .batch import Grid
from .config import CLIP_MEAN as MEAN
from .config import CLIP_STD as STD
from .config import VisionConfig
from .linear import Embedding, Linear
from .registry import register
from .transfer import constants


@register("tower", "clip")
class VisionTower(nn.Module):
    """Crops -> patch features.

    The features are those after the last layer but one, without the class token and without a final norm, so the
    last layer of the checkpoint is neither loaded nor computed.
    """

    def __init__(self, config: VisionConfig, *, backend: str | None = None):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config, backend)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps, backend)
        self.layers = nn.ModuleList(VisionLayer(config, backend) for _ in range(config.num_hidden_layers - 1))

    def forward(self, crops: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        """crops [sum h * w, S, S, 3] uint8, one grid (h, w) an image -> [C, P * P, D], C = sum (1 + h * w).

        Every image gives its global view, then its crops.
        """
        x = self.pre_layrnorm(self.embeddings(crops, grids))
        for layer in self.layers:
            x = layer(x)
        return x[:, 1:]


class VisionEmbeddings(nn.Module):
    """Each crop as L vectors: the class token and its patches, with their positions."""

    def __init__(self, config: VisionConfig, backend: str | None = None):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = PatchEmbedding(config, backend)
        self.position_embedding = Embedding(config.num_positions, config.hidden_size)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.class_embedding, std=len(self.class_embedding) ** -0.5)

    def forward(self, crops: Tensor, grids: tuple[Grid, ...]) -> Tensor:  # -> [C, L, D]
        return self.with_positions(self.patch_embedding(crops, grids))

    def with_positions(self, x: Tensor) -> Tensor:  # [C, P * P, D] -> [C, L, D]
        cls = self.class_embedding.expand(len(x), 1, -1)
        positions = torch.arange(x.shape[1] + 1, device=x.device)
        return torch.cat([cls, x], dim=1) + self.position_embedding(positions)


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel: a matrix product over patches. The weight keeps its shape."""

    def __init__(self, config: VisionConfig, backend: str | None = None):
        super().__init__()
        self.patch_size, self.backend = config.patch_size, backend
        self.weight = nn.Parameter(torch.empty(config.hidden_size, 3, config.patch_size, config.patch_size))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)

    def forward(self, crops: Tensor, grids: tuple[Grid, ...]) -> Tensor:  # -> [C, P * P, D]
        return nn.functional.linear(self.patches(crops, grids), self.weight.flatten(1))

    def patches(self, crops: Tensor, grids: tuple[Grid, ...]) -> Tensor:  # -> [C, P * P, 3 * p * p]
        mean, std = pixel_statistics(crops.device)
        return ops.image_patches(crops, grids, mean, std, self.patch_size, self.weight.dtype, backend=self.backend)


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig, backend: str | None = None):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, backend)
        self.self_attn = VisionAttention(config, backend)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, backend)
        self.mlp = VisionMLP(config, backend)

    def forward(self, x: Tensor) -> Tensor:  # [C, L, D] -> [C, L, D]
        h = self.self_attn(self.layer_norm1(x))
        h, x = self.layer_norm2(h, residual=x)
        return x + self.mlp(h)


class VisionAttention(nn.Module):
    """Every position of a crop sees every other. q, k and v are one matrix here and three in the checkpoint."""

    def __init__(self, config: VisionConfig, backend: str | None = None):
        super().__init__()
        self.head_dim, self.backend = config.head_dim, backend
        self.qkv_proj = Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # [C, L, D] -> [C, L, D]
        C, L, _ = x.shape
        here, host = (torch.arange(0, (C + 1) * L, L, dtype=torch.int32, device=d) for d in (x.device, "cpu"))
        q, k, v = self.qkv(x)
        y = ops.attention(q, k, v, here, L, causal=False, host_cu_seqlens=host, backend=self.backend)
        return self.out_proj(rearrange(y, "(C L) N H -> C L (N H)", L=L))

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:  # [C, L, D] -> three [C * L, N, H]
        return rearrange(self.qkv_proj(x), "C L (three N H) -> three (C L) N H", three=3, H=self.head_dim).unbind()


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig, backend: str | None = None):
        super().__init__()
        self.backend = backend
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # [C, L, D] -> [C, L, D]
        return self.fc2(ops.quick_gelu(self.fc1(x), backend=self.backend))


class LayerNorm(nn.LayerNorm):
    def __init__(self, width: int, eps: float, backend: str | None = None):
        super().__init__(width, eps=eps)
        self.backend = backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """The norm of x [..., D]; with a residual, a pair: the norm of x + residual, and x + residual."""
        if residual is None:
            return ops.layer_norm(x, self.weight, self.bias, self.eps, backend=self.backend)
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps, backend=self.backend)


def normalized_images(crops: Tensor, grids: tuple[Grid, ...], dtype: torch.dtype, backend: str | None = None) -> Tensor:
    """What a tower that is no ViT starts from: crops as above -> (pixel / 255 - mean) / std, [C, 3, S, S]."""
    S, (mean, std) = crops.shape[1], pixel_statistics(crops.device)
    return ops.image_patches(crops, grids, mean, std, S, dtype, backend=backend).view(-1, 3, S, S)


@constants
def pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3] float32 of CLIP's training pixels, in 0 .. 1."""
    return torch.tensor(MEAN, device="cpu").to(device), torch.tensor(STD, device="cpu").to(device)
