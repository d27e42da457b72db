"""Checks of the mask by itself: empty, in pieces, cut, too small or large, tumour outside."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from fedseg.data.checks.checked_case import CheckedCase
from fedseg.data.checks.findings import Finding, Severity

__all__ = ["contents", "field_of_view", "liver_pieces", "liver_volume", "tumor_outside"]

_LIVER_ML = (200.0, 5000.0)
_PIECE_ML = 5.0
_SPECK_ML = 0.1
_TOUCHING = np.ones((3, 3, 3), np.bool_)


def contents(case: CheckedCase) -> Iterator[Finding]:
    """A mask without liver, or with tumours that the site says it doesn't annotate."""
    if case.labelled is None:
        yield case.finding(
            "empty mask",
            got="no labelled voxel",
            expected="a liver",
            mend="export the mask again; remove the case if it isn't annotated",
        )
    elif "tumor" not in case.config.labels and (case.mask.array == 2).any():
        yield case.finding(
            "labels",
            got="tumor (2)",
            expected="liver alone, as labels in site.toml says",
            mend='set labels = "liver,tumor" if every tumour is annotated',
        )


def field_of_view(case: CheckedCase) -> Iterator[Finding]:
    """A liver that reaches the end of the scan: part of it isn't there."""
    if case.cut:
        yield case.finding(
            "truncated field of view",
            severity="note",
            got=f"a liver that reaches the end of the scan ({', '.join(case.cut)})",
            expected="a whole liver",
            mend="nothing to mend if the scan is like that; its liver volume is no liver's",
        )


def liver_volume(case: CheckedCase) -> Iterator[Finding]:
    """A volume that no whole liver has. Without a whole one on the scan nothing is said."""
    if case.labelled is None or case.cut:
        return
    volume = np.count_nonzero(case.mask.array) * case.voxel_ml
    if not _LIVER_ML[0] <= volume <= _LIVER_ML[1]:
        yield case.finding(
            "liver's volume",
            got=f"{volume:.3g} mL",
            expected=f"{_LIVER_ML[0]:.0f} to {_LIVER_ML[1]:.0f} mL",
            mend="check the voxel size, the label values and whether all of it is annotated",
        )


def liver_pieces(case: CheckedCase) -> Iterator[Finding]:
    """More than one piece; small ones, or those of a cut liver, are no more than a note."""
    if case.labelled is None:
        return
    pieces, _ = ndimage.label(case.mask.array[case.labelled] > 0, structure=_TOUCHING)
    volumes = np.sort(np.bincount(pieces.ravel())[1:])[::-1] * case.voxel_ml
    others = volumes[1:][volumes[1:] >= _SPECK_ML]
    if not others.size:
        return
    severity: Severity = "warning" if others[0] >= _PIECE_ML and not case.cut else "note"
    yield case.finding(
        "liver in pieces",
        severity=severity,
        got=f"{others.size + 1} pieces of {', '.join(f'{v:.3g}' for v in volumes[:3])} mL"
        + (", ..." if others.size > 2 else ""),
        expected="one",
        mend="look at the mask; remove what isn't liver",
    )


def tumor_outside(case: CheckedCase) -> Iterator[Finding]:
    """Tumours that don't touch the liver: not of the liver, or on voxels of another organ."""
    if case.labelled is None:
        return
    labels = case.mask.array[case.labelled]
    tumors, count = ndimage.label(labels == 2, structure=_TOUCHING)
    if not count:
        return
    near = _grown(labels == 1)
    inside = np.unique(tumors[near & (tumors > 0)])
    volumes = np.bincount(tumors.ravel(), minlength=count + 1) * case.voxel_ml
    volumes[[0, *inside]] = 0
    outside = np.flatnonzero(volumes)
    if outside.size:
        yield case.finding(
            "tumor outside the liver",
            got=f"{outside.size} of {count} tumors, {volumes.sum():.3g} mL, that touch no liver",
            expected="tumors of the liver",
            mend="look at the mask; label the liver around them or remove them",
        )


def _grown(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Mask and all its neighbours, 26 of each voxel."""
    grown: npt.NDArray[np.bool_] = ndimage.maximum_filter(mask, size=3)
    return grown
