"""Cases that the server holds, for the global metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedseg.config import StudyConfig
from fedseg.data.cache import CachedCase, cached_case
from fedseg.data.phantom import UNSEEN, phantom_seeds
from fedseg.data.phantom_sites import phantom_folder, phantom_kinds
from fedseg.data.plan import Plan
from fedseg.data.sites import Case, site_cases
from fedseg.errors import CaseError, DataError
from fedseg.site_config import SiteConfig, fedseg_home, load_site_config

__all__ = ["HeldOut", "server_cases", "server_groups"]

_SERVER = 900
"""Held-out phantoms come from the seeds of sites from this index on."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A group of the server's cases, preprocessed.

    Attributes:
        cases: The cases.
        annotated: Regions that their masks can have; of any other there is no metric.
    """

    cases: tuple[CachedCase, ...]
    annotated: tuple[str, ...]


def server_groups(
    study: StudyConfig, *, simulated: bool
) -> dict[str, tuple[Sequence[Case], SiteConfig]]:
    """Held-out cases of the server: `global`, and `unseen` of a kind that no site has.

    Phantoms are used only where all sites are simulated phantoms; a `site.toml` in
    `data.server-dir` says how its masks are to be read and which regions they have.

    Raises:
        DataError: `data.server-dir` can't be used.
    """
    data = study.data
    if data.server_dir is not None:
        return {"global": _server_folder(Path(data.server_dir).expanduser())}
    if not (simulated and data.source == "phantom" and data.server_cases):
        return {}
    kinds = list(dict.fromkeys(phantom_kinds(study)))
    seeds = [
        phantom_seeds(data.seed, _SERVER + n, data.server_cases) for n in range(len(kinds) + 1)
    ]
    return {
        "global": _server_folder(phantom_folder("server", list(zip(kinds, seeds, strict=False)))),
        "unseen": _server_folder(phantom_folder("unseen", [(UNSEEN, seeds[-1])])),
    }


def _server_folder(folder: Path) -> tuple[Sequence[Case], SiteConfig]:
    listing, config = site_cases(folder, load_site_config({}, folder=folder))
    if listing.problems:
        raise DataError(f"data.server-dir: {listing.problems[0]}")
    return listing.cases, config


def server_cases(study: StudyConfig, plan: Plan, *, simulated: bool) -> dict[str, HeldOut]:
    """Preprocess the server's held-out cases; a bad one is an error, not skipped.

    Raises:
        DataError: `data.server-dir` or one of its cases can't be used.
    """
    cache = fedseg_home() / "cache"
    groups: dict[str, HeldOut] = {}
    try:
        for name, (cases, config) in server_groups(study, simulated=simulated).items():
            prepared = tuple(
                cached_case(case, plan, cache, modality=config.modality, label_map=config.label_map)
                for case in cases
            )
            groups[name] = HeldOut(cases=prepared, annotated=config.labels)
    except CaseError as error:
        raise DataError(f"server's cases: {error}") from None
    return groups
