"""Resample volumes between grids that cover the same box, one axis at a time.

Torch's trilinear interpolation has no antialiasing in 3D, and a CT taken from 0.7 mm to 3 mm
without it keeps all its noise. A triangle filter widened to the coarser grid is one small matrix
an axis.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["grid_shape", "resample", "resample_labels", "upsample_argmax"]


def grid_shape(
    shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]
) -> tuple[int, int, int]:
    """Number of voxels at the target spacing (mm) that cover the same box, at least 1 an axis."""
    x, y, z = (
        max(1, round(n * mm / wanted)) for n, mm, wanted in zip(shape, spacing, target, strict=True)
    )
    return x, y, z


@functools.lru_cache(maxsize=64)
def _matrix(old: int, new: int) -> torch.Tensor:
    """Weights `[new, old]` of a triangle filter; rows sum to 1, so borders repeat."""
    scale = old / new
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale - 0.5
    distance = (torch.arange(old, dtype=torch.float64)[None] - centres[:, None]).abs()
    weights = (1 - distance / max(scale, 1.0)).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).float()


def _along(volume: torch.Tensor, axis: int, matrix: torch.Tensor) -> torch.Tensor:
    return torch.movedim(torch.tensordot(matrix, volume, dims=([1], [axis])), 0, axis)


def resample(volume: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Resample float `[X, Y, Z]` (antialiased linear) to another number of voxels."""
    # The axis that shrinks most goes first: the others then have less to do.
    order = sorted(range(3), key=lambda axis: shape[axis] / volume.shape[axis])
    for axis in order:
        if volume.shape[axis] != shape[axis]:
            volume = _along(volume, axis, _matrix(volume.shape[axis], shape[axis]))
    return volume


def resample_labels(labels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Resample labels 0, 1, 2: a voxel belongs to a region that fills at least half of it."""
    if tuple(labels.shape) == tuple(shape):
        return labels
    result = np.zeros(shape, np.uint8)
    for label in (1, 2):
        region = torch.from_numpy((labels >= label).astype(np.float32))
        result[(resample(region, shape) >= 0.5).numpy()] = label
    return result


def upsample_argmax(logits: torch.Tensor, shape: Sequence[int], *, rows: int = 32) -> np.ndarray:
    """Bring logits `[C, x, y, z]` to `[X, Y, Z]` and take the largest class.

    Works `rows` of X at a time, so that memory stays at one slab of float logits.

    Returns:
        Labels uint8 `[X, Y, Z]`.
    """
    matrices = [_matrix(logits.shape[axis + 1], shape[axis]) for axis in range(3)]
    labels = np.empty(tuple(shape), np.uint8)
    for start in range(0, shape[0], rows):
        slab = _along(logits, 1, matrices[0][start : start + rows])
        slab = _along(_along(slab, 2, matrices[1]), 3, matrices[2])
        labels[start : start + rows] = slab.argmax(0).to(torch.uint8).numpy()
    return labels
