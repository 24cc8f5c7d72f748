"""The plain model behaves as any PyTorch model: hooked, replaced, copied, trained. (In other people's tools:
test_ecosystem.py.)"""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from minivlm2vec import Embedder, VLM2Vec
from minivlm2vec.linear import Linear
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.rope import rope_tables
from tests.support.golden import synth_image
from tests.support.helpers import close

INPUTS = ["a cat", "a text of some length " * 3, {"text": "what?", "image": Image.fromarray(synth_image(80, 60, 1))}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("tiny") / "m", preset="tiny", seed=5)


@pytest.fixture
def e(folder) -> Embedder:
    return Embedder.from_pretrained(folder, device="cpu", optimize=False, show_progress=False)


@pytest.fixture
def batch(e):
    return e.processor(INPUTS)


@pytest.fixture
def texts(e):
    return e.processor(INPUTS[:2])


def owners(model: VLM2Vec) -> dict[str, nn.Module]:
    """Modules that own a parameter."""
    return {n: m for n, m in model.named_modules() if n and any(True for _ in m.parameters(recurse=False))}


# -------------------------------------------------------------------------------------------------------- hooks


def first(x):
    return x[0] if isinstance(x, tuple) else x


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_hooks_fire_everywhere_with_values_that_stay_true(e, batch, grad, backend):
    """On both backends: what a hook was shown is the same when the forward pass has ended, and nobody wrote over it."""
    if backend == "triton" and grad:
        pytest.skip("not all kernels have gradients")
    for module in e.model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    seen, then = {}, {}

    def record(name, module, args, out):
        outs = [args[0], *(out if isinstance(out, tuple) else (out,))]
        seen[name], then[name] = outs, [x.detach().clone() for x in outs]

    for name, module in owners(e.model).items():
        module.register_forward_hook(functools.partial(record, name))
    with torch.set_grad_enabled(grad):
        e.model(batch)
    assert set(seen) == set(owners(e.model))
    for name in seen:
        for now, before in zip(seen[name], then[name], strict=True):
            assert torch.equal(now, before), f"{name} was written over"


@torch.no_grad()
def test_a_layers_output_is_the_hidden_state(e, batch):
    seen = {}
    for number, layer in enumerate(e.model.decoder.layers):
        layer.register_forward_hook(lambda module, args, out, number=number: seen.update({number: out}))
    e.model(batch)
    kept = e.model.hidden_states(batch, range(len(seen)))
    for number, x in seen.items():
        close(f"layer {number}", x, kept[number], 1e-6)


def test_layers_that_are_none_are_named(e, batch):
    for layers in ([99], [-99, 0], ["0"]):
        with pytest.raises(ValueError, match=r"are none of the \d+ that there are, from -\d+ to \d+"):
            e.model.hidden_states(batch, layers)


@torch.no_grad()
def test_a_hook_can_change_what_follows(e, batch):
    before = e.model(batch)
    e.model.vision.layers[0].mlp.register_forward_hook(lambda module, args, out: 0 * out)
    after = e.model(batch)
    assert torch.equal(before[:2], after[:2]) and (before[2] - after[2]).abs().max() > 1e-4


# ----------------------------------------------------------------------------------------------- other layers


@torch.no_grad()
def test_a_plain_linear_in_every_place(e, batch):
    before, count = e.model(batch), 0
    for name, module in list(e.model.named_modules()):
        if type(module) is Linear:
            other = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            other.load_state_dict(module.state_dict())
            e.model.set_submodule(name, other)
            count += 1
    assert count == len(e.model.vision.layers) * 4 + len(e.model.decoder.layers) * 4 + 2
    close("vectors", e.model(batch), before, 1e-6)


def test_every_parameter_trains(e, batch):
    e.model.requires_grad_(True).train()
    e.model(batch, normalize=False).square().sum().backward()
    for name, p in e.model.named_parameters():
        if name == "decoder.embed_tokens.weight":
            assert p.grad[batch.input_ids[:5]].abs().sum() > 0
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


# ------------------------------------------------------------------------------------------------------------ copied


@torch.no_grad()
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(e, batch, how):
    before = e.model(batch)
    other = copy.deepcopy(e.model) if how == "deepcopy" else pickle.loads(pickle.dumps(e.model))
    e.model.decoder.norm.weight.zero_()
    assert torch.equal(other(batch), before)


def in_another_process(model, batch, queue) -> None:
    with torch.no_grad():
        queue.put(model(batch).numpy())


@torch.no_grad()
def test_a_spawned_process(e, batch):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=in_another_process, args=(e.model, batch, queue))
    process.start()
    vectors = queue.get(timeout=120)
    process.join()
    assert np.abs(vectors - e.model(batch).numpy()).max() <= 1e-6


@torch.no_grad()
def test_state_dict_goes_both_ways(e, batch):
    other = VLM2Vec(e.model.config).eval()
    other.load_state_dict(e.model.state_dict())
    assert torch.equal(other(batch), e.model(batch))


def test_device_and_dtype(e):
    assert e.model.device == torch.device("cpu") and e.model.dtype == torch.float32
    assert e.model.to(torch.bfloat16).dtype == torch.bfloat16


def test_long_and_short_sequences_keep_their_own_rotations(e):
    config, n = e.model.config.decoder, 520
    assert config.original_max_position_embeddings == 512 and config.rope_scaling is not None
    positions = torch.cat([torch.arange(n), torch.arange(7)])
    together = rope_tables(positions, torch.tensor([0, n, n + 7]), config)
    for part, length in ((slice(0, n), n), (slice(n, None), 7)):
        alone = rope_tables(torch.arange(length), torch.tensor([0, length]), config)
        assert all(torch.equal(a[part], b) for a, b in zip(together, alone, strict=True))
