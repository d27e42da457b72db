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


_CERTAIN = 40.0
"""Logits by which background leads outside the crop."""


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
    """Apply `[new, old]` along an axis of `[x, y, z]`, without turning the volume for it."""
    if axis == 0:
        return (matrix @ volume.flatten(1)).reshape(-1, *volume.shape[1:])
    return matrix @ volume if axis == 1 else volume @ matrix.T


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


def upsample_argmax(
    logits: torch.Tensor,
    shape: Sequence[int],
    *,
    grid: Sequence[int] | None = None,
    box: Sequence[slice] | None = None,
    rows: int = 16,
) -> np.ndarray:
    """Bring logits `[C, x, y, z]` to `[X, Y, Z]` and take the largest class.

    Works `rows` of X at a time and, in each, only where a class other than 0 is ahead somewhere
    near: weights are never negative, so elsewhere none can be ahead after resampling either.

    Args:
        logits: Class scores, of a box in a grid where the rest is class 0.
        shape: Number of voxels that the whole grid becomes.
        grid: Size of that grid; the logits' own by default.
        box: Where the logits lie in it; all of it by default.
        rows: Memory is that of so many rows of float logits.

    Returns:
        Labels uint8 `[X, Y, Z]`.
    """
    grid = logits.shape[1:] if grid is None else grid
    box = [slice(0, n) for n in grid] if box is None else box
    along_x, along_y, along_z = (
        _matrix(old, new)[:, part] for old, new, part in zip(grid, shape, box, strict=True)
    )
    labels = np.zeros(tuple(shape), np.uint8)
    for start in range(0, shape[0], rows):
        weights_x = along_x[start : start + rows]
        x = _span(weights_x.amax(0) > 0)
        # Outside the box the lead is -_CERTAIN; counted from there it is 0 and needs no weights.
        lead = logits[1:, x] - logits[:1, x] + _CERTAIN
        ahead = (lead > _CERTAIN).any(0).any(0)
        if not ahead.any():
            continue
        new_y, new_z = _reached(along_y, ahead.any(1)), _reached(along_z, ahead.any(0))
        y, z = _span(along_y[new_y].amax(0) > 0), _span(along_z[new_z].amax(0) > 0)
        slab = torch.tensordot(weights_x[:, x], lead[..., y, z], dims=([1], [1]))
        slab = along_y[new_y, y] @ slab @ along_z[new_z, z].T
        best, found = slab.max(1)
        found = torch.where(best > _CERTAIN, found + 1, 0).to(torch.uint8)
        labels[start : start + rows, new_y, new_z] = found.numpy()
    return labels


def _span(wanted: torch.Tensor) -> slice:
    """From the first to the last True of `[n]`."""
    where = wanted.nonzero()[:, 0]
    return slice(int(where[0]), int(where[-1]) + 1) if len(where) else slice(0, 0)


def _reached(matrix: torch.Tensor, old: torch.Tensor) -> slice:
    """New voxels on which any of the old ones `[old]`, given as True, has weight."""
    return _span(matrix[:, _span(old)].amax(1) > 0)
