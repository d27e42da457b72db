"""Tests of the metrics: against SimpleITK, and by hand."""

import json
from itertools import product
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from fedseg.segmentation import metrics
from fedseg.segmentation.lesions import BANDS
from fedseg.segmentation.metrics import (
    METRICS,
    OVERLAP_METRICS,
    Scoring,
    add,
    case_counts,
    empty_sums,
    score,
    summarise,
)
from fedseg.segmentation.surface import SURFACE_METRICS, surface_metrics

LOWEST = {"liver": 1, "tumor": 2}
SPACING = (0.7, 1.3, 4.0)


def sums_of_case(prediction: np.ndarray, truth: np.ndarray, **options: Any) -> dict[str, float]:
    return metrics.sums_of_case(prediction, truth, **{"spacing": SPACING, **options})


def random_labels(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Labels 0 to 2 of which any may be missing."""
    allowed = [label for label in (0, 1, 2) if rng.random() < 0.75] or [0]
    return rng.choice(allowed, shape).astype(np.uint8)


def pairs(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    shapes = [tuple(int(n) for n in rng.integers(2, 9, 3)) for _ in range(count)]
    return [(random_labels(rng, shape), random_labels(rng, shape)) for shape in shapes]


def by_simpleitk(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Metrics of one region; SimpleITK gives infinity or nan where one is undefined."""
    images = []
    for array in (prediction, truth):
        image = sitk.GetImageFromArray(array.astype(np.uint8))
        image.SetSpacing((0.7, 1.3, 4.0))
        images.append(image)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    sizes = int(prediction.sum()), int(truth.sum())
    return {
        "dice": overlap.GetDiceCoefficient(1),
        "iou": overlap.GetJaccardCoefficient(1),
        "precision": 1 - overlap.GetFalseDiscoveryRate(1),
        "recall": 1 - overlap.GetFalseNegativeError(1),
        "volume_similarity": 1 - abs(sizes[0] - sizes[1]) / sum(sizes),
    }


def defined(prediction: np.ndarray, truth: np.ndarray) -> set[str]:
    names = {"dice", "iou", "volume_similarity"} if prediction.any() or truth.any() else set()
    names |= {"precision"} if prediction.any() else set()
    return names | ({"recall"} if truth.any() else set())


def test_200_random_volumes_agree_with_simpleitk() -> None:
    compared = 0
    for prediction, truth in pairs(200):
        sums = sums_of_case(prediction, truth)
        for region, lowest in LOWEST.items():
            mine, reference = prediction >= lowest, truth >= lowest
            wanted = defined(mine, reference)
            expected = by_simpleitk(mine, reference) if wanted else {}
            for metric in OVERLAP_METRICS:
                key = f"{region}.{metric}"
                assert sums[f"{key}.count"] == float(metric in wanted), key
                value = expected[metric] if metric in wanted else 0.0
                assert sums[f"{key}.sum"] == pytest.approx(value, abs=1e-6), key
                compared += metric in wanted
    assert compared > 1000


def test_counts_are_those_of_voxel_by_voxel_comparison() -> None:
    for prediction, truth in pairs(10):
        counts = dict.fromkeys(product(LOWEST, ("tp", "fp", "fn")), 0)
        for p, t in zip(prediction.ravel(), truth.ravel(), strict=True):
            for region, lowest in LOWEST.items():
                counts[region, "tp"] += p >= lowest and t >= lowest
                counts[region, "fp"] += p >= lowest and t < lowest
                counts[region, "fn"] += p < lowest and t >= lowest
        for region, found in case_counts(prediction, truth).items():
            assert found == tuple(counts[region, name] for name in ("tp", "fp", "fn"))


def test_score_by_hand() -> None:
    assert score(6, 2, 4) == {
        "dice": 12 / 18,
        "iou": 6 / 12,
        "volume_similarity": 1 - 2 / 18,
        "precision": 6 / 8,
        "recall": 6 / 10,
    }
    assert score(0, 0, 0) == {}
    assert score(0, 0, 3) == {"dice": 0, "iou": 0, "volume_similarity": 0, "recall": 0}
    assert score(0, 3, 0) == {"dice": 0, "iou": 0, "volume_similarity": 0, "precision": 0}


def test_mean_is_over_the_cases_that_define_it_and_pooled_over_all_voxels() -> None:
    cases = pairs(40)
    every = summarise(add(sums_of_case(p, t) for p, t in cases))
    assert every["cases"] == 40
    prediction = np.concatenate([p.ravel() for p, _ in cases])
    truth = np.concatenate([t.ravel() for _, t in cases])
    for region, lowest in LOWEST.items():
        whole = by_simpleitk((prediction >= lowest)[None, None], (truth >= lowest)[None, None])
        for metric in OVERLAP_METRICS:
            values = [
                by_simpleitk(p >= lowest, t >= lowest)[metric]
                for p, t in cases
                if metric in defined(p >= lowest, t >= lowest)
            ]
            key = f"{region}.{metric}"
            assert every[f"{key}.cases"] == len(values)
            assert every[key] == pytest.approx(np.mean(values), abs=1e-6)
            assert every[f"{key}.pooled"] == pytest.approx(whole[metric], abs=1e-6)


def test_adding_by_site_equals_adding_by_case() -> None:
    sums = [sums_of_case(p, t) for p, t in pairs(12)]
    by_site = add([add(sums[:5]), add(sums[5:6]), add(sums[6:])])
    assert by_site == pytest.approx(add(sums), abs=1e-12)


def test_region_absent_in_mask_and_prediction_is_counted_and_not_scored() -> None:
    nothing = np.zeros((4, 4, 4), np.uint8)
    liver = np.ones((4, 4, 4), np.uint8)
    result = summarise(add([sums_of_case(nothing, nothing), sums_of_case(liver, liver)]))
    assert result["cases"] == 2
    assert (result["liver.dice"], result["liver.dice.cases"]) == (1.0, 1)
    assert (result["tumor.dice"], result["tumor.dice.cases"]) == (None, 0)
    assert result["tumor.dice.pooled"] is None


def test_false_alarm_scores_zero_dice_and_has_no_recall() -> None:
    alarm = np.full((3, 3, 3), 2, np.uint8)
    result = summarise(sums_of_case(alarm, np.ones_like(alarm)))
    assert (result["tumor.dice"], result["tumor.dice.cases"]) == (0.0, 1)
    assert (result["tumor.recall"], result["tumor.recall.cases"]) == (None, 0)


def test_region_that_is_not_annotated_keeps_count_zero() -> None:
    prediction, truth = np.full((3, 3, 3), 2, np.uint8), np.ones((3, 3, 3), np.uint8)
    sums = sums_of_case(prediction, truth, annotated=("liver",))
    assert not any(value for key, value in sums.items() if key.startswith("tumor."))
    assert sums["liver.dice.sum"] == 1.0
    assert summarise(sums)["tumor.lesions_false_per_scan"] is None


def test_surface_distances_are_those_of_each_region_on_the_whole_volume() -> None:
    for prediction, truth in pairs(20):
        sums = sums_of_case(prediction, truth, scoring=Scoring(tolerance_mm=1.5))
        assert sums["surfaces"] == 1
        for region, lowest in LOWEST.items():
            wanted = surface_metrics(
                prediction >= lowest, truth >= lowest, spacing=SPACING, tolerance_mm=1.5
            )
            for metric in SURFACE_METRICS:
                assert sums[f"{region}.{metric}.count"] == (metric in wanted)
                assert sums[f"{region}.{metric}.sum"] == pytest.approx(wanted.get(metric, 0.0))


def test_surface_distances_that_nobody_asked_for_are_not_in_the_summary() -> None:
    prediction, truth = pairs(1)[0]
    sums = sums_of_case(prediction, truth, scoring=Scoring(distances=False))
    assert set(sums) == set(empty_sums())
    assert sums["surfaces"] == 0
    keys = set(summarise(sums))
    assert not any(metric in key for key in keys for metric in SURFACE_METRICS)
    assert keys < set(summarise(sums_of_case(prediction, truth)))


def test_a_surface_distance_is_undefined_where_one_region_is_empty() -> None:
    liver, nothing = np.ones((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    result = summarise(add([sums_of_case(liver, liver), sums_of_case(nothing, liver)]))
    assert (result["liver.dice"], result["liver.dice.cases"]) == (0.5, 2)
    assert (result["liver.hd95"], result["liver.hd95.cases"]) == (0.0, 1)


def test_volumes_in_millilitres_with_error() -> None:
    truth, more, less = np.zeros((3, 10, 10, 10), np.uint8)
    truth[:4], more[:6], less[:2] = 1, 1, 1
    parts = [
        sums_of_case(prediction, truth, spacing=(1.0, 2.0, 5.0)) for prediction in (more, less)
    ]
    result = summarise(add(parts))
    assert result["liver.volume_ml"] == pytest.approx(4.0)
    assert result["liver.volume_error_ml"] == pytest.approx(0.0)
    assert result["liver.volume_abs_error_ml"] == pytest.approx(2.0)
    assert summarise(parts[1])["liver.volume_error_ml"] == pytest.approx(-2.0)
    assert (result["tumor.volume_ml"], result["tumor.volume_ml.cases"]) == (0.0, 2)


def test_lesions_are_those_of_the_tumour_and_add_up() -> None:
    truth, prediction = np.zeros((2, 12, 12, 12), np.uint8)
    truth[:], prediction[:] = 1, 1
    truth[2:4, 2:4, 2:4] = prediction[2:4, 2:4, 2:4] = prediction[8:10, 8:10, 8:10] = 2
    parts = [sums_of_case(prediction, truth), sums_of_case(truth, truth)]
    result = summarise(add(parts))
    assert (result["tumor.lesions"], result["tumor.lesions_found"]) == (2, 2)
    assert result["tumor.lesion_precision"] == pytest.approx(2 / 3)
    assert result["tumor.lesions_false_per_scan"] == 0.5
    found = {key: result[f"tumor.lesions_{key}"] for key in BANDS}
    assert found == {"small": 2, "medium": 0, "large": 0}


def test_what_a_site_sends_is_small() -> None:
    assert len(empty_sums()) < 80
    assert len(json.dumps(empty_sums())) < 4000


def test_nothing_evaluated_has_every_key_and_no_number() -> None:
    result = summarise(add([]))
    assert add([]) == empty_sums()
    for region, metric in product(LOWEST, METRICS):
        if metric in SURFACE_METRICS:
            assert f"{region}.{metric}" not in result
            continue
        assert result[f"{region}.{metric}"] is None
        assert result[f"{region}.{metric}.cases"] == 0
        if metric in OVERLAP_METRICS:
            assert result[f"{region}.{metric}.pooled"] is None
