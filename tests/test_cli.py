"""Tests of the command line."""

import csv
import errno
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fedseg import __version__
from fedseg.commands.predict import progress_bar
from fedseg.config import StudyConfig
from fedseg.data import phantom
from fedseg.data.phantom import Phantom, PhantomKind
from fedseg.data.planning import make_plan
from fedseg.segmentation import evaluation
from fedseg.segmentation.model_file import save_model
from fedseg.segmentation.models import build_model
from fedseg.segmentation.postprocess import clean_labels

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def small_phantoms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A phantom takes a second; with voxels of 8 mm a tenth."""
    real = phantom.make_phantom

    def make(kind: PhantomKind, seed: int) -> Phantom:
        return real(replace(kind, spacing=(8.0, 8.0, 8.0)), seed)

    monkeypatch.setattr(phantom, "make_phantom", make)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    study = StudyConfig.from_run_config(
        {
            "model.width": 2,
            "model.depth": 2,
            "train.patch-size": "16,16,16",
            "train.spacing": "6,6,6",
        }
    )
    plan = make_plan(study)
    path = tmp_path / "model.safetensors"
    save_model(path, build_model(plan, seed=0).state_dict(), plan)
    return path


@pytest.fixture
def site(fedseg: Run, tmp_path: Path, small_phantoms: None) -> Path:
    code, _, err = fedseg("phantom", tmp_path / "sites", "--sites", 1, "--cases", 2)
    assert code == 0, err
    return tmp_path / "sites" / "site-0"


def one_line(err: str, *words: str) -> None:
    assert err.startswith("fedseg: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_version_and_help(fedseg: Run) -> None:
    assert fedseg("--version") == (0, f"fedseg {__version__}\n", "")
    code, out, _ = fedseg("--help")
    assert code == 0
    for command in ("phantom", "check", "predict", "evaluate"):
        assert command in out
        assert fedseg(command, "--help")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [["pre-dict"], ["check"], ["check", ".", "--jsonn"], ["phantom", "x", "--sites", "0"]],
)
def test_usage_errors_exit_with_2(fedseg: Run, arguments: list[str]) -> None:
    code, out, err = fedseg(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


@pytest.mark.usefixtures("small_phantoms")
def test_phantom_writes_sites_that_check_finds_clean(fedseg: Run, tmp_path: Path) -> None:
    out = tmp_path / "sites"
    code, text, _ = fedseg("phantom", out, "--sites", 3, "--cases", 2, "--kinds", "portal, native")
    assert code == 0
    assert text.splitlines() == [
        f"{out}/site-0: 2 cases of kind portal",
        f"{out}/site-1: 2 cases of kind native",
        f"{out}/site-2: 2 cases of kind portal",
    ]
    for index in range(3):
        assert fedseg("check", out / f"site-{index}")[:2] == (
            0,
            "2 of 2 cases usable (2 with liver, 2 with tumor)\n",
        )
    images = [nib.load(path).get_fdata() for path in sorted(out.rglob("images/*"))]
    assert not any(np.array_equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_phantom_errors(fedseg: Run, tmp_path: Path) -> None:
    code, _, err = fedseg("phantom", tmp_path / "x", "--kinds", "venous")
    assert code == 2
    one_line(err, "--kinds: got 'venous'; expected some of portal, arterial")
    (tmp_path / "file").touch()
    code, _, err = fedseg("phantom", tmp_path / "file")
    assert code == 2
    one_line(err, f"{tmp_path / 'file'}: can't be written", "give another folder")


@pytest.mark.usefixtures("small_phantoms")
def test_phantom_never_mixes_with_what_is_there(fedseg: Run, tmp_path: Path) -> None:
    """Cases of another kind have the same names: they would stay, and pass for the new kind's."""
    out = tmp_path / "sites"
    arguments = ("phantom", out, "--sites", 2, "--cases", 2)
    assert fedseg(*arguments, "--kinds", "portal")[0] == 0
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")}
    for change in (
        ("--kinds", "portal,native"),
        ("--kinds", "portal", "--seed", 1),
        ("--kinds", "portal", "--cases", 3),
    ):
        code, text, err = fedseg(*arguments, *change)
        assert (code, text) == (2, "")
        one_line(err, "has phantoms of kind portal, 2 cases, seed 0, expected phantoms of")
    for part in ("images", "masks"):  # as if it had been interrupted
        lost = out / "site-1" / part / "case-10001.nii.gz"
        lost.unlink()
        del files[lost]
    assert fedseg(*arguments, "--kinds", "portal")[0] == 0
    assert len([*out.rglob("*.nii.gz")]) == 8
    assert {path: path.stat().st_mtime_ns for path in files} == files
    (out / "site-0" / "site.toml").write_text("labels = 'liver'\n")
    for _ in range(2):
        code, _, err = fedseg(*arguments, "--kinds", "portal")
        assert code == 2
        one_line(err, f"{out / 'site-0'}: has other cases, expected phantoms of kind portal, 2")
        (out / "site-0" / "site.toml").unlink(missing_ok=True)


def test_predict_writes_on_the_scans_grid_and_keeps_what_exists(
    fedseg: Run, tmp_path: Path, site: Path, model: Path
) -> None:
    out = tmp_path / "masks"
    arguments = ("predict", "--model", model, site / "images", "-o", out)
    code, text, err = fedseg(*arguments)
    assert (code, err) == (0, "")
    masks = sorted(out.glob("*.nii.gz"))
    scans = sorted((site / "images").iterdir())
    assert [path.name for path in masks] == [path.name for path in scans]
    for mask, scan, line in zip(masks, scans, text.splitlines(), strict=True):
        written, original = nib.load(mask), nib.load(scan)
        assert np.array_equal(written.affine, original.affine)
        assert written.shape == original.shape
        assert written.get_data_dtype() == np.uint8
        values = np.asanyarray(written.dataobj)
        assert set(np.unique(values)) <= {0, 1, 2}
        liver = (values >= 1).sum() * np.prod(original.header.get_zooms()) / 1000
        assert line.startswith(f"{mask}: liver {liver:.0f} mL, tumor ")

    before = [mask.stat().st_mtime_ns for mask in masks]
    code, again, err = fedseg(*arguments)
    assert (code, err) == (0, "")
    kept = "kept (--overwrite replaces it), "
    assert [line.replace(kept, "") for line in again.splitlines()] == text.splitlines()
    assert again.count(kept) == len(masks)
    assert [mask.stat().st_mtime_ns for mask in masks] == before
    masks[0].write_bytes(b"precious")
    code, _, err = fedseg(*arguments)
    assert code == 1
    assert (
        err
        == f"skipped: {masks[0]}: exists, and isn't on the grid of {scans[0]}; say --overwrite\n"
    )
    assert masks[0].read_bytes() == b"precious"
    assert fedseg(*arguments, "--overwrite")[0] == 0
    assert nib.load(masks[0]).shape == nib.load(scans[0]).shape
    assert not list(out.glob("*.png"))


def test_predict_prints_one_json_line_a_scan(
    fedseg: Run, tmp_path: Path, site: Path, model: Path
) -> None:
    first, second = sorted((site / "images").iterdir())
    arguments = ("predict", "--model", model, first, second, "-o", tmp_path / "out", "--json")
    code, text, err = fedseg(*arguments)
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in text.splitlines()]
    with (tmp_path / "out" / "volumes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for line, row, scan in zip(lines, rows, (first, second), strict=True):
        assert (line["scan"], line["status"], line["problem"]) == (str(scan), "done", None)
        assert line["mask"] == str(tmp_path / "out" / scan.name)
        assert row["scan"] == scan.name.removesuffix(".nii.gz")
        for key in ("liver_ml", "tumor_ml", "lesions", "seconds"):
            assert line[key] == pytest.approx(float(row[key]), abs=0.06)
    second.write_bytes(b"broken")
    (tmp_path / "out" / second.name).unlink()
    code, text, err = fedseg(*arguments)
    assert (code, err) == (1, "")
    kept, bad = (json.loads(line) for line in text.splitlines())
    assert (kept["status"], kept["seconds"], kept["lesions"]) == ("kept", None, lines[0]["lesions"])
    assert (bad["status"], bad["mask"]) == ("skipped", None)
    assert "not a NIfTI file" in bad["problem"]


def test_predict_draws_flips_and_cleans(
    fedseg: Run, tmp_path: Path, site: Path, model: Path
) -> None:
    scan = min((site / "images").iterdir())
    masks = {}
    for name, options in {
        "plain": ["--no-largest-liver"],
        "default": ["--overlay"],
        "inside": ["--tumor-in-liver"],
        "flips": ["--no-largest-liver", "--flips", "xz"],
    }.items():
        out = tmp_path / name
        assert fedseg("predict", "--model", model, scan, "-o", out, *options)[0] == 0
        masks[name] = np.asanyarray(nib.load(out / scan.name).dataobj)
    plain = masks["plain"]
    for name, tumor in (("default", False), ("inside", True)):
        expected = clean_labels(plain, largest_liver=True, tumor_in_liver=tumor)
        assert np.array_equal(masks[name], expected)
    assert not np.array_equal(masks["flips"], plain)
    png = (tmp_path / "default" / scan.name.replace(".nii.gz", ".png")).read_bytes()
    assert png.startswith(b"\x89PNG")


def test_predict_says_in_one_line_that_the_disk_is_full(
    fedseg: Run, tmp_path: Path, site: Path, model: Path
) -> None:
    """A file may have so many bytes and no more: what a full disk is to a program."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "out"
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        code, text, err = fedseg("predict", "--model", model, site / "images", "-o", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, text) == (2, "")
    one_line(err, f"{out}: can't be written (File too large); free space, or give another")
    assert not list(out.iterdir())


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_predict_shows_time_left_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress_bar(4) as on_progress:
        assert on_progress is None
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(4) as on_progress:
        assert on_progress is not None
        on_progress(1.0)
        print("a line")  # goes into a file
        on_progress(3.0)
    assert "75% of 4 scans, time left" in terminal.getvalue()  # drawn at the end at the latest
    assert "a line" not in terminal.getvalue()
    assert capsys.readouterr().out == "a line\n"


def test_predict_never_replaces_its_input(fedseg: Run, site: Path, model: Path) -> None:
    scans = {path: path.read_bytes() for path in (site / "images").iterdir()}
    images = site / "images"
    code, _, err = fedseg("predict", "--model", model, images, "-o", images, "--overwrite")
    assert code == 2
    one_line(err, "a mask would replace this scan; give another folder with -o")
    assert {path: path.read_bytes() for path in images.iterdir()} == scans


def test_predict_goes_on_after_a_bad_scan(
    fedseg: Run, tmp_path: Path, site: Path, model: Path
) -> None:
    first, second = sorted((site / "images").iterdir())
    first.write_bytes(gzip.decompress(second.read_bytes())[:500])
    code, out, err = fedseg("predict", "--model", model, first, second, "-o", tmp_path / "out")
    assert code == 1
    assert out.startswith(f"{tmp_path / 'out' / second.name}: liver")
    assert err.startswith(f"skipped: {first}: not a NIfTI file")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "no.safetensors"}, "no.safetensors: no such file; give a model-best"),
        ({"scan": "no.nii"}, "no.nii: no such file or folder; correct the path"),
        ({"device": "gpu"}, "--device: got 'gpu'; expected auto, cpu, cuda, cuda:N or mps"),
        ({"flips": "xx"}, "--flips: got 'xx'; expected some of x, y, z, such as xyz"),
        ({"flips": "w"}, "--flips: got 'w'; expected some of x, y, z"),
        ({"modality": "pet"}, "--modality: got 'pet'; expected auto, ct or mr"),
        ({"out": "model.safetensors"}, "model.safetensors: can't be made"),
    ],
)
def test_predict_errors_are_one_line(
    fedseg: Run, tmp_path: Path, site: Path, model: Path, change: dict[str, str], words: str
) -> None:
    given: dict[str, Any] = {"model": model, "scan": site / "images", "out": tmp_path / "out"}
    given |= {k: tmp_path / v if k in given else v for k, v in change.items()}
    extra = [f"--{k}={given[k]}" for k in ("device", "modality", "flips") if k in given]
    code, out, err = fedseg(
        "predict", "--model", given["model"], given["scan"], "-o", given["out"], *extra
    )
    assert (code, out) == (2, "")
    one_line(err, words)


def test_evaluate_as_table_and_as_json(fedseg: Run, site: Path, model: Path) -> None:
    code, table, err = fedseg("evaluate", "--model", model, site)
    assert (code, err) == (0, "")
    assert "per case" in table and "pooled" in table
    assert "volume similarity" in table
    code, text, _ = fedseg("evaluate", "--model", model, site, "--json")
    assert code == 0
    result = json.loads(text)
    assert result["skipped"] == []
    assert sorted(result["cases"]) == ["case-0000", "case-0001"]
    dices = [case["liver.dice"] for case in result["cases"].values()]
    assert result["all"]["liver.dice"] == pytest.approx(np.mean(dices))
    assert result["all"]["cases"] == 2
    assert f"{result['all']['liver.dice']:.3f}" in table


@pytest.mark.parametrize("flags", [[], ["--no-largest-liver"], ["--tumor-in-liver"]])
def test_evaluate_agrees_with_predicted_masks(
    fedseg: Run, tmp_path: Path, site: Path, model: Path, flags: list[str]
) -> None:
    result = json.loads(fedseg("evaluate", "--model", model, site, "--json", *flags)[1])
    largest, inside = "--no-largest-liver" not in flags, "--tumor-in-liver" in flags
    assert result["cleaning"] == {"largest_liver": largest, "tumor_in_liver": inside}
    fedseg("predict", "--model", model, site / "images", "-o", tmp_path / "out", *flags)
    code, text, _ = fedseg("evaluate", "--predictions", tmp_path / "out", site, "--json")
    assert code == 0
    assert json.loads(text) == {**result, "cleaning": None}
    for name, scores in result["cases"].items():
        found, truth = (
            np.asanyarray(nib.load(folder / f"{name}.nii.gz").dataobj) >= 1
            for folder in (tmp_path / "out", site / "masks")
        )
        dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
        assert scores["liver.dice"] == pytest.approx(dice)


def test_evaluate_writes_a_table_of_cases_and_one_of_lesions(
    fedseg: Run, tmp_path: Path, site: Path
) -> None:
    code, text, err = fedseg(
        "evaluate", "--predictions", site / "masks", site, "--cases", tmp_path / "cases.csv"
    )
    assert (code, err) == (0, "")
    for words in (
        "HD95 (95% Hausdorff), mm",
        "volume error, mL",
        "95% interval",
        "small: under 10 mm",
        "all cases",
    ):
        assert words in text
    assert "False lesions: 0.00 a scan" in text
    with (tmp_path / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["case-0000", "case-0001"]
    assert {row["liver.dice"] for row in rows} == {"1.0"}
    assert all(float(row["liver.volume_ml"]) > 300 for row in rows)


def test_evaluate_compares_two_models_or_folders_case_by_case(
    fedseg: Run, tmp_path: Path, site: Path, model: Path
) -> None:
    both = ("evaluate", "--predictions", site / "masks", "--against", model, site)
    code, text, err = fedseg(*both)
    assert (code, err) == (0, "")
    assert "p (Wilcoxon)" in text
    found = json.loads(fedseg(*both, "--json")[1])
    liver = found["against"]["differences"]["liver.dice"]
    other = found["against"]["all"]["liver.dice"]
    assert (liver["pairs"], liver["one"]) == (2, 1.0)
    assert liver["other"] == pytest.approx(other)
    assert liver["difference"] == pytest.approx(1 - other)
    assert liver["low"] <= liver["difference"] <= liver["high"]


def test_evaluate_needs_exactly_one_of_model_and_predictions(
    fedseg: Run, site: Path, model: Path
) -> None:
    for given, words in (
        ([], "--model, --predictions: got neither; expected exactly one of them"),
        (["--model", model, "--predictions", site], "--model, --predictions: got both"),
        (
            ["--predictions", site / "none"],
            "none: no such folder; give the folder of the predicted",
        ),
    ):
        code, out, err = fedseg("evaluate", site, *given)
        assert (code, out) == (2, "")
        one_line(err, words)


def test_evaluate_scores_nothing_before_its_arguments_are_good(
    fedseg: Run, tmp_path: Path, site: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(*given: object, **more: object) -> None:
        pytest.fail("scored before all arguments were read")

    monkeypatch.setattr(evaluation, "_score_folder", score)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "site.toml").write_text("label-mop = '1:2'\n")
    for option, path, words in (
        ("--cases", tmp_path / "no" / "cases.csv", "can't be written (No such file or directory)"),
        ("--cases", tmp_path, "can't be written (Is a directory); free space, or give another"),
        ("--against", tmp_path / "no.safetensors", "no.safetensors: no such file"),
        ("--against", tmp_path / "odd", "label-mop: unknown key of the site config"),
    ):
        code, out, err = fedseg("evaluate", "--model", model, site, option, path)
        assert (code, out) == (2, "")
        one_line(err, words)
    assert not (tmp_path / "no").exists()


def test_evaluate_of_names_that_are_no_utf_8(fedseg: Run, tmp_path: Path, site: Path) -> None:
    name = os.fsdecode(b"M\xfcller.nii.gz")
    for part in ("images", "masks"):
        try:
            min((site / part).iterdir()).rename(site / part / name)
        except OSError:
            pytest.skip("names of this file system are UTF-8")
    table = tmp_path / "cases.csv"
    for _ in range(2):
        code, out, err = fedseg("evaluate", "--predictions", site / "masks", site, "--cases", table)
        assert (code, err) == (0, "")
        assert "per case" in out
        assert [line.split(b",")[0] for line in table.read_bytes().splitlines()] == [
            b"case",
            b"M\xfcller",
            b"case-0001",
        ]


def test_evaluate_prints_scores_that_it_cannot_write(
    fedseg: Run, tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(csv.DictWriter, "writerows", full)
    table = tmp_path / "cases.csv"
    code, out, err = fedseg("evaluate", "--predictions", site / "masks", site, "--cases", table)
    assert code == 2
    assert "per case" in out
    one_line(err, f"{table}: can't be written (No space left on device); free space")


def test_evaluate_skips_bad_cases_and_says_so(fedseg: Run, site: Path, model: Path) -> None:
    mask = min((site / "masks").iterdir())
    mask.write_bytes(b"broken")
    code, out, err = fedseg("evaluate", "--model", model, site)
    assert code == 1
    assert "per case" in out
    assert err.startswith(f"skipped: {mask}: not a NIfTI file")
    max((site / "masks").iterdir()).write_bytes(b"broken")
    code, out, err = fedseg("evaluate", "--model", model, site, "--json")
    assert (code, out) == (2, "")
    one_line(err, "no usable case; run `fedseg check` on it")
    code, _, err = fedseg("evaluate", "--model", model, site / "nowhere")
    assert code == 2
    one_line(err, "no such folder; correct the path")


def test_debug_shows_where_an_error_came_from(fedseg: Run, tmp_path: Path) -> None:
    code, _, err = fedseg("check", tmp_path)
    assert code == 2
    one_line(err, f"{tmp_path}: no known layout; expected one of")
    start = "from fedseg.cli import main; main()"
    command = [sys.executable, "-c", start, "check", str(tmp_path), "--debug"]
    loud = subprocess.run(command, capture_output=True, text=True, check=False)
    assert loud.returncode == 1
    assert "Traceback" in loud.stderr
    assert loud.stderr.rstrip().splitlines()[-1].startswith("fedseg.errors.DataError: ")


@pytest.mark.usefixtures("small_phantoms")
def test_leak_writes_numbers_words_and_a_picture(fedseg: Run, tmp_path: Path, model: Path) -> None:
    out = tmp_path / "leak"
    short = ("--rounds", 1, "--steps", 1, "--iterations", 1, "--cases", 4, "--model", model)
    code, text, err = fedseg("leak", "-o", out, *short)
    assert code == 0, err
    assert "LOWER bound" in text
    assert (out / "leak.txt").read_text() in text
    found = json.loads((out / "leak.json").read_text())
    assert found["settings"].keys() >= {"none", "clipping", "local-dp", "central-dp"}
    assert (out / "reconstructions.png").read_bytes().startswith(b"\x89PNG")
    code, text, _ = fedseg("leak", "-o", out, *short, "--json")
    assert (code, json.loads(text)) == (0, found)


def test_leak_errors_are_one_line(fedseg: Run, tmp_path: Path, site: Path) -> None:
    code, _, err = fedseg("leak", "-o", tmp_path / "out", "--data", site)
    assert code == 2
    one_line(err, "got 2 usable cases for 3 sites; expected at least 4 a site")
    code, _, err = fedseg("leak", "-o", tmp_path / "out", "--model", "unett")
    assert code == 2
    one_line(err, "unett: no such file")
    assert fedseg("leak")[0] == 2
    assert not (tmp_path / "out").exists()
