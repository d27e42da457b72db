"""A simulated site: its share of the phantoms, or of a researcher's folder."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedseg.config import Scalar, StudyConfig
from fedseg.data.partition import partition
from fedseg.data.phantom import phantom_seeds
from fedseg.data.phantom_sites import phantom_folder, phantom_kinds
from fedseg.data.sites import Case, Site, site_cases
from fedseg.data.volumes import read_mask
from fedseg.errors import CaseError, ConfigError, DataError
from fedseg.site_config import LabelMap, PolicyConfig, SiteConfig, load_site_config

__all__ = ["simulated_config", "simulated_site"]


def simulated_site(
    node_config: Mapping[str, Scalar], study: StudyConfig, *, make_phantoms: bool
) -> Site:
    """The site that a simulated node is, and its cases.

    Args:
        node_config: Flower's node-config, with a `partition-id`.
        study: The study config.
        make_phantoms: Whether a site of phantoms writes them; without, it lists no case.

    Raises:
        ConfigError: `num-partitions` is missing, or the site's config is wrong.
        DataError: Its folder can't be used.
    """
    index, sites = _partition(node_config)
    if study.data.source == "phantom" and not make_phantoms:
        config = load_site_config(node_config)
        return Site(
            name=f"site-{index}",
            simulated=True,
            sites=sites,
            config=config,
            root=Path(),
            cases=(),
            unpaired=0,
        )
    folder, wanted = _simulated_folder(index, sites, study)
    name, config = _own_config(node_config, folder, index, study)
    listing, config = site_cases(folder, config)
    cases = listing.cases
    if wanted is not None:
        cases = _share(cases, wanted, sites, study, config.label_map)
    return Site(
        name=name,
        simulated=True,
        sites=sites,
        config=config,
        root=folder,
        cases=cases,
        unpaired=len(listing.problems) if wanted is None else 0,
    )


def simulated_config(
    node_config: Mapping[str, Scalar], study: StudyConfig | None
) -> tuple[str, SiteConfig]:
    """Name and config of the site that `simulated_site` gives, without a look at its cases."""
    if study is None or study.data.source == "phantom":
        return f"site-{node_config['partition-id']}", _researchers(load_site_config(node_config))
    index, sites = _partition(node_config)
    folder, _ = _simulated_folder(index, sites, study)
    return _own_config(node_config, folder, index, study)


def _partition(node_config: Mapping[str, Scalar]) -> tuple[int, int]:
    if "num-partitions" not in node_config:
        raise ConfigError("num-partitions: got nothing; expected it beside partition-id")
    return int(node_config["partition-id"]), int(node_config["num-partitions"])


def _own_config(
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
