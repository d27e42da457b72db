"""Tests of intervals and comparisons: against scipy's bootstrap and test, and by simulation."""

import numpy as np
import pytest
from scipy import stats

from fedseg.segmentation.intervals import Difference, intervals, paired_differences
from fedseg.segmentation.metrics import add, empty_sums, summarise, sums_of_case


def cases(count: int, seed: int = 0) -> list[dict[str, float]]:
    """Sums of cases with overlap alone."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tp, fp, fn = (float(n) for n in rng.integers(1, 50, 3))
        dice = 2 * tp / (2 * tp + fp + fn)
        part = {"cases": 1.0, "liver.tp": tp, "liver.fp": fp, "liver.fn": fn}
        part |= {"liver.dice.sum": dice, "liver.dice.count": 1.0}
        part |= {"tumor.lesions.small.found": float(rng.integers(4))}
        part |= {"tumor.lesions.small.missed": float(rng.integers(4))}
        found.append({**empty_sums(), **part})
    return found


def test_interval_of_a_mean_agrees_with_scipy() -> None:
    some = cases(30)
    low, high = intervals(some, replicates=9000)["liver.dice"]
    dices = np.array([part["liver.dice.sum"] for part in some])
    wanted = stats.bootstrap(
        (dices,), np.mean, method="percentile", n_resamples=9000, rng=np.random.default_rng(5)
    ).confidence_interval
    width = high - low
    assert low == pytest.approx(wanted.low, abs=0.03 * width)
    assert high == pytest.approx(wanted.high, abs=0.03 * width)


@pytest.mark.parametrize("key", ["liver.dice.pooled", "tumor.lesion_recall"])
def test_interval_of_a_ratio_of_sums_agrees_with_scipy(key: str) -> None:
    some = cases(25)

    def statistic(chosen: np.ndarray) -> float:
        value = summarise(add(some[int(n)] for n in chosen))[key]
        assert value is not None
        return value

    low, high = intervals(some, replicates=4000)[key]
    wanted = stats.bootstrap(
        (np.arange(25),),
        statistic,
        vectorized=False,
        method="percentile",
        n_resamples=2000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    width = high - low
    assert low == pytest.approx(wanted.low, abs=0.1 * width)
    assert high == pytest.approx(wanted.high, abs=0.1 * width)


def test_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for n in range(100):
        some = [
            {**empty_sums(), "cases": 1.0, "liver.dice.sum": value, "liver.dice.count": 1.0}
            for value in rng.beta(8, 2, 40)
        ]
        low, high = intervals(some, seed=n, replicates=200)["liver.dice"]
        hits += low <= 0.8 <= high
    assert 86 <= hits <= 99


def test_intervals_are_seeded_and_need_two_cases_that_define_the_metric() -> None:
    some = cases(8)
    assert intervals(some, seed=3, replicates=50) == intervals(some, seed=3, replicates=50)
    assert intervals(some, seed=3, replicates=50) != intervals(some, seed=4, replicates=50)
    assert intervals(some[:1]) == {}
    for part in some[1:]:
        part["liver.dice.count"] = part["liver.dice.sum"] = 0.0
    assert "liver.dice" not in intervals(some, replicates=50)
    assert "tumor.lesion_recall" in intervals(some, replicates=50)
    assert "tumor.dice" not in intervals(some, replicates=50)


def test_one_case_with_lesions_has_no_interval_of_its_lesions() -> None:
    """Drawn with replacement, the one case is in a draw or not: each draw says the same."""
    truth = np.zeros((40, 12, 12), np.uint8)
    truth[2:38, 2:10, 2:10] = 1
    prediction = truth.copy()
    scans = [(prediction, truth)] * 3
    truth = truth.copy()
    truth[4:8, 4:8, 4:8] = truth[20:24, 4:8, 4:8] = 2
    prediction = prediction.copy()
    prediction[4:8, 4:8, 4:8] = 2

    def of(lesions: int) -> dict[str, tuple[float, float]]:
        chosen = [*scans, *[(prediction, truth)] * lesions]
        return intervals([sums_of_case(*scan, spacing=(1, 1, 1)) for scan in chosen])

    one, two = of(1), of(2)
    about = [key for key in two if key.startswith("tumor.lesion_")]
    assert "tumor.lesion_f1" in about and "tumor.lesion_recall_small" in about
    assert not set(about) & set(one)
    assert "tumor.lesions_false_per_scan" in one  # each scan says how many false ones it has
    assert "tumor.dice" not in one


def named(dices: list[float | None]) -> dict[str, dict[str, float]]:
    return {
        f"case-{n}": {
            **empty_sums(),
            "liver.dice.sum": dice or 0.0,
            "liver.dice.count": float(dice is not None),
        }
        for n, dice in enumerate(dices)
    }


def test_paired_difference_agrees_with_scipy() -> None:
    rng = np.random.default_rng(2)
    one = rng.uniform(0.5, 0.9, 25)
    other = one - rng.normal(0.03, 0.05, 25)
    found = paired_differences(named(list(one)), named(list(other)))["liver.dice"]
    apart = one - other
    assert found.pairs == 25
    assert found.difference == pytest.approx(apart.mean())
    assert (found.one, found.other) == pytest.approx((one.mean(), other.mean()))
    assert found.p == pytest.approx(stats.wilcoxon(one, other).pvalue)
    wanted = stats.bootstrap(
        (apart,), np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.low == pytest.approx(wanted.low, abs=0.002)
    assert found.high == pytest.approx(wanted.high, abs=0.002)


def test_only_pairs_that_both_models_define_count() -> None:
    one, other = named([0.5, 0.7, None, 0.9]), named([0.4, None, 0.3, 0.6])
    found = paired_differences(one, {**other, "more": other["case-0"]})
    assert list(found) == ["liver.dice"]
    assert found["liver.dice"].pairs == 2
    assert found["liver.dice"].difference == pytest.approx(0.2)
    assert paired_differences(one, {}) == {}


def test_one_pair_has_no_interval_and_equal_models_have_p_1() -> None:
    lone = paired_differences(named([0.5]), named([0.4]))["liver.dice"]
    assert (lone.pairs, lone.low, lone.high, lone.p) == (1, None, None, None)
    same = paired_differences(named([0.5, 0.6]), named([0.5, 0.6]))["liver.dice"]
    assert same == Difference(
        pairs=2, one=0.55, other=0.55, difference=0.0, low=0.0, high=0.0, p=1.0
    )
    assert same.to_json()["p"] == 1.0


def test_few_and_tied_pairs_raise_no_warning() -> None:
    for apart in ([0.1, 0.1], [0.1, 0.1, -0.1, 0.0], [0.25] * 9, [0.5, -0.5]):
        found = paired_differences(named([0.5 + a / 2 for a in apart]), named([0.5] * len(apart)))
        p = found["liver.dice"].p
        assert p is not None and 0 <= p <= 1


def test_real_sums_have_intervals_for_each_metric() -> None:
    rng = np.random.default_rng(0)
    some = [
        sums_of_case(*rng.integers(0, 3, (2, 6, 6, 6), dtype=np.uint8), spacing=(1, 1, 2))
        for _ in range(5)
    ]
    found = intervals(some, replicates=100)
    whole = summarise(add(some))
    assert {"liver.hd95", "tumor.nsd", "tumor.volume_error_ml", "tumor.lesion_f1"} <= set(found)
    for key, (low, high) in found.items():
        assert low <= high
        assert isinstance(whole[key], float)
