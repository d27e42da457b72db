"""Sites of a leak test: phantoms or shares of a folder, half of each site's cases kept out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedseg.config import StudyConfig
from fedseg.data.cache import CachedCase
from fedseg.data.node import open_site
from fedseg.data.phantom import phantom_seeds
from fedseg.data.phantom_sites import phantom_folder, phantom_kinds
from fedseg.data.plan import Plan
from fedseg.data.prepared_cases import load_cases
from fedseg.data.sites import Site
from fedseg.errors import DataError

__all__ = ["LEAST_CASES", "Cohort", "cohorts_of", "open_sites", "small_study"]

LEAST_CASES = 4
"""Cases a site needs: two members and two others."""

_FIRST = 700
"""Phantoms come from the seeds of sites from this index on: no study trains with them."""

_SPACING = (5.0, 5.0, 5.0)
"""Voxels of the phantoms, mm: the plan makes scans coarser, and finer ones take long to make."""


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """A site's cases, split at random: all are of one kind, so that only membership differs.

    Attributes:
        members: Cases the site trains with.
        others: Cases it doesn't.
        annotated: Regions of their masks.
    """

    members: Sequence[CachedCase]
    others: Sequence[CachedCase]
    annotated: Sequence[str]


def small_study(*, model: str = "unet", seed: int = 0, folder: Path | None = None) -> StudyConfig:
    """Study config of a test that takes minutes: a narrow network and small patches.

    Raises:
        ConfigError: An impossible value.
    """
    depth, side = (5, 32) if model == "unet++" else (3, 24)
    data: dict[str, str | int] = {}
    if folder is not None:
        data = {"data.source": "folder", "data.dir": str(folder)}
    return StudyConfig.from_run_config(
        {
            **data,
            "data.seed": seed,
            "model.name": model,
            "model.width": 8,
            "model.depth": depth,
            "train.seed": seed,
            "train.patch-size": f"{side},{side},{side}",
            "train.batch-size": 2,
        }
    )


def open_sites(study: StudyConfig, *, sites: int, cases: int) -> list[Site]:
    """Make sites of phantoms, each its own kind, or deal a folder's cases to sites.

    Args:
        study: Says which; `data.*` applies.
        sites: How many.
        cases: Phantoms of each; a folder's cases are all taken.

    Raises:
        SiteError: The folder can't be used.
        DataError: A site has too few cases.
    """
    if study.data.source == "folder":
        whole = open_site({"partition-id": 0, "num-partitions": 1}, study)
        _check_count([len(whole.cases) // sites] * sites, len(whole.cases))
    found = []
    for index in range(sites):
        node: dict[str, str | int] = {"partition-id": index, "num-partitions": sites}
        if study.data.source == "phantom":
            kinds = phantom_kinds(study)
            kind = replace(kinds[index % len(kinds)], spacing=_SPACING)
            seeds = phantom_seeds(study.data.seed, _FIRST + index, cases)
            node = {"data-dir": str(phantom_folder("leak", [(kind, seeds)]))}
        found.append(open_site(node, study))
    return found


def cohorts_of(sites: Sequence[Site], plan: Plan, *, seed: int) -> list[Cohort]:
    """Preprocess the sites' cases and split each site's in halves.

    Raises:
        SiteError: The cache can't be written.
        DataError: A site has too few usable cases.
    """
    found = [load_cases(site, plan, validation_fraction=0.5, seed=seed) for site in sites]
    # Of unusable cases one half may have more than the other.
    counts = [2 * min(len(cases.training), len(cases.validation)) for cases in found]
    _check_count(counts, sum(counts))
    return [
        Cohort(members=cases.training, others=cases.validation, annotated=site.config.labels)
        for site, cases in zip(sites, found, strict=True)
    ]


def _check_count(counts: Sequence[int], total: int) -> None:
    if min(counts) < LEAST_CASES:
        raise DataError(
            f"leak: got {total} usable cases for {len(counts)} sites; expected at least "
            f"{LEAST_CASES} a site; give more cases or fewer sites"
        )
