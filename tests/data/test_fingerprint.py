"""The fingerprint: sums over sites are those of all cases, and few cases stay hidden."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.config import StudyConfig
from fedseg.data.fingerprint import (
    EDGES,
    CaseMeasure,
    Fingerprint,
    Histogram,
    add_fingerprints,
    fingerprint_of,
    quantile,
    resolution,
)
from fedseg.data.measure import measure
from fedseg.data.planning import make_plan, needs_fingerprints
from fedseg.data.volumes import Volume
from fedseg.errors import ConfigError


def volume(array: np.ndarray, spacing: tuple[float, float, float]) -> Volume:
    return Volume(
        array=array.astype(np.float32),
        spacing=spacing,
        stored=None,
        stored_shape=array.shape,
        stored_affine=np.eye(4),
    )


def make_case(seed: int) -> tuple[Volume, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(12, 24, 3))
    hu, step = rng.uniform(50, 150), rng.uniform(0.7, 4, 3)
    image = np.full(shape, -1000.0)
    image[2:-2, 2:-2, 2:-2] = rng.normal(40, 20, [n - 4 for n in shape])
    labels = np.zeros(shape, np.uint8)
    labels[4:-4, 4:-4, 4:-4] = 1
    if rng.random() < 0.8:
        labels[5:7, 5:8, 5:7] = 2
    image[labels == 1] = rng.normal(hu, 15, int((labels == 1).sum()))
    image[labels == 2] = rng.normal(hu - 60, 15, int((labels == 2).sum()))
    return volume(image, (float(step[0]), float(step[1]), float(step[2]))), labels


def measures(count: int, start: int = 0) -> list[CaseMeasure]:
    return [
        measure(*make_case(seed), modality="ct", annotated=("liver", "tumor"))
        for seed in range(start, start + count)
    ]


def fingerprint(parts: list[CaseMeasure], min_count: int = 1, **more: Any) -> Fingerprint:
    return fingerprint_of(parts, modalities=["ct"] * len(parts), min_count=min_count, **more)


ALL = measures(24)


@given(st.lists(st.integers(0, 3), min_size=24, max_size=24))
@settings(max_examples=30, deadline=None)
def test_the_plan_of_any_split_is_that_of_the_pooled_cases(owners: list[int]) -> None:
    pooled = make_plan(StudyConfig(), [fingerprint(ALL)])
    sites = [[m for m, o in zip(ALL, owners, strict=True) if o == site] for site in range(4)]
    split = make_plan(StudyConfig(), [fingerprint(site) for site in sites if site])
    assert split.spacing == pytest.approx(pooled.spacing, rel=1e-3)
    assert split.ct_window == pytest.approx(pooled.ct_window, abs=5)
    assert (split.patch_size, split.batch_size, split.depth) == (
        pooled.patch_size,
        pooled.batch_size,
        pooled.depth,
    )


def test_quantiles_agree_with_the_cases_to_a_bin() -> None:
    """Oracle: NumPy on the cases themselves."""
    total = add_fingerprints([fingerprint(ALL[:10]), fingerprint(ALL[10:])])
    cases = [make_case(seed) for seed in range(24)]
    for axis, name in enumerate("xyz"):
        true = np.median([scan.spacing[axis] for scan, _ in cases])
        found = quantile(f"spacing.{name}", total[f"spacing.{name}"], 0.5)
        assert found == pytest.approx(true, rel=0.06)
    weights = np.concatenate([np.full(int((m >= 1).sum()), 1 / (m >= 1).sum()) for _, m in cases])
    values = np.concatenate([scan.array[labels >= 1] for scan, labels in cases])
    order = np.argsort(values)
    rising = np.cumsum(weights[order]) / weights.sum()
    for q in (0.005, 0.5, 0.995):
        true = values[order][np.searchsorted(rising, q)]
        assert quantile("liver.hu", total["liver.hu"], q) == pytest.approx(true, abs=20)


@pytest.mark.parametrize("min_count", [2, 3, 5, 10])
def test_every_group_stands_for_enough_cases(min_count: int) -> None:
    found = fingerprint(ALL, min_count)
    for name, histogram in found.histograms.items():
        if not histogram.count:
            assert name in found.held_back
            continue
        ends = [*histogram.groups[1:], len(histogram.mass)]
        for start, stop in zip(histogram.groups, ends, strict=True):
            inside = [m for m in ALL if any(start <= i < stop for i in m.get(name, {}))]
            lesions = sum(n for m in ALL for i, n in m.get(name, {}).items() if start <= i < stop)
            assert (lesions if name == "lesion.ml" else len(inside)) >= min_count
            assert len(set(histogram.mass[start:stop])) == 1


def test_merging_keeps_the_mass_and_its_error_within_the_stated_bound() -> None:
    exact, merged = fingerprint(ALL), fingerprint(ALL, 5)
    for name, histogram in merged.histograms.items():
        if not histogram.count:
            continue
        assert sum(histogram.mass) == pytest.approx(sum(exact.histograms[name].mass), rel=1e-4)
        for q in (0.05, 0.5, 0.95):
            value = quantile(name, histogram, q)
            true = quantile(name, exact.histograms[name], q)
            assert value is not None and true is not None
            assert abs(value - true) <= resolution(name, histogram, value) + 1e-9


def test_fewer_cases_than_the_minimum_hold_everything_back() -> None:
    found = fingerprint(ALL[:4], 5)
    assert all(
        not histogram.mass for name, histogram in found.histograms.items() if name != "lesion.ml"
    )
    assert (found.ct, found.liver) == (0, 0)
    assert {"ct", "liver", "body.hu", "spacing.x"} <= set(found.held_back)


def test_without_fingerprints_the_plan_says_default() -> None:
    plan = make_plan(StudyConfig(), [fingerprint(ALL[:4], 5)])
    assert plan.spacing == (3.0, 3.0, 3.0)
    assert plan.ct_window == (-150.0, 250.0)
    assert plan.reasons["spacing"].startswith("default")


def test_what_the_study_fixes_is_not_planned() -> None:
    fixed = {
        "train.spacing": "2,2,4",
        "train.ct-window": "-100,300",
        "train.patch-size": "96,96,48",
        "train.batch-size": 3,
        "train.inference-patch": "96,96,48",
        "model.depth": 4,
    }
    study = StudyConfig.from_run_config(fixed)
    assert needs_fingerprints(StudyConfig()) and not needs_fingerprints(study)
    plan = make_plan(study, [fingerprint(ALL)])
    assert (plan.spacing, plan.ct_window) == ((2, 2, 4), (-100, 300))
    assert (plan.patch_size, plan.batch_size, plan.depth) == ((96, 96, 48), 3, 4)
    assert set(plan.reasons.values()) == {"fixed by the study config"}


def test_the_smallest_device_decides_patch_and_batch() -> None:
    big = fingerprint(ALL, device="cuda", memory_gb=80)
    small = fingerprint(ALL, device="cuda", memory_gb=4)
    cpu = fingerprint(ALL, device="cpu", memory_gb=64)
    study = StudyConfig()
    alone = make_plan(study, [big])
    with_small = make_plan(study, [big, small])
    with_cpu = make_plan(study, [big, cpu])
    assert alone.batch_size > with_small.batch_size or max(alone.patch_size) > max(
        with_small.patch_size
    )
    assert max(with_cpu.patch_size) <= 64
    assert "CPU" in with_cpu.reasons["patch_size"]


def test_mr_has_no_hu() -> None:
    scan, labels = make_case(1)
    found = measure(scan, labels, modality="mr", annotated=("liver",))
    assert not any(name.endswith("hu") for name in found)
    assert "lesion.ml" not in found


def test_json_round_trip_and_numbers_only() -> None:
    found = fingerprint(ALL, 5)
    assert Fingerprint.from_json(found.to_json()) == found
    for histogram in json.loads(found.to_json())["histograms"].values():
        assert set(histogram) == {"mass", "groups", "count"}


@pytest.mark.parametrize(
    "change",
    [
        {"histograms": {"patient": {}}},
        {"histograms": {"liver.hu": {"mass": [1.0], "groups": [], "count": 1}}},
        {"histograms": {"liver.hu": {"mass": [], "groups": [], "count": 1}}},
        {"histograms": {"liver.hu": {"mass": [], "groups": [10**6], "count": 0}}},
        {"ct": -1},
        {"ct": 1e30},
        {"device": "tpu"},
        {"memory_gb": 0},
        {"held_back": ["x" * 17]},
        {"extra": 1},
    ],
)
def test_a_hostile_fingerprint_is_refused(change: dict[str, Any]) -> None:
    values = {**json.loads(fingerprint(ALL).to_json()), **change}
    with pytest.raises(ConfigError):
        Fingerprint.from_json(json.dumps(values))
    with pytest.raises(ConfigError, match="bytes"):
        Fingerprint.from_json("[" * 10**6)


def test_sums_of_many_sites_may_pass_the_bounds_of_one() -> None:
    values = json.loads(fingerprint(ALL).to_json())
    values["histograms"]["liver.hu"]["count"] = 10**7
    large = Fingerprint.from_json(json.dumps(values))
    assert add_fingerprints([large] * 3)["liver.hu"].count == 3 * 10**7


def test_empty_histograms_read_as_nothing() -> None:
    assert quantile("liver.hu", Histogram(), 0.5) is None
    assert all(histogram.count == 0 for histogram in add_fingerprints([]).values())
    assert set(add_fingerprints([])) == set(EDGES)
