"""Tests of predicting and scoring files with a network."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.planning import make_plan
from fedseg.errors import DataError
from fedseg.segmentation.evaluation import evaluate_folder
from fedseg.segmentation.predict import Prediction, predict_files, scans_of

CPU = torch.device("cpu")
PLAN = make_plan(StudyConfig()).model_copy(
    update={"patch_size": (16, 16, 16), "inference_patch": (16, 16, 16)}
)


class ByIntensity(nn.Module):
    """A network that knows the answer: bright is liver, brighter is tumour."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 20 * torch.cat([-image.abs(), 0.9 * image - 0.5, 2 * image - 2], 1)


def write(folder: Path, name: str, *, affine: np.ndarray | None = None) -> np.ndarray:
    """Write a scan whose labels can be told from its HU, and its mask."""
    image = np.full((40, 36, 30), -1000, np.int16)
    image[3:-3, 3:-3, 3:-3] = 50
    labels = np.zeros(image.shape, np.uint8)
    labels[8:28, 8:28, 8:24] = 1
    labels[14:22, 14:22, 12:20] = 2
    image[labels == 1], image[labels == 2] = 140, 250
    for part, array in (("images", image), ("masks", labels)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        affine = np.diag([-2.0, -2, 3, 1]) if affine is None else affine
        nib.save(nib.Nifti1Image(array, affine), folder / part / f"{name}.nii.gz")
    return labels


def predict(scans: list[Path], out: Path, **options: bool) -> list[Prediction]:
    return predict_files(ByIntensity(), PLAN, scans, out, device=CPU, **options)


def test_mask_lies_on_the_scans_own_grid(tmp_path: Path) -> None:
    turned = np.array([[0, 2.0, 0.1, 5], [-2, 0, 0, 7], [0, 0.1, 3, -9], [0, 0, 0, 1]])
    labels = write(tmp_path, "a", affine=turned)
    scan = tmp_path / "images" / "a.nii.gz"
    (result,) = predict([scan], tmp_path / "out")
    assert (result.scan, result.mask) == (scan, tmp_path / "out" / "a.nii.gz")
    assert result.problem is None
    written, original = nib.load(result.mask), nib.load(scan)
    assert np.array_equal(written.affine, original.affine)
    assert written.shape == original.shape
    found = np.asanyarray(written.dataobj)
    for lowest in (1, 2):
        overlap = 2 * ((found >= lowest) & (labels >= lowest)).sum()
        assert overlap / ((found >= lowest).sum() + (labels >= lowest).sum()) > 0.85
    voxel_ml = abs(np.linalg.det(turned[:3, :3])) / 1000
    assert result.volumes_ml["liver"] == pytest.approx((found >= 1).sum() * voxel_ml, rel=0.01)
    assert result.volumes_ml["tumor"] == pytest.approx((found == 2).sum() * voxel_ml, rel=0.01)


def test_masks_that_exist_are_kept_unless_told_otherwise(tmp_path: Path) -> None:
    write(tmp_path, "a")
    write(tmp_path, "b")
    scans = scans_of([tmp_path / "images"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"precious")
    kept, made = predict(scans, tmp_path / "out")
    assert kept.mask is None and "exists; --overwrite" in str(kept.problem)
    assert made.mask is not None
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == b"precious"
    replaced, _ = predict(scans, tmp_path / "out", overwrite=True)
    assert replaced.mask is not None
    assert nib.load(replaced.mask).shape == (40, 36, 30)


def test_bad_scan_does_not_stop_the_others(tmp_path: Path) -> None:
    write(tmp_path, "b")
    (tmp_path / "images" / "a.nii.gz").write_bytes(b"broken")
    huge = np.diag([70.0, 70, 90, 1])
    nib.save(nib.Nifti1Image(np.zeros((40, 40, 30), np.int16), huge), tmp_path / "images" / "c.nii")
    seen: list[Prediction] = []
    fine = PLAN.model_copy(update={"spacing": (0.5, 0.5, 0.5)})
    scans = scans_of([tmp_path / "images"])
    bad, _, large = predict_files(
        ByIntensity(),
        fine,
        [scans[0], scans[0].with_name("no.nii"), scans[2]],
        tmp_path / "out",
        device=CPU,
        on_scan=seen.append,
    )
    assert str(bad.problem).startswith(f"{tmp_path / 'images' / 'a.nii.gz'}: not a NIfTI file")
    assert str(large.problem).startswith(
        f"{tmp_path / 'images' / 'c.nii'}: (5600, 5600, 5400) voxels"
    )
    assert len(seen) == 3
    assert predict(scans[:2], tmp_path / "out")[1].mask == tmp_path / "out" / "b.nii.gz"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b.nii.gz"]


def test_a_scan_is_never_replaced_by_its_mask(tmp_path: Path) -> None:
    write(tmp_path, "a")
    scan = tmp_path / "images" / "a.nii.gz"
    before = scan.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "images")
    for out in (tmp_path / "images", link):
        with pytest.raises(DataError, match="its mask would replace it; give another folder"):
            predict([scan], out, overwrite=True)
    assert scan.read_bytes() == before


def test_two_scans_of_one_name_and_a_folder_that_is_a_file(tmp_path: Path) -> None:
    write(tmp_path / "1", "a")
    write(tmp_path / "2", "a")
    scans = scans_of([tmp_path / "1" / "images", tmp_path / "2" / "images"])
    with pytest.raises(DataError, match="two scans have the same name"):
        predict(scans, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: can't be made .*; give another folder"):
        predict(scans[:1], tmp_path / "file")


def test_scans_of_files_and_folders(tmp_path: Path) -> None:
    for name in ("b.nii", "a.nii.gz", "notes.txt", ".hidden.nii"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    names = [path.name for path in scans_of([tmp_path, tmp_path / "b.nii"])]
    assert names == ["a.nii.gz", "b.nii", "b.nii"]
    for path, words in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "notes.txt", "not named .nii or .nii.gz"),
        (tmp_path / "empty", "no .nii or .nii.gz file in it"),
    ):
        with pytest.raises(DataError, match=words):
            scans_of([path])


def test_folder_is_scored_in_its_own_grid_and_bad_cases_are_named(tmp_path: Path) -> None:
    write(tmp_path, "a")
    write(tmp_path, "b")
    write(tmp_path, "c")
    (tmp_path / "images" / "b.nii.gz").write_bytes(b"broken")
    (tmp_path / "masks" / "c.nii.gz").unlink()
    scores = evaluate_folder(ByIntensity(), PLAN, tmp_path, device=CPU)
    assert list(scores.cases) == ["a"]
    assert len(scores.skipped) == 2
    assert (scores.all["cases"], scores.all["skipped"]) == (1, 2)
    liver = scores.all["liver.dice"]
    assert isinstance(liver, float) and liver > 0.85
    columns = scores.columns()
    assert columns["per case"]["liver.dice"] == columns["pooled"]["liver.dice"] == liver
    (result,) = predict([tmp_path / "images" / "a.nii.gz"], tmp_path / "out")
    found = np.asanyarray(nib.load(result.mask).dataobj) >= 1
    truth = np.asanyarray(nib.load(tmp_path / "masks" / "a.nii.gz").dataobj) >= 1
    assert liver == pytest.approx(2 * (found & truth).sum() / (found.sum() + truth.sum()))


def test_site_toml_of_the_folder_applies_to_scores(tmp_path: Path) -> None:
    write(tmp_path, "a")
    (tmp_path / "site.toml").write_text('labels = "liver"\n')
    every = evaluate_folder(ByIntensity(), PLAN, tmp_path, device=CPU).all
    assert (every["liver.dice.cases"], every["tumor.dice.cases"]) == (1, 0)
    assert every["tumor.dice"] is None


def test_folder_without_a_usable_case(tmp_path: Path) -> None:
    write(tmp_path, "a")
    (tmp_path / "images" / "a.nii.gz").write_bytes(b"broken")
    with pytest.raises(DataError, match="no usable case; run `fedseg check` on it"):
        evaluate_folder(ByIntensity(), PLAN, tmp_path, device=CPU)
    with pytest.raises(DataError, match="no such folder"):
        evaluate_folder(ByIntensity(), PLAN, tmp_path / "nowhere", device=CPU)
