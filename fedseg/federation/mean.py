"""Weighted sums of updates: the mean, step-normalised averaging and q-FedAvg."""

from collections.abc import Sequence

import torch

from fedseg.federation.chunks import for_each_span
from fedseg.federation.gram import squared_norms
from fedseg.federation.spool import SpooledUpdate

__all__ = [
    "Override",
    "combined",
    "fair_factors",
    "shares",
    "step_factors",
    "undiluted",
]

Override = tuple[Sequence[tuple[int, int]], Sequence[float]]
"""Ranges `[start, stop)` of the flat vector, and the weights or factors that hold there."""

_LEAST_LOSS = 1e-10
"""Added to a loss before a power of it is taken; Flower's number."""


def combined(
    updates: Sequence[SpooledUpdate],
    factors: Sequence[float],
    *,
    overrides: Sequence[Override] = (),
) -> torch.Tensor:
    """Sum the updates, each times its factor, in float32 and in the order given.

    Memory is one model and a chunk for any number of updates; an update whose factor is 0 isn't
    read.

    Args:
        updates: S updates of one size, in site order: the sum's last bits depend on it.
        factors: S numbers.
        overrides: Other factors for parts of the vector.

    Returns:
        The sum float32 `[N]`.
    """
    total = torch.empty(updates[0].size)
    for_each_span(lambda start, stop: _sum(total, updates, factors, start, stop), len(total))
    for ranges, other in overrides:
        for start, stop in ranges:
            _sum(total, updates, other, start, stop)
    return total


def _sum(
    total: torch.Tensor,
    updates: Sequence[SpooledUpdate],
    factors: Sequence[float],
    start: int,
    stop: int,
) -> None:
    part = total[start:stop].zero_()
    for update, factor in zip(updates, factors, strict=True):
        if factor:
            part.add_(update.chunk(start, stop), alpha=factor)


def shares(weights: Sequence[float]) -> list[float]:
    """Divide weights by their sum: factors of the mean (McMahan et al., AISTATS 2017)."""
    total = sum(weights)
    return [weight / total for weight in weights]


MOST_ADDED = 0.5
"""Of the step of the sites that annotate all regions, as a share; see `undiluted`."""


def undiluted(weights: Sequence[float], complete: Sequence[bool]) -> list[float]:
    """Factors by which sites that annotate a part of the regions add to the mean of the others.

    In a plain mean the sites that see no tumour shorten the others' step towards it: with as many
    of either kind it is half as long. Here the others' mean keeps its length:

        change = sum_c w_c update_c / W_c + min(1/2, W_p / W_c) * sum_p w_p update_p / W_p

    with c over the sites that annotate all regions, p over the rest, W the sums of the weights.
    What all sites want grows by half at most.

    Args:
        weights: S weights, one of them greater than 0.
        complete: For each site whether it annotates all regions; if none does, or all, the factors
            are the shares of the weights.
    """
    whole = sum(weight for weight, full in zip(weights, complete, strict=True) if full)
    rest = sum(weights) - whole
    if not whole or not rest:
        return shares(weights)
    added = min(MOST_ADDED, rest / whole) / rest
    return [
        weight / whole if full else weight * added
        for weight, full in zip(weights, complete, strict=True)
    ]


def step_factors(parts: Sequence[float], steps: Sequence[float]) -> list[float]:
    """Factors of step-normalised averaging: FedNova (Wang et al., NeurIPS 2020).

    A site that does more steps goes further, and pulls the plain mean to what it alone wants. Here
    each site counts by its mean step d_i, and the sum of these by the effective number of steps:

        change = tau_eff * sum_i p_i d_i,  d_i = update_i / tau_i,  tau_eff = sum_i p_i tau_i

    with p_i a site's part of the mean and tau_i its local steps, and tau_eff at most twice their
    weighted median: it stretches the updates of all who did fewer steps, and what one site does, or
    says it did, mustn't decide how far. Otherwise it is FedNova's own formula for local SGD; for
    SGD with momentum FedNova would count its steps by the momentum's geometric sum, and AdamW isn't
    in its theory: there this is plain averaging of mean steps.

    Args:
        parts: S factors of a mean, see `shares` and `undiluted`.
        steps: Local steps of each site, at least 1.
    """
    weights = shares(parts)
    effective = sum(part * count for part, count in zip(weights, steps, strict=True))
    effective = min(effective, 2 * _weighted_median(steps, weights))
    return [part * effective / count for part, count in zip(parts, steps, strict=True)]


def _weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """The first value, from below, with half of the weight (of sum 1) at or under it."""
    reached = 0.0
    for value, weight in sorted(zip(values, weights, strict=True)):
        reached += weight
        if reached >= 0.5:
            return value
    return max(values)  # the sum's rounding


def fair_factors(
    updates: Sequence[SpooledUpdate],
    losses: Sequence[float],
    *,
    q: float,
    server_learning_rate: float | None = None,
) -> list[float]:
    """Factors of q-FedAvg (Li et al., ICLR 2020): the larger a site's loss, the more it counts.

        change = sum_i L F_i^q update_i / sum_i (q F_i^(q-1) L^2 |update_i|^2 + L F_i^q)

    with F_i the site's loss at the weights the round began with. L estimates the Lipschitz constant
    of the gradients. Flower takes 1 / the local learning rate, which fits one step of SGD: after
    many steps of AdamW it makes the change so small that nothing is learnt. Without
    `server_learning_rate` L is therefore measured, as sum 2 F_i / sum |update_i|^2: the largest
    that a function of that height allows if each update is a step of 1 / L. For equal sites the
    change is then the mean update / (1 + 2 q), whatever the local optimiser.

    Args:
        updates: S updates.
        losses: Loss of each site; below 0 counts as 0.
        q: 0 is the plain mean of all sites alike.
        server_learning_rate: 1 / L.
    """
    heights = [max(loss, 0.0) + _LEAST_LOSS for loss in losses]
    norms = squared_norms(updates)
    if server_learning_rate is not None:
        lipschitz = 1 / server_learning_rate
    else:
        lipschitz = 2 * sum(heights) / max(sum(norms), torch.finfo(torch.float32).tiny)
    total = sum(
        q * height ** (q - 1) * lipschitz**2 * norm + lipschitz * height**q
        for height, norm in zip(heights, norms, strict=True)
    )
    return [lipschitz * height**q / total for height in heights]
