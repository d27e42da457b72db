"""Walk over a round's updates chunk by chunk, so that memory doesn't grow with their number."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from fedseg.federation.spool import SpooledUpdate

__all__ = ["CHUNK", "for_each_span", "spans", "stacks"]

CHUNK = 2**15
"""Values of an update read at once: torch computes so few in the thread that asks for them."""

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


def stacks(
    updates: Sequence[SpooledUpdate], *, values: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield `(start, stop, [S, stop - start])` over all updates at once.

    Args:
        updates: The S updates, at least one.
        values: About so many values of all updates together are in memory.
        dtype: Of the stack.

    Yields:
        The stack is one buffer, written anew each time: its reader may overwrite it, not keep it.
    """
    buffer = torch.empty(0, dtype=dtype)
    for start, stop in spans(updates[0].size, values // len(updates)):
        if buffer.numel() != len(updates) * (stop - start):
            buffer = torch.empty(len(updates), stop - start, dtype=dtype)
        for row, update in zip(buffer, updates, strict=True):
            row.copy_(update.chunk(start, stop))
        yield start, stop, buffer
