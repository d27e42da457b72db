"""Tests of what the plan says of inference; spacing, patch and batch are in test_fingerprint."""

from fedseg.config import StudyConfig
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
