"""A site: its config, and the cases of its folder with what the values of their masks mean."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from fedseg.data.cases import Case as Case  # at home there; own layouts get them here
from fedseg.data.cases import Listing as Listing
from fedseg.data.cases import nifti_stem as nifti_stem
from fedseg.data.labels import label_map_of as label_map_of
from fedseg.data.labels import without_other_organs
from fedseg.data.layouts import LAYOUTS
from fedseg.errors import ConfigError, DataError
from fedseg.registry import resolve
from fedseg.site_config import SiteConfig

__all__ = ["LAYOUTS", "Site", "find_cases", "site_cases"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site as its own node sees it.

    Attributes:
        name: Name in its config, else `site-<partition-id>` or its sub-folder; `""` if it has none.
        simulated: Whether the study's `data.*` section applies.
        sites: Number of simulated sites, 0 where real.
        config: The site config.
        root: The folder that the cases were listed in.
        cases: The cases in a fixed order.
        unpaired: Files that are no case.
    """

    name: str
    simulated: bool
    sites: int
    config: SiteConfig
    root: Path
    cases: tuple[Case, ...]
    unpaired: int


def find_cases(root: Path, *, layout: str = "auto") -> Listing:
    """List a site's cases in a fixed order.

    Raises:
        ConfigError: The layout has no function, or its package isn't installed.
        DataError: The folder is missing, unreadable or has no case.
    """
    try:
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; correct the path")
        listing = resolve("layout", layout, LAYOUTS)(root)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"layout: got '{layout}'; package {error.name} isn't installed; install it"
        ) from None
    except PermissionError:
        raise DataError(f"{root}: no permission to list it; chmod it for this user") from None
    if not isinstance(listing, Listing):
        listing = Listing(cases=tuple(listing))
    if not listing.layout:
        listing = replace(listing, layout=layout)
    if not listing.cases and not listing.problems:
        raise DataError(
            f"{root}: no cases; expected .nii or .nii.gz files, or DICOM, in layout "
            f"{listing.layout}"
        )
    if layout == "auto":
        log.info("layout: %s", listing.layout)
    return listing


def site_cases(root: Path, config: SiteConfig) -> tuple[Listing, SiteConfig]:
    """List a site's cases; the config that comes back has the label map which applies to them.

    Raises:
        ConfigError: The layout has no function, or its package isn't installed.
        DataError: The folder can't be used, or a label name has no meaning.
    """
    listing = without_other_organs(find_cases(root, layout=config.layout), config)
    label_map = label_map_of(listing, config)
    return listing, config.model_copy(update={"label_map": label_map})
