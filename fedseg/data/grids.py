"""Check where voxels lie: affines of volumes, and whether two grids are one."""

from pathlib import Path

import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation

from fedseg.errors import CaseError

__all__ = ["check_affine", "check_apart", "farthest_corner", "ras_affine"]

_MAX_EXTENT = 3000.0
"""mm along an axis; a wrong unit would resample to more voxels than memory holds."""

_MAX_SHEAR = 1.0
"""Degrees off a right angle; voxels are measured by their edges, at 1 degree 0.02% too large."""


def ras_affine(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the affine that a volume has once its axes are in RAS order."""
    turned: np.ndarray = affine @ inv_ornt_aff(io_orientation(affine), shape)
    return turned


def check_affine(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> None:
    """Refuse an affine that is singular or sheared, or can't be in mm.

    Raises:
        CaseError: It is.
    """
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / np.where(sizes > 0, sizes, 1)
    finite = np.all(np.isfinite(affine)) and np.all(np.isfinite(directions))
    if not finite or abs(np.linalg.det(directions)) < 1e-3:
        raise CaseError(
            path,
            "affine is singular or not finite, expected three directions",
            "export it with its geometry",
        )
    cosines = np.abs(directions.T @ directions - np.eye(3))
    shear = float(np.degrees(np.arcsin(np.clip(cosines.max(), 0, 1))))
    if shear > _MAX_SHEAR:
        raise CaseError(
            path,
            f"sheared: axes at {90 - shear:.3g} degrees, expected right angles",
            "reformat it without gantry tilt or shear",
        )
    extent = sizes * shape
    if extent.min() < 1 or extent.max() > _MAX_EXTENT:
        raise CaseError(
            path,
            f"covers {' x '.join(f'{mm:.3g}' for mm in extent)} mm, expected 1 to {_MAX_EXTENT:g}",
            "correct its voxel size: it must be in mm",
        )


def farthest_corner(shape: tuple[int, ...], difference: np.ndarray) -> float:
    """Return how far, in mm, two affines put a corner of one volume apart at most."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    return float(np.linalg.norm((difference @ corners)[:3], axis=0).max())


def check_apart(path: Path, shape: tuple[int, ...], difference: np.ndarray, most: float) -> None:
    """Refuse a mask whose affine differs from its image's by more than `most` mm at a corner.

    Raises:
        CaseError: It does.
    """
    apart = farthest_corner(shape, difference)
    if apart > most:
        raise CaseError(
            path,
            f"affine puts the mask {apart:.3g} mm away from its image",
            "re-export the mask on the image's grid",
        )
