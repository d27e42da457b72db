"""Turn a scan into network input by the plan, and network output back into the scan's own grid."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import ndimage

from fedseg.data.plan import Plan
from fedseg.data.resample import grid_shape, resample, resample_labels, upsample_argmax
from fedseg.data.volumes import MAX_VOXELS, Volume
from fedseg.errors import CaseError

__all__ = [
    "AIR_HU",
    "Modality",
    "Placement",
    "Prepared",
    "check_size",
    "modality_of",
    "prepare",
    "prepare_labels",
    "restore",
]

Modality = Literal["auto", "ct", "mr"]
Box = tuple[slice, slice, slice]

AIR_HU = -400.0
"""What is brighter belongs to the body, on a coarse or averaged grid."""

_MARGIN = 2


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where network input lies in its scan.

    Attributes:
        shape: Shape `[X, Y, Z]` of the scan, RAS axis order.
        spacing: mm a voxel of the scan.
        grid: Shape of the whole scan at the plan's spacing.
        box: Where the crop lies in that grid.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    grid: tuple[int, int, int]
    box: Box

    def to_json(self) -> dict[str, list[Any]]:
        """Write as JSON values."""
        sides = [[side.start, side.stop] for side in self.box]
        return {
            "shape": list(self.shape),
            "spacing": list(self.spacing),
            "grid": list(self.grid),
            "box": sides,
        }

    @classmethod
    def from_json(cls, values: dict[str, list[Any]]) -> "Placement":
        """Read what `to_json` wrote."""
        x, y, z = (slice(start, stop) for start, stop in values["box"])
        a, b, c = values["spacing"]
        return cls(
            shape=_three(values["shape"]),
            spacing=(float(a), float(b), float(c)),
            grid=_three(values["grid"]),
            box=(x, y, z),
        )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Network input of one scan.

    Attributes:
        image: float32 `[x, y, z]` at the plan's spacing, cropped to the body, within -2 and 2.
        placement: Where it lies in the scan.
    """

    image: np.ndarray
    placement: Placement


def _three(values: Any) -> tuple[int, int, int]:
    x, y, z = values
    return int(x), int(y), int(z)


def modality_of(image: np.ndarray, modality: Modality) -> Literal["ct", "mr"]:
    """Settle `auto`: a scan with voxels under -200 is CT."""
    if modality != "auto":
        return modality
    return "ct" if float(image.min()) < -200 else "mr"


def prepare(scan: Volume, plan: Plan, *, modality: Modality = "auto") -> Prepared:
    """Resample, crop to the body and normalise; a scan without body is taken whole.

    Raises:
        CaseError: The plan's spacing would make it too large.
    """
    grid = grid_shape(scan.array.shape, scan.spacing, plan.spacing)
    if math.prod(grid) > MAX_VOXELS:
        raise CaseError(
            scan.path,
            f"{grid} voxels at the plan's {plan.spacing} mm, expected at most {MAX_VOXELS}",
            "leave it out, or ask the study for a larger train.spacing",
        )
    image = resample(torch.from_numpy(scan.array), grid).numpy()
    kind = modality_of(scan.array, modality)
    if kind == "ct":
        low, high = plan.ct_window
        body = image > AIR_HU
    else:
        inside = image[image > image.min()]
        found = np.percentile(inside if inside.size else image, plan.mr_percentiles)
        low, high = float(found[0]), float(found[1])
        body = image > low + 0.1 * (high - low)
    box = _largest_box(body, plan.patch_size)
    middle, quarter = (low + high) / 2, max((high - low) / 4, 1e-6)
    cropped = np.subtract(image[box], middle, order="C")
    cropped /= quarter
    np.clip(cropped, -2, 2, out=cropped)
    return Prepared(
        image=cropped,
        placement=Placement(
            shape=_three(scan.array.shape), spacing=scan.spacing, grid=grid, box=box
        ),
    )


def prepare_labels(labels: np.ndarray, prepared: Prepared) -> np.ndarray:
    """Bring a mask `[X, Y, Z]` onto the network's grid and crop."""
    where = prepared.placement
    return np.ascontiguousarray(resample_labels(labels, where.grid)[where.box])


def restore(logits: torch.Tensor, placement: Placement) -> np.ndarray:
    """Bring logits `[C, x, y, z]` of the crop back to labels uint8 `[X, Y, Z]` of the scan."""
    return upsample_argmax(logits, placement.shape, grid=placement.grid, box=placement.box)


def check_size(image: np.ndarray, plan: Plan, path: object) -> None:
    """Refuse a scan of which a patch would be mostly padding.

    Raises:
        CaseError: The body is smaller than half a patch along an axis.
    """
    if any(2 * n < patch for n, patch in zip(image.shape, plan.patch_size, strict=True)):
        raise CaseError(
            str(path),
            f"body of {image.shape} voxels at the plan's {plan.spacing} mm is smaller than half "
            f"the patch {plan.patch_size}",
            "leave the case out, or ask the study for a smaller train.patch-size",
        )


def _largest_box(body: np.ndarray, at_least: tuple[int, int, int]) -> Box:
    """Box of the largest connected component, with a margin and no smaller than a patch."""
    components, count = ndimage.label(body)
    if count == 0:
        x, y, z = (slice(0, n) for n in body.shape)
        return (x, y, z)
    sizes = np.bincount(components.ravel())[1:]
    found = ndimage.find_objects(components)[int(sizes.argmax())]
    sides = []
    for part, size, minimum in zip(found, body.shape, at_least, strict=True):
        start, stop = max(part.start - _MARGIN, 0), min(part.stop + _MARGIN, size)
        if stop - start < minimum:
            start = min(max(start - (minimum - (stop - start)) // 2, 0), max(size - minimum, 0))
            stop = min(start + minimum, size)
        sides.append(slice(start, stop))
    return (sides[0], sides[1], sides[2])
