"""Which lesions are found: counts by size that add up over cases and sites."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from fedseg.segmentation.boxes import bounding_box

__all__ = ["BANDS", "LESION_COUNTS", "LESION_OVERLAP", "count_lesions", "lesion_summary"]

BANDS = {"small": 10.0, "medium": 20.0, "large": math.inf}
"""Size band to the diameter in mm under which a lesion is in it, of a ball of the same volume."""

LESION_OVERLAP = 0.5
"""IoU that a lesion must pass to count as found: that of LiTS's own scoring program
(`detect_lesions` in its `calc_metric.py`; Bilic et al., Medical Image Analysis 2023)."""

_OUTCOMES = ("found", "missed", "false")

LESION_COUNTS = (
    *(f"{band}.{outcome}" for band in BANDS for outcome in _OUTCOMES),
    *("cases", "free.cases", "free.false"),
)
"""Lesions of each band that are found, missed, or predicted falsely; annotated cases; those of them
without any lesion, and the false ones there."""

_Array = np.ndarray


def count_lesions(
    prediction: _Array,
    truth: _Array,
    *,
    spacing: Sequence[float],
    overlap: float = LESION_OVERLAP,
) -> dict[str, int]:
    """Count the lesions of a case: `LESION_COUNTS`.

    A lesion is a 26-connected component. As LiTS does it, lesions that lie in one predicted one are
    taken together, then predicted pieces that lie mostly in the same lesions; together they are
    found where their IoU is over `overlap` (0: where they touch). A predicted lesion is false where
    it has no part in a found one. Missed and found lesions count by their own size, false ones by
    theirs.

    Args:
        prediction: Bool `[X, Y, Z]`.
        truth: Bool `[X, Y, Z]` on the same grid.
        spacing: mm a voxel.
        overlap: IoU that must be passed.
    """
    box = bounding_box(prediction | truth)
    predicted, predicted_sizes = _components(prediction[box])
    real, real_sizes = _components(truth[box])
    found, true_pieces = _match(predicted, real, predicted_sizes, real_sizes, overlap)
    voxel = float(np.prod(spacing))
    counts = dict.fromkeys(LESION_COUNTS, 0)
    counts["cases"] = 1
    for name, sizes in (
        ("found", real_sizes[found]),
        ("missed", real_sizes[~found]),
        ("false", predicted_sizes[~true_pieces]),
    ):
        diameters = np.cbrt(6 / math.pi * sizes * voxel)
        bands = np.searchsorted(list(BANDS.values()), diameters, side="right")
        for band, count in zip(BANDS, np.bincount(bands, minlength=len(BANDS)), strict=True):
            counts[f"{band}.{name}"] = int(count)
    if not real_sizes.size:
        counts["free.cases"] = 1
        counts["free.false"] = len(predicted_sizes)
    return counts


def _components(region: _Array) -> tuple[_Array, _Array]:
    """Label components from 1 on; also their numbers of voxels."""
    labels, _ = ndimage.label(region, np.ones((3, 3, 3)))
    return labels, np.bincount(labels.ravel(), minlength=1)[1:]


def _match(
    predicted: _Array,
    real: _Array,
    predicted_sizes: _Array,
    real_sizes: _Array,
    overlap: float,
) -> tuple[_Array, _Array]:
    """Tell which real lesions are found, and which predicted ones have a part in that."""
    found = np.zeros(len(real_sizes), bool)
    true_pieces = np.zeros(len(predicted_sizes), bool)
    both = (predicted > 0) & (real > 0)
    width = len(real_sizes)
    pairs, voxels = np.unique(
        (predicted[both].astype(np.int64) - 1) * width + real[both] - 1, return_counts=True
    )
    if not pairs.size:
        return found, true_pieces
    piece, lesion = np.divmod(pairs, width)
    # Lesions are grouped by the predicted one that covers most of each.
    group = np.full(width, -1)
    first = _largest(lesion, voxels)
    group[lesion[first]] = piece[first]
    # Then each predicted one goes to the group in which most of it lies.
    parts, where = np.unique(piece * len(predicted_sizes) + group[lesion], return_inverse=True)
    shared = np.bincount(where, weights=voxels)
    piece, chosen = np.divmod(parts, len(predicted_sizes))
    first = _largest(piece, shared)
    piece, chosen, shared = piece[first], chosen[first], shared[first]
    groups = len(predicted_sizes)
    common = np.bincount(chosen, weights=shared, minlength=groups)
    grouped = group >= 0
    union = np.bincount(chosen, weights=predicted_sizes[piece], minlength=groups) - common
    union += np.bincount(group[grouped], weights=real_sizes[grouped], minlength=groups)
    good = common > overlap * union
    found[grouped] = good[group[grouped]]
    true_pieces[piece] = good[chosen]
    return found, true_pieces


def _largest(key: _Array, amount: _Array) -> _Array:
    """Position of the largest amount for each key; of equal ones, the first."""
    order = np.lexsort((np.arange(len(key)), -amount, key))
    _, first = np.unique(key[order], return_index=True)
    return order[first]


def lesion_summary(counts: Mapping[str, float]) -> dict[str, float | int | None]:
    """Turn `LESION_COUNTS` into what a person reads; what no lesion defines is None.

    Recall found/(found+missed), precision found/(found+false), F1 2 found/(2 found+missed+false).

    Returns:
        `lesion_precision`, `lesion_recall`, `lesion_f1`, the same of each band, such as
        `lesion_f1_small`; counts `lesions`, `lesions_found`, `lesions_false`, of each band, too;
        false ones a scan, and a scan without lesions.
    """
    total = {name: sum(counts[f"{band}.{name}"] for band in BANDS) for name in _OUTCOMES}
    summary = _rates("", total)
    for band in BANDS:
        summary |= _rates(f"_{band}", {name: counts[f"{band}.{name}"] for name in _OUTCOMES})
    free = counts["free.cases"]
    summary["lesions_false_per_scan"] = _ratio(total["false"], counts["cases"])
    summary["lesion_free_cases"] = int(free)
    summary["lesions_false_per_lesion_free_scan"] = _ratio(counts["free.false"], free)
    return summary


def _rates(suffix: str, counts: Mapping[str, float]) -> dict[str, float | int | None]:
    found, missed, false = (counts[name] for name in _OUTCOMES)
    return {
        f"lesion_precision{suffix}": _ratio(found, found + false),
        f"lesion_recall{suffix}": _ratio(found, found + missed),
        f"lesion_f1{suffix}": _ratio(2 * found, 2 * found + missed + false),
        f"lesions{suffix}": int(found + missed),
        f"lesions_found{suffix}": int(found),
        f"lesions_false{suffix}": int(false),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
