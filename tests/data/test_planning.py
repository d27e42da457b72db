"""Tests of the inference window and of spacing by a fixed patch; more are in test_fingerprint."""

from collections.abc import Sequence

import numpy as np
import pytest

from fedseg.config import StudyConfig
from fedseg.data.fingerprint import bin_of, fingerprint_of
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan


def test_inference_sees_what_training_saw_and_the_plan_says_why() -> None:
    plan = make_plan(StudyConfig.from_run_config({"train.patch-size": "96,96,48"}))
    assert plan.inference_patch == plan.patch_size == (96, 96, 48)
    assert "training patch" in plan.reasons["inference_patch"]


def test_the_study_may_fix_the_window() -> None:
    fixed = {"train.patch-size": "96,96,48", "train.inference-patch": "128,128,64"}
    plan = make_plan(StudyConfig.from_run_config(fixed))
    assert plan.inference_patch == (128, 128, 64)
    assert plan.reasons["inference_patch"] == "fixed by the study config"


def plan_of_bodies(spacing: Sequence[float], extent: Sequence[float], patch: str) -> Plan:
    """Plan for ten equal bodies, sizes in mm, on a device that any patch fits."""
    values = {f"spacing.{axis}": mm for axis, mm in zip("xyz", spacing, strict=True)}
    values |= {f"extent.{axis}": mm for axis, mm in zip("xyz", extent, strict=True)}
    case = {name: {int(bin_of(name, np.array([mm]))[0]): 1.0} for name, mm in values.items()}
    found = fingerprint_of(
        [case] * 10, modalities=["ct"] * 10, min_count=1, device="cuda", memory_gb=80
    )
    return make_plan(StudyConfig.from_run_config({"train.patch-size": patch}), [found])


def test_a_short_side_of_a_fixed_patch_coarsens_its_own_axis_alone() -> None:
    spacing, extent = (0.8, 0.8, 1.0), (350.0, 250.0, 410.0)
    cube = plan_of_bodies(spacing, extent, "128,128,128")
    flat = plan_of_bodies(spacing, extent, "128,128,32")
    assert flat.spacing[:2] == cube.spacing[:2]
    for plan in (cube, flat):
        seen = [
            voxels * mm / size
            for voxels, mm, size in zip(plan.patch_size, plan.spacing, extent, strict=True)
        ]
        # A quantile lies somewhere in its bin: 20 mm of extent.
        assert min(seen) > 0.57
        assert "sees 60% of the median body" in plan.reasons["spacing"]
    assert 0.57 < flat.patch_size[2] * flat.spacing[2] / extent[2] < 0.63
    assert "coarser by 2.03 so" in cube.reasons["spacing"]
    assert "coarser by 2.03, 2.03, 7.82 so" in flat.reasons["spacing"]


def test_a_fixed_patch_that_sees_enough_leaves_the_spacing() -> None:
    plan = plan_of_bodies((2.0, 2.0, 5.0), (300.0, 250.0, 200.0), "128,128,32")
    assert plan.spacing == pytest.approx((2, 2, 5), rel=0.05)
    assert "coarser" not in plan.reasons["spacing"]
