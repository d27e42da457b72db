"""Fixed point: never wraps, unbiased, exact where it says so."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.errors import ProtocolError
from fedseg.privacy.fixed_point import (
    LIMBS,
    Encoding,
    decode_numbers,
    decode_values,
    effective_weight,
    encode_numbers,
    encode_values,
)


def words_of(values: np.ndarray, weight: float, encoding: Encoding, seed: int = 0) -> np.ndarray:
    out = np.empty(len(values), np.uint32)
    encode_values(values, weight, encoding, rng=np.random.default_rng(seed), out=out)
    return out


@given(
    sites=st.integers(1, 1024),
    clip=st.floats(1e-6, 1e6),
    weight=st.floats(1e-6, 1e9),
    sign=st.sampled_from([-1.0, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_extreme_values_of_all_sites_do_not_wrap(
    sites: int, clip: float, weight: float, sign: float
) -> None:
    encoding = Encoding(sites=sites, clip=clip, max_weight=weight)
    values = np.full(3, sign * 1e30, np.float32)
    one = words_of(values, weight, encoding).view(np.int32)
    assert np.abs(one.astype(np.int64)).max() <= encoding.scale
    exact = one.astype(np.int64) * sites
    assert np.abs(exact).max() <= 2**31 - 1
    summed = (one.view(np.uint32).astype(np.uint64) * sites).astype(np.uint32)
    np.testing.assert_array_equal(summed.view(np.int32), exact)
    mean = decode_values(summed, weight * sites, encoding)
    np.testing.assert_allclose(mean, sign * clip, rtol=1e-5)


def test_rounding_is_unbiased_and_as_fine_as_promised() -> None:
    encoding = Encoding(sites=1000, clip=1e6, max_weight=100.0)
    step = 1e6 * 100 / (encoding.scale * 3)  # of one site with weight 3
    values = np.full(400_000, 0.3 * step, np.float32)
    mean = decode_values(words_of(values, 3.0, encoding), 3.0, encoding)
    assert set(np.unique(np.round(mean / step))) == {0, 1}
    deviation = step * math.sqrt(0.3 * 0.7 / len(values))
    assert abs(mean.mean(dtype=np.float64) - values[0]) < 5 * deviation


@pytest.mark.parametrize("sites", [3, 4, 10, 50])
def test_mean_is_within_the_stated_error_of_the_weighted_mean(sites: int) -> None:
    rng = np.random.default_rng(sites)
    encoding = Encoding(sites=sites, clip=0.1, max_weight=200.0)
    values = rng.normal(0, 1e-3, (sites, 50_000)).astype(np.float32)
    weights = rng.integers(1, 200, sites).astype(float)
    words = [
        words_of(v, w, encoding, seed)
        for seed, (v, w) in enumerate(zip(values, weights, strict=True))
    ]
    total = np.sum(np.array(words, np.uint64), axis=0).astype(np.uint32)
    mean = decode_values(total, weights.sum(), encoding)
    error = mean - np.average(values.astype(np.float64), axis=0, weights=weights)
    bound = math.sqrt(sites) / 2 * 0.1 * 200 / (encoding.scale * weights.sum())
    float32 = np.abs(mean).max() * 2**-24
    assert error.std() < bound + float32
    assert abs(error.mean()) < 5 * (bound + float32) / math.sqrt(len(error))


def test_clipped_values_are_counted() -> None:
    encoding = Encoding(sites=3, clip=0.5, max_weight=1.0)
    values = np.array([0.5, -0.5, 0.6, -7.0, 0.0], np.float32)
    out = np.empty(5, np.uint32)
    rng = np.random.default_rng(0)
    assert encode_values(values, 1.0, encoding, rng=rng, out=out) == 2
    found = decode_values(out, 1.0, encoding)
    np.testing.assert_allclose(found, [0.5, -0.5, 0.5, -0.5, 0], atol=1e-8)


def test_what_does_not_fit_is_refused() -> None:
    encoding = Encoding(sites=3, clip=0.5, max_weight=10.0)
    for weight in (-1.0, 10.1, math.nan, math.inf):
        with pytest.raises(ProtocolError, match="secagg-max-weight"):
            effective_weight(weight, encoding)
    for value in (math.nan, math.inf):
        with pytest.raises(ProtocolError, match="NaN"):
            words_of(np.array([value], np.float32), 1.0, encoding)
    for number in (math.nan, math.inf, 2.0**200):
        with pytest.raises(ProtocolError, match="number"):
            encode_numbers([number], encoding)
    for bad in ({"sites": 0}, {"sites": 1025}, {"clip": 0.0}, {"max_weight": math.inf}):
        with pytest.raises(ProtocolError):
            Encoding(**{"sites": 3, "clip": 0.5, "max_weight": 10.0, **bad})  # type: ignore[arg-type]
    for total in (0.0, -1.0, 31.0, math.nan):
        with pytest.raises(ProtocolError, match="weights"):
            decode_values(np.zeros(1, np.uint32), total, encoding)
    noise = np.random.default_rng(0).integers(0, 2**32, 1000, np.uint32)
    with pytest.raises(ProtocolError, match="other words"):
        decode_values(noise, 15.0, encoding)


@given(
    data=st.lists(st.floats(-(2.0**47), 2.0**47, allow_nan=False), min_size=1, max_size=60),
)
@settings(max_examples=150, deadline=None)
def test_sums_of_numbers_are_exact_to_their_fraction(data: list[float]) -> None:
    encoding = Encoding(sites=60, clip=1.0, max_weight=1.0)
    total = np.zeros(2 * LIMBS, np.uint64)
    for number in data:
        total += encode_numbers([number, 1.0], encoding)
    assert total.max() < 2**32
    found = decode_numbers(total.astype(np.uint32), ["x", "count"], encoding, summands=len(data))
    exact = sum(Fraction(round(Fraction(x) * 2**32), 2**32) for x in data)
    assert found == {"x": float(exact), "count": len(data)}


def test_sums_no_sites_can_have_sent_are_refused() -> None:
    encoding = Encoding(sites=3, clip=1.0, max_weight=1.0)
    words = np.full(LIMBS, 2**32 - 1, np.uint32)
    with pytest.raises(ProtocolError, match="larger"):
        decode_numbers(words, ["x"], encoding, summands=3)
