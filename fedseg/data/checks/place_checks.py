"""Checks of where the liver lies: against its scan, and against the rest of the patient."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from fedseg.data.checks.checked_case import CheckedCase, Mask, spread
from fedseg.data.checks.findings import Finding

__all__ = ["placement"]

_AXES = ("left-right", "front-back", "up-down")
_FLIPS = tuple(axes for count in (1, 2, 3) for axes in combinations(range(3), count))
_ENOUGH = 30
"""Coarse voxels (0.2 mL each) below which nothing is said."""

_TELLING = 0.8
_LEFT = -0.02
_LUNG_HU, _BONE_HU = -500.0, 250.0
_NEAR_MM = 30.0


def placement(case: CheckedCase) -> Iterator[Finding]:
    """A mask flipped against its scan or outside the body; both turned by a wrong affine.

    Measured on 120 phantoms and three real scans, each turned in all seven ways; see the single
    functions for what they can't see. A liver on the left can be true (situs inversus).
    """
    if np.count_nonzero(case.coarse_liver) < _ENOUGH:
        return
    if flipped := flip_of_mask(case):
        yield case.finding(
            "flipped mask",
            got=f"a mask that fits its image better when flipped {flipped}",
            expected="a mask on its image",
            mend="look at both; export image and mask with the same orientation (LPS or RAS)",
        )
        return
    inside = np.count_nonzero(case.coarse_liver & case.body) / np.count_nonzero(case.coarse_liver)
    if inside < 0.5:
        yield case.finding(
            "mask outside the body",
            got=f"{inside:.0%} of the mask inside the body",
            expected="all",
            mend="look at both; export the mask on its image's grid",
        )
    elif turned := turned_axes(case):
        yield case.finding(
            "orientation",
            of="image",
            got=f"a patient turned {' and '.join(turned)}",
            expected="liver on the right, lungs above, spine behind",
            mend="correct the affine of image and mask (LPS read as RAS?)",
        )


def flip_of_mask(case: CheckedCase) -> str:
    """Name the flip of the mask that fits the scan clearly better than the mask as it is.

    A liver is one tissue; a liver's shape elsewhere covers several, so intensities spread wider.
    The mask is flipped within its array, as a wrong export does it. True masks spread at least
    1.47 times less than their best flip (thin spared parenchyma and large tumours don't matter:
    tumours and the border are left out). It says nothing of masks under 6 mL of parenchyma.
    """
    if np.count_nonzero(case.parenchyma) < _ENOUGH:
        return ""
    now = spread(case.coarse[case.parenchyma])
    spreads = [spread(case.coarse[np.flip(case.parenchyma, axes)]) for axes in _FLIPS]
    best = int(np.argmin(spreads))
    if spreads[best] >= _TELLING * now:
        return ""
    return " and ".join(_AXES[axis] for axis in _FLIPS[best])


def turned_axes(case: CheckedCase) -> list[str]:
    """Name the axes along which the patient lies the wrong way round."""
    signs = (liver_on_the_left, spine_in_front, lungs_below)
    return [name for name, sign in zip(_AXES, signs, strict=True) if sign(case)]


def liver_on_the_left(case: CheckedCase) -> bool:
    """Whether the liver's centre lies left of the body's, in the slices with liver; CT and MR.

    Livers of phantoms and real scans lie 5 to 27% of the body's width to the right.
    """
    body = case.body[:, :, _slices(case)]
    if not body.any():
        return False
    across = np.flatnonzero(body.any(axis=(1, 2)))
    middle = _centre(body, 0)
    return (_centre(case.coarse_liver, 0) - middle) / across.size < _LEFT


def spine_in_front(case: CheckedCase) -> bool:
    """Whether slices with liver have bone in front and none behind, at the midline; CT alone.

    Contrast in stomach and gut is as bright as bone, so bone behind settles that all is well.
    """
    if case.modality != "ct":
        return False
    behind, before, slices = 0, 0, 0
    for z in _slices(case):
        body = case.body[:, :, z]
        across = np.flatnonzero(body.any(axis=1))
        if not across.size:
            continue
        middle, reach = _centre(body, 0), 0.12 * across.size
        strip = slice(max(0, int(middle - reach)), int(middle + reach) + 1)
        deep = np.flatnonzero(body[strip].any(axis=0))
        if not deep.size:
            continue
        third = int(0.35 * (deep[-1] - deep[0] + 1))
        bone = (case.coarse[strip, :, z] > _BONE_HU) & body[strip]
        slices += 1
        behind += int(np.count_nonzero(bone[:, deep[0] : deep[0] + third + 1]) >= 2)
        before += int(np.count_nonzero(bone[:, deep[-1] - third : deep[-1] + 1]) >= 2)
    return slices > 0 and behind < 0.3 * slices and before > 0.6 * slices


def lungs_below(case: CheckedCase) -> bool:
    """Whether air lies under the liver rather than over it; CT alone.

    Lung fills 19 to 62% of the 30 mm over true livers, gas of the gut up to 13% of those under.
    Without any slice on both sides of the liver nothing is said.
    """
    if case.modality != "ct":
        return False
    over, under = _air_over(case.coarse, case), _air_over(case.coarse[:, :, ::-1], case, True)
    return over is not None and under is not None and under > 0.12 and under - over > 0.1


def _air_over(coarse: np.ndarray, case: CheckedCase, upside_down: bool = False) -> float | None:
    """Share of air in the 30 mm over the liver, None where less than a tenth is on the scan."""
    liver = case.coarse_liver[:, :, ::-1] if upside_down else case.coarse_liver
    height = max(1, round(_NEAR_MM / case.coarse_spacing[2]))
    columns = liver.any(axis=2)
    highest = liver.shape[2] - 1 - np.argmax(liver[:, :, ::-1], axis=2)
    above = np.arange(liver.shape[2]) - np.expand_dims(highest, 2)
    region = np.expand_dims(columns, 2) & (above > 0) & (above <= height)
    seen = np.count_nonzero(region)
    if seen < 0.1 * height * np.count_nonzero(columns):
        return None
    return float(np.count_nonzero(coarse[region] < _LUNG_HU) / seen)


def _slices(case: CheckedCase) -> np.ndarray:
    return np.flatnonzero(case.coarse_liver.any(axis=(0, 1)))


def _centre(mask: Mask, axis: int) -> float:
    counts = mask.sum(axis=tuple(other for other in range(mask.ndim) if other != axis))
    return float(np.average(np.arange(counts.size), weights=counts))
