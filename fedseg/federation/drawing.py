"""Which sites a round is for."""

import math

import numpy as np

from fedseg.config import StudyConfig
from fedseg.federation.federation import Federation
from fedseg.federation.sites import KnownSite, wanted_sites

__all__ = ["count_of", "drawn_sites", "planned_sites"]

_DRAW = 17
"""Keeps the draw of sites apart from other uses of the seed."""


def planned_sites(federation: Federation) -> int:
    """Sites that a round is planned with: the same number in all rounds, and after a resume.

    Those that the study expects or, where more came, those it began with.
    """
    began = federation.progress.sites or len(federation.sites)
    return count_of(federation.study, max(began, wanted_sites(federation.study)))


def count_of(study: StudyConfig, sites: int) -> int:
    """How many of `sites` a round is for."""
    settings = study.federation
    if settings.fraction == 1:
        return sites
    return min(sites, max(settings.min_sites, math.ceil(settings.fraction * sites)))


def drawn_sites(federation: Federation, number: int) -> list[KnownSite]:
    """Sites of a round: all that aren't busy with an earlier one, or a fraction drawn by seed."""
    study, free = federation.study, federation.free
    if study.federation.fraction == 1:
        return free
    count = count_of(study, len(federation.sites))
    rng = np.random.default_rng([study.train.seed, number, _DRAW])
    drawn = rng.permutation(len(free))[:count]
    return [free[i] for i in sorted(drawn)]
