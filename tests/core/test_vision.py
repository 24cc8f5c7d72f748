"""The tower against transformers' own CLIPVisionModel, with random weights, module by module."""

import pytest
import torch

from minivlm2vec.config import VisionConfig
from minivlm2vec.vision import VisionTower
from tests.support.helpers import close, copy_parameters, randomize

transformers = pytest.importorskip("transformers")

CONFIG = VisionConfig(hidden_size=96, intermediate_size=160, num_attention_heads=3, num_hidden_layers=4, image_size=56,
                      patch_size=14, layer_norm_eps=1e-5)  # fmt: skip
L, D = CONFIG.num_positions, CONFIG.hidden_size


@pytest.fixture(scope="module")
def towers():
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=96, intermediate_size=160, num_attention_heads=3, num_hidden_layers=4, image_size=56,
        patch_size=14, layer_norm_eps=1e-5, hidden_act="quick_gelu", attn_implementation="eager",
    )).eval()  # fmt: skip
    theirs = randomize(getattr(theirs, "vision_model", theirs))
    ours = VisionTower(CONFIG).eval().requires_grad_(False)
    copy_parameters(theirs, ours, _rename)
    return ours, theirs


def _rename(name: str) -> tuple[str, int] | None:
    name = name.removeprefix("encoder.")
    if name.startswith(("layers.3.", "post_layernorm")):
        return None
    for part, projection in enumerate(("q_proj", "k_proj", "v_proj")):
        if projection in name:
            return name.replace(projection, "qkv_proj"), part
    return name, 0


def _encoder_layer(theirs, i):
    return theirs.encoder.layers[i]


@torch.inference_mode()
def test_attention(towers):
    ours, theirs = (towers[0].layers[0].self_attn, _encoder_layer(towers[1], 0).self_attn)
    h = torch.randn(3, L, D)
    expected = theirs(h, attention_mask=None)[0]
    close("attention", ours(h), expected, 2e-6)


@torch.inference_mode()
def test_mlp(towers):
    h = torch.randn(7, D)
    expected = _encoder_layer(towers[1], 1).mlp(h)
    close("mlp", towers[0].layers[1].mlp(h), expected, 2e-6)


@torch.inference_mode()
def test_layer(towers):
    x = torch.randn(2, L, D)
    expected = _encoder_layer(towers[1], 2)(x, attention_mask=None)
    expected = expected[0] if isinstance(expected, tuple) else expected
    close("layer", towers[0].layers[2](x), expected, 5e-6)


@torch.inference_mode()
def test_tower(towers):
    """Features are hidden_states[-2] without the class token, for the global views and the crops."""
    ours, theirs = towers
    grids = ((1, 2), (2, 2), (1, 1))
    crops = torch.randint(0, 256, (7, 56, 56, 3), dtype=torch.uint8)
    pixels = _pixel_values(crops, grids)
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    got = ours(crops, grids)
    assert got.shape == (10, 16, D)
    close("tower", got, expected, 1e-5)


def _pixel_values(crops, grids):
    """[C, 3, S, S], by the published steps: ToTensor, Normalize, bicubic of the whole canvas for the global view."""
    from minivlm2vec.vision import MEAN, STD

    out, start = [], 0
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in (MEAN, STD))
    for h, w in grids:
        tiles = crops[start : start + h * w]
        start += h * w
        rows = [torch.cat(list(tiles[r * w : (r + 1) * w]), dim=1) for r in range(h)]
        canvas = (torch.cat(rows, dim=0).permute(2, 0, 1) / 255.0 - mean) / std
        small = torch.nn.functional.interpolate(canvas[None], size=(56, 56), mode="bicubic", align_corners=False)
        out += [small[0]] + [canvas[:, r * 56 : r * 56 + 56, c * 56 : c * 56 + 56] for r in range(h) for c in range(w)]
    return torch.stack(out)
