"""How sure a metric is: bootstrap intervals over cases, and paired comparison of two models."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

from fedseg.data.plan import REGIONS
from fedseg.segmentation.metrics import METRICS, empty_sums, summarise

__all__ = ["REPLICATES", "Difference", "intervals", "paired_differences"]

Sums = Mapping[str, float]
Interval = tuple[float, float]

REPLICATES = 2000

_PERCENTS = (2.5, 97.5)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of two models on the same cases.

    Attributes:
        pairs: Cases where both models define it.
        one: The first model's mean over these.
        other: The second's.
        difference: `one - other`.
        low: Lower end of its 95% interval; None of fewer than 2 pairs.
        high: Upper end.
        p: Of the two-sided Wilcoxon signed-rank test, not corrected for the number of metrics; None
            of fewer than 2 pairs.
    """

    pairs: int
    one: float
    other: float
    difference: float
    low: float | None
    high: float | None
    p: float | None

    def to_json(self) -> dict[str, float | int | None]:
        """As JSON values."""
        return asdict(self)


def intervals(
    cases: Sequence[Sums], *, seed: int = 0, replicates: int = REPLICATES
) -> dict[str, Interval]:
    """95% intervals of `metrics.summarise`: percentile bootstrap, cases drawn with replacement.

    With few cases they come out too narrow. A metric that fewer than 2 cases define has none, and
    replicates that leave it undefined don't count.

    Args:
        cases: Sums of each case.
        seed: Decides the draws.
        replicates: Number of draws.
    """
    if len(cases) < 2:
        return {}
    keys = list(empty_sums())
    matrix = np.array([[sums.get(key, 0.0) for key in keys] for sums in cases])
    (whole,), own, drawn = (
        [summarise(dict(zip(keys, row.tolist(), strict=True))) for row in rows]
        for rows in (matrix.sum(0)[None], matrix, _draws(matrix, seed, replicates))
    )
    wanted = [
        key
        for key, value in whole.items()
        if isinstance(value, float) and sum(case.get(key) is not None for case in own) > 1
    ]
    found = {}
    for key in wanted:
        values = [value for summary in drawn if (value := summary[key]) is not None]
        low, high = np.percentile(values, _PERCENTS)
        found[key] = (float(low), float(high))
    return found


def _draws(matrix: np.ndarray, seed: int, replicates: int) -> np.ndarray:
    """Sums `[replicates, keys]` (or means, of the same ratios) of cases drawn anew."""
    count = len(matrix)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(count, np.full(count, 1 / count), size=replicates)
    drawn: np.ndarray = times @ matrix
    return drawn


def paired_differences(
    one: Mapping[str, Sums], other: Mapping[str, Sums], *, seed: int = 0
) -> dict[str, Difference]:
    """Compare two models case by case.

    The interval is a percentile bootstrap over pairs of the mean difference. The test is
    Wilcoxon's, where equal pairs are left out (p is 1 where all are equal).

    Args:
        one: Case to its sums under the first model.
        other: The same of the second; cases that only one has are left out.
        seed: Decides the draws.

    Returns:
        `liver.dice`, ... to its difference; metrics without a pair are left out.
    """
    shared = [name for name in one if name in other]
    found = {}
    for key in (f"{region}.{metric}" for region in REGIONS for metric in METRICS):
        pairs = [
            (one[name][f"{key}.sum"], other[name][f"{key}.sum"])
            for name in shared
            if one[name][f"{key}.count"] and other[name][f"{key}.count"]
        ]
        if pairs:
            found[key] = _difference(np.array(pairs), seed)
    return found


def _difference(pairs: np.ndarray, seed: int) -> Difference:
    means = pairs.mean(0)
    apart = pairs[:, 0] - pairs[:, 1]
    low = high = p = None
    if len(pairs) > 1:
        drawn = _draws(apart[:, None], seed, REPLICATES)[:, 0] / len(pairs)
        low, high = (float(end) for end in np.percentile(drawn, _PERCENTS))
        unequal = apart[apart != 0]
        p = float(stats.wilcoxon(unequal).pvalue) if unequal.size else 1.0
    return Difference(
        pairs=len(pairs),
        one=float(means[0]),
        other=float(means[1]),
        difference=float(apart.mean()),
        low=low,
        high=high,
        p=p,
    )
