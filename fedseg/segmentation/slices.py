"""Draw volumes side by side: their middle slices as one PNG."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedseg.segmentation.overlay import encode_png

__all__ = ["draw_slices"]

_SIDE = 144
"""Pixels of a slice's longest side."""

_GAP = 6


def draw_slices(
    volumes: Sequence[np.ndarray], *, window: tuple[float, float], spacing: Sequence[float]
) -> bytes:
    """Draw one column for each volume: axial, coronal and sagittal middle slice, on white.

    Voxels are drawn as they are, not smoothed. Axial slices are seen from the feet, as in
    `overlay.draw_overlay`, coronal ones from the front and sagittal ones from the patient's left.

    Args:
        volumes: `[x, y, z]` in RAS axis order, all of one shape.
        window: What is black and white.
        spacing: Voxel size in mm.

    Returns:
        A PNG file.
    """
    columns = [_column(volume, window, spacing) for volume in volumes]
    gap = np.full((columns[0].shape[0], _GAP), 255, np.uint8)
    parts = [part for column in columns for part in (column, gap)]
    grey = np.concatenate([gap, *parts], axis=1)
    return encode_png(np.repeat(grey[..., None], 3, axis=2))


def _column(
    volume: np.ndarray, window: tuple[float, float], spacing: Sequence[float]
) -> npt.NDArray[np.uint8]:
    low, high = window
    grey = np.clip((volume - low) / (high - low), 0, 1) * 255
    x, y, z = (n // 2 for n in volume.shape)
    across, deep, up = (n * mm for n, mm in zip(volume.shape, spacing, strict=True))
    scale = _SIDE / max(across, deep, up)
    width = round(max(across, deep) * scale)
    rows = []
    for plane, size in (
        (grey[::-1, ::-1, z].T, (deep, across)),
        (grey[::-1, y, ::-1].T, (up, across)),
        (grey[x, ::-1, ::-1].T, (up, deep)),
    ):
        pixels = _enlarged(plane, round(size[0] * scale), round(size[1] * scale))
        empty = width - pixels.shape[1]
        rows.append(np.pad(pixels, ((_GAP, 0), (0, empty)), constant_values=255))
    rows.append(np.full((_GAP, width), 255, np.uint8))
    return np.concatenate(rows)


def _enlarged(plane: np.ndarray, height: int, width: int) -> npt.NDArray[np.uint8]:
    rows = np.arange(height) * plane.shape[0] // height
    columns = np.arange(width) * plane.shape[1] // width
    pixels: npt.NDArray[np.uint8] = np.round(plane[np.ix_(rows, columns)]).astype(np.uint8)
    return pixels
