"""One case as the checks see it: read once, measured once on a coarse grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from fedseg.data.checks.findings import Finding, Severity
from fedseg.data.preprocess import AIR_HU, modality_of
from fedseg.data.volumes import Volume
from fedseg.site_config import SiteConfig

__all__ = ["CheckedCase", "spread"]

_COARSE_MM = 6.0

Mask = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]


def spread(values: FloatArray) -> float:
    """Distance from the 10th to the 90th percentile, 0 where there are no values."""
    return float(np.subtract(*np.percentile(values, (90, 10)))) if values.size else 0.0


@dataclass(frozen=True, kw_only=True)
class CheckedCase:
    """A case that can be read. What several checks need is measured once, when first asked for.

    Coarse arrays have voxels of about 6 mm, which averages noise away and makes anatomy cheap.

    Attributes:
        name: The case's name.
        image: The scan, RAS axis order.
        mask: Its labels on the same grid.
        config: The site config.
    """

    name: str
    image: Volume
    mask: Volume
    config: SiteConfig

    def finding(
        self,
        what: str,
        *,
        got: str,
        expected: str,
        mend: str,
        severity: Severity = "warning",
        of: Literal["image", "mask"] = "mask",
    ) -> Finding:
        """Make a finding about the image or the mask."""
        path = self.image.path if of == "image" else self.mask.path
        return Finding(
            severity=severity,
            case=self.name,
            file=str(path),
            what=what,
            got=got,
            expected=expected,
            mend=mend,
        )

    @cached_property
    def modality(self) -> Literal["ct", "mr"]:
        """Settled modality, as preprocessing settles it."""
        return modality_of(self.image.array, self.config.modality)

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value of the scan."""
        return float(self.image.array.min()), float(self.image.array.max())

    @cached_property
    def voxel_ml(self) -> float:
        """Volume of a voxel, mL."""
        return float(np.prod(self.image.spacing)) / 1000

    @cached_property
    def labelled(self) -> tuple[slice, slice, slice] | None:
        """Box of the labelled voxels, None where the mask is empty."""
        sides = []
        for others in ((1, 2), (0, 2), (0, 1)):
            where = np.flatnonzero(self.mask.array.any(axis=others))
            if not where.size:
                return None
            sides.append(slice(int(where[0]), int(where[-1]) + 1))
        return (sides[0], sides[1], sides[2])

    @cached_property
    def cut(self) -> tuple[str, ...]:
        """Sides of the field of view that the labelled voxels reach."""
        if self.labelled is None:
            return ()
        ends = (("left", "right"), ("back", "front"), ("bottom", "top"))
        return tuple(
            name
            for side, size, names in zip(self.labelled, self.mask.array.shape, ends, strict=True)
            for name, reached in zip(names, (side.start == 0, side.stop == size), strict=True)
            if reached
        )

    @cached_property
    def _steps(self) -> tuple[int, ...]:
        shape = self.image.array.shape
        return tuple(
            min(max(1, round(_COARSE_MM / mm)), size)
            for mm, size in zip(self.image.spacing, shape, strict=True)
        )

    @cached_property
    def coarse_spacing(self) -> tuple[float, ...]:
        """Voxel size of the coarse grid, mm."""
        return tuple(n * mm for n, mm in zip(self._steps, self.image.spacing, strict=True))

    @cached_property
    def coarse(self) -> FloatArray:
        """The scan, averaged, `[x, y, z]`."""
        return _averaged(self.image.array, self._steps)

    @cached_property
    def coarse_liver(self) -> Mask:
        """Where at least half a coarse voxel is labelled."""
        return _averaged(self.mask.array > 0, self._steps) >= 0.5

    @cached_property
    def parenchyma(self) -> Mask:
        """Coarse voxels inside the liver, away from its border and its tumours."""
        inside: Mask = ndimage.binary_erosion(_averaged(self.mask.array == 1, self._steps) >= 0.5)
        return inside

    @cached_property
    def body(self) -> Mask:
        """The patient, coarse and with lungs and gut filled; all False where there is none."""
        if self.modality == "ct":
            threshold = AIR_HU
        else:
            low, high = np.percentile(self.coarse, (1, 99))
            threshold = low + 0.1 * (high - low)
        pieces, count = ndimage.label(ndimage.binary_opening(self.coarse > threshold))
        if count == 0:
            return np.zeros(self.coarse.shape, np.bool_)
        body = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
        return np.stack([ndimage.binary_fill_holes(plane) for plane in np.moveaxis(body, 2, 0)], 2)


def _averaged(array: npt.NDArray[np.generic], steps: Sequence[int]) -> FloatArray:
    """Average over blocks; what is left over at the far ends is dropped."""
    counts = [size // step for size, step in zip(array.shape, steps, strict=True)]
    whole = array[tuple(slice(0, n * step) for n, step in zip(counts, steps, strict=True))]
    sides = [side for pair in zip(counts, steps, strict=True) for side in pair]
    mean: FloatArray = whole.reshape(sides).mean((1, 3, 5), dtype=np.float32)
    return mean
