"""Tests of changing patches: geometry against SciPy, intensities against NumPy, chances counted."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fedseg.data.augmentation import (
    RECIPES,
    Change,
    Recipe,
    apply_change,
    draw_change,
    source_size,
)

FULL = RECIPES["full"]
assert FULL is not None
SIZE = (16, 12, 10)


def smooth(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(shape)
    return ndimage.gaussian_filter(noise, 1.5).astype(np.float32)


def changed(
    image: np.ndarray, labels: np.ndarray | None = None, *, size: Any = None, **change: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Apply one change to copies."""
    labels = np.zeros(image.shape, np.uint8) if labels is None else labels
    a, b = apply_change(
        torch.from_numpy(image.copy()),
        torch.from_numpy(labels.copy()),
        Change(**change),
        size=size or image.shape,
    )
    assert a.dtype == torch.float32 and b.dtype == torch.uint8
    return a.numpy(), b.numpy()


def rotation_by_hand(axis: int, angle: float) -> np.ndarray:
    """Entry by entry."""
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    about = (
        [[1, 0, 0], [0, c, -s], [0, s, c]],
        [[c, 0, -s], [0, 1, 0], [s, 0, c]],
        [[c, -s, 0], [s, c, 0], [0, 0, 1]],
    )
    return np.array(about[axis])


@settings(max_examples=30, deadline=None)
@given(
    angle=st.none() | st.floats(-30, 30),
    axis=st.integers(0, 2),
    scale=st.none() | st.floats(0.7, 1.4),
    spacing=st.tuples(*[st.floats(0.8, 5)] * 3),
)
def test_rotation_and_scale_are_what_scipy_makes_of_the_whole_scan(
    angle: float | None,
    axis: int,
    scale: float | None,
    spacing: tuple[float, float, float],
) -> None:
    change = Change(angle=angle, axis=axis, scale=scale)
    size = source_size(change, SIZE, spacing=spacing)
    margin = [(big - small) // 2 for big, small in zip(size, SIZE, strict=True)]
    assert all((big - small) % 2 == 0 for big, small in zip(size, SIZE, strict=True))
    whole = smooth([max(n, m) + 8 for n, m in zip(size, SIZE, strict=True)])  # type: ignore[arg-type]
    mask = (whole > 0.02).astype(np.uint8) + (whole > 0.1)
    start = [(n - m) // 2 for n, m in zip(whole.shape, size, strict=True)]
    box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
    image, labels = apply_change(
        torch.from_numpy(whole[box].copy()),
        torch.from_numpy(mask[box].astype(np.uint8)),
        change,
        size=SIZE,
        spacing=spacing,
    )
    mm = np.diag(spacing)
    matrix = np.linalg.inv(mm) @ rotation_by_hand(axis, angle or 0) @ mm / (scale or 1)
    middle = np.array([a + m + (n - 1) / 2 for a, m, n in zip(start, margin, SIZE, strict=True)])
    offset = middle - matrix @ ((np.array(SIZE) - 1) / 2)
    expected = ndimage.affine_transform(whole, matrix, offset, output_shape=SIZE, order=1)
    assert np.abs(image.numpy() - expected).max() < 1e-4
    nearest = ndimage.affine_transform(
        mask.astype(np.uint8), matrix, offset, output_shape=SIZE, order=0
    )
    # Halfway between two voxels either is the nearest.
    ways = np.array([(matrix @ np.array(i)) + offset for i in np.ndindex(*SIZE)]).reshape(*SIZE, 3)
    tied = (np.abs(ways % 1 - 0.5) < 1e-3).any(-1)
    assert np.array_equal(labels.numpy()[~tied], nearest[~tied])


def test_a_scaled_up_sphere_is_larger_and_one_turn_more_is_none() -> None:
    x, y, z = np.ogrid[:40, :40, :40]
    sphere = ((x - 19.5) ** 2 + (y - 19.5) ** 2 + (z - 19.5) ** 2 < 36).astype(np.uint8)
    sizes = []
    for scale in (0.7, 1.0, 1.4):
        n = source_size(Change(scale=scale), (24, 24, 24))
        a = (40 - n[0]) // 2
        box = sphere[a : a + n[0], a : a + n[0], a : a + n[0]]
        _, labels = changed(box.astype(np.float32), box, size=(24, 24, 24), scale=scale)
        sizes.append(np.count_nonzero(labels))
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[2] / sizes[0] == pytest.approx(8, rel=0.15)
    patch = smooth((12, 12, 12))
    big = np.pad(patch, 1, mode="edge")
    turned, _ = changed(big, size=(12, 12, 12), angle=360.0, axis=2)
    assert np.abs(turned - patch).max() < 1e-4


def test_flips_move_image_and_labels_together() -> None:
    image = smooth(SIZE)
    labels = (image > 0).astype(np.uint8)
    for flips in ((), (1,), (2,), (1, 2)):
        a, b = changed(image, labels, flips=flips)
        assert np.array_equal(a, np.flip(image, flips))
        assert np.array_equal(b, np.flip(labels, flips))


def test_contrast_brightness_and_noise() -> None:
    image = smooth((24, 24, 24))
    a, _ = changed(image, contrast=1.2, brightness=-0.1)
    assert np.allclose(a, 1.2 * image - 0.1, atol=1e-6)
    first, again, other = (changed(image, noise=0.15, seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert (first - image).std() == pytest.approx(0.15, rel=0.05)
    assert abs((first - image).mean()) < 0.01


@pytest.mark.parametrize("sigma", [0.5, 0.75, 1.0])
def test_blur_is_the_gaussian(sigma: float) -> None:
    image = smooth((20, 16, 12))
    radius = int(np.ceil(2.5 * sigma))
    expected = ndimage.gaussian_filter(image, sigma, mode="nearest", radius=radius)
    assert np.abs(changed(image, blur=sigma)[0] - expected).max() < 1e-5


@pytest.mark.parametrize("name", ["gamma", "inverse_gamma"])
@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.5])
def test_gamma_keeps_order_mean_and_spread(name: str, exponent: float) -> None:
    image = smooth((16, 16, 16))
    a, _ = changed(image, **{name: exponent})
    assert a.mean() == pytest.approx(image.mean(), abs=1e-5)
    assert a.std() == pytest.approx(image.std(), rel=1e-4)
    order = np.argsort(image.ravel())
    assert np.all(np.diff(a.ravel()[order]) > -1e-5)
    sign = -1.0 if name == "inverse_gamma" else 1.0
    unit = (sign * image - (sign * image).min()) / np.ptp(image)
    power = unit.astype(np.float64) ** exponent
    power = sign * ((power - power.mean()) / power.std() * image.std() + sign * image.mean())
    assert np.abs(a - power).max() < 1e-4


def test_an_even_patch_stays_finite() -> None:
    image = np.full((8, 8, 8), -2, np.float32)
    a, _ = changed(image, gamma=1.3, inverse_gamma=0.8, blur=1.0, low_resolution=0.5)
    assert np.allclose(a, -2, atol=1e-5)


def test_low_resolution_loses_detail_and_keeps_the_rest() -> None:
    fine = np.indices((16, 16, 16)).sum(0) % 2 * 1.0
    coarse = smooth((16, 16, 16)) + np.indices((16, 16, 16))[0]
    assert changed(fine.astype(np.float32), low_resolution=0.5)[0].std() < 0.5 * fine.std()
    found, _ = changed(coarse.astype(np.float32), low_resolution=0.9)
    assert found.shape == (16, 16, 16)
    assert np.abs(found - coarse).max() < 1.2
    same, _ = changed(coarse.astype(np.float32), low_resolution=1.0)
    assert np.allclose(same, coarse, atol=1e-5)


def test_nothing_drawn_changes_nothing() -> None:
    image = smooth(SIZE)
    labels = (image > 0).astype(np.uint8)
    rng = np.random.default_rng(0)
    change = draw_change(Recipe(flip=0), rng)
    assert not change.spatial and source_size(change, SIZE) == SIZE
    a, b = changed(image, labels, **vars(change))
    assert np.array_equal(a, image) and np.array_equal(b, labels)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe])
def test_chances_and_ranges_are_the_recipe_s(name: str) -> None:
    recipe, rng, draws = RECIPES[name], np.random.default_rng(0), 3000
    assert recipe is not None
    drawn = [draw_change(recipe, rng) for _ in range(draws)]
    for field in ("scale", "noise", "blur", "contrast", "brightness", "low_resolution", "gamma"):
        probability, low, high = getattr(recipe, field)
        values = [getattr(change, field) for change in drawn]
        values = [value for value in values if value is not None]
        assert len(values) / draws == pytest.approx(probability, abs=0.03)
        if values:
            assert low <= min(values) and max(values) <= high
            assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.1 * (high - low))
    turned = [change for change in drawn if change.angle is not None]
    assert len(turned) / draws == pytest.approx(recipe.rotation[0], abs=0.03)
    assert np.abs([change.angle for change in turned]).max(initial=0) <= recipe.rotation[2]
    if turned:
        assert min(Counter(change.axis for change in turned).values()) > 0.25 * len(turned)
    flips = Counter(change.flips for change in drawn)
    assert set(flips) == ({(), (1,), (2,), (1, 2)} if recipe.flip else {()})
    assert min(flips.values()) > 0.2 * draws


def test_threads_change_nothing_but_roundings() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            rng = np.random.default_rng(5)
            for _ in range(12):
                change = draw_change(FULL, rng)
                size = source_size(change, (48, 48, 48))
                labels = torch.ones(size, dtype=torch.uint8)
                image = torch.from_numpy(smooth(size))
                results.append(apply_change(image, labels, change, size=(48, 48, 48))[0])
    finally:
        torch.set_num_threads(before)
    # Sums over a patch (gamma's mean) may be added in another order: that is a rounding.
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(results[:12], results[12:], strict=True)
    )
