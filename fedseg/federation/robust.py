"""Averages that a minority of odd updates can't move far, each equal to Flower's own.

Medians and trimmed means sort every value over the sites. A sorting network does that by minima and
maxima of whole chunks, without a branch: for the numbers of sites that there are, many times faster
than sorting value by value.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedseg.federation.chunks import CHUNK, for_each_span
from fedseg.federation.gram import gram, squared_distances
from fedseg.federation.mean import combined, shares
from fedseg.federation.spool import SpooledUpdate

__all__ = ["bulyan", "krum_choice", "median", "multikrum", "network", "trimmed_mean"]

Rows = list[npt.NDArray[Any]]

_STACK = 2**23
"""Most values that all threads sort at once, of all updates together: 32 MiB."""


def median(updates: Sequence[SpooledUpdate]) -> torch.Tensor:
    """Median of each value over the sites (Yin et al., ICML 2018), float32 `[N]`."""
    middle = range((len(updates) - 1) // 2, len(updates) // 2 + 1)
    return _by_order(updates, _mean_of, wanted=middle)


def trimmed_mean(updates: Sequence[SpooledUpdate], *, trim: float) -> torch.Tensor:
    """Mean of each value without the sites at both ends (Yin et al., ICML 2018).

    Args:
        updates: S updates.
        trim: Share of the sites left out at each end, below 0.5; S times it is rounded down.

    Returns:
        The mean float32 `[N]`.
    """
    cut = int(trim * len(updates))
    return _by_order(updates, _mean_of, wanted=range(cut, len(updates) - cut))


def krum_choice(updates: Sequence[SpooledUpdate], *, malicious: int, keep: int) -> list[int]:
    """Choose the updates nearest to their neighbours (Blanchard et al., NeurIPS 2017).

    An update's score is the sum of the squared distances to the S - f - 2 that are closest to it.

    Args:
        updates: S updates, at least 2 f + 3 for the paper's guarantee.
        malicious: f, the updates that may be anything.
        keep: How many to choose.

    Returns:
        Indices, lowest score first; of equal scores the first in site order.
    """
    distances = squared_distances(gram(updates)).numpy()
    closest = max(1, len(updates) - malicious - 2)
    np.fill_diagonal(distances, np.inf)  # nobody is its own neighbour
    scores = np.sort(distances, axis=1)[:, :closest].sum(axis=1)
    return [int(i) for i in np.argsort(scores, kind="stable")[:keep]]


def multikrum(
    updates: Sequence[SpooledUpdate], weights: Sequence[float], *, malicious: int, keep: int
) -> torch.Tensor:
    """Weighted mean of the updates that Krum chooses, float32 `[N]`; Krum itself keeps one."""
    chosen = sorted(krum_choice(updates, malicious=malicious, keep=keep))
    return combined([updates[i] for i in chosen], shares([weights[i] for i in chosen]))


def bulyan(updates: Sequence[SpooledUpdate], *, malicious: int) -> torch.Tensor:
    """Of each value, the mean of those nearest the median (El Mhamdi et al., ICML 2018).

    Krum's scores choose S - 2 f updates, as in Flower (the paper repeats Krum for each); of each of
    their values the S - 4 f nearest to the median are averaged. Where two values are equally far on
    both sides, to the last bit, either may be taken, here and in Flower.

    Args:
        updates: S updates, at least 4 f + 3.
        malicious: f, the updates that may be anything.

    Returns:
        The mean float32 `[N]`.
    """
    keep = len(updates) - 2 * malicious
    chosen = sorted(krum_choice(updates, malicious=malicious, keep=keep))
    nearest = functools.partial(_nearest_mean, count=keep - 2 * malicious)
    return _by_order([updates[i] for i in chosen], nearest, wanted=range(keep))


def network(count: int, wanted: Sequence[int]) -> list[tuple[int, int, bool, bool]]:
    """Plan a sorting network: Batcher's odd-even merge sort (AFIPS 1968), without idle comparators.

    Args:
        count: Number of rows.
        wanted: Places whose values are needed; the others are left in any order.

    Returns:
        Comparators in turn: rows `i < j`, and whether their minimum (to `i`) and maximum (to `j`)
        are still needed.
    """
    needed, plan = set(wanted), []
    for low, high in reversed(_comparators(count)):
        if low in needed or high in needed:
            plan.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return plan[::-1]


def _comparators(count: int) -> list[tuple[int, int]]:
    found = []
    sorted_runs = 1
    while sorted_runs < count:
        apart = sorted_runs
        while apart >= 1:
            for first in range(apart % sorted_runs, count - apart, 2 * apart):
                for low in range(first, min(first + apart, count - apart)):
                    if low // (2 * sorted_runs) == (low + apart) // (2 * sorted_runs):
                        found.append((low, low + apart))
            apart //= 2
        sorted_runs *= 2
    return found


def _by_order(
    updates: Sequence[SpooledUpdate], reduce: Callable[[Rows], npt.NDArray[Any]], *, wanted: range
) -> torch.Tensor:
    """Sort each value over the updates; reduce the rows at the wanted places."""
    plan = network(len(updates), wanted)
    change = np.empty(updates[0].size, np.float32)

    def work(start: int, stop: int) -> None:
        rows = [np.array(update.chunk(start, stop).numpy()) for update in updates]
        spare = np.empty(stop - start, np.float32)
        for low, high, minimum, maximum in plan:
            small = np.minimum(rows[low], rows[high], out=spare) if minimum else rows[low]
            if maximum:
                np.maximum(rows[low], rows[high], out=rows[high])
            rows[low], spare = small, rows[low]
        change[start:stop] = reduce(rows[wanted.start : wanted.stop])

    # No sum runs over chunks here, so their length may go by the number of threads.
    length = _STACK // (len(updates) * torch.get_num_threads())
    for_each_span(work, len(change), length=min(CHUNK, length))
    return torch.from_numpy(change)


def _mean_of(rows: Rows) -> npt.NDArray[Any]:
    total = rows[0]
    for row in rows[1:]:
        total = np.add(total, row, out=total)
    return np.divide(total, np.float32(len(rows)), out=total)


def _nearest_mean(rows: Rows, *, count: int) -> npt.NDArray[Any]:
    """Mean of the `count` rows nearest to the median, place by place; the rows are sorted.

    These are neighbours in the order: of all runs of `count` rows the one that reaches least far
    from the median.
    """
    middle = (rows[(len(rows) - 1) // 2] + rows[len(rows) // 2]) / np.float32(2)
    result, best = np.empty_like(middle), None
    for first in range(len(rows) - count + 1):
        run = rows[first : first + count]
        reach = np.maximum(middle - run[0], run[-1] - middle)
        nearer = True if best is None else reach < best
        np.copyto(result, _mean_of([run[0].copy(), *run[1:]]), where=nearer)
        best = reach if best is None else np.minimum(best, reach)
    return result
