"""Clean predicted labels by what is known of livers: there is one, and its tumours are in it."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from fedseg.segmentation.boxes import bounding_box

__all__ = ["clean_labels", "lesion_count"]

_TOUCHING = np.ones((3, 3, 3), bool)
"""Voxels belong together where they share a face, an edge or a corner."""

_ROWS = 16
"""Rows of X that are worked on at a time, so that no second volume is needed."""

Labels = npt.NDArray[np.uint8]


def clean_labels(
    labels: Labels, *, largest_liver: bool = True, tumor_in_liver: bool = False
) -> Labels:
    """Take away liver and tumour that can't be.

    A component is one of the region liver (label >= 1), so a tumour counts as part of the liver
    that it touches, and a liver that a tumour cuts in two stays whole.

    Args:
        labels: uint8 `[X, Y, Z]`, on any grid.
        largest_liver: Keep liver (label 1) in the component with the most voxels only.
        tumor_in_liver: Keep tumour (label 2) only where its component has liver that is kept.

    Returns:
        New labels, or the same array where nothing changes.
    """
    if not (largest_liver or tumor_in_liver):
        return labels
    box = bounding_box(labels)
    components, count = ndimage.label(labels[box], _TOUCHING)
    voxels = np.zeros((3, count + 1), np.int64)
    for rows in _slabs(components):
        for label in (1, 2):
            found = components[rows][labels[box][rows] == label]
            voxels[label] += np.bincount(found, minlength=count + 1)
    keeps = np.zeros((3, count + 1), bool)
    keeps[1] = voxels[1] > 0
    if largest_liver and keeps[1].any():
        # A lone tumour, however large, is no liver.
        largest = int(np.where(keeps[1], voxels.sum(0), 0).argmax())
        keeps[1] = np.arange(count + 1) == largest
    keeps[2] = keeps[1] if tumor_in_liver else voxels[2] > 0
    if np.array_equal(keeps[1:], voxels[1:] > 0):
        return labels
    cleaned = labels.copy()
    inside = cleaned[box]
    for rows in _slabs(components):
        inside[rows][~keeps[inside[rows], components[rows]]] = 0
    return cleaned


def lesion_count(labels: Labels) -> int:
    """Count tumours of labels `[X, Y, Z]`: components of label 2, touching by a corner at least."""
    tumor = labels == 2
    return int(ndimage.label(tumor[bounding_box(tumor)], _TOUCHING)[1])


def _slabs(array: np.ndarray) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, len(array), _ROWS)]
