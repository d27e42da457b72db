"""Walk over a round's updates chunk by chunk, so that memory doesn't grow with their number."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["CHUNK", "for_each_span", "spans"]

CHUNK = 2**17
"""Most values of an update read at once: of fewer, opening the file costs more than reading."""

_ALIGNED = 2**12
"""Chunks begin at its multiples, and so at the beginning of a block of any compression scheme."""


def spans(size: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut `size` values into `[start, stop)` of about `length` values each."""
    step = max(_ALIGNED, length // _ALIGNED * _ALIGNED)
    for start in range(0, size, step):
        yield start, min(start + step, size)


def for_each_span(work: Callable[[int, int], None], size: int, *, length: int = CHUNK) -> None:
    """Call `work(start, stop)` for each chunk, one in each of torch's threads.

    Threads here and not in each operation: two wait for each other far less often. The result
    can't depend on their number, for chunks have nothing to do with one another.

    Args:
        work: Writes what it computes to where the chunk belongs.
        size: Number of values.
        length: Values of a chunk, about.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(lambda span: work(*span), spans(size, length)):
            pass
