"""Which scans a user means, and what their masks are called."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fedseg.data.cases import holds_dicom, is_dicom, nifti_stem
from fedseg.data.dicom_series import header_of
from fedseg.errors import CaseError, DataError

__all__ = ["mask_names", "scans_of"]


def scans_of(paths: Sequence[Path]) -> list[Path]:
    """Expand folders into the NIfTI files and the DICOM series they hold; each scan comes once.

    A folder with DICOM files is one scan; of folders in a folder, each with DICOM is one. Of files
    of one series in one folder, such as `SERIES/*.dcm`, the first stands for all.

    Raises:
        DataError: A path is missing, no scan, or there is none at all.
    """
    scans: list[Path] = []
    for path in paths:
        if path.is_dir():
            scans += _scans_in(path)
        elif not path.is_file():
            raise DataError(f"{path}: no such file or folder; correct the path")
        elif nifti_stem(path) is None and not is_dicom(path):
            raise DataError(f"{path}: not named .nii or .nii.gz, and no DICOM; convert it")
        else:
            scans.append(path)
    if not scans:
        raise DataError(
            f"{paths[0]}: no .nii or .nii.gz file in it and no DICOM; give scans or their folder"
        )
    once: dict[tuple[str, ...], Path] = {}
    for scan in scans:
        once.setdefault(_identity(scan), scan)
    return list(once.values())


def _identity(scan: Path) -> tuple[str, ...]:
    """What two paths of one scan have in common."""
    place = os.path.abspath(scan)
    if scan.is_file() and nifti_stem(scan) is None:
        try:
            header = header_of(scan)
        except CaseError:  # whoever reads it says what is wrong
            header = None
        if header is not None:  # a series can have its scout's number
            return os.path.dirname(place), header.kind, header.series
    return (place,)


def _scans_in(folder: Path) -> list[Path]:
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in inside if path.is_file()]
    scans = [path for path in files if nifti_stem(path)]
    if not scans and any(is_dicom(path) for path in files):
        return [folder]
    return scans + [path for path in inside if path.is_dir() and holds_dicom(path)]


def mask_names(scans: Sequence[Path]) -> list[str]:
    """Name the scans' masks, without ending: as the scan's file or DICOM folder.

    Where two would have one name, so many folders above go before it that they differ: `p1_ct` and
    `p2_ct`.

    Raises:
        DataError: Two scans differ by their ending alone.
    """
    parts = [_parts(scan) for scan in scans]
    taken = [1] * len(scans)
    while True:
        names = ["_".join(part[-n:]) for part, n in zip(parts, taken, strict=True)]
        # Some file systems don't tell upper case from lower case.
        often = Counter(name.casefold() for name in names)
        clashes = [index for index, name in enumerate(names) if often[name.casefold()] > 1]
        if not clashes:
            return names
        longer = [index for index in clashes if taken[index] < len(parts[index])]
        if not longer:
            one, other = (scans[index] for index in clashes[:2])
            raise DataError(
                f"{one}: its mask would have the name of that of {other}; predict them into two "
                "folders"
            )
        for index in longer:
            taken[index] += 1


def _parts(scan: Path) -> tuple[str, ...]:
    place = Path(os.path.abspath(scan))
    name = place.name if scan.is_dir() else nifti_stem(place) or place.stem
    return (*place.parts[1:-1], name)
