"""Tests of predicting and scoring files with a network."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.planning import make_plan
from fedseg.data.scans import scans_of
from fedseg.data.volumes import read_image, read_mask
from fedseg.errors import DataError
from fedseg.segmentation.evaluation import evaluate_folder
from fedseg.segmentation.overlay import draw_overlay
from fedseg.segmentation.predict import Prediction, predict_files
from fedseg.segmentation.volume_table import Findings

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


def predict(scans: list[Path], out: Path, **options: Any) -> list[Prediction]:
    return predict_files(ByIntensity(), PLAN, scans, out, device=CPU, **options)


def found(result: Prediction) -> Findings:
    assert result.findings is not None
    return result.findings


def labels_of(mask: Path | None) -> np.ndarray:
    assert mask is not None
    return np.asanyarray(nib.load(mask).dataobj)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "volumes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_mask_lies_on_the_scans_own_grid(tmp_path: Path) -> None:
    turned = np.array([[0, 2.0, 0, 5], [-1.92, 0, -0.84, 7], [-0.56, 0, 2.88, -9], [0, 0, 0, 1]])
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
    measured = result.findings
    assert measured is not None
    assert measured.liver_ml == pytest.approx((found >= 1).sum() * voxel_ml, rel=0.01)
    assert measured.tumor_ml == pytest.approx((found == 2).sum() * voxel_ml, rel=0.01)
    assert measured.lesions == 1


def test_a_nifti_2_scan_gets_a_mask_on_its_grid(tmp_path: Path) -> None:
    write(tmp_path, "a")
    one = nib.load(tmp_path / "images" / "a.nii.gz")
    scan = tmp_path / "two.nii.gz"
    nib.save(nib.Nifti2Image(np.asanyarray(one.dataobj), one.affine), scan)
    first, second = predict([tmp_path / "images" / "a.nii.gz", scan], tmp_path / "out")
    assert second.problem is None
    assert np.array_equal(labels_of(first.mask), labels_of(second.mask))
    assert np.array_equal(nib.load(second.mask).affine, nib.load(scan).affine)
    assert predict([scan], tmp_path / "out")[0].kept


def test_masks_that_exist_are_kept_unless_told_otherwise(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path, name)
    out = tmp_path / "out"
    a, b = scans_of([tmp_path / "images"])
    (first,) = predict([a], out)
    assert (first.kept, first.problem, first.seconds is None) == (False, None, False)
    written = (out / "a.nii.gz").stat().st_mtime_ns
    kept, made = predict([a, b], out)
    assert (kept.kept, kept.problem, kept.mask) == (True, None, out / "a.nii.gz")
    assert (made.kept, made.mask) == (False, out / "b.nii.gz")
    for part in ("liver_ml", "tumor_ml", "lesions"):
        assert getattr(found(kept), part) == pytest.approx(getattr(found(first), part), abs=0.005)
    assert (out / "a.nii.gz").stat().st_mtime_ns == written
    replaced, _ = predict([a, b], out, overwrite=True)
    assert not replaced.kept
    assert (out / "a.nii.gz").stat().st_mtime_ns > written


def test_what_has_a_mask_s_name_and_is_none_of_this_scan_is_a_problem(tmp_path: Path) -> None:
    """Else the mask of another patient would pass for this one's."""
    write(tmp_path / "1", "a")
    write(tmp_path / "2", "a", affine=np.diag([-2.0, -2, 3.5, 1]))
    one, other = (tmp_path / site / "images" / "a.nii.gz" for site in "12")
    out = tmp_path / "out"
    predict([one], out)
    whole = (out / "a.nii.gz").read_bytes()
    for content, scan in ((whole, other), (b"precious", one)):
        (out / "a.nii.gz").write_bytes(content)
        (result,) = predict([scan], out)
        assert result.mask is None
        assert not result.kept
        assert str(result.problem).startswith(f"{out / 'a.nii.gz'}: ")
        assert (out / "a.nii.gz").read_bytes() == content
    (result,) = predict([one], out, overwrite=True)
    assert result.problem is None


def test_each_scan_has_a_row_in_the_table(tmp_path: Path) -> None:
    truth = {name: write(tmp_path, name) for name in "ab"}
    (tmp_path / "images" / "c.nii.gz").write_bytes(b"broken")
    out = tmp_path / "out"
    scans = scans_of([tmp_path / "images"])
    results = predict(scans, out)
    assert [row["scan"] for row in rows(out)] == ["a", "b"]
    for row, result in zip(rows(out), results, strict=False):
        labels = labels_of(result.mask)
        assert float(row["liver_ml"]) == pytest.approx((labels >= 1).sum() * 12 / 1000, abs=0.01)
        assert float(row["tumor_ml"]) == pytest.approx((labels == 2).sum() * 12 / 1000, abs=0.01)
        assert float(row["tumor_ml"]) == pytest.approx((truth["a"] == 2).sum() * 0.012, rel=0.3)
        assert row["lesions"] == "1"
        assert float(row["seconds"]) >= 0
    before = rows(out)
    write(tmp_path, "c")
    predict(scans, out)
    assert rows(out)[:2] == before
    assert [row["scan"] for row in rows(out)] == ["a", "b", "c"]


def test_a_mask_without_a_row_gets_one(tmp_path: Path) -> None:
    write(tmp_path, "a")
    scans, out = scans_of([tmp_path / "images"]), tmp_path / "out"
    predict(scans, out)
    (before,) = rows(out)
    for content in ("", "scan,liver_ml,tumor_ml,lesions,seconds\na,many,,,\n"):
        (out / "volumes.csv").unlink()
        if content:
            (out / "volumes.csv").write_text(content)
        (kept,) = predict(scans, out)
        assert kept.kept
        assert rows(out) == [{**before, "seconds": ""}]


def test_another_table_of_that_name_stops_it_before_anything_is_done(tmp_path: Path) -> None:
    write(tmp_path, "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "volumes.csv").write_text("patient,age\n")
    with pytest.raises(DataError, match=r"volumes\.csv: columns patient,age; expected scan,"):
        predict(scans_of([tmp_path / "images"]), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["volumes.csv"]


def two_livers(folder: Path) -> None:
    """A scan with a liver, a smaller piece apart, and a tumour far from both.

    Resampled, the tumour has a rim that is as bright as liver: it is a piece of its own.
    """
    write(folder, "a")
    path = folder / "images" / "a.nii.gz"
    image = np.asanyarray(nib.load(path).dataobj).copy()
    image[31:35, 8:18, 8:18], image[6:14, 31:35, 8:24] = 140, 250
    nib.save(nib.Nifti1Image(image, np.diag([-2.0, -2, 3, 1])), path)


def test_cleaning_is_done_where_it_is_asked_for(tmp_path: Path) -> None:
    two_livers(tmp_path)
    scans = scans_of([tmp_path / "images"])
    plain, large, inside, both = (
        labels_of(predict(scans, tmp_path / name, **how)[0].mask)
        for name, how in (
            ("plain", {"largest_liver": False}),
            ("large", {}),
            ("inside", {"largest_liver": False, "tumor_in_liver": True}),
            ("both", {"tumor_in_liver": True}),
        )
    )
    piece, lone = (slice(31, 35), slice(8, 18), slice(8, 18)), (slice(6, 14), slice(31, 35))
    for labels, has_piece, has_lone in (
        (plain, True, True),
        (large, False, True),
        (inside, True, True),
        (both, False, False),
    ):
        assert (labels[piece] == 1).any() == has_piece
        assert (labels[lone] == 2).any() == has_lone
        assert np.array_equal(labels[8:28, 8:28, 8:24], plain[8:28, 8:28, 8:24])


def test_an_overlay_is_drawn_also_for_a_mask_that_is_kept(tmp_path: Path) -> None:
    write(tmp_path, "a")
    scans, out = scans_of([tmp_path / "images"]), tmp_path / "out"
    predict(scans, out)
    assert not (out / "a.png").exists()
    (kept,) = predict(scans, out, overlay=True)
    assert kept.kept
    drawn = (out / "a.png").read_bytes()
    scan = read_image(scans[0])
    labels = read_mask(out / "a.nii.gz", image=scan).array
    assert drawn == draw_overlay(scan.array, labels, spacing=scan.spacing)
    (out / "a.png").write_bytes(b"own")
    predict(scans, out, overlay=True)
    assert (out / "a.png").read_bytes() == b"own"
    predict(scans, out, overlay=True, overwrite=True)
    assert (out / "a.png").read_bytes() == drawn


def test_progress_goes_from_none_to_all(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path, name)
    scans = scans_of([tmp_path / "images"])
    predict(scans[:1], tmp_path / "out")
    seen: list[float] = []
    predict(scans, tmp_path / "out", on_progress=seen.append)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (1, 3)
    assert any(1 < done < 2 for done in seen)


def test_lack_of_memory_costs_one_scan(tmp_path: Path) -> None:
    class Greedy(ByIntensity):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            if image.max() > 1.9:  # of the second scan
                raise MemoryError
            return super().forward(image)

    for name in "abc":
        write(tmp_path, name)
    path = tmp_path / "images" / "b.nii.gz"
    image = np.asanyarray(nib.load(path).dataobj).copy()
    image[4:12, 4:8, 4:10] = 3000
    nib.save(nib.Nifti1Image(image, nib.load(path).affine), path)
    plan = PLAN.model_copy(update={"ct_window": (-200.0, 3000.0)})
    scans = scans_of([tmp_path / "images"])
    results = predict_files(Greedy(), plan, scans, tmp_path / "out", device=CPU)
    assert [result.problem is None for result in results] == [True, False, True]
    assert str(results[1].problem).startswith(f"{path}: no memory for 1 window of 16x16x16 at once")


_KILLED = """
import os, pathlib, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_predict import predict, scans_of

images, out = map(pathlib.Path, sys.argv[2:])
scans = scans_of([images])

def killed_before(name, nth):
    child = os.fork()
    if not child:
        real, calls = os.replace, []
        def replace(source, target):
            calls.append(pathlib.Path(target).name)
            if calls.count(name) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)
        os.replace = replace
        predict(scans, out, overlay=True)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    print(*sorted(path.name for path in out.iterdir() if not path.name.startswith(".")))

killed_before("a.nii.gz", 1)
killed_before("a.png", 1)
killed_before("volumes.csv", 1)
killed_before("b.nii.gz", 1)
"""


def test_a_folder_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path, name)
    scans, out = scans_of([tmp_path / "images"]), tmp_path / "out"
    result = subprocess.run(
        [sys.executable, "-c", _KILLED, Path(__file__).parent, tmp_path / "images", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "",
        "a.nii.gz",
        "a.nii.gz a.png",
        "a.nii.gz a.png volumes.csv",
    ]
    a, b = predict(scans, out, overlay=True)
    assert (a.kept, b.kept, a.problem, b.problem) == (True, False, None, None)
    predict(scans, tmp_path / "whole", overlay=True)
    assert [row["scan"] for row in rows(out)] == ["a", "b"]
    for row, expected in zip(rows(out), rows(tmp_path / "whole"), strict=True):
        assert {**row, "seconds": ""} == {**expected, "seconds": ""}
    for name in ("a.nii.gz", "b.nii.gz"):
        assert np.array_equal(labels_of(out / name), labels_of(tmp_path / "whole" / name))
    for name in ("a.png", "b.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


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
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["b.nii.gz", "volumes.csv"]


def test_a_scan_is_never_replaced_by_its_mask(tmp_path: Path) -> None:
    write(tmp_path, "a")
    scan = tmp_path / "images" / "a.nii.gz"
    before = scan.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "images")
    for out in (tmp_path / "images", link):
        with pytest.raises(DataError, match="a mask would replace this scan; give another folder"):
            predict([scan], out, overwrite=True)
    assert scan.read_bytes() == before


def test_no_mask_replaces_another_scan(tmp_path: Path) -> None:
    write(tmp_path / "1", "a")
    write(tmp_path / "2", "a")
    (tmp_path / "b.nii.gz").symlink_to(tmp_path / "2" / "images" / "a.nii.gz")
    scans = [tmp_path / "b.nii.gz", tmp_path / "1" / "images" / "a.nii.gz"]
    before = scans[0].read_bytes()
    with pytest.raises(DataError, match="a mask would replace this scan"):
        predict(scans, tmp_path / "2" / "images", overwrite=True)
    assert scans[0].read_bytes() == before
    assert [path.name for path in (tmp_path / "2" / "images").iterdir()] == ["a.nii.gz"]


def test_scans_of_one_name_and_a_folder_that_is_a_file(tmp_path: Path) -> None:
    write(tmp_path / "1", "a")
    write(tmp_path / "2", "a")
    scans = scans_of([tmp_path / "1" / "images", tmp_path / "2" / "images"])
    results = predict(scans, tmp_path / "out")
    names = [result.mask.name for result in results if result.mask]
    assert names == ["1_images_a.nii.gz", "2_images_a.nii.gz"]
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: can't be made .*; give another folder"):
        predict(scans[:1], tmp_path / "file")


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
    assert scores.all["liver.dice.pooled"] == liver
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
