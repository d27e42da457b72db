"""Which sites mask with which: all with all up to 16 sites, a sparse graph above.

Bonawitz et al. (CCS 2017) let every pair of sites share a mask. Bell et al. (CCS 2020) show that
fewer neighbours do: a Harary graph over the sites in random order, each joined to the half of its
`degree` that comes before it on the circle and to the half that comes after.
"""

import functools
import hashlib
import math
from collections.abc import Sequence

__all__ = ["LEAST_SITES", "MOST_SITES", "degree", "holder_threshold", "neighbours", "threshold"]

LEAST_SITES, MOST_SITES = 3, 1024
"""With two sites each knows the other's update once it has the sum."""

_COMPLETE = 16
"""Up to so many sites all mask with all."""

_CORRUPT, _DROPPED = 0.2, 0.3
"""Shares of the sites that may pool what they see with the server, and that may drop out."""

_PRIVATE_BITS, _WHOLE_BITS = 40, 20
"""A sparse graph leaks with probability 2^-40 at most, and fails for lack of shares with 2^-20."""


def threshold(sites: int, share: float) -> int:
    """Fewest of a round's sites that must be left: more than `share` of them."""
    return min(sites, math.floor(share * sites + 1e-9) + 1)


def holder_threshold(holders: int, sites: int, share: float) -> int:
    """Shares that restore a secret of which each holder has one.

    More than half of the holders, so that no two disjoint groups of them restore two secrets of one
    site. Where all sites are holders it is the round's own threshold.
    """
    return threshold(holders, share if holders == sites else 0.5)


def neighbours(sites: int, seed: bytes, *, complete: bool) -> list[tuple[int, ...]]:
    """Find the neighbours of each of the sites 0 to `sites` - 1.

    Args:
        sites: Number of sites.
        seed: The order on the circle follows from it: the digest of the round's roster.
        complete: All with all, whatever the number.

    Returns:
        For each site its neighbours in rising order; never itself, always mutual.
    """
    count = sites - 1 if complete else degree(sites)
    if count == sites - 1:
        return [tuple(j for j in range(sites) if j != i) for i in range(sites)]
    order = sorted(range(sites), key=lambda i: hashlib.sha256(seed + i.to_bytes(4, "big")).digest())
    steps = [step for step in range(-count // 2, count // 2 + 1) if step]
    found: list[tuple[int, ...]] = [()] * sites
    for place, site in enumerate(order):
        found[site] = tuple(sorted(order[(place + step) % sites] for step in steps))
    return found


@functools.lru_cache(maxsize=64)
def degree(sites: int) -> int:
    """Fewest neighbours with which a graph of so many sites is safe; an even number, or all.

    With c = 20% of the sites corrupt and d = 30% dropped, drawn independently of the order, three
    things must be rare (union bounds; the first two below 2^-40 together, the last below 2^-20):
    - a site has as many corrupt neighbours as restore its secrets,
    - those that are honest and left fall apart, so that a part's own sum shows: this takes two gaps
      of half the degree each on the circle,
    - a site has too few neighbours left to restore its secrets.

    50 sites need 32 neighbours, 100 need 60, 1000 need 174: the bounds are for any 20%, so the
    saving is small for few sites.
    """
    if sites <= _COMPLETE:
        return sites - 1
    return next((k for k in range(2, sites - 1, 2) if _is_safe(sites, k)), sites - 1)


def _is_safe(sites: int, count: int) -> bool:
    corrupt, dropped = math.floor(_CORRUPT * sites), math.floor(_DROPPED * sites)
    needed = holder_threshold(count + 1, sites, 0.5)
    leaks = sites * _tail(sites - 1, corrupt, count, needed)
    bad = corrupt + dropped
    apart = math.comb(sites, 2) * math.comb(sites - count, bad - count) if bad >= count else 0
    leaks += apart / math.comb(sites, bad)
    # The site itself, the one more holder, counts as dropped.
    fails = sites * _tail(sites - 1, dropped, count, count - needed + 1)
    return leaks <= 2.0**-_PRIVATE_BITS and fails <= 2.0**-_WHOLE_BITS


def _tail(population: int, marked: int, drawn: int, least: int) -> float:
    """Probability of at least so many marked ones in a draw: the hypergeometric tail."""
    hits: Sequence[int] = range(least, min(drawn, marked) + 1)
    ways = sum(math.comb(marked, k) * math.comb(population - marked, drawn - k) for k in hits)
    return ways / math.comb(population, drawn)
