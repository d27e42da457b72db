"""What mask values mean: the site's label-map, else the names that its data set gives them."""

import re
from dataclasses import replace
from pathlib import Path

from fedseg.data.cases import Listing, nifti_stem
from fedseg.errors import DataError
from fedseg.registry import did_you_mean
from fedseg.site_config import LabelMap, SiteConfig

__all__ = ["label_map_of", "label_of_name", "label_of_segment", "without_other_organs"]

_TUMOR = {
    *("tumor", "tumors", "tumour", "tumours", "cancer", "cancers", "lesion", "lesions"),
    *("mass", "masses", "neoplasm", "metastasis", "metastases", "hcc"),
}
_LIVER = {"liver", "hepatic", "parenchyma"}


def label_of_name(name: str) -> int | None:
    """Return the label that a name means by itself, None where it could be anything.

    `Liver` is 1; `cancer`, `liver tumor` and `Lesion 2` are 2; `kidney tumor` is None.
    """
    words = {word for word in re.split(r"[^a-z]+", name.lower()) if word}
    if words == {"background"}:
        return 0
    if words & _TUMOR and words <= _TUMOR | _LIVER:
        return 2
    return 1 if words & {"liver", "hepatic"} and words <= _LIVER else None


def label_map_of(listing: Listing, config: SiteConfig) -> dict[int | str, int] | None:
    """Return mask value to label: the site's `label-map`, else by the names of its data set.

    DICOM-SEG numbers its segments in each file anew, so names are kept as keys there and looked
    up when the file is read; everywhere else all keys are numbers.

    Raises:
        DataError: `label-map` has a name that isn't there, or a name has no meaning by itself.
    """
    names = {name.lower().strip(): value for name, value in (listing.label_names or {}).items()}
    if config.label_map is None:
        return _by_names(names) if listing.label_names else None
    if listing.layout == "dicom":
        return dict(config.label_map)
    found: dict[int | str, int] = {}
    for key, label in config.label_map.items():
        if isinstance(key, str) and key not in names:
            expected = (
                f"a name of dataset.json: {', '.join(names)}{did_you_mean(key, names)}"
                if names
                else f"numbers: layout {listing.layout} has no label names"
            )
            raise DataError(f"label-map: got '{key}'; expected {expected}")
        found[names[key] if isinstance(key, str) else key] = label
    return found


def _by_names(names: dict[str, int]) -> dict[int | str, int]:
    labels = {name: label_of_name(name) for name in names}
    unknown = [name for name, label in labels.items() if label is None]
    if unknown:
        raise DataError(
            f"dataset.json: can't tell what label '{unknown[0]}' is; set label-map in site.toml, "
            f'such as {{"{unknown[0]}" = 0}}, for all of {", ".join(names)}'
        )
    return {names[name]: label for name, label in labels.items() if label is not None}


def label_of_segment(number: int, name: str, label_map: LabelMap | None) -> int | None:
    """Return the label of a DICOM-SEG segment, None where it has none."""
    if label_map is None:
        return label_of_name(name)
    return label_map.get(name.lower().strip(), label_map.get(number))


def without_other_organs(listing: Listing, config: SiteConfig) -> Listing:
    """Leave out cases of BIDS whose mask is, by its name `label-X_mask`, of X and not of the liver.

    Such a mask is binary: its 1 would be read as liver, be it spleen or tumour. A site with a
    `label-map` has said itself what its values are.
    """
    if listing.layout != "bids" or config.label_map is not None:
        return listing
    others = {case: name for case in listing.cases if (name := _other_organ(case.mask))}
    problems = [
        f"{case.mask}: is of {name} alone, not of the liver; add a _dseg with 1 liver and 2 tumor, "
        "or set label-map in site.toml"
        for case, name in others.items()
    ]
    return replace(
        listing,
        cases=tuple(case for case in listing.cases if case not in others),
        problems=(*listing.problems, *problems),
    )


def _other_organ(mask: Path) -> str | None:
    *entities, suffix = (nifti_stem(mask) or "").split("_")
    names = [part.removeprefix("label-") for part in entities if part.startswith("label-")]
    return names[0] if suffix == "mask" and names and label_of_name(names[0]) != 1 else None
