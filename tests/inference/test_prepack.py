"""Packed linear layers: the same numbers, and loud where they cannot do what a plain layer does."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from minivlm2vec import Embedder
from minivlm2vec.inference.fused import FusedLinear, fuse
from minivlm2vec.inference.prepack import CACHES, PackedLinear, bound_caches, can_prepack, padding, prepack
from minivlm2vec.linear import Linear
from minivlm2vec.new_checkpoint import new_checkpoint
from tests.support.golden import synth_image
from tests.support.helpers import close, randomize

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_prepack(CPU, torch.float32), reason="this torch has no oneDNN")


def one_thread() -> dict[str, str]:
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    unset = {name: value for name, value in os.environ.items() if name not in CACHES}
    return unset | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


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


# Numbers of rows: each costs memory for good


def test_rows_are_padded_to_few_numbers():
    """Where a matrix is small; eight numbers between two powers of two, so at most an eighth more."""
    padded = {rows: rows + padding(rows, 192 * 1024) for rows in range(2049)}
    assert len(set(padded.values())) == 17 + 8 * 7
    assert all(rows <= n <= rows * 9 / 8 for rows, n in padded.items())
    assert all(padding(n, 192 * 1024) == 0 for n in padded.values())
    assert [padded[n] for n in (16, 17, 31, 65, 770)] == [16, 18, 32, 72, 832]


def test_rows_of_large_matrices_cost_more_than_compiling():
    assert all(padding(rows, 3072 * 9216) == 0 for rows in range(4096))
    assert padding(1000, 1024 * 1024) > 0 and padding(1001, 1 << 21) == 0, "a long product is compiled for its rows"
    assert all(padding(rows, 1024 * 1024) < 32 for rows in range(4096))


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 33, 130, 300])
@torch.no_grad()
def test_padded_rows_change_nothing(rows):
    plain, packed = layer_of(torch.float32, True), layer_of(torch.float32, True)
    prepack(packed, "torch", (64, 96))
    whole = layer_of(torch.float32, True)
    prepack(whole, "torch")
    x, residual = torch.randn(rows, 96), torch.randn(rows, 160)
    y = plain(x)
    for layer in (packed, whole):
        assert layer(x).shape == y.shape
        close("forward", layer(x), y, 1e-5)
        close("add_", layer.add_(residual.clone(), x), residual + y, 1e-5)
        close("rows", layer.rows(x, 0, 64), y[:, :64], 1e-5)
        close("quick_gelu", layer.quick_gelu(x), y * torch.sigmoid(1.702 * y), 1e-5)
        close("cube", layer(x[None].expand(2, -1, -1)), y.expand(2, -1, -1), 1e-5)


CALLS = """
from minivlm2vec import Embedder
e = Embedder.from_pretrained("mini", device="cpu", show_progress=False)
for n in range(2, 202, 2):
    e.encode(["x " * n + str(n)])
"""


def test_new_lengths_compile_little():
    """100 lengths, but some 36 numbers of rows; without padding 504 products are compiled."""
    verbose = one_thread() | {"ONEDNN_VERBOSE": "profile_create"}
    run = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, check=True, env=verbose)
    compiled = [line for line in run.stdout.splitlines() if "create:cache_miss" in line and "inner_product" in line]
    assert 100 < len(compiled) < 250, len(compiled)


def test_the_environment_decides_how_many_products_are_kept(monkeypatch):
    monkeypatch.setenv(CACHES[0], "7")
    monkeypatch.delenv(CACHES[1], raising=False)
    bound_caches()
    assert [os.environ[name] for name in CACHES] == ["7", "64"]
