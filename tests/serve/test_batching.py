"""The Batcher, with models made of numpy."""

import asyncio
import random
import threading
import time

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from minivlm2vec.serve.batching import Batcher, ModelError


class Item:
    """An input of some tokens; its vector is [number, tokens]."""

    def __init__(self, number: int, tokens: int = 1):
        self.number, self.tokens = number, tokens

    def __len__(self) -> int:
        return self.tokens


class Model:
    """A launch that remembers its packs. seconds: per pack; gate: packs wait for it."""

    def __init__(self, seconds: float = 0.0):
        self.packs: list[list[int]] = []
        self.tokens: list[int] = []
        self.seconds = seconds
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items):
        assert self.gate.wait(60)
        time.sleep(self.seconds)
        self.packs.append([x.number for x in items])
        self.tokens.append(sum(map(len, items)))
        return np.array([[x.number, len(x)] for x in items], np.float32)

    def pack_of(self, number: int) -> int:
        return next(n for n, pack in enumerate(self.packs) if number in pack)


def run(test, launch, **options):
    """Runs test(batcher) in an event loop, and checks that nothing is left behind."""

    async def body():
        batcher = Batcher(launch, **options)
        batcher.start()
        try:
            await asyncio.wait_for(test(batcher), 60)
        finally:
            await asyncio.wait_for(batcher.stop(), 60)
        assert batcher.waiting == (0, 0)
        assert (batcher._in_flight, batcher._preparing, batcher._requests_waiting) == (0, 0, 0)

    asyncio.run(body())


async def embed(batcher, items):
    with batcher.request() as turn:
        return await asyncio.gather(*turn.submit(items))


def test_an_answer_comes_after_its_batch_was_counted():
    counted = []

    class Slow:
        def batch(self, inputs, tokens, waits, seconds):
            time.sleep(0.05)
            counted.append((inputs, tokens, len(waits)))

    async def test(batcher):
        await embed(batcher, [Item(0, 3), Item(1, 4)])
        assert counted == [(2, 7, 2)]

    run(test, Model(), observer=Slow())


@pytest.mark.parametrize("seed", range(5))
def test_every_job_is_answered_once_within_the_budget(seed):
    rng, model = random.Random(seed), Model()
    sizes = [rng.choice([1, 3, 17, 60, 100, 250]) for _ in range(300)]

    async def test(batcher):
        async def client(numbers):
            await asyncio.sleep(rng.random() / 50)
            rows = await embed(batcher, [Item(n, sizes[n]) for n in numbers])
            assert [(int(a), int(b)) for a, b in rows] == [(n, sizes[n]) for n in numbers]

        await asyncio.gather(*(client(range(i, i + 10)) for i in range(0, 300, 10)))

    run(test, model, batch_tokens=100, max_batch_inputs=8)
    assert sorted(n for pack in model.packs for n in pack) == list(range(300))
    for pack, tokens in zip(model.packs, model.tokens, strict=True):
        assert len(pack) <= 8
        assert tokens <= 100 or len(pack) == 1


def test_a_short_request_overtakes_a_long_one():
    model = Model(seconds=0.002)

    async def test(batcher):
        batcher.rate = 10_000  # 100 tokens of a pack in 10 ms
        long = asyncio.ensure_future(embed(batcher, [Item(n, 50) for n in range(400)]))
        await asyncio.sleep(0.02)
        done = len(model.packs)
        await embed(batcher, [Item(1000, 10)])
        assert model.pack_of(1000) <= done + 3  # not behind the other 380
        assert not long.done()
        await long

    run(test, model, batch_tokens=100)


def test_a_long_job_is_not_starved_by_short_ones():
    """There are always more short jobs than fit, and every one comes after the long one."""
    model = Model(seconds=0.002)

    async def test(batcher):
        stop, number = False, iter(range(1, 10**6))

        async def client():
            while not stop:
                await embed(batcher, [Item(next(number), 10)])

        clients = [asyncio.ensure_future(client()) for _ in range(40)]  # 400 tokens for packs of 100
        await asyncio.sleep(0.05)
        before = len(model.packs)
        await embed(batcher, [Item(0, 100)])
        assert 0 < len(model.packs) - before < 500  # packs of ten short ones overtake it, but not for ever
        stop = True
        await asyncio.gather(*clients)

    run(test, model, batch_tokens=100)


def test_a_lone_client_does_not_wait():
    async def test(batcher):
        for n in range(3):
            await asyncio.wait_for(embed(batcher, [Item(n)]), 60)

    run(test, Model(), max_wait=3600)


def test_company_is_waited_for_but_not_longer_than_max_wait():
    model = Model()

    async def test(batcher):
        await asyncio.gather(*(embed(batcher, [Item(n)]) for n in range(4)))
        late = asyncio.ensure_future(embed(batcher, [Item(10)]))
        await asyncio.sleep(0.05)
        await asyncio.gather(late, *(embed(batcher, [Item(n)]) for n in (11, 12, 13)))
        assert model.packs[-1] == [10, 11, 12, 13]
        start = time.monotonic()
        await embed(batcher, [Item(20)])
        assert time.monotonic() - start > 0.15

    run(test, model, max_wait=0.2)


def test_who_still_prepares_is_waited_for():
    model = Model()

    async def test(batcher):
        with batcher.request() as slow:
            quick = asyncio.ensure_future(embed(batcher, [Item(0)]))
            await asyncio.sleep(0.05)
            assert not model.packs
            await asyncio.gather(quick, *slow.submit([Item(1)]))
        assert model.packs == [[1, 0]]  # in the order of their arrival

    run(test, model, max_wait=5)


def test_a_cancelled_job_leaves_the_queue():
    model = Model()

    async def test(batcher):
        model.gate.clear()
        first = asyncio.ensure_future(embed(batcher, [Item(0, 5)]))
        await asyncio.sleep(0.02)
        others = [asyncio.ensure_future(embed(batcher, [Item(n, 5)])) for n in (1, 2, 3)]
        await asyncio.sleep(0.02)
        assert batcher.waiting == (3, 15)
        others[1].cancel()
        await asyncio.sleep(0.02)
        assert batcher.waiting == (2, 10)
        model.gate.set()
        await asyncio.gather(first, others[0], others[2])

    run(test, model)
    assert sorted(n for pack in model.packs for n in pack) == [0, 1, 3]


@pytest.mark.parametrize("how", ["raises", "raises when finished", "gives NaN"])
def test_a_bad_input_fails_alone(how):
    def launch(items):
        bad = [x.number == 7 for x in items]
        vectors = np.array(
            [[np.nan if b and how == "gives NaN" else x.number] for x, b in zip(items, bad, strict=True)]
        )
        if any(bad) and how == "raises":
            raise RuntimeError("out of memory")

        def finish():
            if any(bad) and how == "raises when finished":
                raise RuntimeError("out of memory")
            return vectors

        return finish

    async def test(batcher):
        batcher.probe = Item(0)
        with batcher.request() as turn:
            answers = await asyncio.gather(*turn.submit([Item(n) for n in range(10)]), return_exceptions=True)
        assert [int(a[0]) for n, a in enumerate(answers) if n != 7] == [0, 1, 2, 3, 4, 5, 6, 8, 9]
        assert isinstance(answers[7], ModelError)
        assert ("NaN" if how == "gives NaN" else "out of memory") in str(answers[7])
        assert batcher.broken is None
        assert int((await embed(batcher, [Item(3)]))[0][0]) == 3  # still alive

    run(test, launch)


def test_a_model_that_fails_on_everything_is_broken():
    def launch(items):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async def test(batcher):
        batcher.probe = Item(0)
        with pytest.raises(ModelError, match="illegal memory access"):
            await embed(batcher, [Item(1)])
        assert "illegal memory access" in batcher.broken
        with pytest.raises(ModelError):
            await embed(batcher, [Item(2)])

    run(test, launch)


def test_an_error_of_the_batcher_itself_leaves_nobody_waiting():
    def launch(items):
        return np.zeros((len(items) + 1, 2), np.float32)  # not a row for each

    async def test(batcher):
        with pytest.raises(ModelError, match="died"):
            await embed(batcher, [Item(1), Item(2)])
        assert "died" in batcher.broken

    run(test, launch)


def test_the_next_full_pack_is_laid_out_while_one_computes():
    events, release = [], threading.Event()

    def launch(items):
        events.append(("launch", [x.number for x in items]))

        def finish():
            if items[0].number == 0:
                assert release.wait(10)
            events.append(("finish", [x.number for x in items]))
            return np.array([[x.number] for x in items], np.float32)

        return finish

    async def test(batcher):
        answers = asyncio.ensure_future(embed(batcher, [Item(n, 10) for n in range(5)]))
        for _ in range(400):
            if len(events) == 2:
                break
            await asyncio.sleep(0.005)
        release.set()
        assert [int(v[0]) for v in await answers] == [0, 1, 2, 3, 4]

    run(test, launch, batch_tokens=20)
    assert [e[0] for e in events] == ["launch", "launch", "finish", "finish", "launch", "finish"]


def test_stop_finishes_what_waits():
    model = Model()

    async def body():
        batcher = Batcher(model, max_wait=60)
        batcher.start()
        model.gate.clear()
        jobs = [asyncio.ensure_future(embed(batcher, [Item(n)])) for n in range(20)]
        await asyncio.sleep(0.02)
        stopped = asyncio.ensure_future(batcher.stop())
        model.gate.set()
        await asyncio.wait_for(asyncio.gather(stopped, *jobs), 60)

    asyncio.run(body())
    assert sorted(n for pack in model.packs for n in pack) == list(range(20))
