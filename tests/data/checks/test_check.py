"""Tests of `fedseg check`: each kind of bad case, all of them at once, and the exit codes."""

import contextlib
import functools
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fedseg import cli
from fedseg.data.checks.check import check_folder
from fedseg.data.phantom import KINDS, make_phantom
from fedseg.errors import DataError

STEP = 3  # every third voxel of a phantom is a patient of 40 x 34 x 24 voxels


@functools.cache
def patient(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, mask and affine of a small phantom."""
    phantom = make_phantom(KINDS["portal"], seed)
    every = (slice(None, None, STEP),) * 3
    affine = phantom.affine @ np.diag([STEP, STEP, STEP, 1])
    return phantom.image[every].copy(), phantom.mask[every].copy(), affine


AFFINE = patient(0)[2]
SHAPE = patient(0)[0].shape
X, Y, Z = SHAPE


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    nib.save(nib.Nifti1Image(array, affine), path)


def good(root: Path, name: str) -> tuple[Path, Path]:
    """Write a good case and return its two files, for spoiling one."""
    image, mask, affine = patient(0)
    files = root / "images" / f"{name}.nii.gz", root / "masks" / f"{name}.nii.gz"
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(name.encode()))  # no two cases have the same scan
    save(files[0], image + rng.integers(0, 3, image.shape).astype(np.int16), affine)
    save(files[1], mask, affine)
    return files


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _unpacked(path: Path) -> None:
    content = gzip.decompress(path.read_bytes())
    path.unlink()
    path.with_suffix("").write_bytes(content[:1000])


def _dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/scan.nii.gz")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _huge(path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000))
    header.set_sform(np.diag([0.05, 0.05, 0.05, 1]), 1)
    path.write_bytes(gzip.compress(header.binaryblock + bytes(500)))


def _singular(path: Path) -> None:
    image = nib.Nifti1Image(np.zeros(SHAPE, np.int16), AFFINE)
    image.header.set_sform(np.diag([1.0, 0, 1, 1]), 1)
    path.write_bytes(gzip.compress(image.header.binaryblock + bytes(4 + 2 * X * Y * Z)))


def _nan(value: float) -> Callable[[Path], None]:
    array = np.zeros(SHAPE, np.float32)
    array[3, 3, 3] = value
    return lambda path: save(path, array)


# How a good case is spoiled: which file (0 image, 1 mask), how, and words of the finding.
BAD: dict[str, tuple[int, Callable[[Path], object], str]] = {
    "no-mask": (1, Path.unlink, "no mask in masks/"),
    "no-image": (0, Path.unlink, "no image in images/"),
    "two-masks": (
        1,
        lambda path: save(path.with_name("two-masks_seg.nii"), np.zeros(SHAPE, np.uint8)),
        "2 masks",
    ),
    "two-images": (
        0,
        lambda path: save(path.with_name("two-images_0000.nii"), np.zeros(SHAPE, np.uint8)),
        "second image",
    ),
    "shape": (
        1,
        lambda path: save(path, np.zeros((X, Y, Z + 1), np.uint8)),
        f"got shape {(X, Y, Z + 1)}, expected {(X, Y, Z)}; re-export the mask",
    ),
    "affine": (
        1,
        lambda path: save(path, np.zeros(SHAPE, np.uint8), AFFINE @ np.diag([1, 1, 2, 1])),
        "mm away from its image",
    ),
    "label-7": (1, lambda path: save(path, np.full(SHAPE, 7, np.uint8)), "label 7, expected 0, 1"),
    "fractions": (
        1,
        lambda path: save(path, np.full(SHAPE, 0.5, np.float32)),
        "fractions such as 0.5, expected whole labels",
    ),
    "nan": (0, _nan(np.nan), "1 voxels are NaN or Inf, expected finite"),
    "inf": (0, _nan(np.inf), "1 voxels are NaN or Inf, expected finite"),
    "2d": (0, lambda path: save(path, np.zeros((8, 8), np.int16)), "2D of shape (8, 8), expected"),
    "4d": (0, lambda path: save(path, np.zeros((*SHAPE, 2), np.int16)), "4D of shape"),
    "slice": (0, lambda path: save(path, np.zeros((X, Y, 1), np.int16)), "expected 2 voxels"),
    "truncated": (0, _truncate, "damaged or truncated"),
    "truncated-mask": (1, _truncate, "damaged or truncated"),
    "truncated-nii": (0, _unpacked, "damaged or truncated: 1000 bytes, expected"),
    "random": (0, lambda path: path.write_bytes(np.random.default_rng(0).bytes(900)), "NIfTI"),
    "empty": (0, lambda path: path.write_bytes(b""), "NIfTI"),
    "dangling": (0, _dangle, "no such file"),
    "folder": (1, _folder, "no such file"),
    "huge": (0, _huge, "shape (30000, 30000, 30000) is over"),
    "singular": (0, _singular, "affine is singular"),
    "metres": (
        0,
        lambda path: save(path, np.zeros(SHAPE, np.int16), np.diag([0.002, 0.002, 0.003, 1])),
        "expected 1 to 3000",
    ),
}


def spoil(root: Path, kind: str) -> None:
    files = good(root, kind)
    which, how, _ = BAD[kind]
    how(files[which])


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Call the command line and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["fedseg", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_case_is_one_finding(tmp_path: Path, kind: str) -> None:
    good(tmp_path, "fine")
    spoil(tmp_path, kind)
    report = check_folder(tmp_path)
    assert not report.clean
    assert report.usable == 1
    named = [f for f in report.findings if BAD[kind][2] in str(f)]
    assert len(named) == 1, [str(f) for f in report.findings]
    assert kind in Path(named[0].file).name
    assert named[0].case == kind
    assert named[0].got and named[0].expected and named[0].mend
    assert "\n" not in str(named[0])
    assert str(named[0]).startswith(f"error: {tmp_path}")


def test_all_bad_cases_are_listed_in_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good(tmp_path, "fine")
    for kind in BAD:
        spoil(tmp_path, kind)
    assert run("check", str(tmp_path), monkeypatch=monkeypatch) == 1
    lines = capsys.readouterr().out.splitlines()
    for kind, (_, _, words) in BAD.items():
        assert any(f"/{kind}" in line and words in line for line in lines), (kind, lines)
    paired = len(BAD) - 4
    assert lines[-1] == f"1 of {paired + 1} cases usable (1 with liver, 1 with tumor)"
    assert lines[-2] == f"{len(lines) - 2} errors, 0 warnings, 0 notes"
    assert all(line.startswith("error: ") for line in lines[:-2])

    assert run("check", str(tmp_path), "--json", monkeypatch=monkeypatch) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["clean"] is False
    assert (report["cases"], report["usable"]) == (paired + 1, 1)
    assert report["counts"] == {"error": len(lines) - 2, "warning": 0, "note": 0}
    assert [
        f"error: {f['file']}: {f['what']}: got {f['got']}, expected {f['expected']}; {f['mend']}"
        for f in report["findings"]
    ] == lines[:-2]
    names = [f["case"] for f in report["findings"]]
    assert names == sorted(names)
    assert set(names) == set(BAD)


def test_image_and_mask_of_one_case_are_both_reported(tmp_path: Path) -> None:
    files = good(tmp_path, "both")
    _truncate(files[0])
    save(files[1], np.full(SHAPE, 7, np.uint8))
    good(tmp_path, "fine")
    found = check_folder(tmp_path).findings
    assert len(found) == 2
    assert "truncated" in found[0].got and "label 7" in found[1].got


def test_clean_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good(tmp_path, "one")
    _, mask = good(tmp_path, "float")
    save(mask, np.minimum(patient(0)[1], 1).astype(np.float32))
    progress: list[tuple[int, int]] = []
    report = check_folder(tmp_path, on_case=lambda done, all: progress.append((done, all)))
    assert report.clean
    assert progress == [(1, 2), (2, 2)]
    assert run("check", str(tmp_path), monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == "2 of 2 cases usable (2 with liver, 1 with tumor)\n"
    assert run("check", str(tmp_path), "--json", monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out) == {
        "clean": True,
        "layout": "images-masks",
        "cases": 2,
        "usable": 2,
        "usable_for": {"liver": 2, "tumor": 2},
        "annotated": {"liver": 2, "tumor": 1},
        "counts": {"error": 0, "warning": 0, "note": 0},
        "findings": [],
    }


def test_site_toml_of_the_folder_applies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, mask = good(tmp_path, "one")
    save(mask, (patient(0)[1] > 0).astype(np.uint8) * 7)
    (tmp_path / "site.toml").write_text('label-map = "7:1"\nlabels = "liver"\n')
    assert run("check", str(tmp_path), monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == "1 of 1 cases usable (1 with liver, no tumor)\n"
    (tmp_path / "site.toml").write_text('label-mapp = "7:1"\n')
    assert run("check", str(tmp_path), monkeypatch=monkeypatch) == 2
    assert "did you mean 'label-map'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, "no known layout; expected one of"),
        (lambda root: (root / "masks").mkdir(), "no folder images/"),
        (
            lambda root: [(root / "images").mkdir(), (root / "masks").mkdir()],
            "no cases; expected .nii or .nii.gz",
        ),
        (lambda root: root.rmdir(), "no such folder; correct the path"),
        (lambda root: [root.rmdir(), root.touch()], "no such folder; correct the path"),
    ],
)
def test_unusable_folder_exits_with_2_and_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], object],
    words: str,
) -> None:
    root = tmp_path / "site"
    root.mkdir()
    make(root)
    with pytest.raises(DataError):
        check_folder(root)
    assert run("check", str(root), "--json", monkeypatch=monkeypatch) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"fedseg: {root}: ")
    assert words in output.err
    assert output.err.count("\n") == 1


@contextlib.contextmanager
def no_root() -> Iterator[None]:
    """Root may read everything, so be nobody for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_folder_without_permission(tmp_path: Path) -> None:
    good(tmp_path, "one")
    (tmp_path / "images").chmod(0)
    try:
        with no_root(), pytest.raises(DataError, match="no permission to list it"):
            check_folder(tmp_path)
    finally:
        (tmp_path / "images").chmod(0o755)


def test_file_names_that_are_no_utf8_are_reported(tmp_path: Path) -> None:
    good(tmp_path, "one")
    name = os.fsencode(tmp_path / "images") + b"/M\xfcller.nii"
    try:
        with open(name, "wb"):
            pass
    except OSError:  # a file system that insists on UTF-8 can't have the problem
        return
    code = "from fedseg.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "check", str(tmp_path)], capture_output=True, check=False
    )
    assert result.returncode == 1, result.stderr
    assert b"ller.nii: pairing: got no mask in masks/" in result.stdout
