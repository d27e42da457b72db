"""Which site a node is: simulated, real, or neither; and the cases it holds."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedseg.config import Scalar, StudyConfig
from fedseg.data.cache import CachedCase, cache_bytes, cached_case
from fedseg.data.partition import partition
from fedseg.data.phantom import phantom_seeds
from fedseg.data.phantom_sites import phantom_folder, phantom_kinds
from fedseg.data.plan import Plan
from fedseg.data.sites import Case, site_cases
from fedseg.data.volumes import read_mask
from fedseg.errors import CaseError, ConfigError, DataError, FedSegError, Reason, SiteError
from fedseg.site_config import (
    LabelMap,
    PolicyConfig,
    SiteConfig,
    load_site_config,
    valid_site_name,
)

__all__ = [
    "Site",
    "SiteCases",
    "load_cases",
    "open_site",
    "own_config",
    "own_name",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site as its own node sees it.

    Attributes:
        name: Name in its config, else `site-<partition-id>` or its sub-folder; `""` if it has none.
        simulated: Whether the study's `data.*` section applies.
        sites: Number of simulated sites, 0 where real.
        config: The site config.
        cases: The cases in a fixed order.
        unpaired: Files that are no case.
    """

    name: str
    simulated: bool
    sites: int
    config: SiteConfig
    cases: tuple[Case, ...]
    unpaired: int


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


def open_site(
    node_config: Mapping[str, Scalar], study: StudyConfig, *, make_phantoms: bool = True
) -> Site:
    """Decide which site this node is and list its cases.

    A node with `data-dir` is real and ignores `data.*`; one with `partition-id` alone is simulated.

    Args:
        node_config: Flower's node-config.
        study: The study config.
        make_phantoms: Whether a site of phantoms writes them; without, it lists no case.

    Raises:
        SiteError: It is neither, its config is wrong, or its folder can't be used.
    """
    try:
        if _is_real(node_config):
            return _real(node_config)
        if "partition-id" in node_config:
            return _simulated(node_config, study, make_phantoms)
    except ConfigError as error:
        raise SiteError(Reason.SITE_CONFIG, str(error)) from None
    except DataError as error:
        raise SiteError(Reason.DATA, str(error)) from None
    raise SiteError(Reason.NO_DATA)


def own_config(
    node_config: Mapping[str, Scalar], study: StudyConfig | None
) -> tuple[str, SiteConfig]:
    """Name and config of the site that `open_site` opens, without a look at its cases.

    Args:
        node_config: Flower's node-config.
        study: The study config, None where it can't be read: then a simulated site has no folder.

    Raises:
        ConfigError: The site's config is wrong.
        DataError: It can't be read, or the simulated site has no folder.
    """
    if _is_real(node_config) or "partition-id" not in node_config:
        config = load_site_config(node_config)
        return config.name or "", config
    if study is None or study.data.source == "phantom":
        return f"site-{node_config['partition-id']}", _researchers(load_site_config(node_config))
    index, sites = _partition(node_config)
    folder, _ = _simulated_folder(index, sites, study)
    return _simulated_config(node_config, folder, index, study)


def own_name(node_config: Mapping[str, Scalar]) -> str:
    """Name of a node that can't take part, as far as it can be told; `""` where it has none."""
    try:
        name = load_site_config(node_config).name or ""
    except FedSegError:
        name = str(node_config.get("name", ""))
    if not name and "data-dir" not in node_config and "partition-id" in node_config:
        name = f"site-{node_config['partition-id']}"
    return name if valid_site_name(name) else ""


def _is_real(node_config: Mapping[str, Scalar]) -> bool:
    if node_config.get("data-dir"):
        return True
    return bool(node_config.get("site-config") and load_site_config(node_config).data_dir)


def _real(node_config: Mapping[str, Scalar]) -> Site:
    config = load_site_config(node_config)
    assert config.data_dir is not None
    if "partition-id" in node_config:
        log.warning("node has data-dir and partition-id: it is real, data.* doesn't apply")
    log.info("real site: data.* of the study config doesn't apply")
    listing, config = site_cases(Path(config.data_dir).expanduser(), config)
    for problem in listing.problems:
        log.warning("left out: %s", problem)
    return Site(
        name=config.name or "",
        simulated=False,
        sites=0,
        config=config,
        cases=listing.cases,
        unpaired=len(listing.problems),
    )


def _simulated(node_config: Mapping[str, Scalar], study: StudyConfig, make_phantoms: bool) -> Site:
    index, sites = _partition(node_config)
    if study.data.source == "phantom" and not make_phantoms:
        config = load_site_config(node_config)
        return Site(
            name=f"site-{index}", simulated=True, sites=sites, config=config, cases=(), unpaired=0
        )
    folder, wanted = _simulated_folder(index, sites, study)
    name, config = _simulated_config(node_config, folder, index, study)
    listing, config = site_cases(folder, config)
    cases = listing.cases
    if wanted is not None:
        cases = _share(cases, wanted, sites, study, config.label_map)
    return Site(
        name=name,
        simulated=True,
        sites=sites,
        config=config,
        cases=cases,
        unpaired=len(listing.problems) if wanted is None else 0,
    )


def _partition(node_config: Mapping[str, Scalar]) -> tuple[int, int]:
    if "num-partitions" not in node_config:
        raise ConfigError("num-partitions: got nothing; expected it beside partition-id")
    return int(node_config["partition-id"]), int(node_config["num-partitions"])


def _simulated_config(
    node_config: Mapping[str, Scalar], folder: Path, index: int, study: StudyConfig
) -> tuple[str, SiteConfig]:
    config = load_site_config(node_config, folder=folder)
    if study.data.partition != "folders":
        return f"site-{index}", _researchers(config)
    return config.name or _site_name(folder, index), config


def _researchers(config: SiteConfig) -> SiteConfig:
    """A share of the researcher's own data has no policy of its own."""
    policy = PolicyConfig(allow_custom_code=True, min_count=1)
    return config.model_copy(update={"policy": policy})


def _site_name(folder: Path, index: int) -> str:
    name = re.sub(r"[^a-z0-9-]+", "-", folder.name.lower()).strip("-")[:32]
    return name or f"site-{index}"


def _simulated_folder(index: int, sites: int, study: StudyConfig) -> tuple[Path, int | None]:
    """Folder of a simulated site, and which share of it is the site's (None: all of it)."""
    data = study.data
    if data.source == "folder":
        assert data.dir is not None
        root = Path(data.dir).expanduser()
        if data.partition != "folders":
            return root, index
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; correct data.dir")
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if len(folders) != sites:
            raise DataError(
                f"{root}: {len(folders)} sub-folders for {sites} simulated sites; expected one a "
                f"site; set num-supernodes={len(folders)}"
            )
        return folders[index], None
    kinds = phantom_kinds(study)
    if data.partition == "iid":
        kind = kinds[index % len(kinds)]
        seeds = phantom_seeds(data.seed, index, data.phantom_cases)
        return phantom_folder(kind.name, [(kind, seeds)]), None
    pool = [
        (kinds[i % len(kinds)], phantom_seeds(data.seed, i, data.phantom_cases))
        for i in range(sites)
    ]
    return phantom_folder("pool", pool), index


def _share(
    cases: Sequence[Case],
    index: int,
    sites: int,
    study: StudyConfig,
    label_map: LabelMap | None,
) -> tuple[Case, ...]:
    data = study.data
    loads = [0.0] * len(cases)
    if data.partition == "dirichlet":
        loads = [_tumor_volume(case, label_map) for case in cases]
    shares = partition(
        data.partition, loads, sites=sites, alpha=data.dirichlet_alpha, seed=data.seed
    )
    return tuple(cases[i] for i in shares[index])


def _tumor_volume(case: Case, label_map: LabelMap | None) -> float:
    try:
        mask = read_mask(case.mask, label_map=label_map)
    except CaseError:
        return 0.0  # whoever gets the case skips and counts it
    return float(np.count_nonzero(mask.array == 2) * np.prod(mask.spacing))


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
