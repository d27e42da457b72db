"""Checks of the scan itself: voxel size, header, intensities, free text that names patients."""

from collections.abc import Iterator

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from fedseg.data.checks.checked_case import CheckedCase, spread
from fedseg.data.checks.findings import Finding
from fedseg.data.checks.identifiers import identifying_fields
from fedseg.data.grids import farthest_corner

__all__ = ["header_geometry", "identity", "intensity", "liver_hu", "voxel_size"]

_THICKEST_MM = 10.0
_TILTED_DEGREES = 20.0
_LIVER_HU = (-20.0, 250.0)
_OFFSET = 1024.0
_HU = "HU, about -1000 for air and 0 for water"
_EXPORT = 'export it again in HU; if it is MR, set modality = "mr" in site.toml'


def voxel_size(case: CheckedCase) -> Iterator[Finding]:
    """Voxels of exactly 1 mm (reset, as in copies of LiTS), or slices too far apart."""
    spacing = case.image.spacing
    if all(abs(mm - 1) < 1e-6 for mm in spacing):
        yield case.finding(
            "voxel size",
            of="image",
            got="exactly 1 mm along all axes",
            expected="the scanner's own",
            mend="compare it with the original: a lost voxel size makes all volumes wrong",
        )
    if max(spacing) > _THICKEST_MM:
        yield case.finding(
            "voxel size",
            of="image",
            got=f"{max(spacing):.3g} mm",
            expected=f"{_THICKEST_MM:g} mm at most",
            mend="export the thinner series, or correct the voxel size",
        )


def header_geometry(case: CheckedCase) -> Iterator[Finding]:
    """Axes that the header doesn't tell, tells in two ways, or that lie far off the body's."""
    header = case.image.stored
    if isinstance(header, nib.Nifti1Header):
        yield from _codes(case, header)
    affine = case.image.stored_affine[:3, :3]
    directions = np.abs(affine / np.linalg.norm(affine, axis=0))
    degrees = float(np.degrees(np.arccos(np.clip(directions.max(axis=0), 0, 1))).max())
    if degrees > _TILTED_DEGREES:
        yield case.finding(
            "orientation",
            severity="note",
            of="image",
            got=f"axes {degrees:.0f} degrees off the body's",
            expected=f"{_TILTED_DEGREES:g} at most",
            mend="fedseg doesn't turn scans; resample it if many others aren't tilted",
        )


def _codes(case: CheckedCase, header: nib.Nifti1Header) -> Iterator[Finding]:
    qform, sform = int(header["qform_code"]) > 0, int(header["sform_code"]) > 0
    if not qform and not sform:
        yield case.finding(
            "orientation",
            of="image",
            got="neither qform nor sform",
            expected="a header that says where left and right are",
            mend="export it again with its geometry",
        )
    if qform and sform and _apart(header, case.image.stored_shape) > max(case.image.spacing):
        yield case.finding(
            "orientation",
            of="image",
            got="qform and sform that disagree",
            expected="one geometry",
            mend="fedseg takes the sform, other programs may not; export it again",
        )


def _apart(header: nib.Nifti1Header, shape: tuple[int, ...]) -> float:
    """Farthest that a corner lies apart by the header's two geometries, mm."""
    try:
        change = header.get_qform() - header.get_sform()
    except (HeaderDataError, ValueError):
        return float("inf")
    apart = farthest_corner(shape, change)
    return apart if np.isfinite(apart) else float("inf")


def intensity(case: CheckedCase) -> Iterator[Finding]:
    """Values that aren't HU: 8-bit, rescaled, shifted above 0, cut to a window, all the same.

    With modality `auto` an MR scan has none of these signs either; a CT whose values were changed
    in another way is taken for MR, as preprocessing takes it.
    """
    low, high = case.bounds
    got = expected = mend = ""
    if low == high:
        got, expected, mend = f"{low:g} everywhere", "a scan", "export it again"
    elif case.config.modality == "mr":
        if low < -200 and _looks_like_hu(case):
            got, expected = f"{low:g} to {high:g}", "MR, as site.toml says"
            mend = 'set modality = "ct" or "auto" in site.toml'
    else:
        got, expected, mend = _not_hu(case), _HU, _EXPORT
    if got:
        yield case.finding("intensity", of="image", got=got, expected=expected, mend=mend)


def _looks_like_hu(case: CheckedCase) -> bool:
    low, high = case.bounds
    return -1100 <= low <= -900 and 200 <= high <= 32767


def _not_hu(case: CheckedCase) -> str:
    """What the values look like, `""` if they could be HU or MR."""
    low, high = case.bounds
    array = case.image.array
    if max(-low, high) > 1e5:
        return f"{low:.3g} to {high:.3g}"
    if high - low <= 20:
        return f"{low:.3g} to {high:.3g}: rescaled"
    if low >= 0 and high <= 255 and np.array_equal(array, np.rint(array)):
        return f"whole numbers {low:g} to {high:g}: 8-bit"
    if low > -200 and (case.config.modality == "ct" or _shifted(case)):
        return f"{low:g} to {high:g}: no air"
    if -900 < low < 0 and np.count_nonzero(array == low) > 0.05 * array.size:
        return f"{low:g} to {high:g}: cut to a window"
    return ""


def _shifted(case: CheckedCase) -> bool:
    """Whether the liver looks like CT plus 1024: MR is never that even at that very value."""
    values = case.coarse[case.parenchyma]
    if not values.size or case.bounds[0] < -1:
        return False
    shifted = float(np.median(values)) - _OFFSET
    return _LIVER_HU[0] <= shifted <= _LIVER_HU[1] and spread(values) < 60


def liver_hu(case: CheckedCase) -> Iterator[Finding]:
    """A median of the liver that no contrast phase and no disease has: no HU, or no liver."""
    values = case.coarse[case.parenchyma]
    if case.modality != "ct" or not values.size:
        return
    median = float(np.median(values))
    if not _LIVER_HU[0] <= median <= _LIVER_HU[1]:
        yield case.finding(
            "liver's intensity",
            got=f"median {median:.0f} HU",
            expected=f"{_LIVER_HU[0]:.0f} to {_LIVER_HU[1]:.0f} HU",
            mend="look at the mask over its scan; export the scan in HU",
        )


def identity(case: CheckedCase) -> Iterator[Finding]:
    """Header text that could name a patient; the text itself isn't repeated."""
    for which, volume in (("image", case.image), ("mask", case.mask)):
        fields = identifying_fields(volume)
        if fields:
            yield case.finding(
                "patient's identity",
                of="image" if which == "image" else "mask",
                got=f"text in {', '.join(fields)}",
                expected="none that could name a patient",
                mend="read it and clear it; it never leaves this site through fedseg",
            )
