"""Tests of what an attacker sees: exact noise, uniform words, the right sums."""

import numpy as np
import pytest
from scipy import stats

from fedseg.privacy.fixed_point import Encoding
from fedseg.privacy.views import SETTINGS, Terms, clipped, masked_words, noised_sum

TERMS = Terms(clip=0.5, noise_multiplier=2.0, word_clip=1.0)


def some_updates(values: int = 5000, sites: int = 3) -> np.ndarray:
    rng = np.random.default_rng(1)
    return (rng.normal(0, 0.02, (sites, values)) * [[1.0], [2.0], [0.1]]).astype(np.float32)


def seen(name: str, updates: np.ndarray, site: int = 0, seed: int = 0) -> np.ndarray:
    return SETTINGS[name].view(updates, site, TERMS, np.random.default_rng(seed))


def test_clipped_keeps_direction_and_shorter_vectors() -> None:
    long, _, short = some_updates()
    result = clipped(long, 0.5)
    assert np.linalg.norm(result) == pytest.approx(0.5, rel=1e-5)
    assert np.linalg.norm(result) <= 0.5
    assert np.allclose(result / np.linalg.norm(result), long / np.linalg.norm(long), atol=1e-6)
    assert np.array_equal(clipped(short, 0.5), short)


def test_noise_is_gaussian_of_zc_on_the_sum_of_clipped_updates() -> None:
    updates = some_updates(200_000)
    total = noised_sum(updates, 0.5, 2.0, np.random.default_rng(3))
    expected = np.sum(
        [u.astype(float) * min(1, 0.5 / np.linalg.norm(u)) for u in updates.astype(float)], axis=0
    )
    noise = total - expected
    assert stats.kstest(noise / (2.0 * 0.5), "norm").pvalue > 0.01
    # Standard deviation of the sum's noise: to 4 standard errors, whatever the number of sites.
    assert noise.std() == pytest.approx(1.0, rel=4 / np.sqrt(2 * 200_000))


def test_local_noise_is_that_of_a_sum_of_one_and_central_is_the_noised_mean() -> None:
    updates = some_updates()
    local = seen("local-dp", updates, 1, seed=5)
    assert np.array_equal(local, noised_sum(updates[1:2], 0.5, 2.0, np.random.default_rng(5)))
    central = seen("central-dp", updates, seed=5)
    total = noised_sum(updates, 0.5, 2.0, np.random.default_rng(5))
    assert np.allclose(central, total / 3, atol=1e-7)
    # A study of the setting's own averages what each site sends, each with noise of its own.
    mean = SETTINGS["local-dp"].mean(updates, TERMS, np.random.default_rng(5))
    assert mean.std() == pytest.approx(2.0 * 0.5 / np.sqrt(3), rel=0.05)


def test_masked_words_of_one_site_are_uniform() -> None:
    """The same update a thousand times too small for its words still gives all words alike."""
    encoding = Encoding(sites=3, clip=1.0, max_weight=1.0)
    update = np.full(1_000_000, 1e-3, np.float32)
    words = masked_words(update, encoding, np.random.default_rng(0))
    for shift in (0, 8, 16, 24):
        counts = np.bincount((words >> np.uint32(shift)) & np.uint32(255), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4
    other = masked_words(update, encoding, np.random.default_rng(1))
    assert stats.chisquare(np.bincount((words - other) >> np.uint32(24))).pvalue > 1e-4


def test_masked_words_say_nothing_of_the_update() -> None:
    updates = some_updates(100_000)
    masked = seen("secagg, one site", updates)
    correlation = np.corrcoef(masked, updates[0])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(100_000)


def test_secure_sum_is_the_mean_to_fixed_point() -> None:
    updates = some_updates()
    step = 1.0 / Encoding(sites=3, clip=1.0, max_weight=1.0).scale
    found = seen("secagg, sum", updates)
    exact = updates.mean(0, dtype=np.float64)
    rounded = np.spacing(np.abs(exact).max().astype(np.float32))  # the mean is float32
    assert np.abs(found - exact).max() < step + rounded


def test_none_and_clipping_show_the_site_itself() -> None:
    updates = some_updates()
    assert np.array_equal(seen("none", updates, 1), updates[1])
    assert np.array_equal(seen("clipping", updates, 1), clipped(updates[1], 0.5))


def test_views_change_no_update() -> None:
    updates = some_updates()
    before = updates.copy()
    for setting in SETTINGS.values():
        setting.view(updates, 0, TERMS, np.random.default_rng(0))
        setting.mean(updates, TERMS, np.random.default_rng(0))
    assert np.array_equal(updates, before)
