"""Shared prefixes: the same vectors from fewer rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlm2vec import Embedder
from minivlm2vec.batch import PackedBatch, cumulative
from minivlm2vec.inference import FusedVLM2Vec, optimize
from minivlm2vec.inference.prefix import SharedBatch, pays, share_prefixes
from minivlm2vec.model import VLM2Vec
from minivlm2vec.new_checkpoint import new_checkpoint
from minivlm2vec.weights import empty_model
from tests.support.golden import synth_image
from tests.support.helpers import randomize

ALWAYS = {"weight_bound_rows": 0, "smallest_share": 0.0}
INSTRUCTION = "Find me an everyday image that matches the given caption: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("tiny") / "m", preset="tiny", seed=5)


@pytest.fixture(scope="module")
def e(folder) -> Embedder:
    """Two query heads on one key-value head, three layers, original_max_position_embeddings 512."""
    return Embedder.from_pretrained(folder, device="cpu", show_progress=False, share_prefixes=False)


@pytest.fixture(scope="module", params=[2, 1], ids=["mha", "gqa"])
def model(request, e) -> VLM2Vec:
    config = e.model.config
    config = replace(config, decoder=replace(config.decoder, num_key_value_heads=request.param))
    return optimize(randomize(empty_model(config).to_empty(device="cpu"), seed=7), prepack=False)


def pack(texts: list[list[int]]) -> PackedBatch:
    none = torch.empty(0, dtype=torch.int64)
    ids = torch.tensor([t for text in texts for t in text], dtype=torch.int64)
    lengths = [len(t) for t in texts]
    positions = torch.cat([torch.arange(n) for n in [0, *lengths]])
    return PackedBatch(ids, positions, cumulative(lengths), tuple(lengths), none, (), none, none)


def distinct_beginnings(texts: list[list[int]]) -> int:
    """What a pack needs at least, said in another way: every distinct beginning once, and for a text that is there
    already its last token again, as each has a row of its own to be pooled."""
    beginnings = {tuple(t[: i + 1]) for t in texts for i in range(len(t))}
    return len(beginnings) + len(texts) - len({tuple(t) for t in texts})


TEXTS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=12), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS)
def test_every_distinct_beginning_is_there_once(texts):
    batch, rows = pack(texts), distinct_beginnings(texts)
    shared = share_prefixes(batch, 512, **ALWAYS)
    assert len(shared.input_ids) == rows
    if rows == len(batch.input_ids):
        assert shared is batch
        return
    assert isinstance(shared, SharedBatch) and shared.lengths == batch.lengths
    assert torch.equal(shared.input_ids[shared.key_index], batch.input_ids)
    assert torch.equal(shared.position_ids[shared.key_index], batch.position_ids)
    assert shared.cu_seqlens_q.diff().tolist() == list(shared.row_lengths) and min(shared.row_lengths) >= 1
    last_rows = shared.key_index[batch.cu_seqlens[1:].long() - 1]
    assert torch.equal(last_rows, shared.cu_seqlens_q[1:].long() - 1)


@settings(max_examples=30, deadline=None)
@given(texts=TEXTS)
@torch.inference_mode()
def test_vectors_are_the_same(model, texts):
    batch = pack(texts)
    shared = share_prefixes(batch, 512, **ALWAYS)
    assert (model(shared) - model(batch)).abs().max() <= 2e-6


@pytest.mark.parametrize("texts", [
    [[1, 2, 3]] * 4,
    [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2], [1]],
    [[5, *range(10, 60)], [9], [5, *range(10, 40), 7], [8, 1, 1], [8, 1, 2], [5, *range(10, 40), 7]],
], ids=["identical", "one-begins-another", "several-groups"])  # fmt: skip
@torch.inference_mode()
def test_all_tokens_too(model, texts):
    """What `hidden_states` gives, and vectors that are not normalised."""
    batch = pack(texts)
    shared = share_prefixes(batch, 512, **ALWAYS)
    assert len(shared.input_ids) < len(batch.input_ids)
    for normalize in (True, False):
        a, b = model(shared, normalize=normalize), model(batch, normalize=normalize)
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()
    kept, expected = model.hidden_states(shared, [0, -1]), model.hidden_states(batch, [0, -1])
    for layer, x in expected.items():
        assert (kept[layer] - x).abs().max() <= 2e-6 * x.abs().max()


class Scaled(torch.nn.Embedding):
    pass


@pytest.mark.parametrize("change", ["hook", "pre-hook", "class"])
def test_embeddings_that_may_look_further_are_not_shared(folder, change):
    e = Embedder.from_pretrained(folder, device="cpu", show_progress=False)
    items = [e.load(e.plan(INSTRUCTION + x)) for x in ("a" * 9, "b" * 9, "c" * 9, "d" * 9)]
    assert isinstance(e.prepare(items), SharedBatch)
    table = e.model.decoder.embed_tokens
    if change == "class":
        table.__class__ = Scaled
    else:
        register = table.register_forward_hook if change == "hook" else table.register_forward_pre_hook
        handle = register(lambda *args: None)
    assert not isinstance(e.prepare(items), SharedBatch)
    if change != "class":
        handle.remove()
        assert isinstance(e.prepare(items), SharedBatch)


def test_only_causal_attention_can_share(e):
    model = empty_model(e.model.config).to_empty(device="cpu")
    model.causal = False
    assert not optimize(model).sharing


@torch.inference_mode()
def test_long_sequences_and_images_take_no_part(e):
    """A long text has other rotations, an image's places are 0 in all inputs; both stay whole beside sharing ones."""
    image = {"text": "<|image_1|>\nwhat is it?", "image": Image.fromarray(synth_image(80, 60, 0))}
    other = image | {"image": Image.fromarray(synth_image(80, 60, 1))}
    items = [INSTRUCTION + "a", image, "x" * 700, INSTRUCTION + "b", other, "x" * 700, INSTRUCTION]
    batch = e.processor(items)
    shared = share_prefixes(batch, 512, **ALWAYS)
    for i in (1, 2, 4, 5):
        assert shared.row_lengths[i] == batch.lengths[i] and sorted(shared.row_lengths)[0] == 1
    assert len(batch.input_ids) - len(shared.input_ids) >= 2 * len(INSTRUCTION)
    assert (e.model(shared) - e.model(batch)).abs().max() <= 2e-6


def test_work_is_saved(e, monkeypatch):
    """Rows that pass through the decoder: with a common instruction, the instruction's once."""
    rows = []
    embed = FusedVLM2Vec.embed
    monkeypatch.setattr(FusedVLM2Vec, "embed", lambda self, b: rows.append(len(b.input_ids)) or embed(self, b))
    items = [INSTRUCTION + chr(97 + i) * 8 for i in range(16)]
    try:
        e.model.sharing = True
        shared = e.encode(items)
        e.model.sharing = False
        whole = e.encode(items)
    finally:
        e.model.sharing = False
    n = len(e.plan(INSTRUCTION))
    assert rows[1] - rows[0] == 15 * n, rows
    assert np.abs(shared - whole).max() <= 2e-6


def test_on_by_default(folder):
    assert Embedder.from_pretrained(folder, device="cpu", show_progress=False).model.sharing


@pytest.mark.parametrize("tokens, rows, expected", [
    (1920, 1164, True),  # 64 queries of 30 tokens, 12 of them in common
    (1920, 1900, False),  # one percent is less than the gathers cost
    (240, 120, False),  # reading the weights takes longer than either
    (300, 120, True),
    (300, 300, False),
])  # fmt: skip
def test_when_it_pays(tokens, rows, expected):
    assert pays(tokens, rows, 256, 1 / 16) is expected


@pytest.mark.parametrize("tokens, rows, replayed, expected", [
    (16348, 328, False, True),  # 268 texts of 61 tokens, 60 in common: 600 rows' time instead of 16,348
    (1800, 207, True, True),
    (300, 192, True, False),  # one replay against 330 launches
    (300, 192, False, False),  # bound by launches either way
    (720, 320, True, True),
])  # fmt: skip
def test_when_it_pays_where_launches_take_as_long_as_600_rows(tokens, rows, replayed, expected):
    assert pays(tokens, rows, 256, 1 / 16, 600, replayed) is expected


class Graphs:
    def __init__(self, takes: bool):
        self.takes = lambda batch: takes


@pytest.mark.parametrize("kind, graphs, shared", [
    ("cuda", Graphs(True), False), ("cuda", Graphs(False), False), ("cuda", None, False), ("cpu", None, True),
], ids=["replayed", "too large for a graph", "without graphs", "cpu"])  # fmt: skip
def test_a_pack_shares_where_launches_leave_a_gain(folder, monkeypatch, kind, graphs, shared):
    """Ten queries of 30 tokens, 12 in common, are bound by launches."""
    model = Embedder.from_pretrained(folder, device="cpu", show_progress=False).model
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device(kind)))
    monkeypatch.setitem(model.__dict__, "graphs", graphs)
    few, many = (pack([[*range(12), *(100 + i,) * 18] for i in range(n)]) for n in (10, 64))
    common = pack([[*range(200), *(250 + i,) * 40] for i in range(3)])  # 720 tokens in 320 rows
    assert isinstance(model.prepare(common), SharedBatch)
    assert isinstance(model.prepare(many), SharedBatch)
    assert isinstance(model.prepare(few), SharedBatch) is shared


def test_what_does_not_pay_stays_as_it_is():
    batch = pack([[1, 2, 3, 4]] * 8)
    assert share_prefixes(batch, 512) is batch
    batch = pack([[i + 1, *range(200)] for i in range(9)])
    assert share_prefixes(batch, 512, **ALWAYS) is batch
    assert share_prefixes(pack([]), 512, **ALWAYS).lengths == ()
