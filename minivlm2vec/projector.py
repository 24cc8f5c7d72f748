"""The projector: patch features -> image tokens in the decoder's width.

C crops, P patches per side, D tower width, I image tokens, Dd decoder width.
"""

import torch
from torch import Tensor, nn

from minivlm2vec_kernels import ops

from .batch import Grid
from .config import VLM2VecConfig
from .linear import Linear
from .registry import register


@register("projector", "hd_mlp")
class Projector(nn.Module):
    """2x2 patches side by side (4 D wide), separators put in, then Linear, GELU (erf), Linear.

    An image's tokens: the rows of its whole canvas, each ended by `sub_GN`; `glb_GN`; the rows of its global view,
    each ended by `sub_GN`. The separators are 4 D wide and go through the MLP like everything else.
    """

    def __init__(self, config: VLM2VecConfig, *, backend: str | None = None):
        super().__init__()
        D, Dd = config.vision.hidden_size, config.decoder.hidden_size
        self.backend = backend
        self.sub_GN = nn.Parameter(torch.empty(1, 1, 1, 4 * D))
        self.glb_GN = nn.Parameter(torch.empty(1, 1, 4 * D))
        self.mlp = nn.Sequential(Linear(4 * D, Dd), nn.GELU(), Linear(Dd, Dd))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.sub_GN), nn.init.normal_(self.glb_GN)

    def forward(self, features: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        """features [C, P * P, D], one grid (h, w) an image -> [I, Dd], image after image."""
        return self.mlp(ops.merge_crops(features, grids, self.sub_GN, self.glb_GN, backend=self.backend))
