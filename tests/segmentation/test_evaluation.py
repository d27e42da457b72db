"""Tests of scoring cases, folders and masks that exist."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.cache import CachedCase, cached_case
from fedseg.data.planning import make_plan
from fedseg.data.sites import find_cases
from fedseg.errors import DataError, ModelError
from fedseg.segmentation import evaluation
from fedseg.segmentation.evaluation import (
    evaluate_cases,
    evaluate_folder,
    evaluate_predictions,
    score_cases,
)
from fedseg.segmentation.metrics import Scoring, add, summarise, sums_of_case

CPU = torch.device("cpu")
PLAN = make_plan(StudyConfig()).model_copy(
    update={"patch_size": (16, 16, 16), "inference_patch": (16, 16, 16)}
)
SPACING = (2.0, 2.0, 3.0)


class ByIntensity(nn.Module):
    """A network that knows the answer: bright is liver, brighter is tumour."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 20 * torch.cat([-image.abs(), 0.9 * image - 0.5, 2 * image - 2], 1)


def labels_of(shift: int = 0) -> np.ndarray:
    labels = np.zeros((40, 36, 30), np.uint8)
    labels[8 + shift : 28 + shift, 8:28, 8:24] = 1
    labels[14 + shift : 22 + shift, 14:22, 12:20] = 2
    return labels


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-2.0, -2, 3, 1]) if affine is None else affine
    nib.save(nib.Nifti1Image(array, affine), path)


def write(folder: Path, image: str, mask: str, *, shift: int = 0) -> None:
    """Write a scan whose labels can be told from its HU, and its mask."""
    labels = labels_of(shift)
    hu = np.full(labels.shape, -1000, np.int16)
    hu[3:-3, 3:-3, 3:-3] = 50
    hu[labels == 1], hu[labels == 2] = 140, 250
    save(folder / image, hu)
    save(folder / mask, labels)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    for n in range(3):
        write(folder, f"images/c{n}.nii.gz", f"masks/c{n}.nii.gz", shift=n)
    return folder


@pytest.fixture
def cached(site: Path, tmp_path: Path) -> list[CachedCase]:
    return [cached_case(case, PLAN, tmp_path / "cache") for case in find_cases(site).cases]


def test_sums_of_cases_are_in_mm_of_the_scan_not_of_the_plan(cached: list[CachedCase]) -> None:
    sums = evaluate_cases(ByIntensity(), cached, PLAN, device=CPU, distances=True)
    summary = summarise(sums)
    true_ml = 20 * 20 * 16 * 12 / 1000
    volume, error = summary["liver.volume_ml"], summary["liver.volume_error_ml"]
    assert volume is not None and error is not None
    assert volume - error == pytest.approx(true_ml)
    hd95 = summary["liver.hd95"]
    assert hd95 is not None and 0 < hd95 <= 3
    assert summary["tumor.lesions_found"] == 3


def test_cases_are_the_parts_of_the_sum_and_distances_are_asked_for(
    cached: list[CachedCase],
) -> None:
    parts = score_cases(ByIntensity(), cached, PLAN, device=CPU)
    whole = evaluate_cases(ByIntensity(), cached, PLAN, device=CPU)
    assert whole == add(parts)
    assert (len(parts), whole["cases"], whole["surfaces"]) == (3, 3, 0)
    liver = evaluate_cases(
        ByIntensity(), cached, PLAN, device=CPU, annotated=("liver",), distances=True
    )
    assert (liver["surfaces"], liver["liver.hd95.count"], liver["tumor.hd95.count"]) == (3, 3, 0)
    assert liver["liver.dice.sum"] == whole["liver.dice.sum"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ModelError("no memory for 1 window of 16x16x16 at once on cpu; free memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    ],
)
@pytest.mark.parametrize("where", ["predict_labels", "sums_of_case"])
def test_lack_of_memory_costs_one_case(
    site: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    real, calls = getattr(evaluation, where), []

    def scarce(*given: object, **more: object) -> object:
        calls.append(given)
        if len(calls) in few:
            raise error
        return real(*given, **more)

    monkeypatch.setattr(evaluation, where, scarce)
    few: tuple[int, ...] = (2,)
    scores = evaluate_folder(ByIntensity(), PLAN, site, device=CPU)
    assert list(scores.cases) == ["c0", "c2"]
    (problem,) = scores.skipped
    assert problem.startswith(f"{site / 'images' / 'c1.nii.gz'}: no memory for ")
    few = (4, 5, 6)
    with pytest.raises(DataError, match=r"no usable case; .*; the first: .*c0\.nii\.gz: no memory"):
        evaluate_folder(ByIntensity(), PLAN, site, device=CPU)


def test_an_error_of_another_kind_ends_an_evaluation(site: Path) -> None:
    class Broken(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        evaluate_folder(Broken(), PLAN, site, device=CPU)


def test_masks_that_exist_are_scored_by_name(site: Path, tmp_path: Path) -> None:
    for n in range(3):
        save(tmp_path / "masks" / f"c{n}.nii.gz", labels_of(n + 1))
    scores = evaluate_predictions(tmp_path / "masks", site)
    assert list(scores.cases) == ["c0", "c1", "c2"]
    for n, sums in enumerate(scores.cases.values()):
        # Volumes are read in RAS order: the first two axes of this file run the other way.
        wanted = sums_of_case(labels_of(n + 1), labels_of(n), spacing=SPACING)
        assert sums == pytest.approx(wanted)
    assert scores.all["liver.hd95"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("image", "mask", "prediction"),
    [
        ("imagesTr/liver_4_0000.nii.gz", "labelsTr/liver_4.nii.gz", "liver_4.nii.gz"),
        ("imagesTr/liver_4_0000.nii.gz", "labelsTr/liver_4.nii.gz", "liver_4_0000.nii"),
        ("volume-7.nii", "segmentation-7.nii", "volume-7.nii.gz"),
        ("volume-7.nii", "segmentation-7.nii", "segmentation-7.nii"),
        ("images/a.nii", "masks/a_seg.nii.gz", "a.nii"),
    ],
)
def test_predictions_are_found_under_the_names_that_people_give_them(
    tmp_path: Path, image: str, mask: str, prediction: str
) -> None:
    write(tmp_path / "data", image, mask)
    if "imagesTr" in image:
        (tmp_path / "data" / "dataset.json").write_text(
            '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "tumor": 2}}'
        )
    save(tmp_path / "found" / prediction, labels_of())
    scores = evaluate_predictions(tmp_path / "found", tmp_path / "data")
    assert scores.all["tumor.dice"] == 1.0
    assert scores.skipped == ()


def test_cases_without_a_usable_prediction_are_skipped_and_said_so(
    site: Path, tmp_path: Path
) -> None:
    found = tmp_path / "found"
    save(found / "c0.nii.gz", labels_of())
    save(found / "c1.nii.gz", labels_of()[:-1])
    scores = evaluate_predictions(found, site)
    assert (scores.all["cases"], scores.all["skipped"]) == (1, 2)
    assert "c1.nii.gz: shape (39, 36, 30) but image is (40, 36, 30)" in scores.skipped[0]
    assert f"c2.nii.gz: no prediction in {found}; name it c2.nii.gz" in scores.skipped[1]
    save(found / "c0.nii", labels_of())
    with pytest.raises(DataError, match="no usable case"):
        evaluate_predictions(found, site)
    with pytest.raises(DataError, match="no such folder; give the folder of the predicted masks"):
        evaluate_predictions(tmp_path / "nowhere", site)


def test_labels_of_predictions_are_mapped_by_a_site_toml_beside_them(
    site: Path, tmp_path: Path
) -> None:
    found = tmp_path / "found"
    for n in range(3):
        save(found / f"c{n}.nii.gz", np.array([0, 5, 7], np.uint8)[labels_of(n)])
    (found / "site.toml").write_text('[label-map]\n5 = "liver"\n7 = "tumor"\n')
    assert evaluate_predictions(found, site).all["tumor.dice"] == 1.0


def test_a_sites_labels_apply_to_predictions(site: Path) -> None:
    (site / "site.toml").write_text('labels = "liver"\n')
    every = evaluate_predictions(site / "masks", site).all
    assert (every["liver.dice"], every["tumor.dice"]) == (1.0, None)
    assert every["tumor.lesions_false_per_scan"] is None


def test_scoring_reaches_the_cases(site: Path, tmp_path: Path) -> None:
    for n in range(3):
        save(tmp_path / "found" / f"c{n}.nii.gz", labels_of(n + 3))
    strict, lenient = (
        evaluate_predictions(tmp_path / "found", site, scoring=scoring).all
        for scoring in (
            Scoring(tolerance_mm=0.5, lesion_overlap=0.5),
            Scoring(tolerance_mm=6, lesion_overlap=0.4),
        )
    )
    assert strict["liver.nsd"] != 1.0 and lenient["liver.nsd"] == 1.0
    assert (strict["tumor.lesion_recall"], lenient["tumor.lesion_recall"]) == (0.0, 1.0)


def test_json_holds_intervals_and_every_case(site: Path, tmp_path: Path) -> None:
    for n in range(3):
        save(tmp_path / "found" / f"c{n}.nii.gz", labels_of(2))
    scores = evaluate_predictions(tmp_path / "found", site)
    content = scores.to_json()
    assert content["all"] == scores.all
    low, high = content["intervals"]["liver.dice"]  # type: ignore[index]
    mean = scores.all["liver.dice"]
    assert mean is not None and low < mean < high
    assert content["cases"]["c2"]["liver.dice"] == 1.0  # type: ignore[index]
    rows = scores.rows()
    assert [row["case"] for row in rows] == ["c0", "c1", "c2"]
    assert rows[2]["liver.hd95"] == 0.0
