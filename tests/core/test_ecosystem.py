"""The plain model in other people's tools: PEFT, torchao, torch.compile, torch.export, the profiler, parametrizations.
docs/research.md has a line on each."""

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils import _pytree as pytree

from minivlm2vec import Embedder, VLM2Vec
from minivlm2vec.batch import PackedBatch
from minivlm2vec.inference import optimize
from minivlm2vec.linear import Linear
from minivlm2vec.lora import TARGETS
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.weights import save_model
from tests.support.golden import synth_image
from tests.support.helpers import close

PICTURE = Image.fromarray(synth_image(80, 60, 1))
INPUTS = ["a cat", "a text of some length " * 3, {"text": "what?", "image": PICTURE}]
# Ten numbers of tokens, of sequences, and greatest lengths; the first and two more are a single sequence.
TEN = [
    ["a cat"], ["x"], ["a", "b" * 40], ["a text " * 9, "x", "y" * 7], ["1", "22", "333", "4444"], ["a"] * 9,
    ["q" * 500], ["q" * 600, "a"], ["a b c", "d"], ["long " * 30] * 3,
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("tiny") / "m", preset="tiny", seed=5)


@pytest.fixture
def e(folder) -> Embedder:
    return Embedder.from_pretrained(folder, device="cpu", optimize=False, show_progress=False)


@pytest.fixture
def batch(e):
    return e.processor(INPUTS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------------- PEFT


def train(model: nn.Module, batch: PackedBatch, steps: int = 2) -> dict[str, nn.Parameter]:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch, normalize=False).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    return trained


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_peft_wraps_all_that_vlm2vec_adapts_trains_merges_and_saves(e, batch, folder, tmp_path, dora):
    """`get_peft_model` on the published adapter's targets: every matrix of the decoder, and the tower's attention."""
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        before = e.model(batch)
    config = peft.LoraConfig(r=2, target_modules=list(TARGETS), lora_dropout=0.0, use_dora=dora)
    model = peft.get_peft_model(e.model, config)
    adapted = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    layers = len(e.model.decoder.layers), len(e.model.vision.layers)
    assert len(adapted) == 4 * layers[0] + 2 * layers[1] and not any("projector" in n or "mlp.fc" in n for n in adapted)
    with torch.no_grad():
        close("a new adapter changes nothing", model(batch), before, 1e-5)
    trained = train(model, batch)
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        after = model(batch)
    assert (after - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "adapter")
    base = Embedder.from_pretrained(folder, device="cpu", optimize=False, show_progress=False).model
    with torch.no_grad():
        close("read by PEFT", peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(batch), after, 1e-6)
        merged = model.merge_and_unload()
        assert type(merged) is VLM2Vec
        close("merged", merged(batch), after, 1e-5)
    again = Embedder.from_pretrained(save_model(merged, tmp_path / "merged"), device="cpu", show_progress=False)
    close("saved", again.embed(again.processor(INPUTS)), after, 1e-5)


def matrices() -> list[str]:
    return ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "out_proj", "fc1", "fc2", "mlp.0", "mlp.2",
            "embed_tokens", "position_embedding"]  # fmt: skip


@pytest.mark.parametrize("target", [*matrices(), "all-linear"])
def test_peft_injects_and_trains(e, batch, target):
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        before = e.model(batch)
    targets = target if target == "all-linear" else [target]
    config = peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.0, init_lora_weights=True)
    model = peft.inject_adapter_in_model(config, e.model)
    with torch.no_grad():
        close("a new adapter changes nothing", model(batch), before, 1e-6)
    trained = train(model, batch)
    assert trained and all("lora_" in n for n in trained)
    with torch.no_grad():
        assert (model(batch) - before).abs().max() > 1e-6


# ------------------------------------------------------------------------------------------------------------- torchao


@torch.no_grad()
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_quantizes_every_matrix(e, batch, config):
    quantization = pytest.importorskip("torchao.quantization")
    before, count = e.model(batch), sum(isinstance(m, nn.Linear) for m in e.model.modules())
    quantization.quantize_(e.model, getattr(quantization, config)())
    quantized = [m for m in e.model.modules() if isinstance(m, nn.Linear) and type(m.weight) is not nn.Parameter]
    assert len(quantized) == count == 4 * len(e.model.decoder.layers) + 4 * len(e.model.vision.layers) + 2
    cosine = torch.cosine_similarity(e.model(batch), before).min()
    assert 0.98 < cosine < 1 - 1e-9
    assert torch.equal(torch.from_numpy(e.encode(INPUTS[:1])), e.model(e.processor(INPUTS[:1])))
    kept = optimize(copy.deepcopy(e.model))  # fast where it is plain; what is quantised stays as it is
    assert sum(type(getattr(m, "weight", None)) in {type(q.weight) for q in quantized} for m in kept.modules()) == count
    close("optimized", kept(batch), e.model(batch), 1e-5)


# ------------------------------------------------------------------------------------------------------- torch.compile


@torch.no_grad()
@pytest.mark.parametrize(
    ("dynamic", "shapes"),
    [(None, TEN), (None, TEN[2:] + TEN[:2]), (True, TEN)],
    ids=["one first", "several first", "dynamic"],
)
def test_compiles_to_two_graphs(e, dynamic, shapes):
    """One for a single sequence, one for several, whatever the lengths, and nothing in them reads a tensor back: the
    lengths that attention is cut by come from the host."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(e.model, fullgraph=True, dynamic=dynamic, backend=backend)
    for texts in shapes:
        batch = e.processor(texts)
        close("vectors", compiled(batch), e.model(batch), 2e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    nodes = list(graphs[-1].nodes)
    attention = [n for n in nodes if "torch_attention" in str(n.target)]
    (host,) = [n for n in nodes if n.op == "placeholder" and "host_cu_seqlens" in n.name]
    assert len(attention) == len(e.model.decoder.layers) and {n.args[3] for n in attention} == {host}
    read_back = [n for n in nodes if str(n.target) in ("item", "tolist", "nonzero", "cpu", "numpy")]
    assert not read_back or dynamic  # with dynamic=True Python's own floats, such as eps, come as tensors on the CPU


def test_attention_takes_the_hosts_lengths(e):
    """On torch the device's are never looked at: here they are wrong."""
    from minivlm2vec_kernels import ops

    q, k, v = torch.randn(3, 20, 2, 16).unbind()
    host, wrong = torch.tensor([0, 4, 20], dtype=torch.int32), torch.tensor([0, 19, 20], dtype=torch.int32)
    expected = ops.attention(q, k, v, host, 16, causal=True, backend="torch")
    got = ops.attention(q, k, v, wrong, 16, causal=True, host_cu_seqlens=host, backend="torch")
    assert torch.equal(got, expected)
    assert not torch.equal(ops.attention(q, k, v, wrong, 19, causal=True, backend="torch"), expected)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_waits_for_the_device(folder, compiled):
    e = Embedder.from_pretrained(folder, device="cuda", optimize=False, backend="torch", show_progress=False)
    model = torch.compile(e.model, fullgraph=True) if compiled else e.model
    batches = [e.processor(texts).to("cuda") for texts in (TEN[2], TEN[3], INPUTS[:2])]
    expected = [model(b).clone() for b in batches]  # compiled, and constants on the card
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = [model(b) for b in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, expected, strict=True):
        close("vectors", a, b, 1e-5)


@torch.no_grad()
def test_inductor_gives_the_same_numbers(e):
    texts = e.processor(INPUTS[:2])
    close("vectors", torch.compile(e.model, fullgraph=True)(texts), e.model(texts), 2e-6)


@torch.no_grad()
def test_compiles_with_images_once_a_set_of_grids(e, batch):
    """Their shapes are part of a graph; the texts beside them may have any length."""
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(e.model, fullgraph=True, backend="aot_eager")
    for text in ("what?", "what is this?", "a text " * 20):
        other = e.processor([*INPUTS[:2], {"text": text, "image": PICTURE}])
        close("vectors", compiled(other), e.model(other), 2e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_gradients_are_the_eager_ones(e):
    texts = e.processor(INPUTS[:2])
    e.model.requires_grad_(True)
    grads = []
    for model in (e.model, torch.compile(e.model, fullgraph=True, backend="aot_eager")):
        e.model.zero_grad()
        model(texts, normalize=False).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in e.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name, grad in grads[0].items():
        close(name, grads[1][name], grad, 1e-5 * float(grad.abs().max() + 1))


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}, {"backend": "aot_eager"}])
def test_a_fast_model_says_that_it_is_not_to_be_compiled(folder, options):
    fast = Embedder.from_pretrained(folder, device="cpu", show_progress=False)
    for part in (fast.model, fast.model.decoder.layers[0]):
        with pytest.raises(RuntimeError, match="cannot be compiled: load the model with optimize=False"):
            torch.compile(part, **options)()  # torch 2.14 asks when it is called, earlier ones before
    assert fast.encode(["a"]).shape == (1, fast.dimension)


# -------------------------------------------------------------------------------------------------------- torch.export


def exported(e: Embedder, *examples: list) -> torch.export.ExportedProgram:
    """For batches of any lengths and numbers of sequences that the examples differ in."""
    batches, shapes = [e.processor(x) for x in examples], torch.export.AdditionalInputs()
    for batch in batches:
        shapes.add((batch,))
    return torch.export.export(e.model, (batches[0],), dynamic_shapes=shapes)


@torch.no_grad()
def test_exports_a_packed_batch(e, caplog):
    """Several texts of any lengths in one program, which torch saves and loads without unpickling anything."""
    program, file = exported(e, ["a", "b" * 40], ["a cat", "x", "y" * 9]), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for run in (program.module(), torch.export.load(file).module()):
        for texts in TEN:
            batch = e.processor(texts)
            if batch.num_sequences > 1:
                close("vectors", run(batch), e.model(batch), 2e-6)
    assert "weights_only" not in caplog.text
    with pytest.raises(AssertionError, match=r"Guard failed: .*cu_seqlens"):  # a single sequence is another program
        program.module()(e.processor(["a"]))
    single = exported(e, ["a cat"], ["q" * 500]).module()
    close("one", single(e.processor(["a text"])), e.model(e.processor(["a text"])), 2e-6)


@torch.no_grad()
def test_the_export_of_the_documents(tmp_path, monkeypatch):
    section = (
        (Path(__file__).parents[2] / "docs/research.md").read_text(encoding="utf-8").partition("ecosystem's tools\n")[2]
    )
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(block, names := {"Embedder": Embedder, "torch": torch})
    e = names["e"]
    close("vectors", names["vectors"], e.model(e.processor(["a text of any length", "x"])), 2e-6)


@torch.no_grad()
def test_exports_images_of_the_same_grids(e):
    def inputs(text):
        return [{"text": text, "image": PICTURE}, "a text"]

    run, other = exported(e, inputs("what?"), inputs("what is this?")).module(), e.processor(inputs("a text " * 20))
    close("vectors", run(other), e.model(other), 2e-6)
    with pytest.raises(ValueError, match="input tree spec"):
        run(e.processor(["a", "b"]))


def test_an_exported_model_leaves_nothing_behind(folder):
    """Constants that a tracer makes are not those that the next model takes."""
    e = Embedder.from_pretrained(folder, device="cpu", optimize=False, show_progress=False, dtype=torch.float64)
    from minivlm2vec.rope import inverse_frequencies

    exported(e, ["a", "b"], ["c", "d", "e"])
    assert all(type(t) is torch.Tensor for t in inverse_frequencies(e.model.config.decoder, torch.device("cpu")))
    assert e.encode(["a"]).shape == (1, e.dimension)


def test_a_batch_is_a_pytree(batch):
    same = pytree.tree_map(lambda x: x, batch)
    assert (same.lengths, same.max_seqlen, same.grids) == (batch.lengths, batch.max_seqlen, batch.grids)
    assert all(torch.equal(a, b) for a, b in zip(*map(pytree.tree_leaves, (same, batch)), strict=True))
    shapes = pytree.tree_map(lambda x: tuple(x.shape), batch)
    assert shapes.input_ids == (batch.num_tokens,) and shapes.crops == tuple(batch.crops.shape)
    leaves, spec = pytree.tree_flatten_with_path(batch)
    assert [pytree.keystr(path) for path, _ in leaves][:2] == [".input_ids", ".position_ids"]
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


# -------------------------------------------------------------------------------------------------------- the profiler


@torch.no_grad()
def test_the_profiler_names_modules_and_counts_flops(e, batch):
    """By hooks, every module stands in the trace by its name; the FLOPs of all matrices are theirs by formula."""
    ranges, expected = [], []

    def begin(module, args, name):
        ranges.append(torch.profiler.record_function(name))
        ranges[-1].__enter__()
        if isinstance(module, Linear):
            expected.append(2 * args[0].numel() * module.out_features)

    def end(module, args, output):
        ranges.pop().__exit__(None, None, None)

    names = [name for name, _ in e.model.named_modules() if name and not name.endswith("layers")]
    for name in names:
        module = e.model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args, name=name: begin(module, args, name))
        module.register_forward_hook(end)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
        e.model(batch)
    seen = {event.key: event for event in profile.key_averages()}
    assert not set(names) - set(seen)
    assert seen["decoder.layers.0"].cpu_time_total >= seen["decoder.layers.0.self_attn"].cpu_time_total > 0
    products = sum(event.flops for key, event in seen.items() if key in ("aten::mm", "aten::addmm"))
    assert products >= sum(expected) > 0
    patches = 2 * e.model.vision.embeddings.patch_embedding.weight.numel() * seen_patches(e, batch)
    assert products == sum(expected) + patches


def seen_patches(e, batch) -> int:
    return sum(1 + h * w for h, w in batch.grids) * e.model.config.vision.patches_per_side**2


# --------------------------------------------------------------------------------------------------- parametrizations


class Symmetric(nn.Module):
    def forward(self, weight):
        return (weight + weight.T) / 2


def test_parametrizations_of_torch_train_and_come_off(e, batch, tmp_path):
    """Weight norm and one of one's own, on any matrix; taken off, the model is plain and saved as any."""
    with torch.no_grad():
        before = e.model(batch)
    places = ["decoder.layers.0.mlp.down_proj", "vision.layers.1.mlp.fc1", "projector.mlp.0"]
    for name in places:
        parametrizations.weight_norm(e.model.get_submodule(name))
    with torch.no_grad():
        close("the norm of a weight and its direction", e.model(batch), before, 1e-6)
    own = e.model.decoder.layers[1].self_attn.o_proj
    parametrize.register_parametrization(own, "weight", Symmetric())
    for name, p in e.model.named_parameters():
        p.requires_grad_("parametrizations" in name)
    assert len(train(e.model, batch)) == 2 * len(places) + 1
    with torch.no_grad():
        after = e.model(batch)
        fast = optimize(copy.deepcopy(e.model))  # plain layers alone: a parametrised one is called as before
        assert parametrize.is_parametrized(fast.decoder.layers[1].self_attn.o_proj)
        close("optimized", fast(batch), after, 1e-5)
    assert (after - before).abs().max() > 1e-4
    for name in [*places, "decoder.layers.1.self_attn.o_proj"]:
        parametrize.remove_parametrizations(e.model.get_submodule(name), "weight")
    assert torch.equal(own.weight, own.weight.T)
    again = Embedder.from_pretrained(save_model(e.model, tmp_path / "m"), device="cpu", show_progress=False)
    close("saved", again.embed(again.processor(INPUTS)), after, 1e-5)
