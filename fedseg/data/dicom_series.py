"""Find DICOM series and the masks that belong to them; needs the extra `fedseg[dicom]`."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedseg.data.cases import Case, Listing, is_dicom, nifti_stem, pairing_stem, walk
from fedseg.errors import CaseError, DataError

__all__ = ["MISSING_EXTRA", "Found", "Header", "dicom_folders", "find_series", "header_of"]

MISSING_EXTRA = "DICOM needs an extra package; pip install 'fedseg[dicom]'"
_MODALITIES = ("CT", "MR")
_DICOMDIR = "1.2.840.10008.1.3.10"
_TAGS = ["SeriesInstanceUID", "Modality", "ImageType", "ReferencedSeriesSequence", "Rows"]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What one file is.

    Attributes:
        kind: `image` (a CT or MR slice), `seg`, or `other`.
        series: SeriesInstanceUID.
        references: Series a DICOM-SEG was drawn on.
    """

    kind: str
    series: str
    references: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Found:
    """DICOM under a folder.

    Attributes:
        images: SeriesInstanceUID to the files of a CT or MR series.
        segmentations: DICOM-SEG file to the series it was drawn on.
        damaged: DICOM files whose header can't be read.
    """

    images: dict[str, list[Path]] = field(default_factory=dict)
    segmentations: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    damaged: list[Path] = field(default_factory=list)


def header_of(path: Path) -> Header | None:
    """Read what a file is, None where it is no DICOM.

    Raises:
        CaseError: It is damaged, or DICOM can't be read here.
    """
    try:
        stat = path.stat()
    except OSError:
        return None
    return _header(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2**17)
def _header(path: Path, size: int, changed: int) -> Header | None:
    if not is_dicom(path):
        return None
    try:
        import pydicom
    except ModuleNotFoundError:
        raise CaseError(path, *MISSING_EXTRA.split("; ")) from None
    try:
        data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
        return _understood(data)
    except MemoryError:
        raise CaseError(path, "doesn't fit in memory", "export it again") from None
    except Exception as error:  # a parser of foreign bytes: what it raises has no bounds
        raise CaseError(
            path, f"damaged DICOM ({type(error).__name__})", "copy or export it again"
        ) from None


def _understood(data: Any) -> Header:
    series, modality = str(data.get("SeriesInstanceUID", "")), str(data.get("Modality", ""))
    if not series and data.file_meta.get("MediaStorageSOPClassUID") != _DICOMDIR:
        raise ValueError("no SeriesInstanceUID")
    if modality == "SEG":
        referenced = data.get("ReferencedSeriesSequence") or []
        uids = tuple(str(item.get("SeriesInstanceUID", "")) for item in referenced)
        return Header(kind="seg", series=series, references=uids)
    scout = "LOCALIZER" in (data.get("ImageType") or [])
    image = modality in _MODALITIES and "Rows" in data and not scout
    return Header(kind="image" if image else "other", series=series)


def find_series(folder: Path) -> Found:
    """Group all DICOM files under a folder; scouts and other modalities are left out."""
    found = Found()
    for _, files in walk(folder):
        for path in files:
            if nifti_stem(path) is not None:
                continue
            try:
                header = header_of(path)
            except CaseError as error:
                if error.mend.startswith("pip install"):
                    raise
                found.damaged.append(path)
                continue
            if header is not None and header.kind == "image":
                found.images.setdefault(header.series, []).append(path)
            elif header is not None and header.kind == "seg":
                found.segmentations[path] = header.references
    return found


def dicom_folders(root: Path) -> Listing:
    """List `<case>/` with DICOM series and a DICOM-SEG, `mask.nii.gz` or `masks/<case>.nii.gz`.

    A DICOM-SEG takes the series it names; a NIfTI mask needs a case with one series.

    Raises:
        DataError: DICOM can't be read here.
    """
    apart: dict[str, list[Path]] = {}
    if (root / "masks").is_dir():
        for path in sorted((root / "masks").iterdir()):
            stem = pairing_stem(path)
            if stem is not None:
                apart.setdefault(stem, []).append(path)
    cases: list[Case] = []
    problems: list[str] = []
    known = set()
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or folder.name.startswith(".") or folder.name == "masks":
            continue
        known.add(folder.name)
        inside = [path for path in sorted(folder.iterdir()) if _is_mask(path)]
        try:
            found = find_series(folder)
        except CaseError as error:
            raise DataError(f"{root}: {error.what}; {error.mend}") from None
        masks = inside + apart.get(folder.name, [])
        new_cases, new_problems = _of_folder(folder, found, masks)
        cases += new_cases
        problems += new_problems
    problems += [
        f"{paths[0]}: no folder {stem}/ with its DICOM; add it or remove the mask"
        for stem, paths in apart.items()
        if stem not in known
    ]
    return Listing(cases=tuple(cases), problems=tuple(problems), layout="dicom")


def _is_mask(path: Path) -> bool:
    return (nifti_stem(path) or "").lower() == "mask"


def _of_folder(folder: Path, found: Found, masks: list[Path]) -> tuple[list[Case], list[str]]:
    segmentations = list(found.segmentations)
    if not (found.images or segmentations or masks or found.damaged):
        return [], []
    if found.damaged:
        path = found.damaged[0]
        return [], [f"{path}: damaged DICOM; copy or export it again, the case is left out"]
    if not found.images:
        return [], [f"{folder}: no CT or MR series in it; add it or remove the folder"]
    if masks and (len(masks) > 1 or segmentations):
        names = " and ".join(path.name for path in masks + segmentations)
        return [], [f"{folder}: {len(masks + segmentations)} masks ({names}); expected one; remove"]
    if masks and len(found.images) > 1:
        return [], [
            f"{folder}: {len(found.images)} series for one NIfTI mask, expected one; remove the "
            "series that it wasn't drawn on"
        ]
    if masks:
        return [Case(image=_image(folder, found, next(iter(found.images))), mask=masks[0])], []
    if not segmentations:
        return [], [f"{folder}: no DICOM-SEG, mask.nii.gz or masks/{folder.name}.nii.gz; add it"]
    return _drawn_on(folder, found)


def _drawn_on(folder: Path, found: Found) -> tuple[list[Case], list[str]]:
    by_series: dict[str, list[Path]] = {}
    problems = []
    for path, references in found.segmentations.items():
        known = [uid for uid in references if uid in found.images]
        if len(known) != 1:
            problems.append(
                f"{path}: was drawn on a series that isn't in {folder.name}/; add the series or "
                "remove the DICOM-SEG"
            )
        else:
            by_series.setdefault(known[0], []).append(path)
    cases = []
    for uid, paths in by_series.items():
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            problems.append(f"{paths[1]}: {len(paths)} DICOM-SEG of one series ({names}); keep one")
        else:
            cases.append(Case(image=_image(folder, found, uid), mask=paths[0]))
    return cases, problems


def _image(folder: Path, found: Found, uid: str) -> Path:
    """Name a series by its folder, or by one of its files where others lie beside it."""
    return folder if len(found.images) == 1 else found.images[uid][0]
