"""Reducers: one change of the global model out of the sites' updates, read from the spool.

Each reads the updates chunk by chunk as often as it likes, so that memory is that of a model or two
whatever the number of sites, and in site order, so that its bits never depend on who came first.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from fedseg.config import StudyConfig
from fedseg.federation.mean import (
    Override,
    combined,
    fair_factors,
    shares,
    step_factors,
    undiluted,
)
from fedseg.federation.robust import bulyan, median, multikrum, trimmed_mean
from fedseg.federation.spool import SpooledUpdate

__all__ = ["REDUCERS", "Reducer", "averages_steps", "reducer_of"]

Updates = Sequence[SpooledUpdate]
Weights = Sequence[float]
Metrics = Sequence[Mapping[str, float]]
Rows = Sequence[tuple[int, int]]

Reducer = Callable[[Updates, Weights, Metrics], torch.Tensor]
"""`(updates in site order, weights, training metrics) -> change of the model`, float32 `[N]`."""


def mean(study: StudyConfig, rows: Rows) -> Reducer:
    """Weighted mean; of the rows of tumour over the sites that annotate tumour."""

    def reduce(updates: Updates, weights: Weights, metrics: Metrics) -> torch.Tensor:
        others = _annotating(rows, weights, metrics)
        overrides = [(rows, shares(other)) for other in others]
        return combined(updates, _parts(study, weights, metrics), overrides=overrides)

    return reduce


def fednova(study: StudyConfig, rows: Rows) -> Reducer:
    """Step-normalised averaging, for sites that do unequal numbers of steps."""

    def reduce(updates: Updates, weights: Weights, metrics: Metrics) -> torch.Tensor:
        steps = [site["steps"] for site in metrics]
        others = _annotating(rows, weights, metrics)
        overrides: list[Override] = [(rows, step_factors(shares(other), steps)) for other in others]
        parts = _parts(study, weights, metrics)
        return combined(updates, step_factors(parts, steps), overrides=overrides)

    return reduce


def _parts(study: StudyConfig, weights: Weights, metrics: Metrics) -> list[float]:
    """Factors of the mean; by `annotated`, sites without tumour masks add to it."""
    if study.federation.weighting != "annotated":
        return shares(weights)
    return undiluted(weights, _sees_tumor(metrics))


def _sees_tumor(metrics: Metrics) -> list[bool]:
    return [site["annotated"] > 1 for site in metrics]


def _annotating(rows: Rows, weights: Weights, metrics: Metrics) -> list[list[float]]:
    """Weights that hold for the rows of tumour: 0 for sites that don't annotate it.

    None if there are no such rows, or no site annotates tumour.
    """
    if not rows:
        return []
    found = [
        weight if sees else 0.0 for weight, sees in zip(weights, _sees_tumor(metrics), strict=True)
    ]
    return [found] if sum(found) > 0 else []


def qfedavg(study: StudyConfig, rows: Rows) -> Reducer:
    """q-FedAvg: sites with a larger loss count more."""

    def reduce(updates: Updates, weights: Weights, metrics: Metrics) -> torch.Tensor:
        factors = fair_factors(
            updates,
            [site["first_loss"] for site in metrics],
            q=study.federation.q,
            server_learning_rate=study.federation.server_learning_rate,
        )
        return combined(updates, factors)

    return reduce


def fedmedian(study: StudyConfig, rows: Rows) -> Reducer:
    """Median of each value."""
    return lambda updates, weights, metrics: median(updates)


def fedtrimmedavg(study: StudyConfig, rows: Rows) -> Reducer:
    """Mean of each value without `federation.trim` of the sites at both ends."""
    return lambda updates, weights, metrics: trimmed_mean(updates, trim=study.federation.trim)


def krum(study: StudyConfig, rows: Rows) -> Reducer:
    """The one update that is nearest to its neighbours."""
    malicious = study.federation.malicious_sites
    return lambda updates, weights, metrics: multikrum(
        updates, weights, malicious=malicious, keep=1
    )


def many_krum(study: StudyConfig, rows: Rows) -> Reducer:
    """Weighted mean of the S - f - 2 updates nearest to their neighbours.

    So many are safe (El Mhamdi et al., AggregaThor, MLSys 2019).
    """
    malicious = study.federation.malicious_sites
    return lambda updates, weights, metrics: multikrum(
        updates, weights, malicious=malicious, keep=max(1, len(updates) - malicious - 2)
    )


def bulyan_mean(study: StudyConfig, rows: Rows) -> Reducer:
    """Mean of the values nearest the median of the updates that Krum chooses."""
    malicious = study.federation.malicious_sites
    return lambda updates, weights, metrics: bulyan(updates, malicious=malicious)


REDUCERS: dict[str, Callable[[StudyConfig, Rows], Reducer]] = {
    "mean": mean,
    "fednova": fednova,
    "qfedavg": qfedavg,
    "fedmedian": fedmedian,
    "fedtrimmedavg": fedtrimmedavg,
    "krum": krum,
    "multikrum": many_krum,
    "bulyan": bulyan_mean,
}


def reducer_of(study: StudyConfig, *, tumor_rows: Rows = ()) -> Reducer:
    """Build the reducer of `federation.strategy`: the mean where it has none of its own.

    Args:
        study: The study config.
        tumor_rows: Ranges of the flat update that belong to tumour alone (see `head.tumor_rows`);
            with `federation.weighting = "annotated"` only sites that annotate tumour move them.
    """
    build = REDUCERS.get(study.federation.strategy, mean)
    if build is mean and study.train.minutes:
        # In a time budget a fast site does many steps: what counts then is its mean step.
        build = fednova
    rows = tumor_rows if study.federation.weighting == "annotated" else ()
    return build(study, rows)


def averages_steps(study: StudyConfig) -> bool:
    """Whether sites count by their mean step, so that those with more steps may move further."""
    settings = study.federation
    by_time = study.train.minutes is not None and REDUCERS.get(settings.strategy, mean) is mean
    return settings.strategy == "fednova" or settings.weighting == "inverse-steps" or by_time
