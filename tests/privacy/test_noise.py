"""The noise is Gaussian, fresh, and wide enough to reach every float."""

import numpy as np
import pytest
from scipy import stats

from fedseg.privacy.noise import add_noise, fresh_key

KEY = bytes(range(32))


def noise(size: int, deviation: float = 1.0, key: bytes | None = None) -> np.ndarray:
    values = np.zeros(size, np.float32)
    add_noise(values, deviation, key=key)
    return values


def test_it_is_gaussian_with_the_deviation_asked_for() -> None:
    drawn = noise(200_000, 3.0, KEY)
    assert stats.kstest(drawn / 3, "norm").pvalue > 0.01
    assert drawn.std() == pytest.approx(3, rel=0.01)
    # Neighbours, and the same place in neighbouring chunks, have nothing to do with one another.
    for lag in (1, 2**16):
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 0.01
    assert np.isfinite(drawn).all() and np.abs(drawn / 3).max() > 4


def test_it_is_added_to_what_is_there() -> None:
    values = np.linspace(-5, 5, 100_000, dtype=np.float32)
    before = values.copy()
    add_noise(values, 0.5, key=KEY)
    assert np.allclose(values - before, noise(100_000, 0.5, KEY), atol=1e-6)


def test_each_draw_is_fresh_unless_a_key_is_given() -> None:
    assert (noise(100, key=KEY) == noise(100, key=KEY)).all()
    assert (noise(100) != noise(100)).any()
    assert (noise(100, key=KEY) != noise(100, key=fresh_key())).any()
    # A seed that everyone knows has no part in it.
    np.random.seed(0)
    one = noise(100)
    np.random.seed(0)
    assert (noise(100) != one).any()


def test_low_bits_say_nothing_of_the_value() -> None:
    """Noise rounded to float32 before it is added would leave gaps that depend on the value."""
    one, other = np.full(300_000, 1.0, np.float32), np.full(300_000, 1.0 + 2**-20, np.float32)
    add_noise(one, 1.0, key=KEY)
    add_noise(other, 1.0, key=fresh_key())
    low = [np.bincount(v.view(np.uint32) & 15, minlength=16) for v in (one, other)]
    assert stats.chi2_contingency(np.array(low)).pvalue > 1e-3
