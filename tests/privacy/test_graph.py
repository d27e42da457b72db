"""Who masks with whom."""

import itertools

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components
from scipy.stats import hypergeom

from fedseg.privacy.graph import degree, holder_threshold, neighbours, threshold


@pytest.mark.parametrize("sites", [3, 4, 10, 16])
def test_few_sites_all_mask_with_all(sites: int) -> None:
    found = neighbours(sites, b"seed", complete=False)
    assert found == [tuple(j for j in range(sites) if j != i) for i in range(sites)]


@pytest.mark.parametrize("sites", [17, 18, 33, 50, 101])
def test_sparse_neighbours_are_mutual_and_as_many_as_the_degree(sites: int) -> None:
    found = neighbours(sites, b"seed", complete=False)
    assert {len(row) for row in found} == {degree(sites)} and degree(sites) < sites - 1
    for site, row in enumerate(found):
        assert list(row) == sorted(set(row)) and site not in row
        assert all(site in found[peer] for peer in row)
    assert found == neighbours(sites, b"seed", complete=False)
    assert found != neighbours(sites, b"other", complete=False)
    assert neighbours(sites, b"seed", complete=True)[0] == tuple(range(1, sites))


@pytest.mark.parametrize("sites", [17, 50, 100, 1000])
def test_degree_keeps_leaks_and_failures_rare(sites: int) -> None:
    """The bounds of the docstring, by scipy's distribution."""
    count, corrupt, dropped = degree(sites), sites // 5, 3 * sites // 10
    needed = holder_threshold(count + 1, sites, 0.6)
    assert 2 * needed > count + 1
    assert sites * hypergeom.sf(needed - 1, sites - 1, corrupt, count) < 2.0**-40
    assert sites * hypergeom.sf(count - needed, sites - 1, dropped, count) < 2.0**-20


def test_who_is_left_of_a_sparse_graph_hangs_together() -> None:
    rng = np.random.default_rng(0)
    for trial in range(200):
        rows = neighbours(50, trial.to_bytes(2, "big"), complete=False)
        left = np.sort(rng.permutation(50)[:25])
        joined = np.zeros((50, 50), bool)
        for site, row in enumerate(rows):
            joined[site, list(row)] = True
        assert connected_components(joined[np.ix_(left, left)])[0] == 1


def test_thresholds_leave_no_room_for_two_disjoint_groups() -> None:
    assert [threshold(n, 0.6) for n in (3, 4, 5, 10, 50)] == [2, 3, 4, 7, 31]
    for n, share in itertools.product(range(3, 60), (0.5, 0.6, 2 / 3, 0.9, 0.999)):
        assert share * n < threshold(n, share) + 1e-9 and threshold(n, share) <= n
        assert 2 * threshold(n, share) > n
