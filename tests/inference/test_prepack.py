"""Packed linear layers: the same numbers, and loud where they cannot do what a plain layer does."""

import pytest
import torch
from PIL import Image

from minivlm2vec import Embedder
from minivlm2vec.linear import Linear
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.prepack import PackedLinear, supports
from tests.support.golden import Case, synth_image, tokenizer_file
from tests.support.helpers import close, randomize

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not supports(CPU, torch.float32), reason="this torch has no oneDNN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_every_method_equals_the_plain_layer(dtype, bias):
    if not supports(CPU, dtype):
        pytest.skip(f"no {dtype} here")
    plain = randomize(Linear(96, 160, bias=bias)).to(dtype)
    packed = PackedLinear(plain, (64, 96))
    whole = PackedLinear(plain)
    x, residual = torch.randn(7, 96).to(dtype), torch.randn(7, 160).to(dtype)
    strided = torch.randn(7, 200).to(dtype)[:, :96]
    atol = 2e-6 if dtype == torch.float32 else 0.04
    for layer in (packed, whole):
        close("forward", layer(x), plain(x), atol)
        close("strided", layer(strided), plain(strided), atol)
        close("add_to", layer.add_to(residual.clone(), x), plain.add_to(residual.clone(), x), atol)
        close("silu_mul", layer.silu_mul(x), plain.silu_mul(x), atol) if not bias else None
        close("first rows", layer.rows(x, 0, 64), plain.rows(x, 0, 64), atol)
        close("last rows", layer.rows(x, 64, None), plain.rows(x, 64, None), atol)
        if bias:
            close("quick_gelu", layer.quick_gelu(x), plain.quick_gelu(x), atol)


def test_the_whole_model(tmp_path):
    folder = new_checkpoint(tmp_path / "m", seed=4)
    packed, plain = (
        Embedder.from_pretrained(folder, device="cpu", prepack=p, show_progress=False) for p in (True, False)
    )
    assert not [m for m in packed.model.modules() if type(m) is Linear]
    inputs = ["a", "b" * 700, {"text": "what?", "image": Image.fromarray(synth_image(70, 50, 1))}]
    close("vectors", packed.encode(inputs, convert_to="torch"), plain.encode(inputs, convert_to="torch"), 2e-6)


@pytest.mark.parametrize("name", ["c01b_text_instruction", "c12c_batch_two_image_rows"])
def test_the_plain_model_gives_the_golden_vectors_too(tmp_path, name):
    case = Case("small", name)
    folder = new_checkpoint(tmp_path / "m", preset="small", seed=1, tokenizer=tokenizer_file())
    e = Embedder.from_pretrained(folder, device="cpu", prepack=False, show_progress=False)
    vectors = e.encode(case.inputs, num_crops=case.num_crops, max_length=case.max_length, convert_to="torch")
    close("pooled", vectors, case.tensors["pooled"], 2e-6)


def test_packed_layers_refuse_to_train(tmp_path):
    e = Embedder.from_pretrained(new_checkpoint(tmp_path / "m"), device="cpu", prepack=True, show_progress=False)
    with pytest.raises(RuntimeError, match="prepack=False"):
        e.model.train()
    e.model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="no gradient; load with prepack=False"):
        e.model(e.processor(["a"]))


def test_what_cannot_be_packed_is_an_error(tmp_path):
    folder = new_checkpoint(tmp_path / "m", dtype="float16")
    with pytest.raises(ValueError, match=r"got torch\.float16 on cpu"):
        Embedder.from_pretrained(folder, device="cpu", prepack=True, show_progress=False)
    e = Embedder.from_pretrained(folder, device="cpu", show_progress=False)
    assert [m for m in e.model.modules() if type(m) is Linear]


def test_what_can_be_packed():
    assert not supports(torch.device("cuda"), torch.float32)
    assert not supports(CPU, torch.float16)
