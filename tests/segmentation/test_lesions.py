"""Tests of lesion detection: by hand, and against a slow twin that goes lesion by lesion."""

import math

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from fedseg.segmentation.lesions import BANDS, LESION_COUNTS, count_lesions, lesion_summary

CUBE = (1.0, 1.0, 1.0)


def space() -> np.ndarray:
    return np.zeros((40, 40, 40), bool)


def ball(centre: tuple[float, ...], radius: float) -> np.ndarray:
    grid = np.indices((40, 40, 40))
    return sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2


def totals(counts: dict[str, int]) -> tuple[int, int, int]:
    found = (
        sum(counts[f"{band}.{what}"] for band in BANDS) for what in ("found", "missed", "false")
    )
    return tuple(found)  # type: ignore[return-value]


def components(region: np.ndarray) -> list[set[int]]:
    image = sitk.GetImageFromArray(region.astype(np.uint8))
    labels = sitk.GetArrayFromImage(sitk.ConnectedComponent(image, True)).ravel()
    return [set(np.flatnonzero(labels == n)) for n in range(1, labels.max(initial=0) + 1)]


def by_lesion(prediction: np.ndarray, truth: np.ndarray, overlap: float) -> tuple[list, list]:
    """Sizes of found and missed lesions, and of false ones; what the docstring says, in sets."""
    pieces, lesions = components(prediction), components(truth)
    home = []
    for lesion in lesions:
        shared = [len(lesion & piece) for piece in pieces]
        home.append(shared.index(max(shared)) if any(shared) else None)
    groups = {
        h: set().union(*(les for les, other in zip(lesions, home, strict=True) if other == h))
        for h in home
        if h is not None
    }
    members: dict[int, list[int]] = {h: [] for h in groups}
    for n, piece in enumerate(pieces):
        shared = {h: len(piece & group) for h, group in groups.items()}
        if any(shared.values()):
            best = max(shared.values())
            members[min(h for h, s in shared.items() if s == best)].append(n)
    good = set()
    for h, group in groups.items():
        joined = set().union(*(pieces[n] for n in members[h]))
        if len(joined & group) > overlap * len(joined | group):
            good.add(h)
    kept = {n for h in good for n in members[h]}
    found = sorted(len(les) for les, h in zip(lesions, home, strict=True) if h in good)
    missed = sorted(len(les) for les, h in zip(lesions, home, strict=True) if h not in good)
    return [found, missed], sorted(len(p) for n, p in enumerate(pieces) if n not in kept)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5])
def test_random_masks_agree_with_the_slow_twin(overlap: float) -> None:
    rng = np.random.default_rng(4)
    outcomes = np.zeros(3, int)
    for _ in range(25):
        noise = ndimage.gaussian_filter(rng.standard_normal((2, 16, 14, 12)), (0, 1, 1, 1))
        truth = noise[0] > np.quantile(noise[0], 0.85)
        mixed = noise[0] + rng.uniform(0.1, 0.8) * noise[1]
        prediction = mixed > np.quantile(mixed, rng.uniform(0.75, 0.95))
        counts = count_lesions(prediction, truth, spacing=CUBE, overlap=overlap)
        (found, missed), false = by_lesion(prediction, truth, overlap)
        assert totals(counts) == (len(found), len(missed), len(false))
        for what, sizes in (("found", found), ("missed", missed), ("false", false)):
            small = sum((6 * n / math.pi) ** (1 / 3) < 10 for n in sizes)
            assert counts[f"small.{what}"] == small
        outcomes += totals(counts)
    assert outcomes.min() > 10


def test_found_missed_and_false_by_hand() -> None:
    truth = ball((8, 8, 8), 3) | ball((25, 25, 25), 8)
    prediction = ball((25, 25, 26), 8) | ball((8, 32, 8), 3)
    counts = count_lesions(prediction, truth, spacing=CUBE)
    assert totals(counts) == (1, 1, 1)
    assert (counts["medium.found"], counts["small.missed"], counts["small.false"]) == (1, 1, 1)
    summary = lesion_summary(counts)
    assert summary["lesion_precision"] == summary["lesion_recall"] == summary["lesion_f1"] == 0.5
    assert (summary["lesion_f1_medium"], summary["lesion_f1_small"]) == (1.0, 0.0)
    assert summary["lesion_f1_large"] is None
    assert summary["lesions_false_per_scan"] == 1
    assert (summary["lesions"], summary["lesions_found"], summary["lesions_false"]) == (2, 1, 1)


def test_overlap_must_be_passed_not_met() -> None:
    truth, prediction = space(), space()
    truth[:8, 0, 0] = True
    prediction[:4, 0, 0] = True
    assert totals(count_lesions(prediction, truth, spacing=CUBE, overlap=0.5)) == (0, 1, 1)
    assert totals(count_lesions(prediction, truth, spacing=CUBE, overlap=0.49)) == (1, 0, 0)
    prediction[4, 0, 0] = True
    assert totals(count_lesions(prediction, truth, spacing=CUBE, overlap=0.5)) == (1, 0, 0)


def test_one_prediction_over_two_lesions_finds_both_and_pieces_of_one_find_it() -> None:
    pair = ball((10, 20, 20), 4) | ball((20, 20, 20), 4)
    bridge = pair.copy()
    bridge[10:21, 20, 20] = True
    assert totals(count_lesions(bridge, pair, spacing=CUBE)) == (2, 0, 0)
    assert totals(count_lesions(pair, bridge, spacing=CUBE)) == (1, 0, 0)


def test_a_lesion_is_26_connected() -> None:
    truth = space()
    for n in range(6):
        truth[n, n, n] = True
    assert totals(count_lesions(space(), truth, spacing=CUBE)) == (0, 1, 0)


def test_bands_are_diameters_in_mm() -> None:
    lesion = np.zeros((40, 40, 40), bool)
    lesion[0, 0, 0] = True
    for diameter, band in ((9.9, "small"), (10.1, "medium"), (19.9, "medium"), (20.1, "large")):
        side = (math.pi / 6 * diameter**3) ** (1 / 3)
        counts = count_lesions(lesion, lesion, spacing=(2 * side, side / 2, side))
        assert counts[f"{band}.found"] == 1
        assert totals(counts) == (1, 0, 0)


def test_false_lesions_of_a_scan_without_any_are_counted_apart() -> None:
    two = ball((10, 10, 10), 2) | ball((30, 30, 30), 2)
    cases = [(two, space()), (space(), space()), (two, two), (space(), two)]
    parts = [count_lesions(*case, spacing=CUBE) for case in cases]
    summed = {key: sum(part[key] for part in parts) for key in LESION_COUNTS}
    summary = lesion_summary(summed)
    assert summary["lesion_free_cases"] == 2
    assert summary["lesions_false_per_lesion_free_scan"] == 1.0
    assert summary["lesions_false_per_scan"] == 0.5
    assert summary["lesion_recall"] == 0.5


def test_nothing_at_all() -> None:
    counts = count_lesions(space(), space(), spacing=CUBE)
    assert set(counts) == set(LESION_COUNTS)
    assert counts["cases"] == counts["free.cases"] == 1
    assert sum(counts.values()) == 2
    nobody = lesion_summary(dict.fromkeys(LESION_COUNTS, 0))
    assert nobody["lesion_f1"] is None
    assert nobody["lesions_false_per_scan"] is None
