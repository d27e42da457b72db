"""Central differential privacy: the server's noise on the sum of a round's clipped updates.

The sum is divided by the number of sites that the round was planned with, a constant: a site that
is missing counts as zero, so that the divisor tells nothing of who came (McMahan et al., ICLR
2018). What Flower's strategy then does is post-processing. Who came, and whether a round had
enough sites, isn't protected.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from fedseg.config import StudyConfig
from fedseg.federation.gram import squared_norms
from fedseg.federation.spool import SpooledUpdate
from fedseg.privacy.clipping import clip_factor
from fedseg.privacy.fixed_point import Encoding
from fedseg.privacy.noise import add_noise

__all__ = ["clipped", "noised_mean", "sensitivity"]


def clipped(updates: Mapping[str, SpooledUpdate], clip: float) -> dict[str, SpooledUpdate]:
    """Clip decoded updates to an L2 norm; the server trusts no site to have done so."""
    norms = squared_norms(list(updates.values()))
    return {
        name: replace(update, scale=clip_factor(math.sqrt(square), clip))
        for (name, update), square in zip(updates.items(), norms, strict=True)
    }


def sensitivity(study: StudyConfig, *, size: int, sites: int) -> float:
    """What one site can change of the sum, L2.

    It is the clip. With secure aggregation a site rounds each value of its clipped update to fixed
    point, one step up or down at most.
    """
    privacy = study.privacy
    assert privacy.clip is not None
    if not privacy.secure_aggregation:
        return privacy.clip
    encoding = Encoding(sites=sites, clip=privacy.secagg_clip, max_weight=1.0)
    return privacy.clip + math.sqrt(size) * encoding.clip / encoding.scale


def noised_mean(
    mean: torch.Tensor, study: StudyConfig, *, came: int, planned: int, key: bytes | None = None
) -> torch.Tensor:
    """Make the release of a round: (sum of updates + N(0, (z C)^2)) / planned.

    Args:
        mean: Mean of the clipped updates that came, float32 `[N]`.
        study: The study config.
        came: Their number.
        planned: Sites the round was planned with.
        key: Of the noise; a fresh one by default, tests give one.

    Returns:
        The release float32 `[N]`.
    """
    multiplier = study.privacy.noise_multiplier
    assert multiplier is not None
    total = mean * came
    deviation = multiplier * sensitivity(study, size=len(total), sites=planned)
    add_noise(total.numpy(), deviation, key=key)
    return total / planned
