"""Tests of resampling: constants, ramps, labels by brute force, and places in mm."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch.nn import functional

from fedseg.data.resample import grid_shape, resample, resample_labels, upsample_argmax

SIDES = st.tuples(*[st.integers(1, 23)] * 3)


@settings(max_examples=60, deadline=None)
@given(old=SIDES, new=SIDES, value=st.floats(-1000, 1000, width=32))
def test_constant_stays_constant(
    old: tuple[int, int, int], new: tuple[int, int, int], value: float
) -> None:
    result = resample(torch.full(old, value), new)
    assert result.shape == new
    assert result.dtype == torch.float32
    assert torch.allclose(result, torch.tensor(value), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("new", [(40, 10, 20), (13, 20, 7), (55, 33, 20), (20, 20, 20)])
def test_mean_is_kept(new: tuple[int, int, int]) -> None:
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).normal(0, 1, (20, 20, 20)), 2)
    volume = torch.from_numpy((100 + 50 * smooth / smooth.std()).astype(np.float32))
    assert resample(volume, new).mean().item() == pytest.approx(volume.mean().item(), abs=2)


@pytest.mark.parametrize("new", [9, 17, 41, 100])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_ramp_in_mm_stays_the_same_ramp_inside(axis: int, new: int) -> None:
    old, extent = 30, 60.0
    centres = (np.arange(old) + 0.5) * extent / old
    shape = [1, 1, 1]
    shape[axis] = old
    volume = torch.from_numpy(centres.reshape(shape).astype(np.float32)).expand(
        *[old if a == axis else 4 for a in range(3)]
    )
    target = [4, 4, 4]
    target[axis] = new
    result = resample(volume, target).movedim(axis, 0)
    expected = (np.arange(new) + 0.5) * extent / new
    border = 1.5 * max(extent / old, extent / new)
    inside = (expected > border) & (expected < extent - border)
    assert inside.sum() > new / 2
    # Sampled at 3.3 voxels a step, the filter's centre of mass wavers a little.
    tolerance = 1e-3 if new > old else 0.1 * extent / old
    assert np.allclose(result.numpy()[inside], expected[inside, None, None], atol=tolerance)


@pytest.mark.parametrize("new", [(9, 17), (11, 5), (40, 33), (20, 30)])
def test_agrees_with_torch_where_it_has_antialiasing_in_2d(new: tuple[int, int]) -> None:
    image = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (20, 30))).float()
    expected = functional.interpolate(
        image[None, None], new, mode="bilinear", antialias=True, align_corners=False
    )[0, 0]
    assert torch.allclose(resample(image[..., None], (*new, 1))[..., 0], expected, atol=1e-4)


def test_coarse_grid_averages_noise_away() -> None:
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (60, 60, 60))).float()
    assert resample(noise, (15, 15, 15)).std().item() < 0.2


@pytest.mark.parametrize(
    ("old_mm", "new_mm"),
    [
        ((0.8, 0.8, 5.0), (3.0, 3.0, 3.0)),
        ((3.0, 2.0, 4.0), (1.0, 1.5, 1.0)),
        ((1.0, 1.0, 1.0), (2.5, 1.0, 0.7)),
    ],
)
def test_a_blob_stays_where_it_is_in_mm(
    old_mm: tuple[float, float, float], new_mm: tuple[float, float, float]
) -> None:
    extent = np.array([48.0, 60.0, 75.0])
    shape = [round(e / mm) for e, mm in zip(extent, old_mm, strict=True)]
    size = np.array(shape) * old_mm
    grid = np.meshgrid(
        *[(np.arange(n) + 0.5) * mm for n, mm in zip(shape, old_mm, strict=True)], indexing="ij"
    )
    where = np.array([20.0, 35.0, 33.0])
    squared = sum((axis - middle) ** 2 for axis, middle in zip(grid, where, strict=True))
    blob = np.exp(-squared / (2 * 7.0**2)).astype(np.float32)
    new = grid_shape(shape, old_mm, new_mm)
    result = resample(torch.from_numpy(blob), new).numpy()
    new_size = size / new
    before = (np.array(ndimage.center_of_mass(blob)) + 0.5) * old_mm
    after = (np.array(ndimage.center_of_mass(result)) + 0.5) * new_size
    assert np.all(np.abs(after - before) < 0.25 * np.minimum(old_mm, new_size))
    back = resample(torch.from_numpy(result), shape).numpy()
    again = (np.array(ndimage.center_of_mass(back)) + 0.5) * old_mm
    assert np.all(np.abs(again - before) < 0.25 * np.array(old_mm))


def test_grid_covers_the_box_and_has_a_voxel_at_least() -> None:
    assert grid_shape((512, 512, 90), (0.75, 0.75, 5.0), (3, 3, 3)) == (128, 128, 150)
    assert grid_shape((1, 10, 2), (0.5, 1, 1), (3, 3, 30)) == (1, 3, 1)


def test_labels_on_their_own_grid_are_the_same() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(np.uint8)
    assert np.array_equal(resample_labels(labels, labels.shape), labels)


def filter_weights(old: int, new: int) -> np.ndarray:
    """The triangle filter, written out voxel by voxel."""
    weights = np.zeros((new, old))
    for i in range(new):
        for j in range(old):
            centre = (i + 0.5) * old / new - 0.5
            weights[i, j] = max(0.0, 1 - abs(j - centre) / max(1.0, old / new))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("new", [(3, 4, 5), (10, 3, 9), (6, 16, 2)])
def test_labels_agree_with_brute_force(new: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    noise = ndimage.gaussian_filter(rng.normal(0, 1, (6, 8, 7)), 1)
    labels = np.digitize(noise, np.quantile(noise, [0.5, 0.8])).astype(np.uint8)
    weights = [filter_weights(o, n) for o, n in zip(labels.shape, new, strict=True)]
    expected, fence = np.zeros(new, np.uint8), np.zeros(new, bool)
    for label in (1, 2):
        share = np.einsum(
            "ai,bj,ck,ijk->abc", *weights, (labels >= label).astype(float), optimize=True
        )
        expected[share >= 0.5] = label
        fence |= np.abs(share - 0.5) < 1e-6
    assert set(np.unique(expected)) == {0, 1, 2}
    result = resample_labels(labels, new)
    assert result.dtype == np.uint8
    assert fence.mean() < 0.3
    assert np.array_equal(result[~fence], expected[~fence])


@settings(max_examples=15, deadline=None)
@given(old=SIDES, new=SIDES, rows=st.integers(1, 40))
def test_slabs_give_what_the_whole_gives(
    old: tuple[int, int, int], new: tuple[int, int, int], rows: int
) -> None:
    generator = torch.Generator().manual_seed(sum(old))
    logits = torch.randn(3, *old, generator=generator)
    whole = torch.stack([resample(channel, new) for channel in logits])
    result = upsample_argmax(logits, new, rows=rows)
    assert result.dtype == np.uint8
    assert result.shape == new
    # Another order of sums may only decide where two classes are equal but for rounding.
    chosen = whole.gather(0, torch.from_numpy(result).long()[None])[0]
    assert torch.allclose(chosen, whole.amax(0), atol=1e-4)
    assert np.array_equal(result, upsample_argmax(logits, new, rows=1000))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), new=SIDES, rows=st.integers(1, 9))
def test_outside_the_box_is_background_and_little_is_ahead(
    data: st.DataObject, new: tuple[int, int, int], rows: int
) -> None:
    grid = data.draw(SIDES)
    starts = [data.draw(st.integers(0, n - 1)) for n in grid]
    stops = [data.draw(st.integers(a + 1, n)) for a, n in zip(starts, grid, strict=True)]
    box = tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))
    lead = data.draw(st.sampled_from([0.0, 2.0, 9.0]))
    generator = torch.Generator().manual_seed(sum(new))
    inside = torch.randn(
        3, *(b - a for a, b in zip(starts, stops, strict=True)), generator=generator
    )
    inside[0] += lead
    result = upsample_argmax(inside, new, grid=grid, box=box, rows=rows)
    # Class scores of the whole grid, outside 40 logits apart, resampled class by class.
    scores = np.full((3, *grid), -20.0)
    scores[0] = 20
    scores[(slice(None), *box)] = inside.numpy()
    weights = [filter_weights(o, n) for o, n in zip(grid, new, strict=True)]
    expected = np.einsum("ai,bj,ck,nijk->nabc", *weights, scores, optimize=True)
    assert result.shape == new
    chosen = np.take_along_axis(expected, result[None].astype(int), 0)[0]
    assert np.allclose(chosen, expected.max(0), atol=1e-4)
