"""The decoder against transformers' own Phi3Model, with random weights, module by module."""

import pytest
import torch

from minivlm2vec.batch import PackedBatch, cumulative
from minivlm2vec.config import DecoderConfig, RopeScaling
from minivlm2vec.decoder import Decoder
from tests.support.helpers import close, copy_parameters, randomize

transformers = pytest.importorskip("transformers")

D, F, H, LAYERS = 192, 320, 48, 3
SHORT = tuple(1.0 + 0.05 * i for i in range(H // 2))
LONG = tuple(1.0 + 1.5 * i for i in range(H // 2))
LIMIT = 40  # original_max_position_embeddings: longer sequences take the long factors
VARIANTS = {"mha": 4, "gqa": 2, "mqa": 1}


@pytest.fixture(scope="module", params=VARIANTS)
def models(request):
    heads = VARIANTS[request.param]
    config = transformers.Phi3Config(
        vocab_size=100, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=heads, max_position_embeddings=32 * LIMIT, original_max_position_embeddings=LIMIT,
        rms_norm_eps=1e-5, sliding_window=None, pad_token_id=0, attn_implementation="eager",
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": list(SHORT),
                         "long_factor": list(LONG), "original_max_position_embeddings": LIMIT},
    )  # fmt: skip
    theirs = randomize(transformers.Phi3Model(config).eval())
    ours = Decoder(DecoderConfig(
        vocab_size=100, hidden_size=D, intermediate_size=F, num_attention_heads=4, num_key_value_heads=heads,
        num_hidden_layers=LAYERS, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=RopeScaling(SHORT, LONG),
        max_position_embeddings=32 * LIMIT, original_max_position_embeddings=LIMIT,
    )).eval().requires_grad_(False)  # fmt: skip
    copy_parameters(theirs, ours, lambda name: (name, 0))
    return ours, theirs


def batch_of(lengths) -> PackedBatch:
    none = torch.empty(0, dtype=torch.int64)
    ids = torch.randint(1, 100, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return PackedBatch(ids, positions, cumulative(lengths), tuple(lengths), none, (), none, none)


def packing(ours, batch, causal=True):
    return ours.packing(batch, dtype=torch.float32, causal=causal)


def rotary(theirs, x, n):
    return theirs.rotary_emb(x, torch.arange(n)[None])


def mask(n):
    return torch.full((n, n), -torch.inf).triu(1)[None, None]


@torch.inference_mode()
@pytest.mark.parametrize("n", [7, LIMIT, LIMIT + 1, 90], ids=["short", "at-limit", "past-limit", "long"])
def test_attention(models, n):
    ours, theirs = models
    h = torch.randn(1, n, D)
    layer = theirs.layers[0].self_attn
    expected = layer(h, position_embeddings=rotary(theirs, h, n), attention_mask=mask(n))[0]
    got = ours.layers[0].self_attn(h[0], packing(ours, batch_of([n])))
    close("attention", got, expected[0], 3e-6)


@torch.inference_mode()
def test_mlp_and_norm(models):
    ours, theirs = models
    h = torch.randn(9, D)
    close("mlp", ours.layers[1].mlp(h), theirs.layers[1].mlp(h), 3e-6)
    norm, expected = ours.layers[1].input_layernorm, theirs.layers[1].input_layernorm
    close("norm", norm(h), expected(h), 1e-6)
    normed, total = norm(h, residual=2 * h)
    close("sum", total, 3 * h, 1e-6)
    close("norm of the sum", normed, expected(3 * h), 1e-6)


@torch.inference_mode()
def test_layer(models):
    ours, theirs = models
    x = torch.randn(1, 33, D)
    expected = theirs.layers[2](x, attention_mask=mask(33), position_embeddings=rotary(theirs, x, 33))
    expected = expected[0] if isinstance(expected, tuple) else expected
    got = ours.layers[2](x[0], packing(ours, batch_of([33])))
    close("layer", got, expected.reshape(33, D), 5e-6)


@torch.inference_mode()
def test_decoder_on_a_pack_equals_theirs_one_by_one(models):
    """Short and long sequences in one pack: each has the rotations of its own length."""
    ours, theirs = models
    lengths = [5, 90, 1, LIMIT, LIMIT + 1, 17]
    batch = batch_of(lengths)
    x, kept = ours.embed_tokens(batch.input_ids), []
    final = ours(x, packing(ours, batch))
    for layer in ours.layers:
        x = layer(x, packing(ours, batch))
        kept.append(x)
    assert torch.equal(ours.norm(x), final)
    for ids, got, *states in zip(
        batch.input_ids.split(lengths), final.split(lengths), *(kept[i].split(lengths) for i in range(LAYERS)),
        strict=True,
    ):  # fmt: skip
        out = theirs(ids[None], output_hidden_states=True, use_cache=False)
        close("final", got, out.last_hidden_state[0], 1e-5)
        for i in range(LAYERS - 1):
            close(f"layer {i}", states[i], out.hidden_states[i + 1][0], 2e-5)


@pytest.mark.parametrize("variant", ["causal", "bidirectional"])
def test_gradients_reach_every_parameter(models, variant):
    """Research code trains through the same forward: nothing is overwritten that a gradient needs."""
    ours, _ = models
    batch = batch_of([5, 8])
    ours.requires_grad_(True)
    try:
        out = ours(ours.embed_tokens(batch.input_ids), packing(ours, batch, causal=variant == "causal"))
        out[batch.cu_seqlens[1:].long() - 1].square().sum().backward()
        for name, p in ours.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    finally:
        ours.requires_grad_(False)
        ours.zero_grad()


@pytest.mark.parametrize("models", ["gqa"], indirect=True)
def test_gradients_through_the_kernels_are_the_references(models, large_tiles):
    """rms_norm, rope, attention and silu_mul in Triton, forward and backward; both sets of frequencies."""
    ours, _ = models
    batch = batch_of([5, LIMIT + 1])
    ours.requires_grad_(True)
    try:
        results = []
        for backend in ("torch", "triton"):
            for module in ours.modules():
                if hasattr(module, "backend"):
                    module.backend = backend
            out = ours(ours.embed_tokens(batch.input_ids), packing(ours, batch))
            last = out[batch.cu_seqlens[1:].long() - 1]
            results.append(torch.autograd.grad(last.square().sum(), list(ours.parameters())))
        for (name, _), torchs, tritons in zip(ours.named_parameters(), *results, strict=True):
            close(name, tritons, torchs, 2e-5 * float(torchs.abs().max()))
    finally:
        ours.requires_grad_(False)
