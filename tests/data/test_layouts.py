"""Tests of the layouts: each is found, read and used; each broken one is one line."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from written import AFFINE, WRITERS, arrays, nifti

from fedseg.config import StudyConfig
from fedseg.data.checks.check import check_folder
from fedseg.data.held_out import server_groups
from fedseg.data.layouts import LAYOUTS
from fedseg.data.node import open_site
from fedseg.data.planning import make_plan
from fedseg.data.prepared_cases import load_cases
from fedseg.data.sites import find_cases, label_map_of, site_cases
from fedseg.data.volumes import read_image, read_mask
from fedseg.errors import DataError, FedSegError, Reason, SiteError
from fedseg.segmentation.evaluation import evaluate_folder
from fedseg.segmentation.models import build_model
from fedseg.site_config import SiteConfig, load_site_config

STUDY = StudyConfig.from_run_config(
    {
        "train.patch-size": "16,16,16",
        "train.spacing": "3,3,3",
        "train.batch-size": 2,
        "train.ct-window": "-150,250",
        "model.width": 2,
        "model.depth": 2,
    }
)
BUILT_IN = [name for name in LAYOUTS if name != "auto"]


def written(root: Path, layout: str, seeds: tuple[int, ...] = (0, 1, 2)) -> Path:
    if layout == "dicom":
        pytest.importorskip("highdicom")
    root.mkdir(exist_ok=True)
    WRITERS[layout](root, seeds)
    return root


def seed_of(name: str) -> int:
    found = re.search(r"\d+", name)
    assert found
    return int(found[0])


def test_every_layout_has_a_writer() -> None:
    assert sorted(BUILT_IN) == sorted(WRITERS)
    described = SiteConfig.model_fields["layout"].description
    assert described == ", ".join(LAYOUTS)


@pytest.mark.parametrize("layout", BUILT_IN)
def test_auto_says_which_it_took_and_finds_the_same_cases(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str
) -> None:
    root = written(tmp_path, layout)
    with caplog.at_level(logging.INFO, "fedseg"):
        listing = find_cases(root)
    assert f"layout: {layout}" in caplog.text
    assert listing == find_cases(root, layout=layout)
    assert (listing.layout, len(listing.cases), listing.problems) == (layout, 3, ())
    assert [seed_of(case.image.name) for case in listing.cases] == [0, 1, 2]
    assert [seed_of(str(case.mask.relative_to(root))) for case in listing.cases] == [0, 1, 2]


@pytest.mark.parametrize("layout", BUILT_IN)
def test_every_layout_gives_the_arrays_that_were_written(tmp_path: Path, layout: str) -> None:
    listing, config = site_cases(written(tmp_path, layout), SiteConfig())
    for case in listing.cases:
        image, labels = arrays(seed_of(case.image.name))
        scan = read_image(case.image)
        mask = read_mask(case.mask, image=scan, label_map=config.label_map)
        assert np.array_equal(scan.array, image[::-1, ::-1])
        assert np.array_equal(mask.array, labels[::-1, ::-1])
        assert np.allclose(scan.stored_affine, AFFINE)
        assert scan.spacing == pytest.approx((1.5, 2, 3))


@pytest.mark.parametrize("layout", BUILT_IN)
def test_check_site_server_and_evaluation_work_on_every_layout(
    tmp_path: Path, home: Path, layout: str
) -> None:
    root = written(tmp_path / "site", layout)
    report = check_folder(root, load_site_config({}, folder=root))
    assert (report.cases, report.usable) == (3, 3)
    assert report.annotated == {"liver": 3, "tumor": 3}

    plan = make_plan(STUDY)
    site = open_site({"data-dir": str(root)}, STUDY)
    cases = load_cases(site, plan, validation_fraction=0.4, seed=0)
    assert (len(cases.training), len(cases.validation), cases.skipped) == (2, 1, 0)
    truths = sorted(int((c.truth == 2).sum()) for c in cases.training + cases.validation)
    assert truths == sorted(int((arrays(seed)[1] == 2).sum()) for seed in range(3))

    study = STUDY.model_copy(
        update={"data": STUDY.data.model_copy(update={"server_dir": str(root)})}
    )
    ((found, config),) = server_groups(study, simulated=False).values()
    assert (len(found), config.label_map) == (3, site.config.label_map)

    scores = evaluate_folder(build_model(plan, seed=0), plan, root, device=torch.device("cpu"))
    assert len(scores.cases) == 3
    assert scores.skipped == ()
    assert scores.all["liver.dice.cases"] == 3


@pytest.mark.parametrize("layout", BUILT_IN)
def test_every_layout_lists_what_it_cannot_pair(tmp_path: Path, layout: str) -> None:
    root = written(tmp_path, layout)
    listing = find_cases(root)
    listing.cases[1].mask.unlink()
    again = find_cases(root, layout=layout)
    assert again.cases == (listing.cases[0], listing.cases[2])
    (problem,) = again.problems
    assert problem.startswith(str(listing.cases[1].image))
    assert re.fullmatch(r"[^\n]+: [^\n]+; [^\n]+", problem)


@pytest.mark.parametrize("layout", [name for name in BUILT_IN if name != "dicom"])
def test_every_layout_lists_a_mask_without_its_image(tmp_path: Path, layout: str) -> None:
    root = written(tmp_path, layout)
    listing = find_cases(root)
    listing.cases[1].image.unlink()
    again = find_cases(root, layout=layout)
    assert again.cases == (listing.cases[0], listing.cases[2])
    (problem,) = again.problems
    assert problem.startswith(f"{listing.cases[1].mask}: no image in ")


@pytest.mark.parametrize("layout", BUILT_IN)
def test_same_name_in_any_case_of_letters(tmp_path: Path, layout: str) -> None:
    root = written(tmp_path, layout)
    before = len(find_cases(root).cases)
    for path in [*root.rglob("*.nii"), *root.rglob("*.nii.gz")]:
        if not path.name.startswith("."):
            path.rename(path.with_name(path.name.replace(".nii", ".NII").replace(".gz", ".GZ")))
    listing, config = site_cases(root, SiteConfig(layout=layout))
    assert len(listing.cases) == before
    scan = read_image(listing.cases[1].image)
    read_mask(listing.cases[1].mask, image=scan, label_map=config.label_map)


def test_no_layout_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "scan.nii").touch()
    with pytest.raises(DataError) as caught:
        find_cases(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: no known layout; expected one of: ")
    assert "\n" not in message
    for name in BUILT_IN:
        assert f"{name} (" in message


def test_of_two_layouts_the_one_with_a_dataset_json_wins(tmp_path: Path) -> None:
    for layout in ("images-masks", "msd"):
        written(tmp_path, layout)
    assert find_cases(tmp_path).layout == "msd"


def test_two_layouts_that_fit_alike_are_an_error(tmp_path: Path) -> None:
    for layout in ("images-masks", "bids"):
        written(tmp_path, layout)
    with pytest.raises(DataError, match="looks like layouts bids and images-masks; set layout"):
        find_cases(tmp_path)
    assert find_cases(tmp_path, layout="bids").layout == "bids"


@pytest.mark.parametrize("folders", [("images", "masks"), ("", ""), ("a/b", "a/b"), ("1", "2/3")])
def test_lits_in_any_folders(tmp_path: Path, folders: tuple[str, str]) -> None:
    for number in (2, 10):
        image, labels = arrays(number)
        nifti(tmp_path / folders[0] / f"volume-{number}.nii", image)
        nifti(tmp_path / folders[1] / f"segmentation-{number}.nii.gz", labels)
    nifti(tmp_path / "test" / "test-volume-3.nii", image)
    listing = find_cases(tmp_path)
    assert (listing.layout, listing.problems) == ("lits", ())
    assert [case.image.name for case in listing.cases] == ["volume-2.nii", "volume-10.nii"]


def test_lits_twice_and_linked_in_a_circle(tmp_path: Path) -> None:
    root = written(tmp_path / "lits", "lits")
    (root / "segmentations" / "again").symlink_to(root, target_is_directory=True)
    assert len(find_cases(root).cases) == 3
    nifti(root / "volume-01.nii", arrays(1)[0])
    (problem,) = find_cases(root).problems
    assert "second image for volume-" in problem


def content(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "dataset.json").read_text())
    return found


def rewrite(root: Path, **changes: object) -> None:
    merged = {k: v for k, v in {**content(root), **changes}.items() if v is not None}
    (root / "dataset.json").write_text(json.dumps(merged))


def test_nnunet_1_has_labels_the_other_way_round(tmp_path: Path) -> None:
    root = written(tmp_path, "nnunet")
    labels = {"0": "background", "3": "liver", "6": "Lesions"}
    rewrite(root, channel_names=None, file_ending=None, modality={"0": "CT"}, labels=labels)
    listing, config = site_cases(root, SiteConfig())
    assert listing.layout == "nnunet"
    assert listing.label_names == {"background": 0, "liver": 3, "Lesions": 6}
    assert config.label_map == {0: 0, 3: 1, 6: 2}


def test_nnunet_2_with_regions(tmp_path: Path) -> None:
    root = written(tmp_path, "nnunet")
    rewrite(root, labels={"background": 0, "liver": [3, 6], "tumor": 6})
    assert site_cases(root, SiteConfig())[1].label_map == {0: 0, 3: 1, 6: 2}
    rewrite(root, labels={"background": 0, "liver": [3, 6, 7], "tumor": 6})
    with pytest.raises(DataError, match=r"'liver' is \[3, 6, 7\], expected one value"):
        find_cases(root)


def test_nnunet_more_channels_or_none_are_problems(tmp_path: Path) -> None:
    root = written(tmp_path, "nnunet")
    nifti(root / "imagesTr" / "case_1_0001.nii.gz", arrays(1)[0])
    nifti(root / "imagesTr" / "plain.nii.gz", arrays(1)[0])
    listing = find_cases(root)
    assert len(listing.cases) == 2
    assert len(listing.problems) == 2
    assert "plain.nii.gz: no channel in its name; expected plain_0000" in listing.problems[0]
    assert "case_1_0000.nii.gz: channels 0000, 0001, expected 0000 alone" in listing.problems[1]


def test_bids_prefers_dseg_and_refuses_two_contrasts(tmp_path: Path) -> None:
    root = written(tmp_path, "bids", (0, 1))
    out = root / "derivatives" / "manual" / "sub-0" / "ses-1" / "anat"
    nifti(out / "sub-0_ses-1_desc-body_mask.nii.gz", arrays(0)[1])
    nifti(root / "sub-2" / "anat" / "sub-2_run-1_T1w.nii.gz", arrays(2)[0])
    nifti(out.parents[1] / "sub-2_run-1_mask.nii", arrays(2)[1])
    nifti(root / "sub-0" / "ses-1" / "dwi" / "sub-0_ses-1_ct.nii.gz", arrays(2)[0])
    listing = find_cases(root)
    assert listing.problems == ()
    assert [case.mask.name for case in listing.cases] == [
        "sub-0_ses-1_space-orig_desc-liver_dseg.nii.gz",
        "sub-1_ses-1_space-orig_desc-liver_dseg.nii.gz",
        "sub-2_run-1_mask.nii",
    ]
    nifti(root / "sub-2" / "anat" / "sub-2_run-1_T2w.nii.gz", arrays(2)[0])
    (problem,) = find_cases(root).problems
    assert "sub-2_run-1_T2w.nii.gz: second image for sub-2_run-1_T1w.nii.gz" in problem


@pytest.mark.parametrize("organ", ["lesion", "spleen", "tumor", "kidneyTumor"])
def test_bids_mask_of_another_organ_is_a_problem(tmp_path: Path, organ: str) -> None:
    """It is binary, and its 1 would be read as liver."""
    for seed, name in enumerate(("liver", "Liver", organ)):
        where = f"sub-{seed}/ct"
        nifti(tmp_path / where / f"sub-{seed}_ct.nii.gz", arrays(seed)[0])
        mask = tmp_path / "derivatives" / "seg" / where / f"sub-{seed}_label-{name}_mask.nii.gz"
        nifti(mask, (arrays(seed)[1] > 0).astype(np.uint8))
    listing, _ = site_cases(tmp_path, SiteConfig())
    assert [seed_of(case.image.name) for case in listing.cases] == [0, 1]
    (problem,) = listing.problems
    assert problem.startswith(f"{mask}: is of {organ} alone, not of the liver; add a _dseg")
    errors = [found for found in check_folder(tmp_path).findings if found.severity == "error"]
    assert [(error.what, error.file) for error in errors] == [("pairing", str(mask))]
    mapped, _ = site_cases(tmp_path, SiteConfig.model_validate({"label-map": "1:2"}))
    assert (len(mapped.cases), mapped.problems) == (3, ())


def _raw(text: str) -> Callable[[Path], object]:
    return lambda root: (root / "dataset.json").write_text(text)


def _labels(labels: object) -> Callable[[Path], object]:
    return lambda root: rewrite(root, labels=labels)


BAD_JSON: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda root: (root / "dataset.json").unlink(), "no dataset.json; expected"),
    "a folder": (
        lambda root: [(root / "dataset.json").unlink(), (root / "dataset.json").mkdir()],
        "dataset.json: can't be read",
    ),
    "cut": (_raw('{"labels": {'), "dataset.json: not valid JSON"),
    "no UTF-8": (lambda root: (root / "dataset.json").write_bytes(b"\xff\xfe\xfa"), "not valid"),
    "deep": (_raw("[" * 100_000), "dataset.json: not valid JSON"),
    "a list": (_raw("[1]"), "a JSON list, expected an object"),
    "no labels": (_labels(None), "no labels; expected"),
    "empty labels": (_labels({}), "no labels; expected"),
    "labels a list": (_labels(["liver"]), "no labels; expected"),
    "name no text": (_labels({"0": "background", "1": 3}), "labels: got 3, expected a name"),
    "value no number": (_labels({"liver": "one"}), "labels: got 'one', expected a whole number"),
    "value a fraction": (_labels({"liver": 1.5}), "labels: got 1.5, expected a whole number"),
    "value a dict": (_labels({"liver": {}}), "labels: got {}, expected a whole number"),
    "one value twice": (_labels({"liver": 1, "tumor": 1}), "expected one value that no other"),
    "one name twice": (_labels({"1": "liver", "2": "liver"}), "two values have one name"),
    "no images": (lambda root: (root / "imagesTr").rename(root / "x"), "no known layout"),
}


@pytest.mark.parametrize("name", BAD_JSON)
@pytest.mark.parametrize("layout", ["msd", "nnunet"])
def test_broken_data_set_is_one_line(tmp_path: Path, layout: str, name: str) -> None:
    spoil, words = BAD_JSON[name]
    root = written(tmp_path, layout, (0,))
    spoil(root)
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        find_cases(root)
    assert "\n" not in str(caught.value)
    assert open_error(root).reason is Reason.DATA


def open_error(root: Path) -> SiteError:
    with pytest.raises(SiteError) as caught:
        open_site({"data-dir": str(root)}, STUDY)
    return caught.value


def test_nnunet_files_that_are_no_nifti(tmp_path: Path) -> None:
    root = written(tmp_path, "nnunet", (0,))
    rewrite(root, file_ending=".nrrd")
    with pytest.raises(DataError, match=r"file_ending is '.nrrd', expected .nii.gz"):
        find_cases(root)


def test_unknown_label_name_asks_for_a_label_map(tmp_path: Path) -> None:
    root = written(tmp_path, "nnunet", (0,))
    rewrite(root, labels={"background": 0, "liver": 3, "Gallbladder": 6})
    with pytest.raises(DataError, match=r"can't tell what label 'gallbladder' is; set label-map"):
        site_cases(root, SiteConfig())
    error = open_error(root)
    assert error.reason is Reason.DATA
    (root / "site.toml").write_text("label-map = {liver = 1, GallBladder = 0}\n")
    site = open_site({"data-dir": str(root)}, STUDY)
    assert site.config.label_map == {3: 1, 6: 0}


def test_site_label_map_wins_over_dataset_json(tmp_path: Path) -> None:
    listing = find_cases(written(tmp_path, "msd", (0,)))
    assert label_map_of(listing, SiteConfig()) == {0: 0, 1: 2, 2: 1}
    config = SiteConfig.model_validate({"label-map": {"cancer": "liver", "2": 0}})
    assert label_map_of(listing, config) == {1: 1, 2: 0}
    wrong = SiteConfig.model_validate({"label-map": "cancr:2"})
    with pytest.raises(DataError, match=r"got 'cancr'; expected a name.*did you mean 'cancer'"):
        label_map_of(listing, wrong)


def test_label_name_where_the_layout_has_none(tmp_path: Path) -> None:
    root = written(tmp_path, "images-masks", (0,))
    config = SiteConfig.model_validate({"label-map": "cancer:2,liver:1"})
    with pytest.raises(FedSegError, match="got 'cancer'; expected numbers: layout images-masks"):
        site_cases(root, config)


def test_liver_only_site_maps_names_all_the_same(tmp_path: Path) -> None:
    root = written(tmp_path, "msd", (0, 1))
    (root / "site.toml").write_text('labels = "liver"\n')
    site = open_site({"data-dir": str(root)}, STUDY)
    assert site.config.labels == ("liver",)
    assert site.config.label_map == {0: 0, 1: 2, 2: 1}
