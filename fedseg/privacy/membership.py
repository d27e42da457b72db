"""Membership inference: was this case among those that a site trained with?

Two attacks, each a score that should be higher for a member:

alignment  Cosine of the update with the candidate case's negative gradient at the weights which the
           round began with, summed over the rounds: training follows the gradients of the members
           (as Li et al., ICLR 2023).
loss       How much the final model's loss of the case is below that of the first weights: the loss
           threshold of Yeom et al. (CSF 2018), calibrated by how hard a case is as in Watson et al.
           (ICLR 2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedseg.privacy.inversion import flat_gradient
from fedseg.segmentation.intervals import REPLICATES
from fedseg.segmentation.losses import Loss

__all__ = ["Candidate", "Separation", "alignment", "case_gradient", "case_loss", "separation"]

Scores = Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Patches of one case, as the attacker cuts them from a scan that he holds himself.

    Attributes:
        image: float32 `[P, 1, x, y, z]`.
        labels: int64 `[P, x, y, z]`.
        annotated: Regions of the labels.
    """

    image: torch.Tensor
    labels: torch.Tensor
    annotated: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Separation:
    """How well scores tell members from non-members.

    Attributes:
        auc: Chance that a member scores higher than a non-member of its site; .5 is guessing.
        low: Lower end of its 95% interval.
        high: Upper end.
    """

    auc: float
    low: float
    high: float


def case_loss(network: nn.Module, case: Candidate, loss: Loss) -> torch.Tensor:
    """Mean loss over a case's patches, a scalar."""
    return loss(network(case.image), case.labels, case.annotated)


def case_gradient(network: nn.Module, case: Candidate, loss: Loss) -> torch.Tensor:
    """Gradient of a case's loss by all trainable parameters, `[N]`, on the CPU."""
    return flat_gradient(network, case_loss(network, case, loss)).cpu()


def alignment(update: np.ndarray, gradient: np.ndarray) -> float:
    """Cosine of an update `[N]` with a negative gradient `[N]`; 0 where one of them is zero."""
    one, other = update.astype(np.float64), gradient.astype(np.float64)
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return float(-(one @ other) / norms) if norms else 0.0


def separation(members: Sequence[Scores], others: Sequence[Scores], *, seed: int = 0) -> Separation:
    """AUC within each site, averaged over sites, with a bootstrap interval.

    Cases are compared within their site alone: a site's scans differ from another's, and that is
    no membership. The interval is a percentile bootstrap over cases, drawn within each site.

    Args:
        members: Scores of the members of each site.
        others: Scores of the non-members of each site.
        seed: Decides the draws.

    Raises:
        ValueError: A site has no member or no non-member.
    """
    rng = np.random.default_rng([seed, 41])
    total = np.zeros(REPLICATES + 1)
    for inside, outside in zip(members, others, strict=True):
        if not inside or not outside:
            raise ValueError("separation: expected members and non-members at each site")
        wins = _wins(inside, outside)
        shape = (len(inside), len(outside))
        rows, columns = (rng.multinomial(n, np.full(n, 1 / n), size=REPLICATES) for n in shape)
        total[0] += wins.mean()
        total[1:] += np.einsum("rm,mn,rn->r", rows, wins, columns, optimize=True) / wins.size
    auc, drawn = total[0] / len(members), total[1:] / len(members)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Separation(auc=float(auc), low=float(low), high=float(high))


def _wins(members: Scores, others: Scores) -> np.ndarray:
    """Who scores higher, `[m, n]`: 1 the member, 0 the other, a half where equal."""
    # A model that noise has destroyed can have a loss of NaN: it tells nothing.
    inside, outside = (np.nan_to_num(np.array(s, float), nan=-np.inf) for s in (members, others))
    difference: np.ndarray = (inside[:, None] > outside).astype(float)
    difference += 0.5 * (inside[:, None] == outside)
    return difference
