"""Tests of weighted sums against numpy and brute force."""

from pathlib import Path

import numpy as np
import pytest
import torch
from updates import spooled

from fedseg.federation.chunks import CHUNK
from fedseg.federation.compression import SCHEMES
from fedseg.federation.mean import (
    combined,
    fair_factors,
    shares,
    step_factors,
    undiluted,
)

SIZE = 2 * CHUNK + 4321


def vectors(count: int, *, size: int = SIZE, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_mean_is_numpy_s(tmp_path: Path, scheme: str) -> None:
    updates = spooled(tmp_path, vectors(5), scheme=scheme)
    weights = [1.0, 2.5, 0.0, 7.0, 3.0]
    exact = np.stack([update.chunk(0, SIZE).double().numpy() for update in updates])
    found = combined(updates, shares(weights))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, np.average(exact, axis=0, weights=weights), atol=1e-6)


def test_the_same_bits_whatever_the_threads(tmp_path: Path) -> None:
    updates, weights = spooled(tmp_path, vectors(4)), [1.0, 2.0, 3.0, 4.0]
    alone = combined(updates, shares(weights))
    torch.set_num_threads(3)
    try:
        assert torch.equal(combined(updates, shares(weights)), alone)
    finally:
        torch.set_num_threads(1)


def test_an_update_without_weight_is_not_read(tmp_path: Path) -> None:
    updates = spooled(tmp_path, vectors(2))
    (tmp_path / "site-001.safetensors").unlink()
    np.testing.assert_array_equal(combined(updates, shares([3.0, 0.0])), vectors(2)[0])


def test_parts_of_the_vector_may_have_other_weights(tmp_path: Path) -> None:
    given = vectors(3)
    rows = [(5, 9), (CHUNK - 2, CHUNK + 3), (SIZE - 1, SIZE)]
    found = combined(
        spooled(tmp_path, given), shares([1, 1, 2]), overrides=[(rows, shares([0, 1, 3]))]
    )
    expected = np.average(given, axis=0, weights=[1, 1, 2])
    for start, stop in rows:
        part = [vector[start:stop] for vector in given]
        expected[start:stop] = np.average(part, axis=0, weights=[0, 1, 3])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_step_normalised_averaging_is_its_formula(tmp_path: Path) -> None:
    given, weights, steps = vectors(3), np.array([1.0, 2.0, 5.0]), np.array([20.0, 10.0, 4.0])
    parts = weights / weights.sum()
    mean_steps = [vector / count for vector, count in zip(given, steps, strict=True)]
    expected = (parts @ steps) * np.average(mean_steps, axis=0, weights=weights)
    found = combined(
        spooled(tmp_path, given), step_factors(shares(weights.tolist()), steps.tolist())
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_step_normalised_averaging_of_equal_steps_is_the_mean() -> None:
    np.testing.assert_allclose(step_factors(shares([1, 2, 5]), [7, 7, 7]), [1 / 8, 2 / 8, 5 / 8])


def test_step_normalised_averaging_does_not_pull_to_who_does_more_steps() -> None:
    """Quadratics (x - c)^2 / 2 with other numbers of local steps: the mean misses the optimum."""
    centres, steps, weights = np.array([0.0, 1.0]), [50, 5], [1.0, 1.0]
    left = (1 - 0.002) ** np.array(steps)
    reached = {}
    for name, factors in (("mean", [0.5, 0.5]), ("fednova", step_factors(shares(weights), steps))):
        x = 0.0
        for _ in range(2000):
            x += float(np.dot(factors, (centres - x) * (1 - left)))
        reached[name] = x
    assert abs(reached["fednova"] - 0.5) < 0.02 < 0.3 < abs(reached["mean"] - 0.5)


def test_fair_factors_of_equal_sites_do_not_depend_on_the_updates_size(tmp_path: Path) -> None:
    for scale in (1e-6, 1.0, 1e6):
        updates = spooled(tmp_path, [scale * vector for vector in vectors(1, size=100) * 4])
        factors = fair_factors(updates, [0.7] * 4, q=0.5)
        np.testing.assert_allclose(factors, [1 / 4 / (1 + 2 * 0.5)] * 4, rtol=1e-6)


def test_fair_factors_favour_the_larger_loss(tmp_path: Path) -> None:
    updates = spooled(tmp_path, vectors(3, size=1000))
    low, middle, high = fair_factors(updates, [0.1, 0.4, 1.6], q=1.0)
    np.testing.assert_allclose([middle / low, high / middle], [4, 4], rtol=1e-6)
    np.testing.assert_allclose(fair_factors(updates, [0.1, 0.4, 1.6], q=0.0), [1 / 3] * 3)


@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_fair_factors_are_finite_where_nothing_is_lost_or_learnt(
    tmp_path: Path, loss: float
) -> None:
    updates = spooled(tmp_path, [np.zeros(10), np.zeros(10)])
    assert np.isfinite(fair_factors(updates, [loss, loss], q=0.2)).all()


def test_sites_that_see_no_tumour_add_to_the_mean_of_those_that_do() -> None:
    assert undiluted([2, 1, 3], [True, False, False]) == [1, 1 / 8, 3 / 8]  # no more than half
    assert undiluted([10, 1, 1], [True, False, False]) == [1, 0.1, 0.1]
    assert undiluted([6, 2, 2], [True, True, False]) == [0.75, 0.25, 0.25]


@pytest.mark.parametrize("complete", [True, False])
def test_where_all_annotate_the_same_it_is_the_mean(complete: bool) -> None:
    assert undiluted([1, 2, 5], [complete] * 3) == shares([1, 2, 5])
