"""Tests of finding a site's cases."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from fedseg.data.sites import LAYOUTS, Case, Listing, find_cases, nifti_stem
from fedseg.errors import ConfigError, DataError


def touch(root: Path, *names: str) -> Path:
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a.nii.gz", "a.nii.gz"),
        ("a.nii", "a.nii.gz"),
        ("liver_7_0000.nii.gz", "liver_7.nii.gz"),
        ("p1_img.nii", "p1_seg.nii"),
        ("p1_image.nii", "p1_mask.nii"),
        ("p1.nii", "p1-seg.nii"),
        ("p1.v2.nii", "p1.v2_label.nii"),
        ("p1.NII.GZ", "p1.Nii"),
    ],
)
def test_image_and_mask_pair_by_stem(tmp_path: Path, image: str, mask: str) -> None:
    root = touch(tmp_path, f"images/{image}", f"masks/{mask}")
    expected = Case(image=root / "images" / image, mask=root / "masks" / mask)
    assert find_cases(root) == Listing(cases=(expected,), layout="images-masks")


def test_order_is_that_of_the_names_and_other_files_are_ignored(tmp_path: Path) -> None:
    names = [f"{folder}/{case}.nii" for case in "cab" for folder in ("masks", "images")]
    root = touch(tmp_path, *names, "images/notes.txt", "images/._a.nii", "masks/.DS_Store")
    listing = find_cases(root)
    assert [case.image.name for case in listing.cases] == ["a.nii", "b.nii", "c.nii"]
    assert listing.problems == ()


def test_each_file_that_has_no_partner_is_named_and_the_others_stay(tmp_path: Path) -> None:
    root = touch(
        tmp_path,
        *("images/good.nii", "masks/good.nii"),
        *("images/lonely.nii", "masks/orphan.nii"),
        *("images/twice.nii", "images/twice_0000.nii", "masks/twice.nii"),
        *("images/two.nii", "masks/two.nii", "masks/two_seg.nii.gz"),
    )
    listing = find_cases(root)
    assert [case.image.name for case in listing.cases] == ["good.nii"]
    by_file = {problem.split(": ")[0]: problem for problem in listing.problems}
    images, masks = root / "images", root / "masks"
    assert set(by_file) == {
        str(images / "lonely.nii"),
        str(masks / "orphan.nii"),
        str(images / "twice_0000.nii"),
        str(images / "two.nii"),
    }
    assert "no mask in masks/" in by_file[str(images / "lonely.nii")]
    assert "no image in images/" in by_file[str(masks / "orphan.nii")]
    assert "second image for twice.nii" in by_file[str(images / "twice_0000.nii")]
    assert "2 masks (two.nii and two_seg.nii.gz)" in by_file[str(images / "two.nii")]
    assert not any("\n" in problem for problem in listing.problems)


@pytest.mark.parametrize("missing", ["images", "masks"])
def test_missing_folder_says_what_is_expected(tmp_path: Path, missing: str) -> None:
    touch(tmp_path)
    (tmp_path / missing).rmdir()
    with pytest.raises(DataError, match=f"no folder {missing}/; expected images/ and masks/"):
        find_cases(tmp_path)


def test_empty_folders_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no known layout"):
        find_cases(tmp_path)
    touch(tmp_path)
    with pytest.raises(DataError, match=r"no cases; expected .nii or .nii.gz files.*images-masks"):
        find_cases(tmp_path)
    with pytest.raises(DataError, match="no such folder; correct the path"):
        find_cases(tmp_path / "nowhere")


def test_layout_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hospital_layout.py").write_text(
        "from fedseg.data.sites import Case\n"
        "def flat(root):\n"
        "    return [Case(image=p, mask=p.with_suffix('.seg.nii')) for p in root.glob('*.ct')]\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    root = tmp_path / "site"
    root.mkdir()
    (root / "x.ct").touch()
    listing = find_cases(root, layout="hospital_layout:flat")
    assert listing.cases == (Case(image=root / "x.ct", mask=root / "x.seg.nii"),)
    assert listing.layout == "hospital_layout:flat"
    with pytest.raises(ConfigError, match="has no function number"):
        find_cases(root, layout="hospital_layout:number")
    with pytest.raises(ConfigError, match="package no_such_package isn't installed"):
        find_cases(root, layout="no_such_package:flat")
    with pytest.raises(ConfigError, match="did you mean 'images-masks'"):
        find_cases(root, layout="image-masks")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_refuses_an_empty_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError):
        find_cases(tmp_path, layout=name)


def test_stem() -> None:
    names: Sequence[tuple[str, str | None]] = [
        ("a.nii.gz", "a"),
        ("a.b.nii", "a.b"),
        ("A.NII.GZ", "A"),
        ("a.dcm", None),
        (".a.nii", None),
    ]
    for name, stem in names:
        assert nifti_stem(Path(name)) == stem
