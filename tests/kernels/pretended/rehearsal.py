"""What is to happen on a card, on a pretended one:

python -m pytest -p tests.kernels.pretended.plugin tests/kernels/pretended/rehearsal.py
"""

import importlib
import re
from collections import Counter
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
import triton
from PIL import Image
from triton.runtime.errors import OutOfResources

from bench import bench_model, common, run, winners
from bench.first_hour import BENCHES
from minivlm2vec import Embedder
from minivlm2vec.config import VLM2VecConfig
from minivlm2vec.inference.graphs import GraphedModel, GraphedTower
from minivlm2vec.inference.prefix import share_prefixes
from minivlm2vec.new_checkpoint import base_config
from minivlm2vec_kernels import (
    activation_triton,
    attention_backward_triton,
    attention_triton,
    cards,
    ops,
    rms_norm_triton,
    rope_triton,
)

CONFIG = VLM2VecConfig.from_dict(base_config("full"))
LAYERS, TOWER_LAYERS = 32, 23  # of the published model, as far as they are computed
TEXT = Counter(rms_norm_kernel=2 * LAYERS, rope_kernel=LAYERS + 1, attention_kernel=LAYERS, silu_mul_kernel=LAYERS,
               pool_last_token_kernel=1)  # fmt: skip
IMAGES = Counter(image_patches_kernel=1, merge_crops_kernel=1)
CHUNK = Counter(
    layer_norm_kernel=2 * TOWER_LAYERS + 1, attention_kernel=TOWER_LAYERS, linear_quick_gelu_kernel=TOWER_LAYERS
)
FIRST_NORM = Counter(layer_norm_kernel=1)  # of the tower, before its layers


def model(dtype: torch.dtype = torch.bfloat16):
    return bench_model.fast(bench_model.random_model(CONFIG, dtype, torch.device("cuda")), "triton")


def batch(name: str):
    return bench_model.batch_of(CONFIG, bench_model.FULL[name], torch.device("cuda"))


# ------------------------------------------------------------------------------------- the published model


@pytest.mark.parametrize("name", bench_model.FULL)
@torch.inference_mode()
def test_forward(card, name):
    """Each workload of the bench: the kernels it takes, and that nothing waits or is fetched from the host."""
    m, b = model(), batch(name)
    m(b)  # constants come to the card
    card.forget()
    vectors = m(b)
    assert vectors.shape == (b.num_sequences, 3072) and vectors.dtype == torch.float32 and vectors.is_cuda
    uneven = len(set(b.lengths)) > 1  # then attention's tiles have an order, one copy from pinned memory
    assert not card.waits and card.uploads == (Counter(pinned=1) if uneven else Counter())
    assert card.operators["aten.add_.Tensor"] == 0  # biases ride along
    chunks = -(-sum(1 + h * w for h, w in b.grids) // 64)  # of crops
    assert card.kernels() == sum(chunks * [CHUNK], TEXT + IMAGES if chunks else TEXT)
    tile = attention_triton.choose_tile(96, b.max_seqlen, b.max_seqlen, True, True, torch.bfloat16)
    tiles = sum(-(-n // tile.BM) for n in b.lengths) * CONFIG.decoder.num_attention_heads
    grids = [launch.grid[0] for launch in card.launches if launch.kernel == "attention_kernel"]
    assert grids.count(tiles) >= LAYERS - 1, "no program is idle but in the last layer"


# (10, 3) is not in the table of cards. What else is, is compiled by `python -m tests.kernels.aot.every_card`.
OTHERS = [(8, 0), (9, 0), (10, 3), (12, 0), "gfx942"]


@pytest.mark.parametrize("kind", [(7, 5), *(pytest.param(k, marks=pytest.mark.slow) for k in OTHERS)], ids=str)
@torch.inference_mode()
def test_every_card(card, kind):
    """Kernels for it compile and find the shared memory that they want, for short and long sequences and images."""
    card.become(kind)
    dtype = torch.bfloat16 if card.kind.bfloat16 else torch.float16
    for name in ("a1", "d") if kind in [(8, 0), (9, 0)] else ("d",):
        assert model(dtype)(batch(name)).shape[1] == 3072
    assert set(card.kernels()) >= set(TEXT + IMAGES + CHUNK)
    if not card.kind.small:
        assert max(launch.shared for launch in card.launches) >= 48 << 10  # what is there without asking


@pytest.mark.parametrize("kind", [(7, 5), "gfx942"], ids=str)
@torch.inference_mode()
def test_cards_on_which_torch_is_taken(card, kind, recwarn):
    """By default, with one line: where there is no bfloat16, or nobody has tried. Triton where it is asked for."""
    card.become(kind)
    cards._warn.cache_clear()
    options = {"dtype": torch.bfloat16, "show_progress": False}
    e = Embedder.from_pretrained("mini", **options)
    for _ in range(3):
        assert e.encode(["a cat"]).shape == (1, e.dimension)
    said = [w for w in recwarn if "torch's own operators are taken" in str(w.message)]
    assert len(said) == 1 and not card.launches and not card.replays
    if kind == (7, 5):
        with pytest.raises(RuntimeError, match="sm_75 has no bfloat16"):
            Embedder.from_pretrained("mini", backend="triton", **options).encode(["a cat"])
        options["dtype"] = torch.float16
    asked = Embedder.from_pretrained("mini", backend="triton", **options)
    assert asked.encode(["a cat"]).shape == (1, e.dimension) and "attention_kernel" in card.kernels()


@torch.inference_mode()
def test_graphs(card):
    """A capture takes nothing from the host; a batch of a known bucket is three copies and a replay."""
    graphed, b = GraphedModel(model(), make_at=1), batch("a1")
    graphed(b)
    assert sum(launch.captured for launch in card.launches) == sum(TEXT.values())
    card.forget()
    assert graphed(b).shape == (1, 3072)
    assert card.replays == 1 and not card.launches and not card.waits and not card.uploads
    assert card.operators["aten.copy_.default"] == 3
    with_images = batch("b1")
    graphed(with_images)
    card.forget()
    graphed(with_images)
    assert card.replays == 1 and card.kernels() == CHUNK + IMAGES


@pytest.mark.parametrize("name", ["a1", "b1", "d"])
@torch.inference_mode()
def test_a_graph_of_ones_own(card, name):
    """Who captures the model gets its launches, and nothing of the host's memory: no replay and no order of tiles."""
    m, b = model(), batch(name)
    m.graphs, m.vision.graphs = GraphedModel(m, make_at=1), GraphedTower(m, make_at=1)
    m(b)
    card.forget()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        m(b)
    assert not card.replays and not card.uploads and all(launch.captured for launch in card.launches)
    assert card.kernels()["pool_last_token_kernel"] == 1


@torch.inference_mode()
def test_graphs_of_the_tower(card):
    """One image: its patches, a norm and a replay, then its merged crops; nothing of the graph waits or is fetched."""
    m, b = model(), batch("b1")
    m.vision.graphs = GraphedTower(m, make_at=1)
    m(b)
    assert Counter(launch.kernel for launch in card.launches if launch.captured) == CHUNK - FIRST_NORM
    card.forget()
    m(b)
    assert card.replays == 1 and card.kernels() == TEXT + IMAGES + FIRST_NORM
    assert not card.waits and not card.uploads
    card.forget()
    m(batch("b"))  # 160 crops
    assert card.replays == 0


@torch.inference_mode()
def test_shared_prefixes(card):
    on_host = bench_model.batch_of(CONFIG, bench_model.COMMON, torch.device("cpu"))
    shared = share_prefixes(on_host, 4096, weight_bound_rows=0).to("cuda")
    m = model()
    m(shared)
    card.forget()
    assert m(shared).shape == (shared.num_sequences, 3072)
    assert card.kernels() == TEXT and not card.waits and card.uploads == Counter(pinned=1)


@torch.inference_mode()
def test_fp8(card):
    quantised = bench_model.fast(model(), "triton", precision="fp8")
    card.forget()
    assert quantised(batch("a")).shape == (64, 3072)
    inner = LAYERS - 2  # all but the first and the last
    assert card.operators["aten._scaled_mm.default"] == card.kernels()["rms_norm_quantize_kernel"] == 2 * inner
    assert "quantize_rows_kernel" not in card.kernels() and card.kernels()["rms_norm_kernel"] == 4
    everything = bench_model.fast(model(), "triton", precision="fp8", fp8_keep=())
    card.forget()
    assert everything(batch("a1")).shape == (1, 3072)
    assert card.kernels()["rms_norm_quantize_kernel"] == card.kernels()["quantize_rows_kernel"] == 2 * LAYERS
    assert card.operators["aten._scaled_mm.default"] == 4 * LAYERS + 1  # the last layer's queries apart
    card.capability = (8, 0)
    with pytest.raises(ValueError, match=r"8\.9"):
        bench_model.fast(model(), "triton", precision="fp8")


@pytest.mark.parametrize(
    "options", [{}, {"cuda_graphs": False}, {"precision": "fp8", "dtype": torch.bfloat16}], ids=str
)
def test_embedder(card, options):
    """From pictures to vectors: all that the forward pass takes is pinned, and only the end waits."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 200, 3), np.uint8)
    inputs = ["a cat", "a text " * 30, Image.fromarray(pixels), {"text": "what is <|image_1|>?", "image": pixels}]
    e = Embedder.from_pretrained("mini", **{"dtype": torch.bfloat16} | options, show_progress=False)
    assert e.device.type == "cuda" and e.model.backend is None
    for _ in range(2):  # at the second time graphs are captured
        e.encode(inputs, batch_tokens=100)
    card.forget()
    assert e.encode(inputs, batch_tokens=100).shape == (4, e.dimension)
    assert card.waits == {"to cpu": 2}  # whether all are finite, and the vectors
    assert card.uploads["pageable"] == 1  # their order
    graphs = options.get("cuda_graphs") is not False
    assert card.replays == (3 if graphs else 0)  # two packs, and the images of one
    assert "merge_crops_kernel" in card.kernels() and ("attention_kernel" in card.kernels()) is not graphs


def test_a_capture_that_fails(card, monkeypatch):
    """By default graphs are then given up; who asks for them is told."""

    class Failing:
        def __init__(self, *_, **__): ...
        def __enter__(self): ...
        def __exit__(self, *_):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", Failing)
    options = {"dtype": torch.bfloat16, "show_progress": False}
    e = Embedder.from_pretrained("mini", **options)
    e.encode(["a cat"])
    with pytest.warns(UserWarning, match="CUDA graphs are off.*not permitted"):
        assert e.encode(["a cat"]).shape == (1, e.dimension)
    for text in ("a cat", "a text " * 30, "a text " * 30):
        assert e.encode([text]).shape == (1, e.dimension)
    assert card.replays == 0 and not e.model.graphs.programs
    strict = Embedder.from_pretrained("mini", **options, cuda_graphs=True)
    strict.encode(["a cat"])
    with pytest.raises(RuntimeError, match="not permitted"):
        strict.encode(["a cat"])


@torch.inference_mode()
def test_no_memory_for_a_capture(card, monkeypatch):
    """The vectors are there already, and are given."""
    graphed = GraphedModel(model(), make_at=1, strict=False)

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphed.buffers, "vectors", full)
    with pytest.warns(UserWarning, match="CUDA graphs are off.*out of memory"):
        assert graphed(batch("a1")).shape == (1, 3072)
    assert not graphed.enabled


# ----------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize(("H", "causal", "lengths"), [(96, True, (777, 30, 1)), (64, False, (577, 577))])
def test_backward_kernels(card, H, causal, lengths):
    """Those of the published model, called as autograd would."""
    make = {"device": "cuda", "dtype": torch.bfloat16}
    T, D = sum(lengths), 32 * H
    q, k, v = torch.zeros(T, 3 * D, **make).view(T, 3, 32, H).unbind(1)
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    call = (cu, max(lengths), causal, None, None, None)
    out, lse = attention_backward_triton.attention_with_lse(q, k, v, *call)
    gradients = attention_backward_triton.attention_backward(out, q, k, v, out, lse, *call)
    assert [g.shape for g in gradients] == [q.shape] * 3
    x, weight = torch.zeros(T, D, **make), torch.zeros(D, **make)
    dx, dweight = rms_norm_triton.rms_norm_backward(x, x, x, weight, 1e-5, True)
    assert dx.shape == x.shape and dweight.shape == weight.shape
    assert activation_triton.silu_mul_backward(x[:, : D // 2], x).shape == x.shape
    cos = torch.zeros(T, H // 2, **make)
    assert rope_triton.rope(q, k, cos, cos, True)[0].shape == q.shape
    assert len(card.kernels()) == 6 and not card.waits


# ----------------------------------------------------------------------------------------------- the bench


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """The bench with few repetitions, a tiny model with few inputs, and a folder of its own."""
    for name, value in {"REPETITIONS": 1, "FEWEST": 1, "WARM_UPS": 1, "RESULTS": tmp_path}.items():
        monkeypatch.setattr(common, name, value)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    sizes = base_config("tiny")
    sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # varlen_attn knows no groups
    monkeypatch.setattr(bench_model, "base_config", lambda preset: sizes)
    monkeypatch.setattr(bench_model, "FULL", {name: few_of(work) for name, work in bench_model.FULL.items()})
    monkeypatch.setattr(bench_model, "WARM_UPS", 1)
    monkeypatch.setattr(bench_model, "FP8_COSINE", -1)  # there are none
    plain = common.Session.run
    without = lambda self, cases: plain(self, (c for c in cases if "backward" not in c.kernel))  # noqa: E731
    monkeypatch.setattr(common.Session, "run", without)

    def call(*args: str) -> list[dict[str, str]]:
        monkeypatch.setattr("sys.argv", ["bench.run", *args])
        assert run.main() == 0
        (path,) = tmp_path.glob("*.csv")
        return list(common.read_rows(path))

    return call


def few_of(work: bench_model.Workload) -> bench_model.Workload:
    some = slice(-9, -7) if len(work.texts) > 9 else slice(None)  # one with an image in the mixed batch, one without
    return replace(work, texts=work.texts[some], grids=work.grids[some])


@pytest.mark.slow
def test_the_bench(card, quick, capsys):
    """Every case but those of gradients, with every provider that is installed."""
    rows = quick("--all")
    printed = capsys.readouterr().out
    missing = set(re.findall(r": no (.+?): \w+Error", printed))
    flex = {"FlexAttention"}  # makes its mask by vmap, which a fake tensor does not survive
    fused = {f"SDPA {kind}" for kind in ("flash", "cuDNN", "efficient")}
    asks_the_driver = fused if torch.version.cuda else set()  # where torch is built with CUDA, which of them there are
    assert missing <= flex | asks_the_driver, printed
    cases = {(r["kernel"], r["case"]) for r in rows}
    assert len(cases) > 80
    for case in cases:
        providers = {r["provider"] for r in rows if (r["kernel"], r["case"]) == case}
        ours = set() if case[0].startswith("linear (") else {"triton"}  # torch's products alone, for comparison
        assert providers >= ours | {"reference"}, (case, providers)
    peers = {
        "SDPA default",
        "varlen_attn (FA2)",
        "packed + compile",
        "bf16",
        "fp8, fast accum",
        "fp8, o_proj too",
        "two kernels",
    } | fused - asks_the_driver
    assert peers <= {r["provider"] for r in rows}


@pytest.mark.parametrize("name", [n for n in BENCHES if n != "attention_backward"])
def test_a_sweep_launches_what_it_says(card, monkeypatch, name):
    """The first candidate and the last two: their warps reach the kernel. `bench.winners` reads the name of each."""
    warps, plain = [], triton.JITFunction.run
    monkeypatch.setattr(
        triton.JITFunction, "run", lambda self, *a, **kw: warps.append(kw["num_warps"]) or plain(self, *a, **kw)
    )
    case = next(importlib.import_module(f"bench.bench_{name}").sweep(torch.device("cuda")))
    candidates = {n: call for n, call in case.build().providers.items() if re.search(r"w\d", n)}
    read = winners.settings(case.kernel, case.name, dict.fromkeys(candidates, 1.0))
    assert sum(map(len, read.values())) == len(candidates) > 2
    for provider in [*candidates][:1] + [*candidates][-2:]:
        warps.clear()
        candidates[provider]()
        assert warps == [int(re.search(r"w(\d+)", provider)[1])], provider


# ------------------------------------------------------------------------------- that it finds what is wrong


def test_it_finds_too_much_shared_memory(card):
    q, cu = torch.zeros(777, 32, 96, device="cuda", dtype=torch.bfloat16), torch.tensor([0, 777], device="cuda").int()
    tile = attention_triton.Tile(128, 128, 8, stages=8, tma=True)
    with pytest.raises(OutOfResources, match="Hardware limit: 232448"):
        attention_triton.launch(q, q, q, cu, 777, cu, 777, True, None, tile)


def test_it_finds_tensors_on_two_devices(card):
    x = torch.zeros(4, 64, device="cuda")
    with pytest.raises(RuntimeError, match="cpu"):
        x + torch.zeros(4, 64)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        rms_norm_triton.rms_norm(x, torch.zeros(64), 1e-5)


def test_it_finds_waits(card):
    x = torch.zeros(4, device="cuda")
    assert bool((x > 0).any()) and x[0].item() == 0 and x.tolist() == [0, 0, 0, 0] and len(x.nonzero()) == 0
    assert card.waits == {"item": 2, "to cpu": 1, "nonzero": 1}
    x.to("cpu", non_blocking=True)
    assert sum(card.waits.values()) == 4


@pytest.mark.parametrize(
    "forbidden",
    [lambda x: x.item(), lambda x: x.cpu(), lambda x: torch.ones(1).to("cuda"), lambda x: torch.cuda.synchronize()],
    ids=["item", "download", "upload", "synchronize"],
)
def test_it_finds_what_a_graph_cannot_hold(card, forbidden):
    x = torch.zeros(1, device="cuda")
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        forbidden(x)
    assert not card.capturing


def test_attention_asks_for_no_memory_for_its_descriptors(card):
    """Where kernels make them, a launch without an allocator fails."""
    triton.set_allocator(triton.runtime._allocation.NullAllocator())
    q = torch.zeros(777, 32, 96, device="cuda", dtype=torch.bfloat16)
    cu = torch.tensor([0, 777], device="cuda", dtype=torch.int32)
    assert attention_triton.choose_tile(96, 777, 777, True, True, q.dtype).tma
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(triton, "set_allocator")
        attention_triton.attention(q, q, q, cu, 777, True, None, None, None)
    assert card.kernels() == {"attention_kernel": 1}


def test_gradients_are_refused(card):
    with pytest.raises(NotImplementedError, match="no gradients"):
        torch.zeros(4, device="cuda").requires_grad_()
    p = torch.nn.Parameter(torch.zeros(4, 64, device="cuda"))
    assert ops.rms_norm(p, p[0], 1e-5).shape == (4, 64)


def test_a_launch_is_recorded(card):
    rms_norm_triton.rms_norm(torch.zeros(5, 64, device="cuda"), torch.zeros(64, device="cuda"), 1e-5)
    (launch,) = card.launches
    assert launch.kernel == "rms_norm_kernel" and launch.grid[0] > 0 and not launch.captured
    assert astuple(launch)[1:] == (launch.grid, launch.shared, False)
