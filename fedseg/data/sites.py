"""Find the cases of a site's folder, and what the values of its masks mean."""

import logging
from dataclasses import replace
from pathlib import Path

from fedseg.data.cases import Case as Case  # at home there; own layouts get them here
from fedseg.data.cases import Listing as Listing
from fedseg.data.cases import nifti_stem as nifti_stem
from fedseg.data.labels import label_map_of as label_map_of
from fedseg.data.layouts import LAYOUTS
from fedseg.errors import ConfigError, DataError
from fedseg.registry import resolve
from fedseg.site_config import SiteConfig

__all__ = ["LAYOUTS", "find_cases", "site_cases"]

log = logging.getLogger(__name__)


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
    listing = find_cases(root, layout=config.layout)
    label_map = label_map_of(listing, config)
    return listing, config.model_copy(update={"label_map": label_map})
