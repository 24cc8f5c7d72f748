"""Inputs to packs, and the work that is done ahead of the model."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from .errors import InputError
from .processor import Loaded, Planned

T = TypeVar("T")


def pack_by_length(lengths: Sequence[int], batch_tokens: int, batch_size: int | None = None) -> list[list[int]]:
    """Sorts inputs by length, longest first, and cuts the order into packs of at most `batch_tokens` tokens and, where
    it is given, `batch_size` inputs; an input longer than that has a pack of its own. Returns the indices of each."""
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > room or len(batches[-1]) == batch_size:
            batches.append([])
            room = batch_tokens
        batches[-1].append(i)
        room -= lengths[i]
    return batches


def load_ahead(
    plans: list[Planned], batches: list[list[int]], load: Callable, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[list[int], list[Loaded]]]:
    """Yields (indices, loaded inputs) batch after batch; always has the next batch and `ahead` inputs in work. Inputs
    of the same images are loaded once, as long as the first is not computed, and hold the same arrays."""
    order = deque(i for batch in batches for i in batch)
    futures: dict[int, Future] = {}
    loading: WeakValueDictionary[Any, Future] = WeakValueDictionary()
    for number, batch in enumerate(batches):
        coming = sum(map(len, batches[number : number + 2]))
        while order and len(futures) < max(coming, len(batch) + ahead):
            i = order.popleft()
            key = _images_key(plans[i]) if plans[i].sources else i
            future = loading.get(key)
            futures[i] = loading[key] = pool.submit(load, plans[i]) if future is None else future
        items = []
        for i in batch:
            try:
                items.append(replace(futures.pop(i).result(), planned=plans[i]))
            except InputError as e:
                raise e.at(i) from None
        yield batch, items


def _images_key(plan: Planned) -> Any:
    """What is equal where two inputs show the same images: paths and bytes by value, other images by identity."""
    sources = (x if isinstance(x, str | bytes | Path) else id(x) for x in plan.sources)
    return plan.num_crops, plan.grids, *sources


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; the next is computed in a thread while the caller is busy with one."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
