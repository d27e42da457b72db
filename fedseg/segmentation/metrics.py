"""Overlap metrics of the regions `liver` (label >= 1) and `tumor` (label 2), as sums and counts.

Sums and counts add up over cases, sites and rounds, so that the mean over all cases of a federation
is exact and a case without the region is counted, never scored 0 or 1.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fedseg.data.plan import REGIONS

__all__ = ["METRICS", "add", "case_counts", "score", "summarise", "sums_of_case"]

METRICS = ("dice", "iou", "precision", "recall", "volume_similarity")
_COUNTS = ("tp", "fp", "fn")


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
    """Metrics of one region; those whose denominator is empty are left out.

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
    prediction: np.ndarray, truth: np.ndarray, *, annotated: Sequence[str] = tuple(REGIONS)
) -> dict[str, float]:
    """One case as sums: `liver.dice.sum`, `liver.dice.count`, ..., `liver.tp`, ..., `cases`.

    A region that isn't annotated keeps count 0 and adds no voxels.
    """
    sums = empty_sums()
    sums["cases"] = 1.0
    for region, (tp, fp, fn) in case_counts(prediction, truth).items():
        if region not in annotated:
            continue
        for metric, value in score(tp, fp, fn).items():
            sums[f"{region}.{metric}.sum"] = value
            sums[f"{region}.{metric}.count"] = 1.0
        for name, count in zip(_COUNTS, (tp, fp, fn), strict=True):
            sums[f"{region}.{name}"] = float(count)
    return sums


def empty_sums() -> dict[str, float]:
    """All keys a site may send about an evaluation, at 0."""
    sums = {"cases": 0.0, "skipped": 0.0}
    for region in REGIONS:
        for metric in METRICS:
            sums[f"{region}.{metric}.sum"] = 0.0
            sums[f"{region}.{metric}.count"] = 0.0
        for name in _COUNTS:
            sums[f"{region}.{name}"] = 0.0
    return sums


def add(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add sums of cases or sites."""
    total = empty_sums()
    for part in parts:
        for key in total:
            total[key] += part.get(key, 0.0)
    return total


def summarise(sums: Mapping[str, float]) -> dict[str, float | int | None]:
    """Turn sums into what a person reads.

    Returns:
        `liver.dice` (mean over the cases that define it, None where none does), `liver.dice.cases`
        (how many do), `liver.dice.pooled` (over all voxels of all cases), ..., and `cases`.
    """
    result: dict[str, float | int | None] = {
        "cases": int(sums["cases"]),
        "skipped": int(sums.get("skipped", 0)),
    }
    for region in REGIONS:
        pooled = score(*(sums[f"{region}.{name}"] for name in _COUNTS))
        for metric in METRICS:
            count = sums[f"{region}.{metric}.count"]
            mean = sums[f"{region}.{metric}.sum"] / count if count else None
            result[f"{region}.{metric}"] = mean
            result[f"{region}.{metric}.cases"] = int(count)
            result[f"{region}.{metric}.pooled"] = pooled.get(metric)
    return result
