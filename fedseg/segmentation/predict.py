"""Predict masks for new scans with a model file."""

import functools
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from torch import nn

from fedseg.data.cases import nifti_stem
from fedseg.data.plan import Plan
from fedseg.data.preprocess import Modality
from fedseg.data.scans import mask_names
from fedseg.data.volumes import Volume, read_image, read_mask, write_mask
from fedseg.data.whole_file import replace_file, writing
from fedseg.errors import CaseError, DataError, ModelError, why_left_out
from fedseg.segmentation.inference import (
    OnWindows,
    predict_labels,
    ways_to_predict,
)
from fedseg.segmentation.overlay import draw_overlay
from fedseg.segmentation.postprocess import clean_labels
from fedseg.segmentation.volume_table import (
    VOLUMES,
    Findings,
    add_row,
    findings_of,
    read_rows,
)

__all__ = ["Prediction", "predict_files"]

_Label = Callable[[Volume, OnWindows], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What became of one scan.

    Attributes:
        scan: The input.
        mask: Its mask, None where there is a problem.
        findings: What the mask has, None where there is a problem.
        kept: The mask was there before.
        seconds: What it took, None for a mask that was there before.
        problem: Why there is no mask.
    """

    scan: Path
    mask: Path | None = None
    findings: Findings | None = None
    kept: bool = False
    seconds: float | None = None
    problem: str | None = None


def predict_files(
    network: nn.Module,
    plan: Plan,
    scans: Sequence[Path],
    out: Path,
    *,
    device: torch.device,
    modality: Modality = "auto",
    flips: Sequence[int] = (),
    largest_liver: bool = True,
    tumor_in_liver: bool = False,
    overlay: bool = False,
    overwrite: bool = False,
    on_scan: Callable[[Prediction], None] | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> list[Prediction]:
    """Write `<out>/<name>.nii.gz` for each scan, on the scan's exact grid and affine.

    Each scan has a row in `<out>/volumes.csv`. A scan that can't be used is reported and the others
    go on; masks that exist are kept, so that a folder goes on where it stopped.

    Args:
        network: The network.
        plan: Its plan.
        scans: Scans, see `data.scans.scans_of`.
        out: Folder of the masks.
        device: Where to begin; see `ways_to_predict` for what happens where memory runs out.
        modality: What the scans are.
        flips: As in `predict_logits`.
        largest_liver: As in `clean_labels`.
        tumor_in_liver: As in `clean_labels`.
        overlay: Draw `<out>/<name>.png`, too, see `draw_overlay`.
        overwrite: Replace masks that exist.
        on_scan: Called after each scan.
        on_progress: Called with the number of scans done, the one in work by its share.

    Raises:
        DataError: The folder can't be written, or a mask would replace a scan or another mask.
    """
    names = mask_names(scans)
    table = out / VOLUMES
    _check_targets(scans, [out / f"{name}.nii.gz" for name in names])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: can't be made ({error.strerror}); give another folder") from None
    read_rows(table)
    ways = ways_to_predict(plan, device)

    def label(scan: Volume, on_windows: OnWindows) -> np.ndarray:
        labels = predict_labels(
            network,
            scan,
            plan,
            device=device,
            modality=modality,
            flips=flips,
            ways=ways,
            on_windows=on_windows,
        )
        return clean_labels(labels, largest_liver=largest_liver, tumor_in_liver=tumor_in_liver)

    results = []
    for index, (scan, name) in enumerate(zip(scans, names, strict=True)):
        if (out / f"{name}.nii.gz").exists() and not overwrite:
            result = _kept(scan, out, name, overlay=overlay)
        else:
            report = functools.partial(_report, on_progress, index)
            result = _predicted(scan, out, name, label, report, overlay=overlay)
        results.append(result)
        if on_progress:
            on_progress(index + 1)
        if on_scan:
            on_scan(result)
    return results


def _report(
    on_progress: Callable[[float], None] | None, before: int, windows: int, total: int
) -> None:
    if on_progress:
        on_progress(before + windows / total)


def _check_targets(scans: Sequence[Path], targets: Sequence[Path]) -> None:
    inputs = {scan.resolve() for scan in scans}
    for target in targets:
        if target.resolve() in inputs:
            raise DataError(
                f"{target}: a mask would replace this scan; give another folder with -o"
            )


def _predicted(
    scan: Path, out: Path, name: str, label: _Label, report: OnWindows, *, overlay: bool
) -> Prediction:
    began = time.monotonic()
    target = out / f"{name}.nii.gz"
    try:
        volume = read_image(scan)
        labels = label(volume, report)
        picture = _drawn(volume, labels) if overlay else None
        findings = findings_of(labels, volume)
    except (CaseError, ModelError, MemoryError, RuntimeError) as error:
        return Prediction(scan=scan, problem=why_left_out(scan, error))
    with writing(out, kind="folder"):
        write_mask(target, labels, volume)
        if picture:
            replace_file(out / f"{name}.png", picture)
        seconds = time.monotonic() - began
        add_row(out / VOLUMES, name, findings, seconds)
    return Prediction(scan=scan, mask=target, findings=findings, seconds=seconds)


def _kept(scan: Path, out: Path, name: str, *, overlay: bool) -> Prediction:
    """Take a mask that exists; what a run that was killed left undone beside it is done now."""
    target, picture = out / f"{name}.nii.gz", out / f"{name}.png"
    findings = _known(read_rows(out / VOLUMES).get(name, {}))
    try:
        if not _same_grid(target, scan):
            raise CaseError(target, f"exists, and isn't on the grid of {scan}", "say --overwrite")
        if findings is None or (overlay and not picture.exists()):
            volume = read_image(scan)
            labels = read_mask(target, image=volume).array
            found = findings_of(labels, volume)
            with writing(out, kind="folder"):
                if overlay and not picture.exists():
                    replace_file(picture, _drawn(volume, labels))
                if findings is None:
                    add_row(out / VOLUMES, name, found, None)
            findings = found
    except (CaseError, MemoryError, RuntimeError) as error:
        return Prediction(scan=scan, problem=why_left_out(scan, error))
    return Prediction(scan=scan, mask=target, findings=findings, kept=True)


def _known(row: Mapping[str, str]) -> Findings | None:
    try:
        return Findings(
            liver_ml=float(row["liver_ml"]),
            tumor_ml=float(row["tumor_ml"]),
            lesions=int(row["lesions"]),
        )
    except (KeyError, ValueError, TypeError):  # an edited table
        return None


def _same_grid(mask: Path, scan: Path) -> bool:
    """Compare headers; that of a DICOM series would take reading all of it."""
    if nifti_stem(scan) is None:
        return True
    try:
        one, other = nib.load(mask), nib.load(scan)
        return one.shape == other.shape and np.allclose(one.affine, other.affine, atol=1e-3)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error):
        return False


def _drawn(scan: Volume, labels: np.ndarray) -> bytes:
    return draw_overlay(scan.array, labels, spacing=scan.spacing)
