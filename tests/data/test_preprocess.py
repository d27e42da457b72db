"""Tests of preprocessing: intensities, crop, and the way back."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fedseg.config import StudyConfig
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan
from fedseg.data.preprocess import (
    Placement,
    check_size,
    modality_of,
    prepare,
    prepare_labels,
    restore,
)
from fedseg.data.volumes import Volume
from fedseg.errors import CaseError, ConfigError


def a_plan(**changes: Any) -> Plan:
    plan = make_plan(StudyConfig())
    return plan.model_copy(update={"patch_size": (16, 16, 16), **changes})


def scan_of(array: np.ndarray, spacing: tuple[float, float, float] = (3, 3, 3)) -> Volume:
    return Volume(
        array=array.astype(np.float32),
        spacing=spacing,
        stored=None,
        stored_shape=array.shape,
        stored_affine=np.diag([*spacing, 1.0]),
    )


def test_ct_window_maps_to_minus_2_and_2() -> None:
    values = np.linspace(-1000, 1000, 32 * 4 * 4).reshape(32, 4, 4)
    prepared = prepare(scan_of(values), a_plan(patch_size=(32, 4, 4)), modality="ct")
    assert prepared.image.shape == values.shape
    assert prepared.image.dtype == np.float32
    expected = np.interp(values, [-150, 50, 250], [-2, 0, 2])
    assert np.allclose(prepared.image, expected, atol=1e-5)


def test_mr_percentiles_map_to_minus_2_and_2_whatever_the_scale() -> None:
    rng = np.random.default_rng(0)
    body = np.zeros((20, 20, 20))
    body[2:-2, 2:-2, 2:-2] = rng.uniform(200, 1000, (16, 16, 16))
    plan = a_plan(mr_percentiles=(10.0, 90.0), patch_size=(20, 20, 20))
    prepared = prepare(scan_of(body), plan, modality="mr")
    inside = body[body > 0]
    low, high = np.percentile(inside, [10, 90])
    expected = np.clip((body - (low + high) / 2) / ((high - low) / 4), -2, 2)
    assert prepared.image.dtype == np.float32
    assert np.allclose(prepared.image, expected, atol=1e-4)
    doubled = prepare(scan_of(body * 2), plan, modality="mr")
    assert np.allclose(doubled.image, prepared.image, atol=1e-4)


def test_auto_takes_a_scan_with_air_for_ct() -> None:
    assert modality_of(np.array([-1000.0, 50]), "auto") == "ct"
    assert modality_of(np.array([-100.0, 900]), "auto") == "mr"
    assert modality_of(np.array([-1000.0, 50]), "mr") == "mr"
    assert modality_of(np.array([0.0, 50]), "ct") == "ct"
    values = np.full((16, 16, 16), -1000.0)
    values[4:12] = 50
    automatic, named = (prepare(scan_of(values), a_plan(), modality=m) for m in ("auto", "ct"))
    assert np.array_equal(automatic.image, named.image)


@pytest.mark.parametrize("value", [0.0, -1000.0, 40.0])
@pytest.mark.parametrize("modality", ["auto", "ct", "mr"])
def test_scan_without_contrast_is_taken_whole(value: float, modality: Any) -> None:
    prepared = prepare(scan_of(np.full((18, 17, 16), value)), a_plan(), modality=modality)
    assert prepared.image.shape == (18, 17, 16)
    assert np.all(np.isfinite(prepared.image))
    assert np.abs(prepared.image).max() <= 2


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_crop_holds_the_body_and_a_patch_where_the_scan_does(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(4, 40)] * 3))
    starts = [data.draw(st.integers(0, n - 1)) for n in shape]
    stops = [data.draw(st.integers(a + 1, n)) for a, n in zip(starts, shape, strict=True)]
    patch = data.draw(st.tuples(*[st.integers(1, 32)] * 3))
    body = tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))
    image = np.full(shape, -1000.0)
    image[body] = 40
    prepared = prepare(scan_of(image), a_plan(patch_size=patch), modality="ct")
    box = prepared.placement.box
    assert prepared.image.shape == tuple(side.stop - side.start for side in box)
    for side, part, n, least in zip(box, body, shape, patch, strict=True):
        assert 0 <= side.start <= part.start
        assert part.stop <= side.stop <= n
        assert side.stop - side.start >= min(n, least)
        # And no more than the body, its margin of 2 or the patch need.
        assert side.stop - side.start <= max(part.stop - part.start + 4, min(n, least))


def test_crop_is_around_the_largest_part_and_leaves_the_table_out() -> None:
    image = np.full((40, 40, 40), -1000.0)
    image[10:30, 8:26, 5:35] = 40
    image[:, 36:38, :] = -100
    prepared = prepare(scan_of(image), a_plan(), modality="ct")
    assert prepared.placement.box == (slice(8, 32), slice(6, 28), slice(3, 37))


def phantom_like(spacing: tuple[float, float, float]) -> tuple[Volume, np.ndarray]:
    """A body with a liver and a tumour, in a grid of its own."""
    shape = [round(180 / mm) for mm in spacing]
    x, y, z = np.meshgrid(
        *[(np.arange(n) + 0.5) * mm - 90 for n, mm in zip(shape, spacing, strict=True)],
        indexing="ij",
    )
    body = (x / 80) ** 2 + (y / 65) ** 2 + (z / 85) ** 2 < 1
    liver = ((x - 25) / 40) ** 2 + (y / 38) ** 2 + ((z - 5) / 45) ** 2 < 1
    tumor = (x - 30) ** 2 + (y - 5) ** 2 + (z - 10) ** 2 < 16**2
    labels = (liver.astype(np.uint8) + (tumor & liver)).astype(np.uint8)
    image = np.where(body, 40.0, -1000.0) + 60 * (labels == 1)
    return scan_of(image, spacing), labels


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 2.5), (3.0, 3.0, 3.0), (2.0, 2.0, 5.0)])
def test_labels_survive_the_way_there_and_back(spacing: tuple[float, float, float]) -> None:
    scan, labels = phantom_like(spacing)
    prepared = prepare(scan, a_plan(spacing=(2.0, 2.0, 2.0)))
    small = prepare_labels(labels, prepared)
    assert small.shape == prepared.image.shape
    assert small.dtype == np.uint8
    logits = torch.nn.functional.one_hot(torch.from_numpy(small).long(), 3).movedim(-1, 0).float()
    back = restore(10 * logits, prepared.placement)
    assert back.shape == labels.shape
    assert back.dtype == np.uint8
    assert dice(back >= 1, labels >= 1) > 0.97
    assert dice(back == 2, labels == 2) > 0.97
    centres = [np.array(ndimage.center_of_mass(mask == 2)) for mask in (back, labels)]
    assert np.abs(centres[0] - centres[1]).max() < 0.25


def test_image_and_labels_lie_on_each_other() -> None:
    scan, labels = phantom_like((1.5, 2.0, 4.0))
    prepared = prepare(scan, a_plan())
    small = prepare_labels(labels, prepared)
    core = ndimage.binary_erosion(small == 1, iterations=2)
    assert core.sum() > 100
    assert np.allclose(prepared.image[core], (100 - 50) / 100, atol=0.05)


def test_outside_the_crop_is_background() -> None:
    image = np.full((40, 40, 40), -1000.0)
    image[15:25, 15:25, 15:25] = 40
    prepared = prepare(scan_of(image), a_plan(), modality="ct")
    everywhere_tumor = torch.tensor([0.0, 0.0, 9.0])[:, None, None, None].expand(
        3, *prepared.image.shape
    )
    labels = restore(everywhere_tumor, prepared.placement)
    inside = np.zeros_like(labels)
    inside[prepared.placement.box] = 2
    assert np.array_equal(labels, inside)


def test_placement_survives_json() -> None:
    placement = Placement(
        shape=(512, 512, 90),
        spacing=(0.7, 0.7, 2.5),
        grid=(128, 128, 150),
        box=(slice(3, 120), slice(0, 64), slice(9, 99)),
    )
    assert Placement.from_json(json.loads(json.dumps(placement.to_json()))) == placement


def test_scan_that_the_spacing_would_make_too_large_is_refused_by_name() -> None:
    scan = scan_of(np.zeros((40, 40, 40)), (30.0, 30, 30))
    with pytest.raises(CaseError, match=r"scan: \(2400, 2400, 2400\) voxels at the plan's"):
        prepare(scan, a_plan(spacing=(0.5, 0.5, 0.5)))


def test_body_smaller_than_half_a_patch_is_refused() -> None:
    plan = a_plan(patch_size=(32, 32, 32))
    check_size(np.zeros((16, 40, 16)), plan, "a.nii")
    with pytest.raises(CaseError) as caught:
        check_size(np.zeros((40, 15, 40)), plan, "a.nii")
    assert str(caught.value).startswith("a.nii: body of (40, 15, 40) voxels at the plan's")
    assert "smaller than half the patch (32, 32, 32); leave the case out" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("train.patch-size", "0,64,64", "train.patch-size: got"),
        ("train.inference-patch", "64,64,-1", "train.inference-patch: got"),
        ("train.spacing", "200,3,3", "spacing.0: got 200"),
        ("train.mr-percentiles", "-1,99", "mr_percentiles|mr-percentiles"),
        ("train.mr-percentiles", "1,101", "mr_percentiles|mr-percentiles"),
    ],
)
def test_plan_of_an_impossible_config_is_one_clear_error(key: str, value: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_plan(StudyConfig.from_run_config({key: value}))


def test_plan_from_the_wire_is_checked() -> None:
    plan = a_plan()
    assert Plan.from_json(plan.to_json()) == plan
    values = json.loads(plan.to_json())
    for change in (
        {"spacing": [0, 3, 3]},
        {"spacing": [3, 3]},
        {"patch_size": [100000, 16, 16]},
        {"mr_percentiles": [99, 1]},
        {"ct_window": [250, -150]},
        {"width": 10**9},
        {"surprise": 1},
    ):
        with pytest.raises(ConfigError, match="plan"):
            Plan.from_json(json.dumps({**values, **change}))
    with pytest.raises(ConfigError, match="plan"):
        Plan.from_json("{")
    with pytest.raises(ConfigError, match="more than 65536 bytes"):
        Plan.from_json(json.dumps({**values, "model": "x" * 70000}))
