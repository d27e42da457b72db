"""Metrics of the regions `liver` (label >= 1) and `tumor` (label 2), as sums and counts.

Sums and counts add up over cases, sites and rounds, so that the mean over all cases of a federation
is exact and a case where a metric is undefined is counted, never scored 0 or 1: overlap of a region
that is absent in mask and prediction, a surface distance where one of the two is empty.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedseg.data.plan import REGIONS
from fedseg.segmentation.boxes import bounding_box
from fedseg.segmentation.lesions import (
    LESION_COUNTS,
    LESION_OVERLAP,
    count_lesions,
    lesion_summary,
)
from fedseg.segmentation.surface import SURFACE_METRICS, surface_metrics

__all__ = [
    "METRICS",
    "MOST_SUM",
    "OVERLAP_METRICS",
    "TOLERANCE_MM",
    "VOLUME_METRICS",
    "Scoring",
    "add",
    "case_counts",
    "empty_sums",
    "plausible",
    "score",
    "summarise",
    "sums_of_case",
]

OVERLAP_METRICS = ("dice", "iou", "precision", "recall", "volume_similarity")
VOLUME_METRICS = ("volume_ml", "volume_error_ml", "volume_abs_error_ml")
"""The predicted volume, it minus the mask's, and the size of that; mL."""
METRICS = (*OVERLAP_METRICS, *SURFACE_METRICS, *VOLUME_METRICS)
"""Metrics that a case has, by region."""

TOLERANCE_MM = 2.0
"""How far surfaces of NSD may lie apart: what the challenge FLARE 2023 takes for lesions (for
livers it takes 5, which hardly tells good models apart)."""

_COUNTS = ("tp", "fp", "fn")
_LESIONS = "tumor.lesions."
MOST_SUM = 1e15
"""More than any sum over a site's cases has: as many voxels are in ten million scans."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What is measured, and how.

    Attributes:
        distances: Whether surface distances are.
        tolerance_mm: How far surfaces of NSD may lie apart.
        lesion_overlap: IoU that a lesion must pass to count as found.
    """

    distances: bool = True
    tolerance_mm: float = TOLERANCE_MM
    lesion_overlap: float = LESION_OVERLAP


def case_counts(prediction: np.ndarray, truth: np.ndarray) -> dict[str, tuple[int, int, int]]:
    """Count true positive, false positive and false negative voxels of each region.

    Args:
        prediction: Labels `[X, Y, Z]`.
        truth: Labels `[X, Y, Z]` on the same grid.
    """
    # One pass: the nine pairs of labels hold every count of both regions.
    pairs = np.bincount((truth.astype(np.intp) * 3 + prediction).ravel(), minlength=9).reshape(3, 3)
    counts = {}
    for region, lowest in REGIONS.items():
        tp = int(pairs[lowest:, lowest:].sum())
        fp = int(pairs[:lowest, lowest:].sum())
        fn = int(pairs[lowest:, :lowest].sum())
        counts[region] = (tp, fp, fn)
    return counts


def score(tp: float, fp: float, fn: float) -> dict[str, float]:
    """Overlap metrics of one region; those whose denominator is empty are left out.

    Dice 2TP/(2TP+FP+FN), IoU TP/(TP+FP+FN), precision TP/(TP+FP), recall TP/(TP+FN), volume
    similarity 1-|FP-FN|/(2TP+FP+FN) (Taha and Hanbury, BMC Medical Imaging 2015).
    """
    found = {}
    if tp + fp + fn:
        found["dice"] = 2 * tp / (2 * tp + fp + fn)
        found["iou"] = tp / (tp + fp + fn)
        found["volume_similarity"] = 1 - abs(fp - fn) / (2 * tp + fp + fn)
    if tp + fp:
        found["precision"] = tp / (tp + fp)
    if tp + fn:
        found["recall"] = tp / (tp + fn)
    return found


def sums_of_case(
    prediction: np.ndarray,
    truth: np.ndarray,
    *,
    spacing: Sequence[float],
    annotated: Sequence[str] = tuple(REGIONS),
    scoring: Scoring | None = None,
) -> dict[str, float]:
    """One case as sums: the keys of `empty_sums`.

    A region that isn't annotated keeps count 0 and adds no voxels.

    Args:
        prediction: Labels `[X, Y, Z]`.
        truth: Labels `[X, Y, Z]` on the same grid.
        spacing: mm a voxel.
        annotated: Regions that the mask can have.
        scoring: What is measured, and how.
    """
    scoring = scoring or Scoring()
    sums = empty_sums()
    sums["cases"], sums["surfaces"] = 1.0, float(scoring.distances)
    box = bounding_box(np.maximum(prediction, truth) > 0)
    prediction, truth = prediction[box], truth[box]
    millilitres = float(np.prod(spacing)) / 1000
    for region, (tp, fp, fn) in case_counts(prediction, truth).items():
        if region not in annotated:
            continue
        found = score(tp, fp, fn) | _volumes(tp, fp, fn, millilitres)
        regions = [labels >= REGIONS[region] for labels in (prediction, truth)]
        if scoring.distances:
            found |= surface_metrics(*regions, spacing=spacing, tolerance_mm=scoring.tolerance_mm)
        if region == "tumor":
            lesions = count_lesions(*regions, spacing=spacing, overlap=scoring.lesion_overlap)
            sums |= {_LESIONS + name: float(count) for name, count in lesions.items()}
        for metric, value in found.items():
            sums[f"{region}.{metric}.sum"] = value
            sums[f"{region}.{metric}.count"] = 1.0
        for name, count in zip(_COUNTS, (tp, fp, fn), strict=True):
            sums[f"{region}.{name}"] = float(count)
    return sums


def _volumes(tp: int, fp: int, fn: int, millilitres: float) -> dict[str, float]:
    error = (fp - fn) * millilitres
    return {
        "volume_ml": (tp + fp) * millilitres,
        "volume_error_ml": error,
        "volume_abs_error_ml": abs(error),
    }


def empty_sums() -> dict[str, float]:
    """All keys a site may send about an evaluation, at 0.

    `cases`, `skipped`, `surfaces` (cases whose surface distances were asked for),
    `liver.dice.sum`, `liver.dice.count`, ..., `liver.tp`, ..., `tumor.lesions.small.found`, ...
    """
    sums = {"cases": 0.0, "skipped": 0.0, "surfaces": 0.0}
    for region in REGIONS:
        for metric in METRICS:
            sums[f"{region}.{metric}.sum"] = 0.0
            sums[f"{region}.{metric}.count"] = 0.0
        for name in _COUNTS:
            sums[f"{region}.{name}"] = 0.0
    return sums | {_LESIONS + name: 0.0 for name in LESION_COUNTS}


def add(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add sums of cases or sites."""
    total = empty_sums()
    for part in parts:
        for key in total:
            total[key] += part.get(key, 0.0)
    return total


def plausible(sums: Mapping[str, float]) -> bool:
    """Tell whether these can be sums over cases: then `summarise` makes finite numbers of them.

    What a site sends is checked by this: below 0, or no whole number where cases, voxels or lesions
    are counted, it would divide by 0.
    """
    if not set(empty_sums()) <= set(sums):
        return False
    for name, value in sums.items():
        signed = name.endswith("volume_error_ml.sum")
        if not (-MOST_SUM if signed else 0) <= value <= MOST_SUM:
            return False
        if not name.endswith(".sum") and value != int(value):
            return False
    return True


def summarise(sums: Mapping[str, float]) -> dict[str, float | int | None]:
    """Turn sums into what a person reads.

    Returns:
        `liver.dice` (mean over the cases that define it, None where none does), `liver.dice.cases`
        (how many do), for overlap also `liver.dice.pooled` (over all voxels of all cases), ...,
        `tumor.lesion_f1`, ... (see `lesions.lesion_summary`), `cases` and `skipped`. Surface
        distances are there only if they were asked for.
    """
    result: dict[str, float | int | None] = {
        "cases": int(sums["cases"]),
        "skipped": int(sums.get("skipped", 0)),
    }
    asked = [name for name in METRICS if name not in SURFACE_METRICS or sums.get("surfaces")]
    for region in REGIONS:
        pooled = score(*(sums[f"{region}.{name}"] for name in _COUNTS))
        for metric in asked:
            count = sums[f"{region}.{metric}.count"]
            mean = sums[f"{region}.{metric}.sum"] / count if count else None
            result[f"{region}.{metric}"] = mean
            result[f"{region}.{metric}.cases"] = int(count)
            if metric in OVERLAP_METRICS:
                result[f"{region}.{metric}.pooled"] = pooled.get(metric)
    lesions = lesion_summary({name: sums[_LESIONS + name] for name in LESION_COUNTS})
    return result | {f"tumor.{name}": value for name, value in lesions.items()}
