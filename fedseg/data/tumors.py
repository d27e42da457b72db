"""Implant synthetic tumours into healthy livers, of phantoms and of real scans alike."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.special import ndtr

__all__ = ["BACKGROUND", "LIVER", "TUMOR", "implant_tumors", "smooth_field"]

BACKGROUND, LIVER, TUMOR = 0, 1, 2

EDGE_SIGMA_MM = (1.2, 2.1)
BORDER_MM = (1.0, 3.0)
RADIUS_WEIGHTS = (0.3, 0.35, 0.25, 0.1)
TEXTURE = 0.22
DEFORMATION = 0.15

FloatArray = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def smooth_field(
    rng: np.random.Generator, shape: Sequence[int], *, spacing: Sequence[float], length_mm: float
) -> FloatArray:
    """Draw a smooth random field of zero mean and unit variance.

    Args:
        rng: Source of randomness.
        shape: Voxels of the three axes.
        spacing: Voxel size of the three axes, mm.
        length_mm: Distance over which values stay alike.

    Returns:
        The field, float32 [X, Y, Z].
    """
    extents = [size * step for size, step in zip(shape, spacing, strict=True)]
    nodes = [np.arange(-2, extent / length_mm + 3) * length_mm for extent in extents]
    field = rng.standard_normal([len(axis) for axis in nodes], dtype=np.float32)
    for size, step, axis in zip(shape, spacing, nodes, strict=True):
        distance = (np.arange(size)[:, None] * step - axis) / length_mm
        weights = np.exp(-(distance**2))
        weights /= np.sqrt((weights**2).sum(axis=1, keepdims=True))
        field = np.tensordot(field, weights.astype(np.float32), axes=(0, 1))
    return field


def implant_tumors(
    image: npt.NDArray[Any],
    liver: Mask,
    rng: np.random.Generator,
    *,
    spacing: Sequence[float],
    count: int | None = None,
    radii_mm: Sequence[float] = (4.0, 8.0, 16.0, 32.0),
    radius_weights: Sequence[float] | None = None,
    contrast_hu: tuple[float, float] = (-79.0, -47.0),
    avoid: Mask | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
    """Add tumours to a healthy liver.

    Each tumour is an ellipsoid with semi-axes U(.75r, 1.25r), turned at random, elastically
    deformed, blurred into the parenchyma and clipped to the liver. The mask follows the border an
    annotator draws, 1 to 3 mm outside the half-contrast point. After Hu et al., Label-Free Liver
    Tumor Segmentation, CVPR 2023.

    Args:
        image: CT, [X, Y, Z], HU.
        liver: Healthy liver, bool [X, Y, Z].
        rng: Source of randomness; the same state gives the same tumours.
        spacing: Voxel size of the three axes, mm.
        count: How many tumours; drawn from 1 to 5 if left out.
        radii_mm: Sizes r to draw from.
        radius_weights: How often each size comes up; need not sum to 1.
        contrast_hu: Range of a tumour's mean difference from the parenchyma, HU.
        avoid: Vessels that tumours' centres keep away from, bool [X, Y, Z].

    Returns:
        The image with tumours, of the dtype given, and the mask, uint8 [X, Y, Z], with
        0 background, 1 liver, 2 tumor.

    Raises:
        ValueError: If shapes differ, the liver is empty or the sizes have no matching weights.
    """
    liver = np.asarray(liver, dtype=bool)
    vessels = np.zeros_like(liver) if avoid is None else np.asarray(avoid, dtype=bool)
    _check(image, liver, vessels, spacing)
    probabilities = _probabilities(radii_mm, radius_weights)
    total = int(rng.integers(1, 6)) if count is None else count
    radii = np.sort(rng.choice(np.asarray(radii_mm, dtype=float), size=total, p=probabilities))
    box = ndimage.find_objects(liver.astype(np.uint8))[0]
    inside, veins = liver[box], vessels[box] & liver[box]
    centers = _place(inside & ~veins, radii[::-1], rng, spacing)

    flat = _flatten_vessels(image[box].astype(np.float32), inside, veins)
    change = np.zeros(inside.shape, dtype=np.float32)
    cover = np.zeros(inside.shape, dtype=np.float32)
    tumor = np.zeros(inside.shape, dtype=bool)
    for center, radius in zip(centers, radii[::-1], strict=True):
        window, distance = _distance(inside.shape, center, radius, rng, spacing)
        tumor[window] |= distance <= rng.uniform(*BORDER_MM)
        profile = ndtr(-distance / rng.uniform(*EDGE_SIGMA_MM)).astype(np.float32)
        profile[profile < 1e-3] = 0.0
        target = _texture(profile, radius, rng, spacing, rng.uniform(*contrast_hu))
        change[window] += profile * (target - change[window])
        cover[window] = np.maximum(cover[window], profile)
    change += cover * flat

    result = image.copy()
    result[box] = _add(image[box], np.where(inside, change, 0.0))
    mask = liver.astype(np.uint8) * np.uint8(LIVER)
    mask[box][tumor & inside] = TUMOR
    return result, mask


def _check(image: npt.NDArray[Any], liver: Mask, vessels: Mask, spacing: Sequence[float]) -> None:
    if image.ndim != 3 or len(spacing) != 3 or min(spacing) <= 0:
        msg = f"image must be [X, Y, Z] with 3 positive spacings, got {image.shape}, {spacing}"
        raise ValueError(msg)
    if image.shape != liver.shape or image.shape != vessels.shape:
        msg = f"liver is {liver.shape} and avoid {vessels.shape} but image is {image.shape}"
        raise ValueError(msg)
    if not liver.any():
        msg = "liver is empty; implant_tumors needs at least one liver voxel"
        raise ValueError(msg)


def _probabilities(
    radii_mm: Sequence[float], weights: Sequence[float] | None
) -> npt.NDArray[np.float64]:
    if weights is None:
        weights = RADIUS_WEIGHTS if len(radii_mm) == len(RADIUS_WEIGHTS) else [1.0] * len(radii_mm)
    if len(weights) != len(radii_mm) or min(weights, default=0) < 0 or sum(weights) <= 0:
        msg = f"radius_weights {tuple(weights)} must be one weight >= 0 for each of {radii_mm} mm"
        raise ValueError(msg)
    total = float(sum(weights))
    return np.array([weight / total for weight in weights])


def _place(
    free: Mask, radii: npt.NDArray[np.float64], rng: np.random.Generator, spacing: Sequence[float]
) -> list[npt.NDArray[np.float64]]:
    """Pick a center [mm from the box's corner] for each radius, clear of vessels and each other."""
    clearance = ndimage.distance_transform_edt(np.pad(free, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    voxels = np.argwhere(free) if free.any() else np.argwhere(np.ones_like(free))
    points = voxels * np.asarray(spacing)
    clear = clearance[tuple(voxels.T)]
    roomiest = np.quantile(clear, 0.8)
    apart = np.full(len(points), np.inf)
    centers: list[npt.NDArray[np.float64]] = []
    for radius in radii:
        deep = clear >= min(radius / 2 + 2, roomiest)
        candidates = np.flatnonzero(deep & (apart > 1.3 * radius))
        if not len(candidates):
            candidates = np.flatnonzero(deep)
        center = points[rng.choice(candidates)]
        centers.append(center)
        apart = np.minimum(apart, np.linalg.norm(points - center, axis=1) - 1.3 * radius)
    return centers


def _distance(
    shape: tuple[int, ...],
    center: npt.NDArray[np.float64],
    radius: float,
    rng: np.random.Generator,
    spacing: Sequence[float],
) -> tuple[tuple[slice, ...], FloatArray]:
    """Signed distance, mm, to a deformed ellipsoid, in the window of `shape` that it can reach."""
    reach = 1.6 * radius + 8
    lows = [max(0, int((c - reach) / s)) for c, s in zip(center, spacing, strict=True)]
    highs = [
        min(n, int((c + reach) / s) + 2) for c, s, n in zip(center, spacing, shape, strict=True)
    ]
    window = tuple(slice(low, high) for low, high in zip(lows, highs, strict=True))
    grid = np.stack(
        np.meshgrid(
            *(np.arange(w.start, w.stop) * s for w, s in zip(window, spacing, strict=True)),
            indexing="ij",
        )
    )
    bend = [smooth_field(rng, grid.shape[1:], spacing=spacing, length_mm=radius) for _ in range(3)]
    offset = grid - center[:, None, None, None] + DEFORMATION * radius * np.stack(bend)
    rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    axes = rng.uniform(0.75 * radius, 1.25 * radius, size=3)[:, None, None, None]
    local = np.tensordot(rotation, offset, axes=1)
    norm = np.maximum(np.linalg.norm(local / axes, axis=0), 1e-6)
    slope = np.maximum(np.linalg.norm(local / axes**2, axis=0), 1e-6 / radius)
    return window, (norm * (norm - 1) / slope).astype(np.float32)


def _texture(
    profile: FloatArray,
    radius: float,
    rng: np.random.Generator,
    spacing: Sequence[float],
    contrast: float,
) -> FloatArray:
    """A lesion's own HU differences [X, Y, Z], whose mean inside the lesion is `contrast`."""
    length = max(radius / 3, max(spacing))
    field = smooth_field(rng, profile.shape, spacing=spacing, length_mm=length)
    inside = profile > 0.5
    if inside.any():
        field -= field[inside].mean()
    field *= TEXTURE * abs(contrast)
    field += contrast
    return field


def _flatten_vessels(image: FloatArray, inside: Mask, veins: Mask) -> FloatArray:
    """HU change [X, Y, Z] that takes vessels down to parenchyma: a tumour displaces them."""
    parenchyma = inside & ~ndimage.binary_dilation(veins)
    if not veins.any() or not parenchyma.any():
        return np.zeros_like(image)
    offset = image[veins].mean() - image[parenchyma].mean()
    change: FloatArray = -offset * ndimage.gaussian_filter(veins.astype(np.float32), 0.6)
    return change


def _add(image: npt.NDArray[Any], change: FloatArray) -> npt.NDArray[Any]:
    if not np.issubdtype(image.dtype, np.integer):
        return (image + change).astype(image.dtype)
    limits = np.iinfo(image.dtype)
    changed = np.clip(np.rint(image + change), limits.min, limits.max)
    return np.where(change == 0, image, changed.astype(image.dtype))
