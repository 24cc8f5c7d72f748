"""Packed linear layers: the same numbers, and loud where they cannot do what a plain layer does."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from minivlm2vec import Embedder
from minivlm2vec.inference.fused import FusedLinear, fuse
from minivlm2vec.inference.prepack import PackedLinear, can_prepack, prepack
from minivlm2vec.linear import Linear
from minivlm2vec.new_checkpoint import new_checkpoint
from tests.support.golden import synth_image
from tests.support.helpers import close, randomize

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_prepack(CPU, torch.float32), reason="this torch has no oneDNN")


def layer_of(dtype: torch.dtype, bias: bool) -> Linear:
    return randomize(Linear(96, 160, bias=bias)).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_every_method_equals_the_plain_layer(dtype, bias):
    if not can_prepack(CPU, dtype):
        pytest.skip(f"no {dtype} here")
    plain, fused, packed, whole = (layer_of(dtype, bias) for _ in range(4))
    fuse(fused, "torch"), prepack(packed, "torch", (64, 96)), prepack(whole, "torch")
    assert [type(x) for x in (fused, packed, whole)] == [FusedLinear, PackedLinear, PackedLinear]
    x, residual = torch.randn(7, 96).to(dtype), torch.randn(7, 160).to(dtype)
    strided = torch.randn(7, 200).to(dtype)[:, :96]
    y, share = plain(x), 2e-6 if dtype == torch.float32 else 0.02
    gate, up = y.chunk(2, dim=1)

    def near(name, ours, expected):
        close(name, ours, expected, share * max(1.0, float(expected.abs().max())))

    for layer in (fused, packed, whole):
        near("forward", layer(x), y)
        near("strided", layer(strided), plain(strided))
        near("add_", layer.add_(residual.clone(), x), residual + y)
        near("silu_mul", layer.silu_mul(x), F.silu(gate) * up) if not bias else None
        near("first rows", layer.rows(x, 0, 64), y[:, :64])
        near("last rows", layer.rows(x, 64, None), y[:, 64:])
        if bias:
            near("quick_gelu", layer.quick_gelu(x), y * torch.sigmoid(1.702 * y))
            ahead = layer.bias_ahead()
            if ahead is not None:
                near("bias ahead", layer.add_(residual + ahead, x, bias_is_in=True), residual + y)


def test_the_whole_model(tmp_path):
    folder = new_checkpoint(tmp_path / "m", seed=4)
    packed, plain = (
        Embedder.from_pretrained(folder, device="cpu", prepack=p, show_progress=False) for p in (True, False)
    )
    assert not [m for m in packed.model.modules() if type(m) is Linear]
    inputs = ["a", "b" * 700, {"text": "what?", "image": Image.fromarray(synth_image(70, 50, 1))}]
    close("vectors", packed.encode(inputs, convert_to="torch"), plain.encode(inputs, convert_to="torch"), 2e-6)


def test_packed_layers_have_no_gradient():
    layer = layer_of(torch.float32, True)
    prepack(layer, "torch")
    with pytest.raises(RuntimeError, match="optimize=False"):
        layer(torch.randn(7, 96, requires_grad=True))


def test_what_cannot_be_packed_is_an_error(tmp_path):
    folder = new_checkpoint(tmp_path / "m", dtype="float16")
    with pytest.raises(ValueError, match=r"got torch\.float16 on cpu"):
        Embedder.from_pretrained(folder, device="cpu", prepack=True, show_progress=False)
    e = Embedder.from_pretrained(folder, device="cpu", show_progress=False)
    assert not [m for m in e.model.modules() if type(m) is PackedLinear]


def test_what_can_be_packed():
    assert not can_prepack(torch.device("cuda"), torch.float32)
    assert not can_prepack(CPU, torch.float16)
