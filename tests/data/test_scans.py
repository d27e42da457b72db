"""Tests of which scans are meant, and what their masks are called."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseg.data.scans import mask_names, scans_of
from fedseg.errors import DataError


def dicom(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0" * 128 + b"DICM")
    return path


def test_scans_of_files_and_folders(tmp_path: Path) -> None:
    for name in ("b.nii", "a.nii.gz", "notes.txt", ".hidden.nii"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    names = [path.name for path in scans_of([tmp_path])]
    assert names == ["a.nii.gz", "b.nii"]
    for path, words in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "notes.txt", "not named .nii or .nii.gz"),
        (tmp_path / "empty", "no .nii or .nii.gz file in it"),
    ):
        with pytest.raises(DataError, match=words):
            scans_of([path])


def test_a_scan_that_is_named_twice_comes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.nii", "a.nii"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    found = scans_of([tmp_path / "b.nii", Path(), Path("b.nii"), tmp_path])
    assert [path.name for path in found] == ["b.nii", "a.nii"]


def test_files_and_series_may_be_mixed(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").touch()
    dicom(tmp_path / "p1" / "ct" / "0001")
    dicom(tmp_path / "p2" / "0001.dcm")
    (tmp_path / "notes").mkdir()
    folders = [tmp_path / "p1", tmp_path / "p2"]
    assert scans_of([tmp_path]) == [tmp_path / "a.nii.gz", *folders]
    one = dicom(tmp_path / "loose" / "0001")
    given_paths = [one, tmp_path / "p2", tmp_path / "a.nii.gz"]
    assert scans_of(given_paths) == [one, tmp_path / "p2", tmp_path / "a.nii.gz"]


def test_masks_are_named_as_their_scans(tmp_path: Path) -> None:
    series = dicom(tmp_path / "p1" / "0001").parent
    scans = [tmp_path / "a.nii.gz", tmp_path / "b.v2.NII", series, tmp_path / "x" / "1.dcm"]
    assert mask_names(scans) == ["a", "b.v2", "p1", "1"]


def test_the_folder_itself_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = dicom(tmp_path / "p1" / "0001").parent
    monkeypatch.chdir(series)
    assert mask_names([Path()]) == ["p1"]
    assert mask_names([Path("..") / "p1"]) == ["p1"]


def test_scans_of_one_name_take_their_folders(tmp_path: Path) -> None:
    paths = ["p1/ct.nii", "p2/CT.nii.gz", "p3/mr.nii", "s1/p4/pet.nii", "s2/p4/pet.nii"]
    names = mask_names([tmp_path / path for path in paths])
    assert names == ["p1_ct", "p2_CT", "mr", "s1_p4_pet", "s2_p4_pet"]


def test_a_name_that_folders_make_may_be_taken_already(tmp_path: Path) -> None:
    paths = ["p1/ct.nii", "p2/ct.nii", "q/p1_ct.nii"]
    names = mask_names([tmp_path / path for path in paths])
    assert len(set(names)) == 3


@given(st.sets(st.lists(st.sampled_from("abA_"), min_size=1, max_size=4).map("/".join), min_size=1))
def test_no_two_masks_have_one_name(places: set[str]) -> None:
    scans = [Path("/data") / f"{place}.nii" for place in sorted(places)]
    try:
        names = mask_names(scans)
    except DataError:
        # What only case, or a line for a folder, tells apart can't always be.
        assert len({str(scan).casefold().replace("/", "_") for scan in scans}) < len(scans)
        return
    assert len({name.casefold() for name in names}) == len(scans)


def test_scans_that_differ_by_their_ending_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.nii: its mask would have the name of that of .*\.gz"):
        mask_names([tmp_path / "a.nii", tmp_path / "a.nii.gz"])
