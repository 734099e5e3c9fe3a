"""Read images and label maps in background threads while the network computes."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from flowseg.config import DataConfig
from flowseg.data.datasets import Pairs
from flowseg.data.pictures import LARGE_PIXELS
from flowseg.runs.machine import cores_per_process

Loaded = TypeVar("Loaded")

# Largest number of pixels that are read ahead. An image that is being decoded takes about 6 bytes per pixel.
READ_AHEAD_PIXELS = 2**26
# Decoding is limited by the memory bandwidth before so many threads.
_MOST_THREADS = 16


def reading_threads(config: DataConfig) -> int:
    """Number of threads that read ahead: ``data.workers`` if it is set, else one per core of this process.

    With 0 the caller reads by itself.
    """
    if config.workers is not None:
        return min(_MOST_THREADS, config.workers)
    return min(_MOST_THREADS, cores_per_process())


def read_ahead(
    items: Sequence,
    load: Callable[[object], Loaded],
    pixels: Callable[[Loaded], int],
    *,
    threads: int,
    most: int,
    overlap: bool = True,
    budget: int | None = None,
    sizes: Callable[[object], int] | None = None,
) -> Iterator[Loaded]:
    """Yield ``load(item)`` for all items in order; threads load the next ones meanwhile.

    Close the iterator, for example by ``contextlib.closing``: that cancels what has not started and waits for the threads.

    Args:
        items: arguments of ``load``.
        load: called in a thread. Its exceptions are raised when the turn of the item comes.
        pixels: size of a result.
        threads: number of threads; 0: the caller loads each item at its turn.
        most: largest number of items that are loaded ahead.
        overlap: load while the caller computes. ``False``: load ``most`` items at a time, while the caller waits for them.
            That is faster if the caller computes on the same cores: its OpenMP threads wait for each other in every operation.
        budget: largest number of pixels that are loaded ahead; ``None``: ``READ_AHEAD_PIXELS``. Nothing is loaded ahead if one
            image is larger.
        sizes: size of an item before it is loaded. ``None``, or an exception: the size of the largest result so far.
    """
    if threads == 0:
        yield from map(load, items)
        return
    budget = READ_AHEAD_PIXELS if budget is None else budget
    pool = ThreadPoolExecutor(threads, thread_name_prefix="flowseg-read")
    waiting: deque[tuple[Future, int]] = deque()
    todo = deque(items)
    largest: int | None = None

    def reserved() -> int:
        """The size of the next item."""
        with contextlib.suppress(Exception):
            if sizes is not None:
                return sizes(todo[0])
        # Before the first result a single item is loaded, because its size is not known.
        return budget if largest is None else largest

    def submit_next(size: int) -> None:
        waiting.append((pool.submit(load, todo.popleft()), size))

    def taken() -> Loaded:
        nonlocal largest
        result = waiting.popleft()[0].result()
        largest = max(largest or 0, pixels(result))
        return result

    def held() -> int:
        return sum(pixels(one.result()) if one.done() and not one.exception() else size for one, size in waiting)

    def fill() -> None:
        while todo and len(waiting) < most and held() + (size := reserved()) <= budget:
            submit_next(size)

    try:
        while waiting or todo:
            if not waiting:
                submit_next(reserved())
            if not overlap and len(waiting) == 1:
                fill()
                wait([one for one, _ in waiting])
            # Keep no reference to a result: the next one is loaded before these names are bound again.
            ready = [taken()]
            if overlap:
                fill()
            yield ready.pop()
    finally:
        pool.shutdown(cancel_futures=True)


class LargeOneByOne:
    """Contexts in which threads read pairs: large images wait for each other, so memory holds one of them at a time."""

    def __init__(self, pairs: Pairs):
        # Generated scenes have no files, and all have the size of training.
        pixels = getattr(pairs, "pixels", None)
        #: Size of a pair, from the header of its file, which is read once; ``None`` if the pairs do not tell it.
        self.pixels: Callable[[int], int] | None = pixels and functools.cache(pixels)
        self._lock = threading.Lock()

    def reading(self, index: int) -> contextlib.AbstractContextManager:
        """The context in which to read a pair and reduce its image."""
        large = self.pixels is not None and self.pixels(index) > LARGE_PIXELS
        return self._lock if large else contextlib.nullcontext()
