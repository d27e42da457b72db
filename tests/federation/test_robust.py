"""Tests of robust averages against numpy, scipy and brute force; against Flower: test_reduce."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import trim_mean
from updates import spooled

from fedseg.federation.compression import SCHEMES
from fedseg.federation.robust import (
    bulyan,
    krum_choice,
    median,
    multikrum,
    network,
    trimmed_mean,
)

SIZE = 41_000


def vectors(count: int, *, size: int = SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)


@pytest.mark.parametrize("count", range(1, 12))
def test_network_sorts_what_is_wanted(count: int) -> None:
    """By the 0-1 principle: what sorts all rows of zeros and ones sorts everything."""
    rows = np.array(list(itertools.product((0, 1), repeat=count)), np.int8).T
    for wanted in ([(count - 1) // 2, count // 2], range(count // 4, count), range(count)):
        values = [row.copy() for row in rows]
        for low, high, minimum, maximum in network(count, list(wanted)):
            small, large = (
                np.minimum(values[low], values[high]),
                np.maximum(*values[low : high + 1 : high - low]),
            )
            # What isn't needed is spoilt: nothing may depend on it.
            values[low] = small if minimum else np.full_like(small, 7)
            values[high] = large if maximum else np.full_like(large, 7)
        for place in wanted:
            np.testing.assert_array_equal(values[place], np.sort(rows, axis=0)[place])


def test_network_leaves_out_what_a_median_does_not_need() -> None:
    full, middle = network(100, range(100)), network(100, [49, 50])
    assert len(middle) < 0.85 * len(full)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10, 33])
def test_median_is_numpy_s(tmp_path: Path, count: int) -> None:
    rows = vectors(count)
    found = median(spooled(tmp_path, list(rows)))
    np.testing.assert_array_equal(found, np.median(rows, axis=0))


@pytest.mark.parametrize("count", [1, 4, 5, 10, 33])
@pytest.mark.parametrize("trim", [0.0, 0.1, 0.2, 0.49])
def test_trimmed_mean_is_scipy_s(tmp_path: Path, count: int, trim: float) -> None:
    rows = vectors(count)
    found = trimmed_mean(spooled(tmp_path, list(rows)), trim=trim)
    np.testing.assert_allclose(found, trim_mean(rows.astype(float), trim), atol=1e-6)


@given(
    st.lists(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=1, max_size=9
    )
)
def test_medians_with_ties(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]]
) -> None:
    updates = spooled(tmp_path_factory.mktemp("spool"), [np.array(row) for row in rows])
    expected = np.median(np.array(rows, np.float32), axis=0)
    np.testing.assert_allclose(median(updates), expected, rtol=1e-6)


def brute_krum(rows: np.ndarray, malicious: int) -> np.ndarray:
    """Scores by the paper's words."""
    scores = []
    for one in range(len(rows)):
        apart = [((rows[one] - row) ** 2).sum() for n, row in enumerate(rows) if n != one]
        scores.append(sum(sorted(apart)[: len(rows) - malicious - 2]))
    return np.argsort(scores)


def brute_bulyan(rows: np.ndarray, malicious: int) -> np.ndarray:
    """Value by value: sort by the distance to the median, keep the nearest."""
    chosen = rows[brute_krum(rows, malicious)[: len(rows) - 2 * malicious]]
    result = []
    for values in chosen.T:
        nearest = sorted(values, key=lambda value: abs(value - np.median(values)))
        result.append(np.mean(nearest[: len(values) - 2 * malicious]))
    return np.array(result)


@pytest.mark.parametrize(("count", "malicious"), [(3, 0), (5, 1), (9, 3), (12, 2)])
def test_krum_chooses_as_the_paper_says(tmp_path: Path, count: int, malicious: int) -> None:
    rows = vectors(count, size=3000)
    order = brute_krum(rows.astype(float), malicious).tolist()
    updates = spooled(tmp_path, list(rows))
    assert krum_choice(updates, malicious=malicious, keep=count) == order
    weights = [float(n + 1) for n in range(count)]
    found = multikrum(updates, weights, malicious=malicious, keep=2)
    pair = order[:2]
    expected = np.average(rows[pair], axis=0, weights=[weights[n] for n in pair])
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("count", "malicious"), [(3, 0), (7, 1), (8, 1), (11, 2), (15, 3)])
def test_bulyan_is_the_brute_force(tmp_path: Path, count: int, malicious: int) -> None:
    rows = vectors(count, size=2000, seed=count)
    found = bulyan(spooled(tmp_path, list(rows)), malicious=malicious)
    np.testing.assert_allclose(found, brute_bulyan(rows.astype(float), malicious), atol=1e-6)


ROBUST = {
    "median": median,
    "trimmed": lambda updates: trimmed_mean(updates, trim=0.2),
    "krum": lambda updates: multikrum(updates, [1.0] * len(updates), malicious=1, keep=1),
    "multikrum": lambda updates: multikrum(updates, [1.0] * len(updates), malicious=1, keep=4),
    "bulyan": lambda updates: bulyan(updates, malicious=1),
}


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("attack", ["huge", "largest", "sign-flip", "zeros"])
def test_one_odd_update_of_seven_hardly_matters(tmp_path: Path, name: str, attack: str) -> None:
    rng = np.random.default_rng(3)
    truth = rng.standard_normal(5000)
    rows = list(truth + 0.3 * rng.standard_normal((7, 5000)))
    largest = 2.0**120 / np.abs(rows[2]).max()  # a site can't send more
    rows[2] *= {"huge": 100, "largest": largest, "sign-flip": -1, "zeros": 0}[attack]
    found = ROBUST[name](spooled(tmp_path, rows)).numpy()
    assert np.linalg.norm(found - truth) < 0.4 * np.linalg.norm(truth)


@pytest.mark.parametrize("name", ROBUST)
def test_a_robust_average_of_one_update_seven_times_is_that_update(
    tmp_path: Path, name: str
) -> None:
    row = vectors(1)[0]
    found = ROBUST[name](spooled(tmp_path, [row] * 7))
    np.testing.assert_allclose(found, row, rtol=1e-6)


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_updates_are_left_as_they_are(tmp_path: Path, name: str, scheme: str) -> None:
    updates = spooled(tmp_path, list(vectors(7) * 1e-3), scheme=scheme)
    decoded = spooled(tmp_path / "2", [update.chunk(0, SIZE).numpy() for update in updates])
    first, second = ROBUST[name](updates), ROBUST[name](updates)
    assert torch.equal(first, second)
    assert torch.equal(first, ROBUST[name](decoded))
