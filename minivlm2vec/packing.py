"""Inputs to packs, and the work that is done ahead of the model."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
    """Yields (indices, loaded inputs) batch after batch; always has the next batch and `ahead` inputs in work."""
    order = deque(i for batch in batches for i in batch)
    futures: dict[int, Future] = {}
    for number, batch in enumerate(batches):
        coming = sum(map(len, batches[number : number + 2]))
        while order and len(futures) < max(coming, len(batch) + ahead):
            i = order.popleft()
            futures[i] = pool.submit(load, plans[i])
        items = []
        for i in batch:
            try:
                items.append(futures.pop(i).result())
            except InputError as e:
                raise e.at(i) from None
        yield batch, items


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; the next is computed in a thread while the caller is busy with one."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
