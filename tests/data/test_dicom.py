"""Tests of reading DICOM: against ITK, onto any grid, and with everything that can be wrong."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from written import AFFINE, arrays, nifti, segmentation, series

pytest.importorskip("highdicom")

from fedseg.config import StudyConfig
from fedseg.data import dicom_series, volumes
from fedseg.data.cases import files_of
from fedseg.data.planning import make_plan
from fedseg.data.scans import scans_of
from fedseg.data.sites import find_cases, site_cases
from fedseg.data.volumes import read_image, read_mask, write_mask
from fedseg.errors import CaseError, ConfigError, DataError
from fedseg.segmentation.models import build_model
from fedseg.segmentation.predict import predict_files
from fedseg.site_config import SiteConfig

ANGLE = np.deg2rad(20)
TURNED = np.eye(4)
TURNED[1:3, 1:3] = [[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]]
CORONAL = np.array([[-1.5, 0, 0, 40], [0, 0, 3.0, 30], [0, -2.0, 0, -12], [0, 0, 0, 1]])
SAGITTAL = np.array([[0, 0, 3.0, 40], [-1.5, 0, 0, 30], [0, -2.0, 0, -12], [0, 0, 0, 1]])
AFFINES = {
    "axial": AFFINE,
    "coronal": CORONAL,
    "sagittal": SAGITTAL,
    "oblique": TURNED @ AFFINE,
    "prone": np.diag([-1.0, -1, 1, 1]) @ AFFINE,
}


def by_itk(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def to_ras(image: sitk.Image, path: Path) -> nib.Nifti1Image:
    sitk.WriteImage(image, str(path))
    return nib.as_closest_canonical(nib.load(path))


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("reverse", [False, True])
def test_series_is_what_itk_reads(tmp_path: Path, name: str, modality: str, reverse: bool) -> None:
    def rescale(data: Any, _: int) -> None:
        data.RescaleSlope, data.RescaleIntercept = 0.5, -7

    image = arrays(1)[0]
    order = range(image.shape[2])
    series(
        tmp_path / "ct",
        image,
        affine=AFFINES[name],
        modality=modality,
        order=list(reversed(order)) if reverse else list(order),
        change=rescale,
    )
    scan = read_image(tmp_path / "ct")
    expected = to_ras(by_itk(tmp_path / "ct"), tmp_path / "itk.nii")
    assert scan.array.dtype == np.float32
    assert np.array_equal(scan.array, expected.get_fdata())
    assert np.allclose(scan.spacing, expected.header.get_zooms(), atol=1e-5)

    labels = (scan.array > 10).astype(np.uint8)
    write_mask(tmp_path / "mask.nii.gz", labels, scan)
    written = sitk.ReadImage(str(tmp_path / "mask.nii.gz"))
    itk = by_itk(tmp_path / "ct")
    assert written.GetSize() == itk.GetSize()
    assert np.allclose(written.GetOrigin(), itk.GetOrigin(), atol=1e-4)
    assert np.allclose(written.GetDirection(), itk.GetDirection(), atol=1e-5)
    assert np.array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(itk) > 10)
    assert np.array_equal(read_mask(tmp_path / "mask.nii.gz", image=scan).array, labels)


def test_signed_values_and_a_slope_of_each_slice(tmp_path: Path) -> None:
    def change(data: Any, k: int) -> None:
        data.PixelRepresentation = 1
        data.RescaleSlope, data.RescaleIntercept = 1 + k / 8, -k
        values = np.arange(18 * 17, dtype=np.int16) - 100 * k
        data.PixelData = values.tobytes()

    series(tmp_path / "ct", arrays(1)[0], change=change)
    scan = read_image(tmp_path / "ct")
    values = np.arange(18 * 17).reshape(17, 18).T
    for k in range(16):
        expected = ((values - 100 * k) * (1 + k / 8) - k)[::-1, ::-1]
        assert np.allclose(scan.array[:, :, k], expected)


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("flip", [False, True])
def test_nifti_mask_of_a_series_may_have_axes_of_its_own(
    tmp_path: Path, axes: tuple[int, ...], flip: bool
) -> None:
    """dcm2niix and others turn and flip axes; a mask drawn on their scan fits all the same."""
    image, labels = arrays(1)
    series(tmp_path / "ct", image)
    scan = read_image(tmp_path / "ct")
    turn = np.array([[axis, -1 if flip and axis == 1 else 1] for axis in axes])
    stored = nib.Nifti1Image(labels, AFFINE).as_reoriented(turn)
    nib.save(stored, tmp_path / "mask.nii")
    mask = read_mask(tmp_path / "mask.nii", image=scan)
    assert np.array_equal(mask.array, labels[::-1, ::-1])
    moved = AFFINE.copy()
    moved[0, 3] += 2
    nifti(tmp_path / "moved.nii", labels, moved)
    with pytest.raises(CaseError, match="affine puts the mask 2 mm away from its image"):
        read_mask(tmp_path / "moved.nii", image=scan)
    nifti(tmp_path / "short.nii", labels[:, :, 1:])
    with pytest.raises(CaseError, match=r"shape \(18, 17, 15\) but image is"):
        read_mask(tmp_path / "short.nii", image=scan)


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize(
    ("kind", "omit"), [("BINARY", True), ("BINARY", False), ("LABELMAP", True)]
)
def test_segmentation_lies_where_it_was_drawn(
    tmp_path: Path, name: str, kind: str, omit: bool
) -> None:
    image, labels = arrays(1)
    data = series(tmp_path / "ct", image, affine=AFFINES[name])
    liver = labels == 1 if kind == "LABELMAP" else labels >= 1  # a label map can't overlap
    parts = {"Liver": liver, "Tumor": labels == 2}
    path = segmentation(tmp_path / "seg.dcm", data, parts, kind=kind, omit_empty=omit)
    scan = read_image(tmp_path / "ct")
    mask = read_mask(path, image=scan)
    nifti(tmp_path / "same.nii", labels, AFFINES[name])
    expected = read_mask(tmp_path / "same.nii", image=scan)
    assert np.array_equal(mask.array, expected.array)
    assert mask.array.dtype == np.uint8
    alone = read_mask(path)
    assert np.count_nonzero(alone.array == 2) == np.count_nonzero(labels == 2)
    assert alone.spacing == pytest.approx(scan.spacing)
    write_mask(tmp_path / "written.nii.gz", mask.array, mask)
    assert np.array_equal(read_mask(tmp_path / "written.nii.gz", image=scan).array, mask.array)


def test_order_of_segments_does_not_matter_and_gaps_are_filled(tmp_path: Path) -> None:
    image, labels = arrays(1)
    apart = np.zeros(labels.shape, bool)
    apart[3:6, 3:6, [3, 7, 11]] = True
    data = series(tmp_path / "ct", image)
    path = segmentation(tmp_path / "seg.dcm", data, {"lesion": apart})
    scan = read_image(tmp_path / "ct")
    assert np.array_equal(read_mask(path, image=scan).array, 2 * apart[::-1, ::-1])
    parts = {"tumor": labels == 2, "liver": labels >= 1}
    path = segmentation(tmp_path / "seg2.dcm", data, parts)
    assert np.array_equal(read_mask(path, image=scan).array, labels[::-1, ::-1])


def test_segment_in_one_slice(tmp_path: Path) -> None:
    image, labels = arrays(1)
    one = np.zeros(labels.shape, bool)
    one[3:6, 3:6, 9] = True
    path = segmentation(tmp_path / "seg.dcm", series(tmp_path / "ct", image), {"lesion": one})
    mask = read_mask(path, image=read_image(tmp_path / "ct"))
    assert np.array_equal(mask.array, 2 * one[::-1, ::-1])


def test_segments_are_mapped_by_name_and_by_number(tmp_path: Path) -> None:
    image, labels = arrays(1)
    data = series(tmp_path / "ct", image)
    parts = {"Organ A": labels == 1, "Vessel": labels == 2}
    path = segmentation(tmp_path / "seg.dcm", data, parts)
    scan = read_image(tmp_path / "ct")
    with pytest.raises(CaseError, match=r"segment 1 'Organ A' has no label.*with label-map"):
        read_mask(path, image=scan)
    for label_map in ({"organ a": 1, "vessel": 2}, {1: 1, 2: 2}, {"organ a": 1, 2: 2}):
        assert np.array_equal(read_mask(path, label_map=label_map).array.max(), 2)
        mask = read_mask(path, image=scan, label_map=label_map)
        assert np.array_equal(mask.array, labels[::-1, ::-1])
    mask = read_mask(path, image=scan, label_map={1: 1, 2: 0})
    assert np.array_equal(mask.array, (labels == 1)[::-1, ::-1])
    with pytest.raises(CaseError, match="segment 2 'Vessel' has no label"):
        read_mask(path, image=scan, label_map={"organ a": 1})


def test_site_config_maps_segments_by_name(tmp_path: Path) -> None:
    image, labels = arrays(1)
    parts = {"Organ A": labels == 1, "Vessel": labels == 2}
    data = series(tmp_path / "p1", image)
    segmentation(tmp_path / "p1" / "seg.dcm", data, parts)
    config = SiteConfig.model_validate({"label-map": "Organ A:liver,vessel:background"})
    listing, config = site_cases(tmp_path, config)
    mask = read_mask(listing.cases[0].mask, label_map=config.label_map)
    assert set(np.unique(mask.array)) == {0, 1}


def test_segmentation_on_another_grid_or_fractional(tmp_path: Path) -> None:
    image, labels = arrays(1)
    data = series(tmp_path / "ct", image)
    series(tmp_path / "short", image[:, :, :10])
    series(tmp_path / "moved", image, affine=AFFINE + np.array([[0, 0, 0, 0.7]] + [[0] * 4] * 3))
    series(tmp_path / "other", image, affine=AFFINE @ np.diag([2.0, 2, 2, 1]))
    path = segmentation(tmp_path / "seg.dcm", data, {"liver": labels >= 1})
    for folder, words in (
        ("short", "reaches outside its image"),
        ("moved", "affine puts the mask .* mm away"),
        ("other", "affine puts the mask .* mm away"),
    ):
        with pytest.raises(CaseError, match=words):
            read_mask(path, image=read_image(tmp_path / folder))
    path = segmentation(tmp_path / "soft.dcm", data, {"liver": labels >= 1}, kind="FRACTIONAL")
    with pytest.raises(CaseError, match="fractional segments, expected BINARY or LABELMAP"):
        read_mask(path)


def _attribute(name: str, value: object, at: int = 5) -> Callable[[Any, int], None]:
    def change(data: Any, k: int) -> None:
        if k == at or at < 0:
            if value is None:
                delattr(data, name)
            else:
                setattr(data, name, value)

    return change


def _tilt(data: Any, k: int) -> None:
    x, y, z = data.ImagePositionPatient
    data.ImagePositionPatient = [x, y + 0.5 * k, z]


BAD_SERIES: dict[str, tuple[Callable[[Any, int], None], str]] = {
    "two positions alike": (
        _attribute("ImagePositionPatient", [-40, -30, 0]),
        "two slices at one position",
    ),
    "uneven": (
        _attribute("ImagePositionPatient", [-40.0, -30, 4.0]),
        "slices 5 and 6 are 4 mm apart but others 3 mm",
    ),
    "mixed orientation": (
        _attribute("ImageOrientationPatient", [0, 1, 0, 1, 0, 0]),
        "slices with mixed orientations",
    ),
    "mixed pixels": (_attribute("PixelSpacing", [1, 1]), "slices with mixed pixel spacings"),
    "tilt": (_tilt, "gantry tilt: slices shift by 7.5 mm"),
    "mixed sizes": (_attribute("Rows", 16), "slices of 2 sizes"),
    "colour": (_attribute("SamplesPerPixel", 3, -1), "colour images"),
    "no orientation": (
        _attribute("ImageOrientationPatient", [0] * 6, -1),
        "orientation is no two directions",
    ),
    "no position": (_attribute("ImagePositionPatient", None), "can't be read as DICOM"),
    "no spacing": (_attribute("PixelSpacing", None, -1), "can't be read as DICOM"),
    "no pixels": (_attribute("PixelData", None), "can't be read as DICOM"),
    "few pixels": (_attribute("PixelData", bytes(10)), "can't be read as DICOM"),
    "in metres": (_attribute("PixelSpacing", [1e-4, 1e-4], -1), "mm, expected 1 to 3000"),
    "slope is no number": (_attribute("RescaleSlope", 1e300, -1), "NaN or Inf|can't be read"),
    "no modality": (_attribute("Modality", "OT", -1), "0 CT or MR series in it, expected one"),
    "scout": (
        _attribute("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"], -1),
        "0 CT or MR series",
    ),
}


@pytest.mark.parametrize("name", BAD_SERIES)
def test_bad_series_is_one_line(tmp_path: Path, name: str) -> None:
    change, words = BAD_SERIES[name]
    series(tmp_path / "ct", arrays(1)[0], change=change)
    with pytest.raises(CaseError, match=words) as caught:
        read_image(tmp_path / "ct")
    assert caught.value.path == tmp_path / "ct"
    assert re.fullmatch(r"[^\n]+: [^\n]+; [^\n]+", str(caught.value))


def test_missing_slice(tmp_path: Path) -> None:
    series(tmp_path / "ct", arrays(1)[0])
    (tmp_path / "ct" / "007.dcm").unlink()
    with pytest.raises(CaseError, match="slices 7 and 8 are 6 mm apart but others 3 mm"):
        read_image(tmp_path / "ct")


def test_rounded_positions_are_no_gap(tmp_path: Path) -> None:
    def rounded(data: Any, k: int) -> None:
        data.ImagePositionPatient = [-40, -30, round(-12 + 0.625 * k, 2)]

    series(tmp_path / "ct", arrays(1)[0], change=rounded)
    assert read_image(tmp_path / "ct").spacing[2] == pytest.approx(0.625, abs=2e-3)


def test_claims_are_checked_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def huge(data: Any, _: int) -> None:
        data.Rows = data.Columns = 60000

    series(tmp_path / "ct", arrays(1)[0], change=huge)
    with pytest.raises(CaseError, match="16 slices of 60000 x 60000 are over"):
        read_image(tmp_path / "ct")
    data = series(tmp_path / "ok", arrays(1)[0])
    path = segmentation(tmp_path / "seg.dcm", data, {"liver": arrays(1)[1] > 0})
    monkeypatch.setattr(volumes, "MAX_VOXELS", 100)
    with pytest.raises(CaseError, match="over 100 voxels"):
        read_mask(path)


def test_one_slice_no_series_and_no_file(tmp_path: Path) -> None:
    series(tmp_path / "one", arrays(1)[0][:, :, :1])
    with pytest.raises(CaseError, match="one slice is no volume"):
        read_image(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CaseError, match="0 CT or MR series in it, expected one"):
        read_image(tmp_path / "empty")
    with pytest.raises(CaseError, match="no such file; correct the path"):
        read_image(tmp_path / "nowhere")
    for folder in ("a", "b"):
        series(tmp_path / "two" / folder, arrays(1)[0])
    with pytest.raises(CaseError, match="2 CT or MR series in it, expected one"):
        read_image(tmp_path / "two")


def test_a_file_stands_for_its_series(tmp_path: Path) -> None:
    first, second = arrays(0)[0], arrays(1)[0]
    series(tmp_path, first, prefix="a")
    data = series(tmp_path, second, prefix="b")
    seg = segmentation(tmp_path / "seg.dcm", data, {"liver": arrays(1)[1] > 0})
    assert np.array_equal(read_image(tmp_path / "a003.dcm").array, first[::-1, ::-1])
    assert np.array_equal(read_image(tmp_path / "b000.dcm").array, second[::-1, ::-1])
    with pytest.raises(CaseError, match="no CT or MR image"):
        read_image(seg)
    assert len(files_of(tmp_path / "a003.dcm")) == 33


def test_names_without_an_ending(tmp_path: Path) -> None:
    image = arrays(1)[0]
    series(tmp_path, image)
    for path in tmp_path.glob("*.dcm"):
        path.rename(path.with_name(f"IM{path.stem}"))
    (tmp_path / "notes.txt").write_text("no DICOM")
    assert np.array_equal(read_image(tmp_path).array, image[::-1, ::-1])
    assert np.array_equal(read_image(tmp_path / "IM004").array, image[::-1, ::-1])


def test_every_truncation_is_one_line(tmp_path: Path) -> None:
    data = series(tmp_path / "ct", arrays(1)[0])
    seg = segmentation(tmp_path / "seg.dcm", data, {"liver": arrays(1)[1] > 0})
    path = tmp_path / "ct" / "004.dcm"
    whole, whole_seg = path.read_bytes(), seg.read_bytes()
    for length in [*range(0, 1200, 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CaseError) as caught:
            read_image(tmp_path / "ct")
        assert "\n" not in str(caught.value)
    for length in [*range(132, len(whole_seg), 499), len(whole_seg) - 3]:
        seg.write_bytes(whole_seg[:length])
        with pytest.raises(CaseError) as caught:
            read_mask(seg)
        assert "\n" not in str(caught.value)


@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
@given(st.lists(st.tuples(st.integers(132, 1500), st.integers(0, 255)), min_size=1, max_size=4))
def test_spoilt_bytes_never_end_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("spoilt")
    image, labels = arrays(1)
    data = series(folder / "ct", image[:, :, 4:8])
    seg = segmentation(folder / "seg.dcm", data, {"liver": labels[:, :, 4:8] > 0})
    for path, read in ((folder / "ct" / "001.dcm", read_image), (seg, read_mask)):
        content = bytearray(path.read_bytes())
        for at, value in changes:
            content[at] = value
        path.write_bytes(content)
        try:
            read(folder / "ct" if read is read_image else path)
        except CaseError as error:
            assert "\n" not in str(error)


def test_compressed_series(tmp_path: Path) -> None:
    from pydicom.uid import RLELossless

    image = arrays(1)[0]
    series(tmp_path / "rle", image, change=lambda data, _: data.compress(RLELossless))
    assert np.array_equal(read_image(tmp_path / "rle").array, image[::-1, ::-1])

    def unknown(data: Any, _: int) -> None:
        data.compress(RLELossless)
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.57"

    series(tmp_path / "jpeg", image, change=unknown)
    with pytest.raises(CaseError, match=r"needs a codec; pip install 'highdicom\[libjpeg\]'"):
        read_image(tmp_path / "jpeg")


def test_enhanced_multi_frame_series(tmp_path: Path) -> None:
    from highdicom.legacy import LegacyConvertedEnhancedCTImage

    image = arrays(1)[0]
    data = series(tmp_path / "ct", image)
    frames = LegacyConvertedEnhancedCTImage(
        data,
        series_instance_uid="1.2.3.4",
        series_number=9,
        sop_instance_uid="1.2.3.5",
        instance_number=1,
    )
    (tmp_path / "enhanced").mkdir()
    frames.save_as(tmp_path / "enhanced" / "all.dcm")
    scan = read_image(tmp_path / "enhanced")
    assert np.array_equal(scan.array, image[::-1, ::-1])
    assert np.allclose(scan.stored_affine, AFFINE)


# The layout: which series and masks belong together.
def case(root: Path, name: str, seed: int = 1) -> tuple[list[Any], np.ndarray]:
    image, labels = arrays(seed)
    return series(root / name / "ct", image), labels


def test_segmentation_picks_its_series(tmp_path: Path) -> None:
    first, labels = case(tmp_path, "p1")
    second = series(tmp_path / "p1" / "late", arrays(0)[0])
    series(tmp_path / "p1" / "late", arrays(2)[0], prefix="x")
    series(tmp_path / "p1" / "scout", arrays(0)[0][:, :, :1], change=BAD_SERIES["scout"][0])
    segmentation(tmp_path / "p1" / "deep" / "a.dcm", second, {"liver": arrays(0)[1] > 0})
    listing = find_cases(tmp_path)
    assert (listing.layout, listing.problems) == ("dicom", ())
    assert len(listing.cases) == 1
    assert np.array_equal(read_image(listing.cases[0].image).array, arrays(0)[0][::-1, ::-1])
    segmentation(tmp_path / "p1" / "b.dcm", first, {"liver": labels > 0})
    assert len(find_cases(tmp_path).cases) == 2


def test_what_cannot_be_paired_is_named(tmp_path: Path) -> None:
    labels = arrays(1)[1]
    parts = {"liver": labels > 0}
    data, _ = case(tmp_path, "good")
    nifti(tmp_path / "good" / "mask.nii.gz", labels)
    case(tmp_path, "bare")
    case(tmp_path, "foreign")
    segmentation(tmp_path / "foreign" / "seg.dcm", data, parts)
    (tmp_path / "noimage").mkdir()
    segmentation(tmp_path / "noimage" / "seg.dcm", data, parts)
    twice, _ = case(tmp_path, "twice")
    for name in "ab":
        segmentation(tmp_path / "twice" / f"{name}.dcm", twice, parts)
    case(tmp_path, "both")
    nifti(tmp_path / "both" / "mask.nii", labels)
    nifti(tmp_path / "masks" / "both_seg.nii.gz", labels)
    case(tmp_path, "two")
    series(tmp_path / "two" / "late", arrays(0)[0])
    nifti(tmp_path / "masks" / "two.nii.gz", labels)
    case(tmp_path, "cut")
    path = tmp_path / "cut" / "ct" / "003.dcm"
    path.write_bytes(path.read_bytes()[:150])
    nifti(tmp_path / "masks" / "orphan.nii.gz", labels)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")

    listing = find_cases(tmp_path)
    assert [item.image.name for item in listing.cases] == ["good"]
    expected = {
        "bare": "no DICOM-SEG, mask.nii.gz or masks/bare.nii.gz",
        "foreign/seg.dcm": "was drawn on a series that isn't in foreign/",
        "noimage": "no CT or MR series in it",
        "twice/b.dcm": "2 DICOM-SEG of one series (a.dcm and b.dcm)",
        "both": "2 masks (mask.nii and both_seg.nii.gz); expected one",
        "two": "2 series for one NIfTI mask",
        "cut/ct/003.dcm": "damaged DICOM",
        "masks/orphan.nii.gz": "no folder orphan/",
    }
    assert len(listing.problems) == len(expected)
    for file, words in expected.items():
        assert any(p.startswith(f"{tmp_path / file}: {words}") for p in listing.problems), file


def test_cache_identity_follows_every_slice(tmp_path: Path) -> None:
    case(tmp_path, "p1")
    assert len(files_of(tmp_path / "p1")) == 16
    assert files_of(tmp_path / "p1" / "ct" / "003.dcm")[3].name == "003.dcm"
    assert files_of(tmp_path / "a.nii.gz") == [tmp_path / "a.nii.gz"]


def test_without_the_extra_there_is_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, labels = case(tmp_path, "p1")
    seg = segmentation(tmp_path / "p1" / "seg.dcm", data, {"liver": labels > 0})
    dicom_series._header.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] in ("pydicom", "highdicom")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    hint = r"DICOM needs an extra package; pip install 'fedseg\[dicom\]'"
    with pytest.raises(DataError, match=hint):
        find_cases(tmp_path)
    with pytest.raises(CaseError, match=hint):
        read_image(tmp_path / "p1")
    with pytest.raises(CaseError, match=hint):
        read_mask(seg)
    with pytest.raises(ConfigError, match="layout: got 'pydicom_layout:f'"):
        find_cases(tmp_path, layout="pydicom_layout:f")


def test_predict_writes_one_mask_a_series(tmp_path: Path) -> None:
    study = StudyConfig.from_run_config(
        {"model.width": 2, "model.depth": 2, "train.patch-size": "16,16,16"}
    )
    plan = make_plan(study)
    for name in ("p1", "p2"):
        case(tmp_path / "scans", name)
    results = predict_files(
        build_model(plan, seed=0),
        plan,
        scans_of([tmp_path / "scans"]),
        tmp_path / "out",
        device=torch.device("cpu"),
    )
    assert [result.problem for result in results] == [None, None]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "p1.nii.gz",
        "p2.nii.gz",
        "volumes.csv",
    ]
    scan = read_image(tmp_path / "scans" / "p1")
    assert read_mask(tmp_path / "out" / "p1.nii.gz", image=scan).array.shape == scan.array.shape


def test_predict_takes_folders_of_series(tmp_path: Path) -> None:
    case(tmp_path, "p1")
    case(tmp_path, "p2")
    assert scans_of([tmp_path]) == [tmp_path / "p1", tmp_path / "p2"]
    assert scans_of([tmp_path / "p1" / "ct"]) == [tmp_path / "p1" / "ct"]
    one = tmp_path / "p1" / "ct" / "000.dcm"
    assert scans_of([one]) == [one]
    (tmp_path / "x.txt").touch()
    with pytest.raises(DataError, match="and no DICOM; convert it"):
        scans_of([tmp_path / "x.txt"])


def test_files_of_one_series_are_one_scan(tmp_path: Path) -> None:
    """`fedseg predict SERIES/*.dcm` names each slice."""

    def scout(data: Any, _: int) -> None:
        data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        data.SeriesInstanceUID = uid

    uid = series(tmp_path / "p1", arrays(1)[0], prefix="b")[0].SeriesInstanceUID
    series(tmp_path / "p1", arrays(1)[0][:, :, :1], prefix="a", change=scout)
    series(tmp_path / "p1", arrays(2)[0], prefix="c")
    shutil.copytree(tmp_path / "p1", tmp_path / "p2")
    (tmp_path / "p1" / "d000.dcm").write_bytes(bytes(128) + b"DICM and nothing")
    nifti(tmp_path / "p1" / "e.nii", arrays(1)[0])
    found = scans_of([*sorted((tmp_path / "p1").iterdir()), *sorted((tmp_path / "p2").iterdir())])
    first = [f"p1/{name}" for name in ("a000.dcm", "b000.dcm", "c000.dcm", "d000.dcm", "e.nii")]
    expected = [*first, "p2/a000.dcm", "p2/b000.dcm", "p2/c000.dcm"]
    assert [str(path.relative_to(tmp_path)) for path in found] == expected
    image = read_image(found[1]).array
    assert np.array_equal(image, arrays(1)[0][::-1, ::-1])
    assert np.array_equal(image, read_image(tmp_path / "p2" / "b003.dcm").array)
