"""fp8: the product of torch against the same product in float32, and which layers it takes."""

import copy

import pytest
import torch
from PIL import Image

from minivlm2vec import Embedder
from minivlm2vec.config import VLM2VecConfig
from minivlm2vec.decoder import RMSNorm
from minivlm2vec.inference import InferenceOnly, fp8, optimize
from minivlm2vec.inference.fp8 import Fp8Linear, check_fp8, quantize
from minivlm2vec.inference.fused import QuantizedRows, fuse
from minivlm2vec.linear import Linear
from minivlm2vec.new_checkpoint import base_config, new_checkpoint
from minivlm2vec.weights import empty_model
from minivlm2vec_kernels import quantize_rows
from tests.support.golden import synth_image
from tests.support.helpers import randomize


def linear(n=48, k=64, bias=False, seed=0) -> Linear:
    return randomize(Linear(k, n, bias=bias), seed).bfloat16().requires_grad_(False)


def in_8_bits(layer: Linear) -> Fp8Linear:
    layer = copy.deepcopy(layer)
    quantize(layer, None)
    return layer


def in_float32(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    """The same product, its e4m3 operands multiplied in float32."""
    (w, sw), (a, sa) = quantize_rows(layer.weight), quantize_rows(x)
    y = (a.float() @ w.float().T) * sa[:, None] * sw
    return y if layer.bias is None else y + layer.bias.float()


def test_rows_do_not_see_each_other():
    """What makes a vector independent of its neighbours, here too; sums may be taken in another order."""
    layer = in_8_bits(linear())
    x, large = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    alone = torch.cat([layer(row[None]) for row in x]).float()
    beside = layer(torch.cat([x, 1e4 * large, torch.full_like(large, float("nan"))])).float()
    assert (beside[:5] - alone).abs().max() <= 2**-8 * alone.abs().max() and beside[10:].isnan().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 17])
def test_products(bias, rows):
    plain = linear(bias=bias)
    layer = in_8_bits(plain)
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = in_float32(plain, x)
    limit = 2**-8 * exact.abs().max() * 1.01  # half a unit of bfloat16, of the largest
    assert (layer(x).float() - exact).abs().max() <= limit
    for start, stop in ((16, 32), (16, None)):
        assert (layer.rows(x, start, stop).float() - exact[:, start:stop]).abs().max() <= limit
    assert torch.equal(layer(x.view(rows, 1, 64)), layer(x).view(rows, 1, 48))
    residual = torch.randn(rows, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(layer.add_(residual.clone(), x), residual + layer(x))
    assert torch.equal(layer.quick_gelu(x), layer(x) * torch.sigmoid(1.702 * layer(x)))
    gate, up = layer(x).chunk(2, dim=1)
    assert torch.equal(layer.silu_mul(x), torch.nn.functional.silu(gate) * up)
    cosine = torch.cosine_similarity(layer(x).float(), plain(x).float()).min()
    print(f"smallest cosine to bfloat16 {cosine:.5f}")
    assert cosine > 0.998


def test_rows_that_a_norm_has_quantised():
    """The same product, whether the norm's rows come in bfloat16 or in 8 bits already; some of them too."""
    layer, norm = in_8_bits(linear()), RMSNorm(64, 1e-5).bfloat16().requires_grad_(False)
    norm.weight.copy_(torch.linspace(0.5, 2, 64))
    x = torch.randn(17, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    fuse(norm, None)
    h = norm.ahead_of(x, layer)
    assert isinstance(h, QuantizedRows) and h.q.dtype == torch.float8_e4m3fn and h.scale.shape == (17,)
    assert torch.equal(layer(h), layer(norm(x))) and torch.equal(layer.silu_mul(h), layer.silu_mul(norm(x)))
    some = torch.tensor([3, 16, 0])
    assert torch.equal(layer.rows(h.at(some), 16, 32), layer.rows(norm(x)[some], 16, 32))
    assert torch.equal(norm.ahead_of(x, linear()), norm(x))


def test_matrices_that_do_not_fit_are_named_before_anything_is_changed():
    config = VLM2VecConfig.from_dict(base_config("tiny") | {"intermediate_size": 100})
    model = empty_model(config).to_empty(device="cpu").bfloat16()
    with pytest.raises(ValueError, match=r"multiples of 16, decoder\.layers\.1\.mlp\.gate_up_proj is \[200, 64\]"):
        optimize(model, precision="fp8")
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, InferenceOnly) for m in model.modules())
    optimize(model, precision="fp8", fp8_keep=("*.mlp.*", "vision.*", "projector.*"))


def test_sizes_of_layers_that_stay_as_they_are_do_not_matter():
    config = VLM2VecConfig.from_dict(base_config("tiny") | {"intermediate_size": 100})
    model = empty_model(config).to_empty(device="cpu").bfloat16()
    model.decoder.layers[1].register_forward_hook(lambda *_: None)
    assert not fp8_names(optimize(model, precision="fp8"))


@pytest.mark.parametrize("error", [RuntimeError, TypeError, AttributeError])
def test_a_product_that_cannot_be_tried_is_told(monkeypatch, error):
    def refuse(*_, **__):
        raise error("use_fast_accum is not known")

    monkeypatch.setattr(fp8, "scaled_mm", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    with pytest.raises(ValueError, match=r"does not work on a card .*use_fast_accum is not known"):
        fp8._try_product(torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("tiny") / "m", preset="tiny", seed=5)


def load(folder, **options) -> Embedder:
    return Embedder.from_pretrained(folder, device="cpu", dtype=torch.bfloat16, show_progress=False, **options)


def quantized(folder, keep) -> Embedder:
    e = load(folder, optimize=False)
    optimize(e.model, precision="fp8", fp8_keep=keep)
    return e


def fp8_names(model) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, Fp8Linear)}


def test_what_is_quantised_by_default(folder):
    names = fp8_names(load(folder, precision="fp8").model)
    inner = "decoder.layers.1."
    assert names == {inner + x for x in ("self_attn.qkv_proj", "mlp.gate_up_proj")}
    assert not fp8_names(load(folder).model)


def test_what_is_kept_can_be_chosen(folder):
    names = fp8_names(quantized(folder, ("vision.*", "projector.mlp.2", "*.first.mlp.*")).model)
    assert "projector.mlp.0" in names and "projector.mlp.2" not in names
    assert "decoder.layers.2.mlp.down_proj" in names and "decoder.layers.0.mlp.down_proj" not in names
    assert "decoder.layers.0.self_attn.qkv_proj" in names and not any(n.startswith("vision") for n in names)


def test_vectors_are_near_those_of_bfloat16(folder):
    texts = ["a cat", "ünïcode 🐈 text", "b" * 100, "what is left of the dog?"]
    plain, fp8 = load(folder), load(folder, precision="fp8")
    everything = quantized(folder, ("vision.*",))
    expected = plain.encode(texts)
    near, far = ((expected * e.encode(texts)).sum(1).min() for e in (fp8, everything))
    print(f"smallest cosine to bfloat16: {near:.4f}, with every matrix of the decoder {far:.4f}")
    assert 0.98 < near < 1 - 1e-6  # measured 0.9923; random weights are a hard case, and there are three layers
    assert 0.9 < far < near  # measured 0.9354
    assert all(m.weight.element_size() == 1 for m in fp8.model.modules() if isinstance(m, Fp8Linear))


def test_the_tower_too(folder):
    """Every matrix in 8 bits, with biases and quick_gelu: a vector of an image stays near."""
    plain, everything = load(folder), quantized(folder, ())
    assert "vision.layers.0.mlp.fc1" in fp8_names(everything.model)
    image = Image.fromarray(synth_image(80, 60, 0))
    cosine = (plain.encode([image]) @ everything.encode([image]).T).item()
    print(f"cosine to bfloat16 {cosine:.4f}")
    assert 0.9 < cosine < 1 - 1e-6


def test_errors(folder):
    with pytest.raises(ValueError, match="precision is 'bf16' or 'fp8', got 'int4'"):
        load(folder, precision="int4")
    with pytest.raises(ValueError, match=r"bfloat16 models, got torch\.float32"):
        Embedder.from_pretrained(folder, device="cpu", precision="fp8", show_progress=False)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 30, 777, 4096])
@pytest.mark.parametrize("n, k", [(9216, 3072), (3072, 3072), (16384, 3072), (3072, 8192)])
def test_gpu_products(rows, n, k):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no e4m3 products before capability 8.9")
    plain = randomize(Linear(k, n, bias=False)).bfloat16().cuda().requires_grad_(False)
    x = torch.randn(rows, k, device="cuda").bfloat16()
    exact = in_float32(plain, x)
    assert (in_8_bits(plain)(x).float() - exact).abs().max() <= 2**-7 * exact.abs().max()


CARD = torch.device("cuda")


def pretend_card(monkeypatch, product) -> None:
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    monkeypatch.setattr(torch, "ones", lambda *shape, device=None: ones(*shape))
    monkeypatch.setattr(torch, "_scaled_mm", product)


def test_a_product_is_tried_before_anything_is_converted(monkeypatch):
    def right(a, b, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        assert scale_a.shape == (16, 1) and scale_b.shape == (1, 16)
        return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)

    pretend_card(monkeypatch, right)
    check_fp8(CARD, torch.bfloat16)

    def refused(*args, **kwargs):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    pretend_card(monkeypatch, refused)
    with pytest.raises(ValueError, match=r"does not work on a card with torch .*: CUBLAS_STATUS_NOT_SUPPORTED"):
        check_fp8(CARD, torch.bfloat16)
    pretend_card(monkeypatch, lambda *args, **kwargs: torch.zeros(16, 16))
    with pytest.raises(ValueError, match="the product of ones is not 16"):
        check_fp8(CARD, torch.bfloat16)


def test_amds_8_bit_floats_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match="AMD's 8-bit floats are another format"):
        check_fp8(CARD, torch.bfloat16)
