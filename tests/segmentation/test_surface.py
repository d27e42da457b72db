"""Tests of surface distances: against SimpleITK, MONAI and brute force."""

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from scipy import ndimage
from scipy.spatial.distance import cdist

from fedseg.data.volumes import read_mask
from fedseg.segmentation.boxes import bounding_box
from fedseg.segmentation.surface import surface_distances, surface_metrics

CHECKOUT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("FEDSEG_REAL_DATA") or CHECKOUT.parent / "shared" / "data" / "real")
SPACING = (0.7, 1.3, 2.5)


def blob(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), 2)
    return noise > np.quantile(noise, rng.uniform(0.3, 0.95))


def pairs(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(1)
    shapes = [tuple(int(n) for n in rng.integers(6, 15, 3)) for _ in range(count)]
    return [(blob(rng, shape), blob(rng, shape)) for shape in shapes]


def surface(region: np.ndarray) -> list[tuple[int, ...]]:
    """Voxels with a face to the outside, one by one."""
    padded = np.pad(region, 1)
    steps = [step for axis in range(3) for step in (np.eye(3, dtype=int)[axis],)]
    return [
        tuple(index)
        for index in np.argwhere(region)
        if not all(padded[tuple(index + 1 + sign * step)] for step in steps for sign in (1, -1))
    ]


def by_brute_force(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    points = [np.array(surface(region)) * SPACING for region in (one, other)]
    apart = cdist(*points)
    return apart.min(1), apart.min(0)


def test_distances_are_those_of_all_pairs_of_surface_voxels() -> None:
    for one, other in pairs(8):
        for mine, wanted in zip(
            surface_distances(one, other, spacing=SPACING), by_brute_force(one, other), strict=True
        ):
            assert np.sort(mine) == pytest.approx(np.sort(wanted), abs=1e-9)


def test_metrics_agree_with_monai() -> None:
    for one, other in pairs(8):
        found = surface_metrics(one, other, spacing=SPACING, tolerance_mm=2.0)
        batch = [torch.from_numpy(region)[None, None].float() for region in (one, other)]
        hd95 = compute_hausdorff_distance(
            *batch, include_background=True, percentile=95, spacing=SPACING
        )
        assd = compute_average_surface_distance(
            *batch, include_background=True, symmetric=True, spacing=SPACING
        )
        nsd = compute_surface_dice(*batch, [2.0], include_background=True, spacing=SPACING)
        assert found["hd95"] == pytest.approx(float(hd95), abs=1e-5)
        assert found["assd"] == pytest.approx(float(assd), abs=1e-5)
        assert found["nsd"] == pytest.approx(float(nsd), abs=1e-6)


def by_simpleitk(one: np.ndarray, other: np.ndarray, spacing: tuple[float, ...]) -> list:
    """Both directions' distances by Maurer's exact transform of the contours."""
    contours = []
    for region in (one, other):
        image = sitk.GetImageFromArray(np.pad(region, 1).astype(np.uint8))
        image.SetSpacing(spacing[::-1])
        contours.append(sitk.LabelContour(image, fullyConnected=False))
    found = []
    for here, there in (contours, contours[::-1]):
        away = sitk.SignedMaurerDistanceMap(there, squaredDistance=False, useImageSpacing=True)
        values = sitk.GetArrayFromImage(away)[sitk.GetArrayFromImage(here) == 1]
        found.append(np.abs(values))
    hausdorff = sitk.HausdorffDistanceImageFilter()
    hausdorff.Execute(*contours)
    return [*found, hausdorff.GetHausdorffDistance()]


def test_distances_agree_with_simpleitk() -> None:
    for one, other in pairs(8):
        mine = surface_distances(one, other, spacing=SPACING)
        *theirs, most = by_simpleitk(one, other, SPACING)
        for found, wanted in zip(mine, theirs, strict=True):
            assert np.sort(found) == pytest.approx(np.sort(wanted), abs=1e-4)
        assert max(part.max() for part in mine) == pytest.approx(most, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["site-ct-a", "site-ct-b", "site-mr"])
def test_real_mask_agrees_with_simpleitk(site: str) -> None:
    if not REAL.is_dir():
        pytest.skip(f"no real scans in {REAL}; set FEDSEG_REAL_DATA")
    (path,) = (REAL / site / "masks").iterdir()
    mask = read_mask(path)
    truth = mask.array >= 1
    prediction = ndimage.binary_dilation(np.roll(truth, (2, -1, 1), (0, 1, 2)), iterations=2)
    prediction[tuple(n // 2 for n in truth.shape)] = True
    mine = surface_distances(prediction, truth, spacing=mask.spacing)
    box = tuple(
        slice(max(side.start - 2, 0), side.stop + 2) for side in bounding_box(prediction | truth)
    )
    *theirs, most = by_simpleitk(prediction[box], truth[box], mask.spacing)
    # SimpleITK works in float32.
    for found, wanted in zip(mine, theirs, strict=True):
        assert np.sort(found) == pytest.approx(np.sort(wanted), abs=1e-3)
    assert max(part.max() for part in mine) == pytest.approx(most, abs=1e-3)


def test_by_hand_along_each_axis() -> None:
    for axis, step in enumerate(SPACING):
        one, other = np.zeros((2, 9, 9, 9), bool)
        one[4, 4, 4] = True
        other[tuple(7 if n == axis else 4 for n in range(3))] = True
        found = surface_metrics(one, other, spacing=SPACING, tolerance_mm=3 * step)
        assert found == pytest.approx({"hd95": 3 * step, "assd": 3 * step, "nsd": 1.0})
        found = surface_metrics(one, other, spacing=SPACING, tolerance_mm=2.9 * step)
        assert found["nsd"] == 0


def test_hd95_is_the_worse_direction_and_assd_counts_every_voxel() -> None:
    truth, prediction = np.zeros((2, 40, 3, 3), bool)
    truth[:2, 1, 1] = True
    prediction[:, 1, 1] = True  # 38 voxels lie 1 to 38 mm away
    found = surface_metrics(prediction, truth, spacing=(1, 1, 1), tolerance_mm=1)
    there = np.r_[0, 0, np.arange(1, 39)]
    assert found["hd95"] == pytest.approx(np.percentile(there, 95))
    assert found["assd"] == pytest.approx(there.sum() / 42)
    assert found["nsd"] == pytest.approx((3 + 2) / 42)


@pytest.mark.parametrize(
    "points",
    [
        [(7, 30, 19)],  # near
        [(6, 47, 19), (6, 3, 19)],  # in the box that is tried, and just beyond it, nearer to some
        [],  # only far ones
    ],
)
def test_a_small_region_in_a_large_volume_finds_the_nearest_points_wherever_they_lie(
    points: list[tuple[int, int, int]],
) -> None:
    one, other = np.zeros((2, 60, 50, 40), bool)
    one[4:9, 20:32, 18:21] = True
    other[tuple(np.transpose([*points, (0, 0, 0), (59, 49, 39)]))] = True
    for mine, wanted in zip(
        surface_distances(one, other, spacing=SPACING), by_brute_force(one, other), strict=True
    ):
        assert np.sort(mine) == pytest.approx(np.sort(wanted), abs=1e-9)


def test_same_region_has_distance_zero_also_at_the_side_of_the_volume() -> None:
    region = np.ones((5, 6, 7), bool)
    same = surface_metrics(region, region, spacing=SPACING, tolerance_mm=0)
    assert same == {"hd95": 0, "assd": 0, "nsd": 1}


def test_nothing_is_defined_where_a_region_is_empty() -> None:
    empty, full = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    for one, other in ((empty, full), (full, empty), (empty, empty)):
        assert surface_metrics(one, other, spacing=SPACING, tolerance_mm=2) == {}


def test_metrics_do_not_depend_on_where_the_regions_lie() -> None:
    one, other = pairs(1)[0]
    base = surface_metrics(one, other, spacing=SPACING, tolerance_mm=2)
    padded = [np.pad(region, ((3, 9), (0, 4), (5, 2))) for region in (one, other)]
    assert surface_metrics(*padded, spacing=SPACING, tolerance_mm=2) == pytest.approx(base)
