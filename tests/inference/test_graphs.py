"""Padded buckets against the model as it is, on any device; CUDA graphs against both on a card."""

import contextlib
import itertools
import threading
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlm2vec import Embedder
from minivlm2vec.inference import FusedVLM2Vec, optimize
from minivlm2vec.inference.graphs import (
    MAX_CROPS,
    MAX_TOKENS,
    Bucket,
    Crops,
    GraphedModel,
    GraphedTower,
    PaddedModel,
    Programs,
    TowerPrograms,
    bucket_of,
)
from minivlm2vec.inference.prefix import share_prefixes
from minivlm2vec.model import VLM2Vec
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.weights import empty_model
from minivlm2vec_kernels import attention
from tests.inference.test_prefix import pack
from tests.support.golden import synth_image
from tests.support.helpers import randomize

LIMIT = 512  # original_max_position_embeddings of the `tiny` sizes


@pytest.fixture(scope="module")
def e(tmp_path_factory) -> Embedder:
    folder = new_checkpoint(tmp_path_factory.mktemp("tiny") / "m", preset="tiny", seed=5)
    return Embedder.from_pretrained(folder, device="cpu", show_progress=False)


def batch_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return pack([torch.randint(1, 320, (n,), generator=generator).tolist() for n in lengths])


def poisoned(padded: PaddedModel) -> PaddedModel:
    """What earlier batches left in the buffers is as bad as can be."""
    padded.buffers.x.fill_(float("nan"))
    padded.buffers.position_ids.fill_(-(10**6))
    padded.buffers.cu_seqlens.fill_(10**6)
    return padded


# -------------------------------------------------------------------------------------------------- buckets


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_a_batch_fits_its_bucket(lengths):
    batch, T = batch_of(lengths), sum(lengths)
    bucket = bucket_of(batch, LIMIT)
    if T > MAX_TOKENS:
        assert bucket is None
        return
    assert T <= bucket.tokens <= MAX_TOKENS and bucket.tokens - T < max(32, min(T, 128))
    assert len(lengths) <= bucket.sequences <= bucket.tokens
    assert max(lengths) <= bucket.max_seqlen <= max(32, 2 * max(lengths))


def test_buckets_are_few():
    tokens, sequences, longest = [
        {getattr(bucket_of(batch_of([n]), MAX_TOKENS), f) for n in range(1, MAX_TOKENS + 1)}
        for f in ("tokens", "sequences", "max_seqlen")
    ]
    assert tokens == {32, 64, *range(128, 2049, 128)} and sequences == {1} and len(longest) == 7
    many = {bucket_of(batch_of([1] * n), LIMIT).sequences for n in range(1, 200)}
    assert many == {1, 2, 4, 8, 16, 32, 64, 128, 256}
    assert bucket_of(batch_of([30]), LIMIT) == Bucket(32, 1, 32)


def test_what_runs_as_it_is():
    same = batch_of([20] * 9, seed=0)
    same = replace(same, input_ids=same.input_ids[:20].repeat(9))
    shared = share_prefixes(same, LIMIT, weight_bound_rows=0)
    assert shared is not same
    for batch in (batch_of([]), batch_of([MAX_TOKENS + 1]), batch_of([LIMIT + 1, 3]), shared):
        assert bucket_of(batch, LIMIT) is None
    assert bucket_of(batch_of([LIMIT, 3]), LIMIT) is not None


# -------------------------------------------------------------------------------------------------- padding


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [
    [1], [32], [33], [7, 1, 3], [30] * 5, [128], [129], [1] * 70, [400, 2, 90], [LIMIT, 30, 30, 30],
], ids=str)  # fmt: skip
def test_padding_changes_no_vector(e, lengths):
    batch = batch_of(lengths)
    padded = poisoned(PaddedModel(e.model, make_at=1))
    for normalize in (True, False):
        expected = e.model(batch, normalize=normalize)
        got = padded(batch, normalize=normalize)
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert (got - expected).abs().max() <= 2e-6 * max(1.0, expected.abs().max())
    assert len(padded.programs) == 2


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=6), min_size=2, max_size=4))
@torch.inference_mode()
def test_batches_leave_nothing_behind(e, packs):
    """Through the same buffers, one after the other; a result that was handed out is not written over."""
    padded, results = poisoned(PaddedModel(e.model, make_at=1)), []
    batches = [batch_of(lengths, seed) for seed, lengths in enumerate(packs)]
    for batch in [*batches, *batches]:
        results.append(padded(batch))
    for batch, got in zip([*batches, *batches], results, strict=True):
        assert (got - e.model(batch)).abs().max() <= 2e-6


@torch.inference_mode()
def test_images_stay_outside(e):
    items = ["a cat", {"text": "what is it?", "image": Image.fromarray(synth_image(80, 60, 1))}]
    batch = e.processor(items)
    padded = poisoned(PaddedModel(e.model, make_at=1))
    assert (padded(batch) - e.model(batch)).abs().max() <= 2e-6 and len(padded.programs) == 1


@torch.inference_mode()
def test_large_batches_run_as_they_are(e):
    padded = PaddedModel(e.model, make_at=1)
    for batch in (batch_of([LIMIT + 1]), batch_of([512] * 5)):
        assert torch.equal(padded(batch), e.model(batch))
    assert not padded.programs


@torch.inference_mode()
def test_the_programs_used_last_are_kept(e):
    made = []

    class Counting(PaddedModel):
        def _make(self, run):
            made.append(1)
            run()  # as a capture does before
            return run

    padded = Counting(e.model, max_programs=2, make_at=1)
    small, middle, large = batch_of([5]), batch_of([50]), batch_of([100])
    for batch in (small, middle, small, large, small):  # `middle` is the one to go
        assert (padded(batch) - e.model(batch)).abs().max() <= 2e-6
    assert len(made) == 3 and len(padded.programs) == 2
    padded(middle)
    assert len(made) == 4 and len(padded.programs) == 2


def test_a_program_is_made_when_its_shape_comes_again(e):
    padded = PaddedModel(e.model, max_programs=2)
    small, middle, large = batch_of([5]), batch_of([50]), batch_of([100])
    for batch, programs in [(small, 0), (middle, 0), (small, 1), (middle, 2), (small, 2), (large, 2), (large, 2)]:
        assert (padded(batch) - e.model(batch)).abs().max() <= 2e-6
        assert len(padded.programs) == programs
    assert list(padded.programs) == [(bucket_of(b, LIMIT), True) for b in (small, large)]  # `middle` had to go
    padded(middle)  # and must come twice again
    assert (bucket_of(middle, LIMIT), True) not in padded.programs


def test_what_was_seen_is_bounded(e, monkeypatch):
    monkeypatch.setattr("minivlm2vec.inference.graphs.MAX_SEEN", 3)
    padded = PaddedModel(e.model)
    for n in (5, 40, 70, 200):
        padded(batch_of([n]))
    padded(batch_of([5]))
    assert not padded.programs and len(padded._seen) == 3
    padded(batch_of([200]))
    assert len(padded.programs) == 1


class Stale(PaddedModel):
    """As a graph whose weights have moved: what it gives is right in shape alone."""

    def _make(self, run):
        made = torch.roll(run(), 1, dims=1)
        return lambda: made


def test_a_program_that_is_wrong_is_dropped_for_good(e):
    padded, batch = Stale(e.model, make_at=1), batch_of([5, 3])
    with pytest.warns(UserWarning, match=r"relative error 1\.\d.*it is dropped"):
        got = padded(batch)
    assert (got - e.model(batch)).abs().max() <= 2e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (padded(batch) - e.model(batch)).abs().max() <= 2e-6
    assert not padded.programs


def test_weights_written_over_are_followed_and_moved_ones_after_recapture(e):
    model = fast(e.model.config)
    padded, batch = PaddedModel(model, make_at=1), batch_of([5])
    before = padded(batch)
    model.decoder.norm.weight.mul_(torch.linspace(1, 2, len(model.decoder.norm.weight)))
    assert (padded(batch) - model(batch)).abs().max() <= 2e-6 and (padded(batch) - before).abs().max() > 1e-3
    model.vision.graphs = TowerPrograms(model, make_at=1)
    model(with_images(model))
    assert model.vision.graphs.programs
    padded.recapture()
    assert not padded.programs and not model.vision.graphs.programs
    assert (padded(batch) - model(batch)).abs().max() <= 2e-6 and len(padded.programs) == 1


def fast(config, backend="torch", device="cpu", dtype=torch.float32, **options) -> FusedVLM2Vec:
    """With weights of its own."""
    model = randomize(empty_model(config, backend=backend).to_empty(device="cpu"), seed=7).to(device, dtype)
    return optimize(model, **{"prepack": False, "cuda_graphs": False} | options)


@torch.inference_mode()
def test_threads_take_turns(e):
    padded, batches = PaddedModel(e.model, make_at=1), [batch_of([n, 3], n) for n in (4, 9, 17, 30)]
    expected = [e.model(b) for b in batches]
    wrong = []

    def work(i):
        for _ in range(10):
            if (padded(batches[i]) - expected[i]).abs().max() > 2e-6:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


def test_programs_of_a_device_are_made_one_at_a_time(towered, monkeypatch):
    """No capture of the decoder's beside one of the tower's, which a batch that fits no bucket reaches by itself."""
    inside, most = [], []
    programs = PaddedModel(towered, make_at=1), towered.vision.graphs

    def make(self, run):
        inside.append(self)
        most.append(len(inside))
        time.sleep(0.05)
        inside.remove(self)
        return run

    monkeypatch.setattr(Programs, "_make", make)
    x = torch.randn(2, *programs[1].x.shape[1:])
    calls = [lambda: programs[0](batch_of([5, 3])), lambda: programs[1](x)]
    threads = [threading.Thread(target=call) for call in calls]
    [t.start() for t in threads], [t.join() for t in threads]
    assert most == [1, 1]


def test_kernels_take_padding(device, generator, poison_empty):
    """Attention with empty sequences, rows beyond the last, and queries without keys: in the interpreter too."""
    q, k, v = torch.randn(3, 24, 2, 32, device=device, generator=generator).unbind()
    for x in (q, k, v):
        x[20:] = float("nan")
    cu = torch.tensor([0, 3, 20, 20, 20], dtype=torch.int32, device=device)
    one_each = torch.arange(5, dtype=torch.int32, device=device)
    for causal in (True, False):
        ours, torchs = (attention(q, k, v, cu, 32, causal=causal, backend=b) for b in ("triton", "torch"))
        assert (ours[:20] - torchs[:20]).abs().max() <= 2e-6
        last = q[cu[1:].long() - 1]
        options = {"causal": causal, "cu_seqlens_q": one_each, "max_seqlen_q": 1}
        ours, torchs = (attention(last, k, v, cu, 32, **options, backend=b) for b in ("triton", "torch"))
        assert (ours - torchs).abs().max() <= 2e-6 and (ours[2:] == 0).all()


@torch.inference_mode()
def test_the_model_on_kernels_takes_padding_and_shared_prefixes(device, e):
    """The whole decoder on Triton kernels, in the interpreter without a card: in place on views, padded, pruned."""
    on_kernels, plain = (fast(e.model.config, backend, device) for backend in ("triton", "torch"))
    batch = batch_of([7, 1, 12]).to(device)
    expected = plain(batch)
    assert (on_kernels(batch) - expected).abs().max() <= 2e-6
    assert (poisoned(PaddedModel(on_kernels, make_at=1))(batch) - expected).abs().max() <= 2e-6
    alike = pack([[5, 6, 7, 8, 9], [5, 6, 7, 1], [5, 6, 7, 8, 9], [3]])
    shared = share_prefixes(alike, LIMIT, weight_bound_rows=0)
    assert len(shared.input_ids) == 8
    assert (on_kernels(shared.to(device)) - plain(alike.to(device))).abs().max() <= 2e-6


def test_graphs_need_a_card(e):
    with pytest.raises(ValueError, match="CUDA graphs need the Triton kernels on a CUDA device, got cpu"):
        GraphedModel(e.model)
    with pytest.raises(ValueError, match="CUDA graphs need the Triton kernels on a CUDA device, got cpu"):
        GraphedTower(e.model)
    with pytest.raises(ValueError, match="CUDA graphs need"):
        fast(e.model.config, cuda_graphs=True)
    assert e.model.graphs is None and e.model.vision.graphs is None  # not asked for


# -------------------------------------------------------------------------------------------------- the tower


@pytest.fixture
def towered(e) -> FusedVLM2Vec:
    """A model whose tower has programs from the first time on."""
    model = fast(e.model.config)
    model.vision.graphs = TowerPrograms(model, make_at=1)
    model.vision.graphs.x.fill_(float("nan"))
    return model


def crops_of(model: VLM2Vec, grids, seed=0):
    S, count = model.config.vision.image_size, sum(h * w for h, w in grids)
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, S, S, 3), np.uint8)), grids


@torch.inference_mode()
def test_few_crops_by_programs(towered):
    """One image, two, and the most: the same features, whatever came before; those that were handed out stay."""
    kept = []
    for seed, grids in enumerate(2 * [((1, 1),), ((2, 2),), ((1, 2), (2, 2)), ((1, 1),)]):
        crops = crops_of(towered, grids, seed)
        got, graphs = towered.vision(*crops), towered.vision.graphs
        towered.vision.graphs = None
        expected = towered.vision(*crops)
        towered.vision.graphs = graphs
        kept.append((got, expected))
    assert list(graphs.programs) == [Crops(5), Crops(8), Crops(2)] and MAX_CROPS == 8
    assert all(torch.equal(got, expected) for got, expected in kept)


@torch.inference_mode()
def test_more_crops_run_as_they_are(towered):
    assert towered.vision(*crops_of(towered, ((2, 4),))).shape[0] == 9 and not towered.vision.graphs.programs


@torch.inference_mode()
def test_a_tower_is_hooked_and_changed_before_its_programs(towered):
    """What may be changed in a fast tower lies outside: hooks fire, and new parameters are followed, in every call."""
    tower, crops = towered.vision, crops_of(towered, ((1, 1),))
    before, seen = tower(*crops), []
    for part in (tower.embeddings, tower.embeddings.patch_embedding, tower.pre_layrnorm):
        hook = part.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__) or out.flip(-1))
        changed = tower(*crops)
        hook.remove()
        assert (changed - before).abs().max() > 1e-3
    assert seen == ["VisionEmbeddings", "PatchEmbedding", "LayerNorm"]
    norm = tower.pre_layrnorm
    norm.weight = torch.nn.Parameter(norm.weight * torch.linspace(1, 2, len(norm.weight)), requires_grad=False)
    with_new, graphs = tower(*crops), tower.graphs
    tower.graphs = None
    assert torch.equal(with_new, tower(*crops)) and (with_new - before).abs().max() > 1e-3
    assert list(graphs.programs) == [Crops(2)]
    with pytest.raises(RuntimeError, match="have a part replaced"):
        tower.layers[0].mlp.fc1.weight = norm.weight


@torch.inference_mode()
def test_a_tower_that_gets_something_else_runs_as_it_is(towered):
    """Another dtype, and what is to have a gradient, as they would without programs."""
    tower = towered.vision
    x = torch.zeros(2, tower.config.num_positions, tower.config.hidden_size)
    with pytest.raises(RuntimeError, match="dtype"):
        tower.graphs(x.double())
    with torch.inference_mode(False), torch.enable_grad(), pytest.raises(RuntimeError, match="has no gradient"):
        tower.graphs(torch.zeros(x.shape, requires_grad=True) * 1)
    assert not tower.graphs.programs


def test_a_program_of_the_tower_that_is_wrong_is_dropped_for_good(towered, monkeypatch):
    monkeypatch.setattr(TowerPrograms, "_make", lambda self, run: lambda: torch.roll(run(), 1, dims=-1))
    crops = crops_of(towered, ((1, 1),))
    with pytest.warns(UserWarning, match=r"program for Crops\(count=2\).*it is dropped"):
        first = towered.vision(*crops)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(towered.vision(*crops), first)
    assert not towered.vision.graphs.programs


def test_features_may_be_used_where_gradients_are_recorded(towered):
    """They are no inference tensors: a head of one's own on the tower can be trained. Even where programs were made
    for inference."""
    weight, crops = torch.ones(towered.config.vision.hidden_size, requires_grad=True), crops_of(towered, ((1, 1),))
    with torch.inference_mode():
        towered.vision.graphs = TowerPrograms(towered, make_at=1)
        towered.vision(*crops)
    (towered.vision(*crops) * weight).sum().backward()
    assert weight.grad.isfinite().all() and list(towered.vision.graphs.programs) == [Crops(2)]


# -------------------------------------------------------------------------------------------------- on a card


@pytest.fixture(scope="module")
def on_card(e) -> FusedVLM2Vec:
    """Heads of 32, bfloat16, Triton kernels."""
    return fast(e.model.config, "triton", "cuda", torch.bfloat16)


@pytest.mark.gpu
@torch.inference_mode()
def test_gpu_graphs_equal_eager_and_the_model(on_card):
    graphed, padded = GraphedModel(on_card, make_at=1), PaddedModel(on_card, make_at=1)
    shapes = [[1], [30], [33], [7, 1, 3], [30] * 5, [128], [129], [1] * 70, [400, 2, 90], [30] * 64]
    for seed, lengths in enumerate([*shapes, *shapes]):
        batch = batch_of(lengths, seed).to("cuda")
        got = graphed(batch)
        assert torch.equal(got, padded(batch)), lengths
        assert torch.cosine_similarity(got, on_card(batch)).min() > 0.999, lengths
    assert len(graphed.programs) == len({bucket_of(batch_of(s), LIMIT) for s in shapes})


@pytest.mark.gpu
@torch.inference_mode()
def test_gpu_graphs_of_the_tower_equal_the_tower(on_card):
    graphed, tower = GraphedTower(on_card, make_at=1), on_card.vision
    shape = tower.config.num_positions, tower.config.hidden_size
    for seed, count in enumerate(2 * [2, 5, 8, 1, 3]):
        x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)
        expected = tower.layers_(x.clone())
        assert torch.cosine_similarity(graphed(x), expected, dim=-1).min() > 0.999, count
    assert len(graphed.programs) == 5


@pytest.mark.gpu
@torch.inference_mode()
def test_gpu_memory_is_bounded(on_card):
    """Twenty shapes need about as much as the largest; a second round through them needs nothing more."""
    shapes = [[n] * m for n, m in itertools.product((20, 60, 120, 250), (1, 2, 4, 6, 8))]
    largest, all_of_them = GraphedModel(on_card, make_at=1), GraphedModel(on_card, max_programs=6, make_at=1)
    before = reserved()
    largest(batch_of(shapes[-1]).to("cuda"))
    one = reserved() - before
    for lengths in shapes:
        all_of_them(batch_of(lengths).to("cuda"))
    first_round = reserved() - before - one
    for lengths in shapes:
        all_of_them(batch_of(lengths).to("cuda"))
    assert len(all_of_them.programs) == 6
    print(f"one shape {one >> 20} MiB, twenty {first_round >> 20} MiB")
    assert first_round <= 3 * max(one, 32 << 20)
    assert reserved() - before - one <= first_round + (32 << 20)


def reserved() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@pytest.mark.gpu
def test_gpu_forward_waits_for_nothing(on_card):
    """No synchronisation in the forward pass of texts and images, nor in a replay."""
    batch = batch_of([30, 7]).to("cuda")
    image = with_images(on_card).to("cuda")
    graphed, tower = GraphedModel(on_card, make_at=1), GraphedTower(on_card, make_at=1)
    crops = torch.randn_like(tower.x[:5])
    with torch.inference_mode():
        graphed(batch), tower(crops), on_card(image), on_card(batch)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            graphed(batch), tower(crops), on_card(image), on_card(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def with_images(model: VLM2Vec):
    S, m = model.config.vision.image_size, model.config.vision.merged_per_side
    n = 3 * m * m + 1 + 3 * m  # a (2, 1) grid: two crops and the global view, a separator for each row, one between
    batch = batch_of([n + 5, 9])
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, S, S, 3), np.uint8))
    return replace(batch, crops=crops, grids=((2, 1),), image_index=torch.arange(n), image_source=torch.arange(n))


@torch.inference_mode()
def test_the_batch_of_that_test_is_sound(e):
    assert e.model(with_images(e.model)).isfinite().all()


@pytest.mark.gpu
def test_gpu_embedder(e, tmp_path):
    folder = new_checkpoint(tmp_path / "m", preset="tiny", seed=5)
    options = {"device": "cuda", "dtype": torch.bfloat16, "show_progress": False, "share_prefixes": False}
    plain = Embedder.from_pretrained(folder, **options, cuda_graphs=False)
    graphed = Embedder.from_pretrained(folder, **options)
    assert plain.model.graphs is None
    texts = ["a cat", "", "x" * 700, "b" * 300, "ünïcode 🐈 text"]
    for batch_tokens in (64, 512, 16384, 64, 512, 16384):
        a, b = (x.encode(texts, batch_tokens=batch_tokens) for x in (plain, graphed))
        assert (a * b).sum(1).min() > 0.999
    assert graphed.model.graphs.programs


class Work:
    """Streams of a card that is not there, as lists of what was queued. Waiting is having what came before
    it first."""

    def __init__(self, monkeypatch, model):
        self.queues, self.current = {"first": [], "second": []}, "first"
        work = self

        class Event:
            def __init__(self, **_):
                self.after = ()

            def record(self, stream=None):
                self.after = tuple(work.queues[work.current])

        class Stream:
            def wait_event(self, event):
                work.queues[work.current] += event.after

        for name, value in {"Event": Event, "current_stream": lambda device=None: Stream(), "Stream": Stream}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
        monkeypatch.setattr("minivlm2vec.inference.graphs.can_graph", lambda model: True)


@pytest.mark.parametrize("kind, programs", [(GraphedModel, PaddedModel), (GraphedTower, TowerPrograms)])
def test_a_second_stream_waits_for_what_a_replay_still_reads(e, monkeypatch, kind, programs):
    """Each call queues its fill, its replay and its copy; the buffers are one for all streams."""
    work = Work(monkeypatch, e.model)

    class Queued(kind):
        def _make(self, run):
            return run

        def _run(self, program, key, given):
            return super()._run(lambda: work.queues[work.current].append("replay") or program(), key, given)

    plain = programs._fill
    monkeypatch.setattr(programs, "_fill", lambda *a: plain(*a) or work.queues[work.current].append("fill"))
    graphed = Queued(e.model, make_at=1)
    given = batch_of([5]) if kind is GraphedModel else torch.randn(2, *graphed.x.shape[1:])
    graphed(given)
    work.queues["first"].clear()
    graphed(given)
    work.current = "second"
    graphed(given)
    assert work.queues["first"][-2:] == ["fill", "replay"]
    assert work.queues["second"] == [*work.queues["first"], "fill", "replay"], "its fill comes after the first's replay"


def test_a_second_stream_waits_for_a_replay_whose_result_could_not_be_kept(e, monkeypatch):
    """The replay is queued by then, and writes over the buffers."""
    work = Work(monkeypatch, e.model)

    class Queued(GraphedModel):
        def _make(self, run):
            return run

    graphed = Queued(e.model, make_at=1)
    graphed(batch_of([5]))
    (key,) = graphed.programs
    program = graphed.programs[key]
    graphed.programs[key] = lambda: work.queues[work.current].append("replay") or program()
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="out of memory"):
        m.setattr(graphed, "_cut", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        graphed(batch_of([5]))
    work.current = "second"
    graphed(batch_of([5]))
    assert work.queues["second"] == ["replay", "replay"]


def test_a_capture_runs_between_what_fills_the_buffers_and_what_comes_next(e, monkeypatch):
    """It warms up on a stream of its own, on the same buffers; and a result is none of the graph's memory."""
    queues, current = {"caller": [], "capture": []}, ["caller"]

    class Stream:
        def __init__(self, name="capture"):
            self.name = name

        def wait_stream(self, other):
            queues[self.name] += queues[other.name]

        def wait_event(self, event): ...

    @contextlib.contextmanager
    def on(stream):
        before, current[0] = current[0], stream.name
        yield
        current[0] = before

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"  # others pin memory meanwhile
        before = {name: list(queue) for name, queue in queues.items()}
        yield
        queues.update(before)  # nothing ran

    class Graph:
        def replay(self):
            queues[current[0]].append("replay")

    Work(monkeypatch, e.model)
    for name, value in {"Stream": Stream, "stream": on, "graph": capture, "CUDAGraph": Graph}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(current[0]))
    monkeypatch.setattr(torch.cuda, "Event", lambda: type("Event", (), {"record": lambda self: None})())
    fill, body, outs = PaddedModel._fill, PaddedModel._body, []
    monkeypatch.setattr(PaddedModel, "_fill", lambda *a: fill(*a) or queues[current[0]].append("fill"))
    monkeypatch.setattr(
        PaddedModel, "_body", lambda *a: queues[current[0]].append("run") or outs.append(body(*a)) or outs[-1]
    )
    graphed = GraphedModel(e.model, make_at=1)
    graphed(batch_of([5]))
    assert queues["capture"] == ["fill", "run"]
    assert queues["caller"] == ["fill", "fill", "run", "fill", "replay"]
    vectors = graphed(batch_of([5]))
    assert vectors.untyped_storage().data_ptr() != outs[-1].untyped_storage().data_ptr()
