"""A site's cases as they are trained on: preprocessed, cached, some held out."""

import logging
from dataclasses import dataclass

import numpy as np

from fedseg.data.cache import CachedCase, cache_bytes, cached_case
from fedseg.data.plan import Plan
from fedseg.data.sites import Site
from fedseg.errors import CaseError, DataError, Reason, SiteError

__all__ = ["SiteCases", "load_cases"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SiteCases:
    """Preprocessed cases of a site.

    Attributes:
        training: Cases to train on.
        validation: Cases held out for metrics.
        skipped: Cases that can't be used.
    """

    training: tuple[CachedCase, ...]
    validation: tuple[CachedCase, ...]
    skipped: int


def load_cases(site: Site, plan: Plan, *, validation_fraction: float, seed: int) -> SiteCases:
    """Preprocess a site's cases, or find them in its cache, and hold some out.

    A case that can't be used is logged here and counted; it never stops the site.

    Raises:
        SiteError: No case is left to train on, or the cache can't be written.
    """
    usable, skipped = [], site.unpaired
    for case in site.cases:
        try:
            usable.append(
                cached_case(
                    case,
                    plan,
                    site.config.cache,
                    modality=site.config.modality,
                    label_map=site.config.label_map,
                )
            )
        except CaseError as error:
            log.warning("skipped: %s", error)
            skipped += 1
        except DataError as error:
            raise SiteError(Reason.DATA, str(error)) from None
    size = cache_bytes(site.config.cache) / 1024**2
    log.info("%d usable cases, %d skipped; cache holds %.0f MB", len(usable), skipped, size)
    held_out = 0
    if validation_fraction and len(usable) > 1:
        held_out = min(max(1, round(validation_fraction * len(usable))), len(usable) - 1)
    order = np.random.default_rng([seed, 11]).permutation(len(usable))
    return SiteCases(
        training=tuple(usable[i] for i in sorted(order[held_out:])),
        validation=tuple(usable[i] for i in sorted(order[:held_out])),
        skipped=skipped,
    )
