"""How sites lay out their folders: one function a layout, in one table."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from fedseg.data.cases import Case, Listing, holds_dicom, nifti_stem, pairing_stem, walk
from fedseg.data.dataset_json import DATASET_JSON, label_names, read_dataset_json
from fedseg.data.dicom_series import dicom_folders
from fedseg.errors import DataError

__all__ = ["LAYOUTS", "auto", "bids", "images_masks", "lits", "msd", "nnunet"]

Layout = Callable[[Path], Listing]

_LITS = re.compile(r"(volume|segmentation)-(\d+)\.nii(\.gz)?", re.IGNORECASE)
_CHANNEL = re.compile(r"(.+)_(\d{4})")
_BIDS_IMAGE = re.compile(r"(.+)_(ct|t1w|t2w)", re.IGNORECASE)
_BIDS_MASK = re.compile(r"(.+)_(dseg|mask)")
_BIDS_OF_MASK = ("desc", "label", "space", "res", "den", "atlas", "seg")
"""Entities that a derivative adds to those of its image."""


def _need(root: Path, folders: Iterable[str], expected: str) -> None:
    for name in folders:
        if not (root / name).is_dir():
            raise DataError(f"{root}: no folder {name}/; expected {expected}")


def _pair(
    images: Mapping[str, list[Path]], masks: Mapping[str, list[Path]], place: str
) -> tuple[list[Case], list[str]]:
    """Pair by key; `place` says where a mask was looked for."""
    cases, problems = [], []
    for key, paths in images.items():
        found = masks.get(key, [])
        if len(paths) > 1:
            problems.append(
                f"{paths[1]}: second image for {paths[0].name}; expected one; remove one"
            )
        elif not found:
            problems.append(f"{paths[0]}: no mask in {place}; add or rename the mask")
        elif len(found) > 1:
            names = " and ".join(path.name for path in found)
            problems.append(f"{paths[0]}: {len(found)} masks ({names}); expected one; remove one")
        else:
            cases.append(Case(image=paths[0], mask=found[0]))
    return cases, problems


def _orphans(
    images: Mapping[str, list[Path]], masks: Mapping[str, list[Path]], place: str
) -> list[str]:
    return [
        f"{paths[0]}: no image in {place}; add the image or remove the mask"
        for key, paths in masks.items()
        if key not in images
    ]


def _grouped(paths: Iterable[Path], key: Callable[[Path], str | None]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in paths:
        name = key(path)
        if name is not None:
            found.setdefault(name, []).append(path)
    return found


def images_masks(root: Path) -> Listing:
    """List `images/` and `masks/` with the same file stem (`_0000`, `_seg`, ... are ignored).

    Raises:
        DataError: One of the two folders is missing.
    """
    _need(root, ("images", "masks"), "images/ and masks/ with the same file names")
    images = _grouped(sorted((root / "images").iterdir()), pairing_stem)
    masks = _grouped(sorted((root / "masks").iterdir()), pairing_stem)
    cases, problems = _pair(images, masks, "masks/ with this stem")
    problems += _orphans(images, masks, "images/ with this stem")
    return Listing(cases=tuple(cases), problems=tuple(problems), layout="images-masks")


def _lits_files(root: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    parts: dict[str, dict[str, list[Path]]] = {"volume": {}, "segmentation": {}}
    for _, files in walk(root):
        for path in files:
            match = _LITS.fullmatch(path.name)
            if match:
                number = str(int(match[2]))
                parts[match[1].lower()].setdefault(number, []).append(path)
    volumes = dict(sorted(parts["volume"].items(), key=lambda item: int(item[0])))
    return volumes, parts["segmentation"]


def lits(root: Path) -> Listing:
    """List LiTS: `volume-N.nii` and `segmentation-N.nii`, in one folder or spread over several.

    `test-volume-N.nii` has no segmentation and is left out.
    """
    volumes, segmentations = _lits_files(root)
    cases, problems = _pair(volumes, segmentations, "this folder with its number (segmentation-N)")
    problems += _orphans(volumes, segmentations, "this folder with its number (volume-N)")
    return Listing(cases=tuple(cases), problems=tuple(problems), layout="lits")


def msd(root: Path) -> Listing:
    """List a Medical Segmentation Decathlon task: imagesTr/, labelsTr/, dataset.json.

    Raises:
        DataError: A folder or `dataset.json` is missing or wrong.
    """
    _need(root, ("imagesTr", "labelsTr"), "imagesTr/, labelsTr/ and dataset.json")
    names = label_names(root, read_dataset_json(root))
    images = _grouped(sorted((root / "imagesTr").iterdir()), nifti_stem)
    masks = _grouped(sorted((root / "labelsTr").iterdir()), nifti_stem)
    cases, problems = _pair(images, masks, "labelsTr/ with this stem")
    problems += _orphans(images, masks, "imagesTr/ with this stem")
    return Listing(
        cases=tuple(cases), problems=tuple(problems), layout="msd", label_names=names or None
    )


def nnunet(root: Path) -> Listing:
    """List an nnU-Net raw data set: imagesTr/ with `_0000` channels, labelsTr/, dataset.json.

    Raises:
        DataError: A folder or `dataset.json` is missing or wrong, or files are no NIfTI.
    """
    _need(root, ("imagesTr", "labelsTr"), "imagesTr/, labelsTr/ and dataset.json")
    content = read_dataset_json(root)
    ending = content.get("file_ending", ".nii.gz")
    if str(ending).lower() not in (".nii", ".nii.gz"):
        raise DataError(
            f"{root / DATASET_JSON}: file_ending is {ending!r}, expected .nii.gz; convert the files"
        )
    channels: dict[str, dict[str, list[Path]]] = {}
    problems = []
    for path in sorted((root / "imagesTr").iterdir()):
        stem = nifti_stem(path)
        match = _CHANNEL.fullmatch(stem) if stem is not None else None
        if match:
            channels.setdefault(match[1], {}).setdefault(match[2], []).append(path)
        elif stem is not None:
            problems.append(f"{path}: no channel in its name; expected {stem}_0000; rename it")
    masks = _grouped(sorted((root / "labelsTr").iterdir()), nifti_stem)
    images: dict[str, list[Path]] = {}
    for stem, found in channels.items():
        if list(found) == ["0000"]:
            images[stem] = found["0000"]
        else:
            first = next(iter(found.values()))[0]
            problems.append(
                f"{first}: channels {', '.join(sorted(found))}, expected 0000 alone; "
                "keep the scan to segment as _0000"
            )
    cases, unpaired = _pair(images, masks, "labelsTr/ with this stem")
    known = {
        stem: [path for paths in found.values() for path in paths]
        for stem, found in channels.items()
    }
    problems += unpaired + _orphans(known, masks, "imagesTr/ with this stem")
    return Listing(
        cases=tuple(cases),
        problems=tuple(problems),
        layout="nnunet",
        label_names=label_names(root, content) or None,
    )


def _entities(stem: str) -> str:
    """Return the entities by which a BIDS image and its mask find each other."""
    parts = [part for part in stem.split("_") if "-" in part]
    return "_".join(sorted(part for part in parts if part.split("-")[0] not in _BIDS_OF_MASK))


def _bids_files(
    folders: Iterable[Path], pattern: re.Pattern[str], within: tuple[str, ...]
) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for top in folders:
        for folder, files in walk(top):
            for path in files if not within or folder.name in within else ():
                match = pattern.fullmatch(nifti_stem(path) or "")
                if match:
                    found.setdefault(_entities(match[1]), []).append(path)
    return found


def bids(root: Path) -> Listing:
    """List BIDS: `sub-*/[ses-*/](anat|ct)/*_(ct|T1w|T2w)`, masks in `derivatives/<pipeline>/`.

    A mask belongs to the image with the same entities, `desc`, `space` and the like aside; where
    there are both, `_dseg` is taken and `_mask` is not.

    Raises:
        DataError: There is no `derivatives/`.
    """
    _need(root, ("derivatives",), "sub-*/ and derivatives/<pipeline>/sub-*/ with masks")
    images = _bids_files(sorted(root.glob("sub-*")), _BIDS_IMAGE, ("anat", "ct"))
    masks = _bids_files(sorted(root.glob("derivatives/*/sub-*")), _BIDS_MASK, ())
    for key, paths in masks.items():
        labels = [path for path in paths if (nifti_stem(path) or "").endswith("_dseg")]
        masks[key] = labels or paths
    cases, problems = _pair(images, masks, "derivatives/ with these entities (_dseg or _mask)")
    problems += _orphans(images, masks, "sub-*/ with these entities (_ct, _T1w or _T2w)")
    return Listing(cases=tuple(cases), problems=tuple(problems), layout="bids")


def _has(root: Path, *folders: str) -> bool:
    return all((root / name).is_dir() for name in folders)


def _is_lits(root: Path) -> bool:
    return all(_lits_files(root))


def _is_nnunet(root: Path) -> bool:
    """Tell nnU-Net from MSD: version 2 by its `dataset.json`, version 1 by its file names."""
    if not _has(root, "imagesTr", "labelsTr"):
        return False
    stems = filter(None, map(nifti_stem, (root / "imagesTr").iterdir()))
    return any(_CHANNEL.fullmatch(stem) for stem in stems) or (
        (root / DATASET_JSON).is_file() and "channel_names" in read_dataset_json(root)
    )


_SIGNS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "nnunet": ("imagesTr/ with _0000, labelsTr/, dataset.json", _is_nnunet),
    "msd": ("imagesTr/, labelsTr/, dataset.json", lambda root: _has(root, "imagesTr", "labelsTr")),
    "lits": ("volume-N.nii, segmentation-N.nii", _is_lits),
    "bids": (
        "sub-*/, derivatives/",
        lambda root: _has(root, "derivatives") and any(root.glob("sub-*")),
    ),
    "images-masks": ("images/, masks/", lambda root: _has(root, "images", "masks")),
    "dicom": ("a folder of DICOM a case", holds_dicom),
}
"""What `auto` goes by."""

_SAID_BY = {
    "msd": ("nnunet",),
    "lits": ("nnunet", "msd"),
    "bids": ("nnunet", "msd"),
    "images-masks": ("nnunet", "msd", "lits"),
    "dicom": ("nnunet", "msd", "lits", "bids", "images-masks"),
}
"""Signs that say more than a layout's own: `dataset.json`; LiTS names in images/ and masks/; any
layout of masks beside the DICOM it was made from."""


def auto(root: Path) -> Listing:
    """Recognise the layout of a folder and list it.

    Raises:
        DataError: No layout fits, or several do.
    """
    fitting: list[str] = []
    for name, (_, fits) in _SIGNS.items():
        if not set(fitting) & set(_SAID_BY.get(name, ())) and fits(root):
            fitting.append(name)
    if not fitting and (_has(root, "images") or _has(root, "masks")):
        return images_masks(root)  # says which of the two is missing
    if not fitting:
        looked = "; ".join(f"{name} ({sign})" for name, (sign, _) in _SIGNS.items())
        raise DataError(
            f"{root}: no known layout; expected one of: {looked}; or set layout = "
            "'pkg.mod:function' in site.toml"
        )
    if len(fitting) > 1:
        raise DataError(
            f"{root}: looks like layouts {' and '.join(fitting)}; set layout in site.toml"
        )
    return LAYOUTS[fitting[0]](root)


LAYOUTS: dict[str, Layout] = {
    "auto": auto,
    "images-masks": images_masks,
    "lits": lits,
    "msd": msd,
    "nnunet": nnunet,
    "bids": bids,
    "dicom": dicom_folders,
}
