"""Split one pool of cases over simulated sites: same size, unequal size, unequal tumour load."""

from collections.abc import Callable, Sequence

import numpy as np

from fedseg.errors import DataError

__all__ = ["PARTITIONS", "partition"]

Shares = list[list[int]]


def iid(loads: Sequence[float], sites: int, alpha: float, rng: np.random.Generator) -> Shares:
    """Shuffle and deal: sizes differ by one at most."""
    order = rng.permutation(len(loads))
    return [sorted(int(i) for i in order[site::sites]) for site in range(sites)]


def size(loads: Sequence[float], sites: int, alpha: float, rng: np.random.Generator) -> Shares:
    """Unequal numbers of cases: shares drawn from a Dirichlet, at least one case a site."""
    order = rng.permutation(len(loads))
    return _cut(order, rng.dirichlet([alpha] * sites))


def dirichlet(loads: Sequence[float], sites: int, alpha: float, rng: np.random.Generator) -> Shares:
    """Unequal tumour load: Dirichlet shares within each third of the load (Hsu et al., 2019)."""
    order = np.argsort(np.asarray(loads), kind="stable")
    shares: Shares = [[] for _ in range(sites)]
    for third in np.array_split(order, 3):
        parts = _cut(rng.permutation(third), rng.dirichlet([alpha] * sites), at_least=0)
        for share, part in zip(shares, parts, strict=True):
            share.extend(part)
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
    return [sorted(share) for share in shares]


PARTITIONS: dict[str, Callable[..., Shares]] = {"iid": iid, "size": size, "dirichlet": dirichlet}


def partition(name: str, loads: Sequence[float], *, sites: int, alpha: float, seed: int) -> Shares:
    """Split cases over sites; every case goes to exactly one site, every site gets one.

    Args:
        name: iid, size or dirichlet.
        loads: Tumour volume of each case, any unit.
        sites: Number of sites.
        alpha: Concentration; smaller is more unequal.
        seed: Of the split.

    Raises:
        DataError: There are fewer cases than sites.
    """
    if len(loads) < sites:
        raise DataError(
            f"data: got {len(loads)} cases for {sites} simulated sites; expected at least one a "
            "site; lower num-supernodes"
        )
    return PARTITIONS[name](loads, sites, alpha, np.random.default_rng([seed, 7]))


def _cut(order: np.ndarray, shares: np.ndarray, *, at_least: int = 1) -> Shares:
    spare = len(order) - at_least * len(shares)
    ends = np.round(np.cumsum(shares) * spare).astype(int)
    sizes = np.diff(ends, prepend=0) + at_least
    parts = np.split(order, np.cumsum(sizes)[:-1])
    return [sorted(int(i) for i in part) for part in parts]
