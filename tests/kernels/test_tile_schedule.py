"""The order of attention's tiles: what it holds, and that a kernel that follows it gives the same bits."""

import pytest
import torch

from minivlm2vec_kernels import attention, attention_triton
from minivlm2vec_kernels.attention_triton import Tile
from minivlm2vec_kernels.tile_schedule import TileSchedule
from tests.kernels.test_attention import packed

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("poison_empty")


def test_has_every_tile_once_the_longest_sequence_first():
    tiles = TileSchedule([30, 200, 0, 64]).tiles(64, CPU)
    assert tiles.dtype == torch.int32
    assert tiles.tolist() == [
        [30, 200, 30, 200, 0],
        [30, 200, 30, 200, 1],
        [30, 200, 30, 200, 2],
        [30, 200, 30, 200, 3],
        [230, 64, 230, 64, 0],
        [0, 30, 0, 30, 0],
    ]


def test_fewer_queries_than_keys_are_ordered_by_keys():
    tiles = TileSchedule([30, 200], [30, 1]).tiles(16, CPU)
    assert tiles.tolist() == [[30, 1, 30, 200, 0], [0, 30, 0, 30, 0], [0, 30, 0, 30, 1]]


def test_tiles_are_made_once():
    schedule = TileSchedule([30, 200])
    assert schedule.tiles(64, CPU) is schedule.tiles(64, CPU)
    assert schedule.tiles(64, CPU) is not schedule.tiles(32, CPU)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_lengths", [None, [1, 20, 0, 1, 40]])
def test_same_bits_with_a_schedule(q_lengths, causal, tma, generator):
    lengths = [17, 33, 0, 1, 40]
    q, k, v, cu_q, cu_k = packed(lengths, 2, 1, 32, torch.float16, generator, q_lengths)
    most_q, tile = max(q_lengths or lengths), Tile(16, 16, 4, 2, tma)

    def run(schedule):
        return attention_triton.launch(q, k, v, cu_k, 40, cu_q, most_q, causal, None, tile, schedule=schedule)

    assert torch.equal(run(TileSchedule(lengths, q_lengths)), run(None))


def test_no_program_is_idle(generator, monkeypatch):
    grids = []
    kernel = attention_triton.attention_kernel

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    q, k, v, cu, _ = packed([1, 100, 1, 1], 2, 2, 32, torch.float16, generator)
    monkeypatch.setattr(attention_triton, "attention_kernel", Recorded())
    for schedule in (None, TileSchedule([1, 100, 1, 1])):
        attention_triton.launch(q, k, v, cu, 100, cu, 100, True, None, Tile(32, 32, 4, 2), schedule=schedule)
    assert grids == [(4 * 2 * 4,), ((4 + 3) * 2,)]


def test_of_no_queries(generator):
    q, k, v, cu, _ = packed([0, 0], 2, 2, 64, torch.float16, generator)
    schedule = TileSchedule([0, 0])
    assert attention(q, k, v, cu, 0, causal=True, schedule=schedule, backend="triton").shape == (0, 2, 64)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_op_takes_one(backend, generator):
    q, k, v, cu, _ = packed([20, 1, 40], 2, 2, 32, torch.float32, generator)
    with_one = attention(q, k, v, cu, 40, causal=True, schedule=TileSchedule([20, 1, 40]), backend=backend)
    assert torch.equal(with_one, attention(q, k, v, cu, 40, causal=True, backend=backend))


def test_a_gradient_takes_no_schedule(generator):
    q, k, v, cu, _ = packed([40, 1], 1, 1, 32, torch.float32, generator)
    q = q.clone().requires_grad_()
    attention(q, k, v, cu, 40, causal=True, schedule=TileSchedule([40, 1]), backend="triton").sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_another_packs_schedule_is_refused(generator):
    q, k, v, cu, _ = packed([40, 1], 1, 1, 32, torch.float32, generator)
    for lengths, longest, said in (
        ([40], 40, "of 1 sequences, cu_seqlens of 2"),
        ([41, 1], 41, "of 42 queries and 42 keys, q has 41"),
        ([40, 1], 8, "sequences of 40 queries and 40 keys, max_seqlen is 8 and 8"),
    ):
        for backend in ("triton", "torch"):
            with pytest.raises(ValueError, match=said):
                attention(q, k, v, cu, longest, causal=True, schedule=TileSchedule(lengths), backend=backend)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([-5, 50], "from 0 on and below 2.31 together"),
        ([2**31, 5], "from 0 on and below 2.31 together"),
        ([2.7, 3.2], "whole numbers"),
    ],
)
def test_lengths_that_cannot_be_are_refused(lengths, said):
    with pytest.raises(ValueError, match=said):
        TileSchedule(lengths)
    with pytest.raises(ValueError, match=said):
        TileSchedule([1, 1], lengths)


def test_lengths_that_are_changed_later_change_nothing():
    lengths = [5, 40]
    schedule = TileSchedule(lengths)
    lengths[1] = 400
    assert schedule.tiles(64, CPU).tolist() == TileSchedule([5, 40]).tiles(64, CPU).tolist()


def test_as_many_queries_as_keys():
    with pytest.raises(ValueError, match="2 sequences of keys but 1 of queries"):
        TileSchedule([40, 1], [40])
