"""Predict masks for new scans with a model file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedseg.data.cases import holds_dicom, is_dicom, nifti_stem
from fedseg.data.plan import Plan
from fedseg.data.preprocess import Modality
from fedseg.data.volumes import read_image, write_mask
from fedseg.errors import CaseError, DataError
from fedseg.segmentation.inference import predict_labels

__all__ = ["Prediction", "predict_files", "scans_of"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What became of one scan.

    Attributes:
        scan: The input.
        mask: The written mask, None where there is a problem.
        volumes_ml: Region to its volume in mL.
        problem: Why there is no mask.
    """

    scan: Path
    mask: Path | None
    volumes_ml: dict[str, float]
    problem: str | None = None


def scans_of(paths: Sequence[Path]) -> list[Path]:
    """Expand folders into the NIfTI files or the DICOM series they hold.

    A folder with DICOM files is one scan; of a folder of such folders, each is one.

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
    return scans


def _scans_in(folder: Path) -> list[Path]:
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in inside if path.is_file()]
    scans = [path for path in files if nifti_stem(path)]
    if scans:
        return scans
    if any(is_dicom(path) for path in files):
        return [folder]
    return [path for path in inside if path.is_dir() and holds_dicom(path)]


def _name(scan: Path) -> str:
    return nifti_stem(scan) or (scan.resolve().name if scan.is_dir() else scan.stem)


def predict_files(
    network: nn.Module,
    plan: Plan,
    scans: Sequence[Path],
    out: Path,
    *,
    device: torch.device,
    modality: Modality = "auto",
    overwrite: bool = False,
    on_scan: Callable[[Prediction], None] | None = None,
) -> list[Prediction]:
    """Write `<out>/<name>.nii.gz` for each scan, on the scan's exact grid and affine.

    A scan that can't be used is reported and the others go on; masks that exist are kept.

    Raises:
        DataError: The folder can't be written, or two scans would have one mask.
    """
    targets = [out / f"{_name(scan)}.nii.gz" for scan in scans]
    if len(set(targets)) < len(targets):
        raise DataError(f"{out}: two scans have the same name; predict them into two folders")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: can't be made ({error.strerror}); give another folder") from None
    results = []
    for scan, target in zip(scans, targets, strict=True):
        if target.resolve() == scan.resolve():
            raise DataError(f"{scan}: its mask would replace it; give another folder with -o")
        if target.exists() and not overwrite:
            result = Prediction(
                scan=scan, mask=None, volumes_ml={}, problem=f"{target}: exists; --overwrite"
            )
        else:
            result = _predict(network, plan, scan, target, device, modality)
        results.append(result)
        if on_scan:
            on_scan(result)
    return results


def _predict(
    network: nn.Module,
    plan: Plan,
    scan: Path,
    target: Path,
    device: torch.device,
    modality: Modality,
) -> Prediction:
    try:
        volume = read_image(scan)
        labels = predict_labels(network, volume, plan, device=device, modality=modality)
    except CaseError as error:
        return Prediction(scan=scan, mask=None, volumes_ml={}, problem=str(error))
    try:
        write_mask(target, labels, volume)
    except OSError as error:
        raise DataError(f"{target}: can't be written ({error.strerror}); free space") from None
    millilitres = float(np.prod(volume.spacing)) / 1000
    volumes = {
        "liver": int(np.count_nonzero(labels >= 1)) * millilitres,
        "tumor": int(np.count_nonzero(labels == 2)) * millilitres,
    }
    return Prediction(scan=scan, mask=target, volumes_ml=volumes)
