"""Walk over a round's updates chunk by chunk, so that memory doesn't grow with their number."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["CHUNK", "for_each_span", "over_spans", "spans"]

T = TypeVar("T")

CHUNK = 2**17
"""Most values of an update read at once: of fewer, opening the file costs more than reading."""

_ALIGNED = 2**12
"""Chunks begin at its multiples, and so at the beginning of a block of any compression scheme."""


def spans(size: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut `size` values into `[start, stop)` of about `length` values each."""
    step = max(_ALIGNED, length // _ALIGNED * _ALIGNED)
    for start in range(0, size, step):
        yield start, min(start + step, size)


def over_spans(work: Callable[[int, int], T], size: int, *, length: int = CHUNK) -> Iterator[T]:
    """Yield `work(start, stop)` of each chunk in turn; torch's number of threads work ahead.

    Threads here and not in each operation: two wait for each other far less often. The results
    can't depend on their number, for chunks have nothing to do with one another.

    Args:
        work: What is done with a chunk.
        size: Number of values.
        length: Values of a chunk, about.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield from pool.map(lambda span: work(*span), spans(size, length))


def for_each_span(work: Callable[[int, int], None], size: int, *, length: int = CHUNK) -> None:
    """Call `work(start, stop)` for each chunk: it writes what it computes to where it belongs."""
    for _ in over_spans(work, size, length=length):
        pass
