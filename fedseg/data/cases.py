"""What a layout finds: cases, files that are none, and how files are named."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Case",
    "Listing",
    "files_of",
    "holds_dicom",
    "is_dicom",
    "nifti_stem",
    "pairing_stem",
    "walk",
]

_ENDINGS = (".nii.gz", ".nii")
_SUFFIXES = ("_0000", "_img", "_image", "_seg", "-seg", "_mask", "_label")
_MAX_DEPTH = 8
_LOOKED_AT = 3
"""Files of a folder that are opened to tell whether it holds DICOM."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One scan and its mask. The paths never leave the site.

    Attributes:
        image: A NIfTI file; of DICOM the folder that holds one series, or a file of the series.
        mask: A NIfTI or DICOM-SEG file.
    """

    image: Path
    mask: Path


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a layout found.

    Attributes:
        cases: Complete cases.
        problems: One line for each file that can't be paired.
        layout: Name of the layout, also where `auto` took it.
        label_names: Name in `dataset.json` to mask value, None where there are no names.
    """

    cases: tuple[Case, ...]
    problems: tuple[str, ...] = ()
    layout: str = ""
    label_names: Mapping[str, int] | None = None


def nifti_stem(path: Path) -> str | None:
    """Return the file name without `.nii` or `.nii.gz`, or None where it is no NIfTI name."""
    for ending in _ENDINGS:
        if path.name.lower().endswith(ending) and not path.name.startswith("."):
            return path.name[: -len(ending)]
    return None


def pairing_stem(path: Path) -> str | None:
    """Return the stem by which an image and its mask find each other: `a` of `a_seg.nii`."""
    stem = nifti_stem(path)
    if stem is None:
        return None
    for suffix in _SUFFIXES:
        stem = stem.removesuffix(suffix)
    return stem


def walk(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield each folder under `root` with its files, both by name; links are followed once."""
    seen: set[str] = set()
    for name, folders, files in os.walk(root, followlinks=True):
        folder = Path(name)
        real = os.path.realpath(name)
        if real in seen or len(folder.relative_to(root).parts) > _MAX_DEPTH:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        yield folder, [folder / file for file in sorted(files) if not file.startswith(".")]


def is_dicom(path: Path) -> bool:
    """Tell whether a file starts as a DICOM file does, whatever its name."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def holds_dicom(folder: Path) -> bool:
    """Tell whether one of the first files of a folder, or of a folder in it, is DICOM."""
    return any(
        is_dicom(path)
        for _, files in walk(folder)
        for path in [file for file in files if nifti_stem(file) is None][:_LOOKED_AT]
    )


def files_of(path: Path) -> list[Path]:
    """List the files that make up an image or mask, for telling whether it has changed."""
    if nifti_stem(path) is not None:
        return [path]
    if path.is_dir():
        return [file for _, files in walk(path) for file in files]
    if is_dicom(path):  # a series is all files of it in one folder
        return sorted(file for file in path.parent.iterdir() if file.is_file())
    return [path]
