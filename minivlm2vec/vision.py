"""The image tower: CLIP ViT-L/14-336, up to its last layer but one.

C crops, P patches per side, L = P * P + 1 positions (the class token first), D width, N heads, H head dim.
"""

import functools

import torch
from einops import rearrange
from torch import Tensor, nn

from minivlm2vec_kernels import ops

from .batch import Grid
from .config import CLIP_MEAN as MEAN
from .config import CLIP_STD as STD
from .config import VisionConfig
from .linear import Embedding, Linear


class VisionTower(nn.Module):
    """Crops -> patch features.

    The features are those after the last layer but one, without the class token and without a final norm, so the
    last layer of the checkpoint is neither loaded nor computed.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers - 1))

    def forward(
        self,
        crops: Tensor,
        grids: tuple[Grid, ...],
        *,
        crops_per_chunk: int | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """crops [sum h * w, S, S, 3] uint8, one grid (h, w) an image -> [C, P * P, D], C = sum (1 + h * w).

        Every image gives its global view, then its crops. Crops do not see each other, so they pass through the
        layers in chunks of `crops_per_chunk`, which bounds memory and changes nothing else.
        """
        weight = self.embeddings.patch_embedding.weight
        mean, std = pixel_statistics(crops.device)
        patches = ops.image_patches(
            crops, grids, mean, std, self.config.patch_size, weight.dtype, backend=backend
        )  # [C, P * P, 3 * p * p]
        chunk = crops_per_chunk or self._crops_per_chunk(patches)
        features = [self._encode(x, backend) for x in patches.split(chunk)]
        return features[0] if len(features) == 1 else torch.cat(features)

    def _crops_per_chunk(self, patches: Tensor) -> int:
        """64 on a GPU. On a CPU so many that the widest activation stays below 32 MB: larger blocks are mapped
        anew by the allocator each time, and touching fresh pages costs as much as the arithmetic on them."""
        if patches.device.type != "cpu":
            return 64
        widest = max(self.config.intermediate_size, 3 * self.config.hidden_size)  # of the MLP, and q, k and v
        return max(1, 32_000_000 // (self.config.num_positions * widest * patches.element_size()))

    def _encode(self, patches: Tensor, backend: str | None) -> Tensor:
        x = self.embeddings(patches)  # [C, L, D]
        C, L, _ = x.shape
        norm = self.pre_layrnorm
        x = ops.layer_norm(x.flatten(0, 1), norm.weight, norm.bias, norm.eps, backend=backend)
        cu_seqlens = torch.arange(0, (C + 1) * L, L, dtype=torch.int32, device=x.device)
        for layer in self.layers:
            x = layer(x, cu_seqlens, L, backend)
        return x.unflatten(0, (C, L))[:, 1:]


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        D, p = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(D))
        self.patch_embedding = PatchEmbedding(D, p)
        self.position_embedding = Embedding(config.num_positions, D)

    def forward(self, patches: Tensor) -> Tensor:  # [C, P * P, 3 * p * p] -> [C, L, D]
        x = self.patch_embedding(patches)
        cls = self.class_embedding.expand(len(x), 1, -1)
        return torch.cat([cls, x], dim=1) + self.position_embedding.weight


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel: a matrix product over patches. The weight keeps its shape."""

    def __init__(self, width: int, patch_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch_size, patch_size))

    def forward(self, patches: Tensor) -> Tensor:  # [C, P * P, 3 * p * p] -> [C, P * P, D]
        return nn.functional.linear(patches, self.weight.flatten(1))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str | None) -> Tensor:
        h, x, bias_is_in = _normed(self.layer_norm1, x, self.self_attn.out_proj, backend)
        x = self.self_attn(x, h, cu_seqlens, max_seqlen, backend, bias_is_in)
        h, x, bias_is_in = _normed(self.layer_norm2, x, self.mlp.fc2, backend)
        return self.mlp(x, h, backend, bias_is_in)


def _normed(norm: nn.LayerNorm, x: Tensor, last: Linear, backend: str | None) -> tuple[Tensor, Tensor, bool]:
    """The normed x, and x with the bias of the block's last matrix already in it, where that saves a pass over x."""
    shift = last.bias_ahead()
    if shift is None:
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, backend=backend), x, False
    return *ops.layer_norm_shift_(x, shift, norm.weight, norm.bias, norm.eps, backend=backend), True


class VisionAttention(nn.Module):
    """Every position of a crop sees every other. q, k and v are one matrix here and three in the checkpoint."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.head_dim = config.head_dim
        self.qkv_proj = Linear(D, 3 * D)
        self.out_proj = Linear(D, D)

    def forward(
        self, x: Tensor, h: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str | None, bias_is_in: bool = False
    ) -> Tensor:
        q, k, v = rearrange(self.qkv_proj(h), "T (three N H) -> three T N H", three=3, H=self.head_dim)
        y = ops.attention(q, k, v, cu_seqlens, max_seqlen, causal=False, backend=backend)
        return self.out_proj.add_to(x, y.flatten(1), bias_is_in=bias_is_in, backend=backend)


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, h: Tensor, backend: str | None, bias_is_in: bool = False) -> Tensor:
        return self.fc2.add_to(x, self.fc1.quick_gelu(h, backend=backend), bias_is_in=bias_is_in, backend=backend)


@functools.lru_cache(maxsize=16)  # copying them to a device waits for it
def pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3] float32 of CLIP's training pixels, in 0 .. 1."""
    return torch.tensor(MEAN, device="cpu").to(device), torch.tensor(STD, device="cpu").to(device)
