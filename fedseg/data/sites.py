"""Find the cases of a site's folder. One function a layout, in one table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedseg.errors import ConfigError, DataError
from fedseg.registry import resolve

__all__ = ["LAYOUTS", "Case", "Listing", "find_cases", "nifti_stem"]

_ENDINGS = (".nii.gz", ".nii")
_SUFFIXES = ("_0000", "_img", "_image", "_seg", "-seg", "_mask", "_label")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One scan and its mask. The paths never leave the site."""

    image: Path
    mask: Path


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a layout found: complete cases, and one line for each file it can't pair."""

    cases: tuple[Case, ...]
    problems: tuple[str, ...] = ()


Layout = Callable[[Path], Listing]


def nifti_stem(path: Path) -> str | None:
    """Return the file name without `.nii` or `.nii.gz`, or None where it is no NIfTI name."""
    for ending in _ENDINGS:
        if path.name.endswith(ending) and not path.name.startswith("."):
            return path.name[: -len(ending)]
    return None


def _pairing_stem(path: Path) -> str | None:
    stem = nifti_stem(path)
    if stem is None:
        return None
    for suffix in _SUFFIXES:
        stem = stem.removesuffix(suffix)
    return stem


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        stem = _pairing_stem(path)
        if stem is not None:
            found.setdefault(stem, []).append(path)
    return found


def images_masks(root: Path) -> Listing:
    """List `images/` and `masks/` with the same file stem (`_0000`, `_seg`, ... are ignored).

    Raises:
        DataError: One of the two folders is missing.
    """
    for name in ("images", "masks"):
        if not (root / name).is_dir():
            raise DataError(
                f"{root}: no folder {name}/; expected images/ and masks/ with the same file names"
            )
    images, masks = _by_stem(root / "images"), _by_stem(root / "masks")
    cases, problems = [], []
    for stem, paths in images.items():
        found = masks.get(stem, [])
        if len(paths) > 1:
            problems.append(
                f"{paths[1]}: second image for {paths[0].name}; expected one; remove one"
            )
        elif not found:
            problems.append(f"{paths[0]}: no mask in masks/ with this stem; add or rename the mask")
        elif len(found) > 1:
            names = " and ".join(path.name for path in found)
            problems.append(f"{paths[0]}: {len(found)} masks ({names}); expected one; remove one")
        else:
            cases.append(Case(image=paths[0], mask=found[0]))
    problems += [
        f"{paths[0]}: no image in images/ with this stem; add the image or remove the mask"
        for stem, paths in masks.items()
        if stem not in images
    ]
    return Listing(cases=tuple(cases), problems=tuple(problems))


LAYOUTS: dict[str, Layout] = {"auto": images_masks, "images-masks": images_masks}


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
    if not listing.cases and not listing.problems:
        raise DataError(f"{root}: no cases; expected .nii or .nii.gz files in images/ and masks/")
    return listing
