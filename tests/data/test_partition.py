"""Tests of splitting cases over simulated sites."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.data.partition import PARTITIONS, partition
from fedseg.errors import DataError


@pytest.mark.parametrize("name", PARTITIONS)
@settings(max_examples=40, deadline=None)
@given(
    cases=st.integers(1, 60),
    sites=st.integers(1, 12),
    alpha=st.floats(0.05, 100),
    seed=st.integers(0, 1000),
)
def test_every_case_goes_to_one_site_and_every_site_gets_one(
    name: str, cases: int, sites: int, alpha: float, seed: int
) -> None:
    loads = list(np.random.default_rng(seed).exponential(1, cases))
    if cases < sites:
        with pytest.raises(DataError, match=f"got {cases} cases for {sites} simulated sites"):
            partition(name, loads, sites=sites, alpha=alpha, seed=seed)
        return
    shares = partition(name, loads, sites=sites, alpha=alpha, seed=seed)
    assert len(shares) == sites
    assert min(map(len, shares)) >= 1
    assert sorted(i for share in shares for i in share) == list(range(cases))
    assert shares == [sorted(share) for share in shares]
    assert shares == partition(name, loads, sites=sites, alpha=alpha, seed=seed)


def split(name: str, *, seed: int, alpha: float = 0.3) -> tuple[list[list[int]], np.ndarray]:
    loads = np.random.default_rng(seed).exponential(1, 60)
    return partition(name, list(loads), sites=4, alpha=alpha, seed=seed), loads


@pytest.mark.parametrize("name", PARTITIONS)
def test_the_seed_matters(name: str) -> None:
    loads = [float(i) for i in range(30)]
    ways = {str(partition(name, loads, sites=3, alpha=1.0, seed=seed)) for seed in range(5)}
    assert len(ways) == 5


def test_iid_shares_are_equal_and_size_shares_are_not() -> None:
    for seed in range(20):
        sizes = [len(share) for share in split("iid", seed=seed)[0]]
        assert max(sizes) - min(sizes) <= 1
    spreads = [np.ptp([len(share) for share in split("size", seed=s)[0]]) for s in range(20)]
    assert np.mean(spreads) > 20
    calm = [
        np.ptp([len(share) for share in split("size", seed=s, alpha=500)[0]]) for s in range(20)
    ]
    assert np.mean(calm) < 5


def load_spread(name: str, alpha: float) -> float:
    """Mean over seeds of how much the sites' mean tumour load a case differs."""
    spreads = []
    for seed in range(40):
        shares, loads = split(name, seed=seed, alpha=alpha)
        spreads.append(np.std([loads[share].mean() for share in shares]))
    return float(np.mean(spreads))


def test_dirichlet_makes_the_tumour_load_unequal() -> None:
    equal = load_spread("iid", 0.2)
    assert load_spread("dirichlet", 0.2) > 1.6 * equal
    assert load_spread("dirichlet", 1000.0) < 1.3 * equal


def test_equal_loads_are_fine() -> None:
    shares = partition("dirichlet", [0.0] * 9, sites=9, alpha=0.1, seed=0)
    assert sorted(share[0] for share in shares) == list(range(9))
