"""Tests of implanted tumours."""

from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from fedseg.data.tumors import LIVER, TUMOR, implant_tumors, smooth_field

SPACING = (2.0, 2.0, 2.5)
SHAPE = (60, 60, 48)


@pytest.fixture
def liver() -> np.ndarray:
    grid = np.indices(SHAPE).T * SPACING - np.array([60.0, 60.0, 60.0])
    return (np.linalg.norm(grid / [52, 50, 48], axis=-1) < 1).T


@pytest.fixture
def image(liver: np.ndarray) -> np.ndarray:
    return np.where(liver, 110.0, -100.0).astype(np.float32)


def implant(image: np.ndarray, liver: np.ndarray, seed: int = 0, **options: Any) -> Any:
    return implant_tumors(image, liver, np.random.default_rng(seed), spacing=SPACING, **options)


def test_same_rng_same_tumors(image: np.ndarray, liver: np.ndarray) -> None:
    first, second, other = (implant(image, liver, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[1], other[1])


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_keeps_dtype_and_input(image: np.ndarray, liver: np.ndarray, dtype: type) -> None:
    given = image.astype(dtype)
    before = given.copy()
    result, mask = implant(given, liver)
    assert result.dtype == dtype
    assert mask.dtype == np.uint8
    assert np.array_equal(given, before)


@pytest.mark.parametrize("seed", range(4))
def test_changes_nothing_far_from_tumors(image: np.ndarray, liver: np.ndarray, seed: int) -> None:
    result, mask = implant(image, liver, seed)
    far = ndimage.distance_transform_edt(mask != TUMOR, sampling=SPACING) > 8
    assert np.array_equal(result[far | ~liver], image[far | ~liver])
    assert set(np.unique(mask)) == {0, LIVER, TUMOR}
    assert np.array_equal(mask > 0, liver)


@pytest.mark.parametrize("radius", [8.0, 16.0])
def test_size_and_contrast_are_as_asked(
    image: np.ndarray, liver: np.ndarray, radius: float
) -> None:
    for seed in range(3):
        result, mask = implant(
            image, liver, seed, count=1, radii_mm=[radius], contrast_hu=(-60.0, -60.0)
        )
        volume = (mask == TUMOR).sum() * np.prod(SPACING)
        sphere = 4 / 3 * np.pi * radius**3
        assert 0.4 * sphere < volume < 1.25**3 * (1 + 3.5 / radius) ** 3 * sphere
        core = ndimage.distance_transform_edt(mask == TUMOR, sampling=SPACING) > 5.5
        assert -75 < result[core].mean() - 110 < -45


def test_annotated_border_lies_outside_half_contrast(image: np.ndarray, liver: np.ndarray) -> None:
    result, mask = implant(image, liver, count=1, radii_mm=[16.0])
    dark = (image - result) > 30
    annotated = (mask == TUMOR).sum()
    assert dark.sum() < annotated < 2 * dark.sum()
    assert (dark & (mask != TUMOR)).sum() < 0.01 * annotated


def test_count_and_no_tumors(image: np.ndarray, liver: np.ndarray) -> None:
    _, mask = implant(image, liver, count=3, radii_mm=[4.0])
    assert ndimage.label(mask == TUMOR)[1] == 3
    result, healthy = implant(image, liver, count=0)
    assert np.array_equal(result, image)
    assert np.array_equal(healthy, liver)


def test_centers_avoid_vessels_and_tumors_displace_them(
    image: np.ndarray, liver: np.ndarray
) -> None:
    vessels = np.zeros(SHAPE, dtype=bool)
    vessels[:36] = liver[:36]
    _, mask = implant(image, liver, count=2, radii_mm=[4.0], avoid=vessels)
    assert not (mask[:34] == TUMOR).any()
    thin = np.zeros(SHAPE, dtype=bool)
    thin[::8] = liver[::8]
    bright = image + 40 * thin
    result, mask = implant(bright, liver, count=1, radii_mm=[16.0], avoid=thin)
    core = ndimage.distance_transform_edt(mask == TUMOR, sampling=SPACING) > 6
    assert result[core & thin].mean() < 110


def test_radius_larger_than_liver_stays_inside(image: np.ndarray, liver: np.ndarray) -> None:
    result, mask = implant(image, liver, count=2, radii_mm=[64.0])
    assert not ((mask == TUMOR) & ~liver).any()
    assert np.array_equal(result[~liver], image[~liver])


def test_smallest_liver_works() -> None:
    liver = np.zeros(SHAPE, dtype=bool)
    liver[5, 5, 5] = True
    image = np.zeros(SHAPE, dtype=np.int16)
    _, mask = implant(image, liver, count=1, avoid=liver)
    assert mask[5, 5, 5] == TUMOR


def test_errors_are_one_line(image: np.ndarray, liver: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^liver is empty.*$"):
        implant(image, np.zeros_like(liver))
    with pytest.raises(ValueError, match=r"^liver is \(60, 60, 47\) .* image is \(60, 60, 48\)$"):
        implant(image, liver[..., :-1])
    with pytest.raises(ValueError, match=r"avoid \(60, 60, 47\)"):
        implant(image, liver, avoid=liver[..., :-1])
    with pytest.raises(ValueError, match="radius_weights"):
        implant(image, liver, radius_weights=[1.0])


def test_smooth_field_is_smooth_and_standard() -> None:
    rng = np.random.default_rng(0)
    field = smooth_field(rng, (80, 80, 60), spacing=SPACING, length_mm=8)
    assert abs(field.mean()) < 0.15
    assert 0.85 < field.std() < 1.15
    assert np.diff(field, axis=0).std() < 0.4
