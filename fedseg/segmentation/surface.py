"""Surface distances of a region in mm: HD95, ASSD, NSD."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from fedseg.segmentation.boxes import Box, bounding_box

__all__ = ["SURFACE_METRICS", "surface_distances", "surface_metrics"]

SURFACE_METRICS = ("hd95", "assd", "nsd")

_NEAR_MM = 20.0
"""How far around a surface the other one is looked for first."""


def surface_metrics(
    prediction: np.ndarray, truth: np.ndarray, *, spacing: Sequence[float], tolerance_mm: float
) -> dict[str, float]:
    """Metrics of two surfaces; nothing where one of the regions is empty.

    HD95: the larger of both directions' 95th percentiles, as DeepMind's surface-distance, MONAI and
    Metrics Reloaded (Maier-Hein et al., Nature Methods 2024) have it; medpy takes the percentile of
    both directions together, which is never larger. ASSD: mean over all points of both surfaces
    (Heimann et al., IEEE TMI 2009). NSD: share of all points of both surfaces within the tolerance
    (Nikolov et al., arXiv 1809.04430). Each surface voxel counts alike.

    Args:
        prediction: Bool `[X, Y, Z]`.
        truth: Bool `[X, Y, Z]` on the same grid.
        spacing: mm a voxel.
        tolerance_mm: How far surfaces of NSD may lie apart.
    """
    there, back = surface_distances(prediction, truth, spacing=spacing)
    if not there.size:
        return {}
    both = np.concatenate([there, back])
    return {
        "hd95": float(max(np.percentile(there, 95), np.percentile(back, 95))),
        "assd": float(both.mean()),
        "nsd": float((both <= tolerance_mm + 1e-9).mean()),  # 3 x 0.7 is a bit over 2.1
    }


def surface_distances(
    one: np.ndarray, other: np.ndarray, *, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm of each surface voxel of either region to the nearest one of the other.

    A surface voxel is one of the region with one of its 6 neighbours, or the side of the volume,
    outside. Both results are empty where a region is.
    """
    box = bounding_box(one | other)
    first, second = _surface(one[box]), _surface(other[box])
    if not (first.any() and second.any()):
        return np.empty(0), np.empty(0)
    return _to_nearest(first, second, spacing), _to_nearest(second, first, spacing)


def _surface(region: np.ndarray) -> np.ndarray:
    surface: np.ndarray = region & ~ndimage.binary_erosion(region)
    return surface


def _to_nearest(here: np.ndarray, there: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distances in mm of the points `here` to the nearest ones `there`.

    Takes time by the volume, however far apart they lie; a tree of points is faster where they are
    close, but takes minutes for a prediction scattered over a whole CT. So a box around `here` is
    tried first where it is much smaller than the volume.
    """
    margin = _NEAR_MM
    for _ in range(2):
        box = _grown(bounding_box(here), margin, here.shape, spacing)
        if 2 * here[box].size > here.size or not there[box].any():
            break
        apart = _transformed(here[box], there[box], spacing)
        # All beyond the box is farther away than the margin.
        if apart.max() <= margin:
            return apart
        margin = float(apart.max())  # no nearest point lies beyond it
    return _transformed(here, there, spacing)


def _grown(box: Box, margin: float, shape: tuple[int, ...], spacing: Sequence[float]) -> Box:
    steps = [math.ceil(margin / step) for step in spacing]
    x, y, z = (
        slice(max(side.start - more, 0), min(side.stop + more, size))
        for side, more, size in zip(box, steps, shape, strict=True)
    )
    return (x, y, z)


def _transformed(here: np.ndarray, there: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    # Where the nearest point lies, rather than how far for each voxel: a quarter of the memory.
    nearest = ndimage.distance_transform_edt(
        ~there, sampling=spacing, return_distances=False, return_indices=True
    )
    squared = np.zeros(np.count_nonzero(here))
    for step, found, place in zip(spacing, nearest, np.nonzero(here), strict=True):
        squared += ((found[here] - place) * step) ** 2
    apart: np.ndarray = np.sqrt(squared)
    return apart
