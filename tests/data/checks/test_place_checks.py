"""Tests of the checks of place: no true case is flagged, every turned one is."""

import os
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fedseg.data.checks.check import check_folder
from fedseg.data.checks.checked_case import CheckedCase
from fedseg.data.checks.place_checks import placement
from fedseg.data.phantom import KINDS, UNSEEN, make_phantom
from fedseg.data.tumors import implant_tumors
from fedseg.data.volumes import Volume, read_image, read_mask
from fedseg.site_config import SiteConfig

CHECKOUT = Path(__file__).resolve().parents[3]
REAL = Path(os.environ.get("FEDSEG_REAL_DATA") or CHECKOUT.parent / "shared" / "data" / "real")
SITES = ("site-ct-a", "site-ct-b", "site-mr")
FLIPS = [axes for count in (1, 2, 3) for axes in combinations(range(3), count)]
AXES = ("left-right", "front-back", "up-down")

real = [
    pytest.mark.slow,
    pytest.mark.skipif(not REAL.is_dir(), reason=f"no real scans in {REAL}; set FEDSEG_REAL_DATA"),
]


def volume(array: np.ndarray, spacing: tuple[float, float, float]) -> Volume:
    affine = np.diag([*spacing, 1.0])
    return Volume(
        array=np.ascontiguousarray(array),
        spacing=spacing,
        stored=None,
        stored_shape=array.shape,
        stored_affine=affine,
    )


def turned(of: Volume, axes: tuple[int, ...]) -> Volume:
    return replace(of, array=np.ascontiguousarray(np.flip(of.array, axes)))


def said(image: Volume, mask: Volume) -> str:
    case = CheckedCase(name="a", image=image, mask=mask, config=SiteConfig())
    return "; ".join(f"{f.what}: {f.got}" for f in placement(case))


def phantom(kind: str, seed: int) -> tuple[Volume, Volume]:
    made = make_phantom({**KINDS, "late": UNSEEN}[kind], seed)
    affine = nib.as_closest_canonical(nib.Nifti1Image(made.image, made.affine))
    image = affine.get_fdata(dtype=np.float32)
    mask = nib.as_closest_canonical(nib.Nifti1Image(made.mask, made.affine)).get_fdata()
    x, y, z = (float(mm) for mm in affine.header.get_zooms())
    return volume(image, (x, y, z)), volume(mask.astype(np.uint8), (x, y, z))


def real_case(site: str, tumors: bool) -> tuple[Volume, Volume]:
    (path,) = (REAL / site / "images").iterdir()
    image = read_image(path)
    mask = read_mask(REAL / site / "masks" / path.name, image=image)
    if tumors:
        rng = np.random.default_rng(0)
        scan, labels = implant_tumors(
            image.array, mask.array == 1, rng, spacing=image.spacing, count=6
        )
        image = replace(image, array=np.asarray(scan, np.float32))
        mask = replace(mask, array=labels.astype(np.uint8))
    return image, mask


def check_turns(image: Volume, mask: Volume) -> None:
    assert said(image, mask) == ""
    for axes in FLIPS:
        names = " and ".join(AXES[axis] for axis in axes)
        fits = f"flipped mask: a mask that fits its image better when flipped {names}"
        assert said(image, turned(mask, axes)) == fits
        assert said(turned(image, axes), mask) == fits
        both = said(turned(image, axes), turned(mask, axes))
        seen = [AXES[axis] for axis in axes]
        if float(image.array.min()) > -200:  # MR shows neither lungs nor bone
            seen = [name for name in seen if name == "left-right"]
        expected = f"orientation: a patient turned {' and '.join(seen)}" if seen else ""
        assert both == expected


@pytest.mark.parametrize("kind", [*KINDS, "late"])
def test_phantoms_turned_in_every_way(kind: str) -> None:
    check_turns(*phantom(kind, 0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "late"])
def test_many_phantoms_turned_in_every_way(kind: str) -> None:
    for seed in range(1, 6):
        check_turns(*phantom(kind, seed))


@pytest.mark.parametrize("tumors", [pytest.param(t, marks=real) for t in (False, True)])
@pytest.mark.parametrize("site", SITES)
def test_real_scans_turned_in_every_way(site: str, tumors: bool) -> None:
    check_turns(*real_case(site, tumors))


@pytest.mark.parametrize("site", [pytest.param(site, marks=real) for site in SITES])
def test_real_scans_are_clean(site: str) -> None:
    report = check_folder(REAL / site)
    assert report.clean
    notes = {f.what for f in report.findings}
    pieces = {"liver in pieces"} if site == "site-mr" else set()
    assert notes == {"truncated field of view", "labels"} | pieces


@pytest.mark.parametrize("site", [pytest.param(site, marks=real) for site in SITES[1:]])
def test_mixed_orientations_of_real_scans(tmp_path: Path, site: str) -> None:
    """A mask saved LPS beside an image saved RAS: fine with its affine, caught with the image's."""
    (path,) = (REAL / site / "images").iterdir()
    image, mask = nib.load(path), nib.load(REAL / site / "masks" / path.name)
    other = mask.slicer[::-1, ::-1]
    for folder, saved in (("images", image), ("masks", other)):
        (tmp_path / folder).mkdir()
        nib.save(saved, tmp_path / folder / "a.nii.gz")
    (error,) = [f for f in check_folder(tmp_path).findings if f.severity == "error"]
    assert "affine puts the mask" in error.got
    values = np.asarray(other.dataobj)
    nib.save(nib.Nifti1Image(values, image.affine), tmp_path / "masks" / "a.nii.gz")
    warnings = [f.what for f in check_folder(tmp_path).findings if f.severity == "warning"]
    assert "flipped mask" in warnings


def test_small_masks_are_left_alone() -> None:
    image, mask = phantom("portal", 0)
    tiny = np.zeros_like(mask.array)
    tiny[5:8, 5:8, 5:8] = 1
    assert said(image, replace(mask, array=tiny)) == ""
