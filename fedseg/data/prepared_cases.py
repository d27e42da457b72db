"""A site's cases as they are trained on: preprocessed, cached, some held out."""

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from fedseg.data.cache import CachedCase, cache_bytes, cached_case
from fedseg.data.plan import Plan
from fedseg.data.sites import Case, Site, nifti_stem
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

    A case that can't be used is logged here and counted; it never stops the site. It may be one of
    those held out: no other takes its place.

    Raises:
        SiteError: The cache can't be written.
    """
    held_out = _held_out(site, fraction=validation_fraction, seed=seed)
    training: list[CachedCase] = []
    validation: list[CachedCase] = []
    skipped = site.unpaired
    for case in site.cases:
        try:
            prepared = cached_case(
                case,
                plan,
                site.config.cache,
                modality=site.config.modality,
                label_map=site.config.label_map,
            )
        except CaseError as error:
            log.warning("skipped: %s", error)
            skipped += 1
        except DataError as error:
            raise SiteError(Reason.DATA, str(error)) from None
        else:
            (validation if case in held_out else training).append(prepared)
    size = cache_bytes(site.config.cache) / 1024**2
    usable = len(training) + len(validation)
    log.info("%d usable cases, %d skipped; cache holds %.0f MB", usable, skipped, size)
    if held_out and not validation:
        log.warning("none of the held-out cases (%d) is usable: no scores here", len(held_out))
    return SiteCases(training=tuple(training), validation=tuple(validation), skipped=skipped)


def _held_out(site: Site, *, fraction: float, seed: int) -> set[Case]:
    """Choose by rank of a hash of each listed case, whether it is usable or not.

    Each message chooses anew, and a case that was trained on must not be scored later. So a case
    that can't be read moves no other, and one that comes or goes moves one other at most.
    """
    if not fraction or len(site.cases) < 2:
        return set()
    count = min(max(1, round(fraction * len(site.cases))), len(site.cases) - 1)
    return set(sorted(site.cases, key=lambda case: _rank(case, site.root, seed))[:count])


def _rank(case: Case, root: Path, seed: int) -> bytes:
    """Hash of the image's place in the site's folder: stays where the folder moves."""
    name = nifti_stem(case.image) or case.image.name
    place = os.path.relpath(case.image.with_name(name), root)
    return hashlib.sha256(os.fsencode(f"{seed} {place}")).digest()
