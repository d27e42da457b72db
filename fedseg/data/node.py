"""Which site a node is: simulated, real, or neither; and which cases it lists.

Flower starts a process for each message to a real site: nothing here reads a scan or imports torch,
so that a short question gets a quick answer. `prepared_cases` reads, `simulated_site` makes.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from fedseg.config import Scalar, StudyConfig
from fedseg.data.sites import Site, site_cases
from fedseg.errors import ConfigError, DataError, Reason, SiteError
from fedseg.site_config import SiteConfig, load_site_config, valid_site_name

__all__ = ["open_site", "own_config", "own_name"]

log = logging.getLogger(__name__)


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
            from fedseg.data.simulated_site import simulated_site

            return simulated_site(node_config, study, make_phantoms=make_phantoms)
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
    from fedseg.data.simulated_site import simulated_config

    return simulated_config(node_config, study)


def own_name(node_config: Mapping[str, Scalar]) -> str:
    """Name of a node that can't take part, as far as it can be told; `""` where it has none."""
    try:
        name = load_site_config(node_config).name or ""
    except Exception:  # what is wrong with it was told where it was first read
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
    root = Path(config.data_dir).expanduser()
    listing, config = site_cases(root, config)
    for problem in listing.problems:
        log.warning("left out: %s", problem)
    return Site(
        name=config.name or "",
        simulated=False,
        sites=0,
        config=config,
        root=root,
        cases=listing.cases,
        unpaired=len(listing.problems),
    )
