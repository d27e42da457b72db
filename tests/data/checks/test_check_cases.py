"""Tests of what `check` says of cases that can be read: one spoilt thing, one warning."""

import gzip
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Extension

from fedseg.data.checks import check as check_module
from fedseg.data.checks.check import check_folder
from fedseg.data.checks.findings import Finding
from fedseg.data.checks.identifiers import identifying_fields
from fedseg.data.phantom import KINDS, make_phantom
from fedseg.data.volumes import Volume
from fedseg.site_config import SiteConfig

STEP = 3
IMAGE, MASK, AFFINE = (
    lambda p: (p.image[::STEP, ::STEP, ::STEP], p.mask[::STEP, ::STEP, ::STEP], p.affine)
)(make_phantom(KINDS["portal"], 0))
AFFINE = AFFINE @ np.diag([STEP, STEP, STEP, 1])
LPS = np.diag([-1.0, -1, 1, 1])

Header = Callable[[nib.Nifti1Header], object]


def write(
    root: Path,
    *,
    name: str = "a",
    image: np.ndarray = IMAGE,
    mask: np.ndarray = MASK,
    affine: np.ndarray = AFFINE,
    header: Header = lambda header: None,
    kind: type = nib.Nifti1Image,
) -> None:
    for folder, array in (("images", image), ("masks", mask)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        nifti = kind(np.ascontiguousarray(array), affine)
        if folder == "images":
            header(nifti.header)
        nib.save(nifti, root / folder / f"{name}.nii.gz")


def found(root: Path, **config: object) -> list[Finding]:
    return list(check_folder(root, SiteConfig.model_validate(config)).findings)


def one(root: Path, **config: object) -> Finding:
    (finding,) = found(root, **config)
    assert "\n" not in str(finding)
    assert finding.got and finding.expected and finding.mend
    return finding


def moved(mask: np.ndarray, label: int, corner: tuple[int, int, int], size: int) -> np.ndarray:
    """A mask with a cube of a label more."""
    more = mask.copy()
    more[tuple(slice(start, start + size) for start in corner)] = label
    return more


def grown(mask: np.ndarray) -> np.ndarray:
    """A liver that ends with the last slice."""
    more = mask.copy()
    more[:, :, 12:][(mask == 1).any(axis=2)] = 1
    return more


def disagreeing(header: nib.Nifti1Header) -> None:
    header.set_qform(LPS @ AFFINE, 1)
    header.set_sform(AFFINE, 1)


SCALED = (IMAGE.astype(np.float32) + 1024) / 4095
MILLIMETRE = np.diag([1.0, 1, 1, 1])
OUTSIDE = next(tuple(int(i) for i in c) for c in np.argwhere(MASK == 0) if c.min() > 1)
TILT = np.eye(4)
TILT[:2, :2] = [[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]]

# What is spoilt, the check that finds it, and words of what it got.
WARNINGS: dict[str, tuple[dict[str, object], str, str]] = {
    "empty": ({"mask": MASK * 0}, "empty mask", "no labelled voxel"),
    "two livers": ({"mask": moved(MASK, 1, OUTSIDE, 3)}, "liver in pieces", "2 pieces of"),
    "tumor outside": (
        {"mask": moved(np.minimum(MASK, 1), 2, OUTSIDE, 2)},
        "tumor outside the liver",
        "1 of 1 tumors",
    ),
    "small": ({"affine": AFFINE * 0.4}, "liver's volume", " mL"),
    "8-bit": (
        {"image": np.clip((IMAGE + 150) * 255 / 400, 0, 255).astype(np.uint8)},
        "intensity",
        "8-bit",
    ),
    "0 to 1": ({"image": SCALED}, "intensity", "rescaled"),
    "all positive": ({"image": IMAGE + np.int16(1024)}, "intensity", "no air"),
    "window": ({"image": np.clip(IMAGE, -150, 250)}, "intensity", "cut to a window"),
    "constant": ({"image": IMAGE * 0}, "intensity", "0 everywhere"),
    "not HU": ({"image": IMAGE * np.int16(4)}, "liver's intensity", "median 5"),
    "1 mm": ({"affine": MILLIMETRE}, "voxel size", "exactly 1 mm"),
    "thick": ({"affine": AFFINE @ np.diag([1, 1, 1.5, 1])}, "voxel size", "13.5 mm"),
    "two geometries": ({"header": disagreeing}, "orientation", "qform and sform"),
    "mask left-right": ({"mask": MASK[::-1]}, "flipped mask", "flipped left-right"),
    "mask up-down": ({"mask": MASK[:, :, ::-1]}, "flipped mask", "flipped up-down"),
    "image front-back": ({"image": IMAGE[:, ::-1]}, "flipped mask", "flipped front-back"),
    "mask LPS": ({"mask": MASK[::-1, ::-1]}, "flipped mask", "left-right and front-back"),
    "affine LPS": ({"affine": LPS @ AFFINE}, "orientation", "turned left-right and front-back"),
    "affine left-right": (
        {"affine": np.diag([-1.0, 1, 1, 1]) @ AFFINE},
        "orientation",
        "turned left-right",
    ),
    "affine up-down": (
        {"affine": np.diag([1.0, 1, -1, 1]) @ AFFINE},
        "orientation",
        "turned up-down",
    ),
}


@pytest.mark.parametrize("kind", WARNINGS)
def test_a_spoilt_case_is_found(tmp_path: Path, kind: str) -> None:
    changes, what, words = WARNINGS[kind]
    write(tmp_path, **changes)  # type: ignore[arg-type]
    findings = [f for f in found(tmp_path) if f.severity == "warning"]
    named = [f for f in findings if f.what == what]
    assert len(named) == 1, [str(f) for f in findings]
    assert words in named[0].got
    assert "\n" not in str(named[0])
    assert named[0].case == "a"


@pytest.mark.parametrize("kind", [*KINDS])
def test_good_cases_of_all_kinds_are_clean(tmp_path: Path, kind: str) -> None:
    phantom = make_phantom(KINDS[kind], 0)
    write(tmp_path, image=phantom.image, mask=phantom.mask, affine=phantom.affine)
    assert not found(tmp_path)


def test_what_cannot_be_mended_is_a_note(tmp_path: Path) -> None:
    write(tmp_path, mask=grown(MASK))
    note = next(f for f in found(tmp_path) if f.what == "truncated field of view")
    assert note.severity == "note"
    assert "(top)" in note.got
    write(tmp_path, affine=TILT @ AFFINE)
    assert one(tmp_path).severity == "note"
    assert "29 degrees" in one(tmp_path).got
    assert check_folder(tmp_path).clean


def test_a_header_without_geometry(tmp_path: Path) -> None:
    write(tmp_path)
    for path in tmp_path.rglob("*.nii.gz"):
        content = bytearray(gzip.decompress(path.read_bytes()))
        content[252:256] = bytes(4)  # qform_code, sform_code
        path.write_bytes(gzip.compress(content))
    warnings = [f.got for f in found(tmp_path) if f.what == "orientation"]
    assert "neither qform nor sform" in warnings


def test_a_mask_outside_the_body(tmp_path: Path) -> None:
    mask = np.zeros_like(MASK)
    mask[1:5, 1:5, 1:20] = 1
    write(tmp_path, mask=mask)
    assert "mask outside the body" in [f.what for f in found(tmp_path)]


def test_the_site_config_counts(tmp_path: Path) -> None:
    write(tmp_path)
    assert "tumor (2)" in one(tmp_path, labels=["liver"]).got
    write(tmp_path, mask=np.minimum(MASK, 1))
    assert not found(tmp_path, labels=["liver"])
    note = one(tmp_path)
    assert (note.severity, note.case, note.got) == ("note", "", "no tumor in any case")
    assert "MR, as site.toml says" in one(tmp_path, modality="mr", labels=["liver"]).expected
    write(tmp_path, image=SCALED)
    assert not found(tmp_path, modality="mr")
    write(tmp_path, image=np.clip(IMAGE, -150, 3000))
    assert "no air" in {f.got.split(": ")[-1] for f in found(tmp_path, modality="ct")}


def test_duplicates_are_found_whatever_their_file_is_like(tmp_path: Path) -> None:
    write(tmp_path, name="a")
    write(tmp_path, name="b", image=IMAGE + np.int16(1))
    write(tmp_path, name="c", image=IMAGE.astype(np.float32), affine=AFFINE @ np.diag([1, 1, 2, 1]))
    flipped = (IMAGE[::-1], MASK[::-1], np.diag([-1.0, 1, 1, 1]) @ AFFINE)
    write(tmp_path, name="d", image=flipped[0], mask=flipped[1], affine=flipped[2])
    twice = [f for f in found(tmp_path) if f.what == "duplicate image"]
    assert [(f.case, f.got) for f in twice] == [
        ("c", "the voxels of case a"),
        ("d", "the voxels of case a"),
    ]


def test_mixed_orientations_and_modalities_are_noted(tmp_path: Path) -> None:
    write(tmp_path, name="a")
    write(tmp_path, name="b", image=np.clip(IMAGE, 0, None) * 2 + np.int16(7))
    write(
        tmp_path, name="c", image=IMAGE[::-1, ::-1] + 1, mask=MASK[::-1, ::-1], affine=LPS @ AFFINE
    )
    notes = {f.what: f.got for f in found(tmp_path) if f.severity == "note"}
    assert notes == {"orientation": "1 of LPS, 2 of RAS", "modality": "2 of ct, 1 of mr"}


def test_text_that_could_name_a_patient_is_found_and_not_repeated(tmp_path: Path) -> None:
    def named(header: nib.Nifti1Header) -> None:
        header["descrip"] = b"Meyer^Anna 1961-02-03"
        header["intent_name"] = b"0815-4711"
        header.extensions.append(Nifti1Extension("comment", b"Anna"))

    write(tmp_path, header=named)
    finding = one(tmp_path)
    assert finding.what == "patient's identity"
    assert finding.got == "text in descrip, intent_name, extension comment"
    assert not any(word in str(finding) for word in ("Meyer", "1961", "0815", "Anna"))


def test_nifti_2_is_checked_as_nifti_1_is(tmp_path: Path) -> None:
    """It has no db_name."""

    def named(header: nib.Nifti1Header) -> None:
        header["descrip"] = b"Meyer^Anna 1961-02-03"

    write(tmp_path, kind=nib.Nifti2Image)
    assert found(tmp_path) == []
    write(tmp_path, kind=nib.Nifti2Image, header=named)
    assert one(tmp_path).got == "text in descrip"


def test_dicom_tags_that_name_a_patient(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    slice_ = pydicom.dataset.Dataset()
    slice_.file_meta = meta
    slice_.PatientName, slice_.PatientID, slice_.AccessionNumber = "Meyer^Anna", "ANON_01", ""
    volume = Volume(
        array=IMAGE,
        spacing=(1, 1, 1),
        stored=None,
        stored_shape=IMAGE.shape,
        stored_affine=AFFINE,
        path=tmp_path,
    )
    slice_.save_as(tmp_path / "1", enforce_file_format=True)
    assert identifying_fields(volume) == ["PatientName"]
    slice_.PatientIdentityRemoved = "YES"
    slice_.save_as(tmp_path / "1", enforce_file_format=True)
    assert identifying_fields(volume) == []


@pytest.mark.parametrize(
    "text",
    [
        "fedseg",
        "FSL5.0",
        "6.0.5:9e026117",
        "TE=2.3;Time=120000.000;phase=1",
        "SPM12",
        "NiBabel 5.3",
    ],
)
def test_marks_of_programs_are_harmless(tmp_path: Path, text: str) -> None:
    def marked(header: nib.Nifti1Header) -> None:
        header["descrip"] = text.encode()

    write(tmp_path, header=marked)
    assert not found(tmp_path)


def test_short_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    usage = namedtuple("usage", "free")
    asked: list[Path] = []

    def disk_usage(path: Path) -> object:
        asked.append(path)
        return usage(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    finding = one(tmp_path, **{"cache-dir": str(tmp_path / "not" / "there")})
    assert asked == [tmp_path]
    assert (finding.case, finding.file) == ("", str(tmp_path / "not" / "there"))
    assert "1e-06 GB free" in finding.got
    needed = float(finding.expected.split(" GB")[0]) * 1e9
    assert IMAGE.size < needed - 320_000 < 4.01 * IMAGE.size


def test_cases_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        folder = tmp_path / "derivatives" / "d" / f"sub-{patient}"
        image = tmp_path / f"sub-{patient}" / "anat"
        for place in (folder, image):
            place.mkdir(parents=True)
        nib.save(nib.Nifti1Image(IMAGE * 0, AFFINE), image / f"sub-{patient}_ct.nii.gz")
        nib.save(nib.Nifti1Image(MASK, AFFINE), folder / f"sub-{patient}_dseg.nii.gz")
    names = {f.case for f in found(tmp_path, layout="bids")}
    assert len(names - {""}) == 2


def test_each_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write(tmp_path, name=name)
    read: list[str] = []

    def counted(kind: str) -> Callable[..., object]:
        real = getattr(check_module, kind)

        def call(path: Path, **rest: object) -> object:
            read.append(os.fspath(path.relative_to(tmp_path)))
            return real(path, **rest)

        return call

    for kind in ("read_image", "read_mask"):
        monkeypatch.setattr(check_module, kind, counted(kind))
    found(tmp_path)
    assert read == [f"{kind}/{name}.nii.gz" for name in "ab" for kind in ("images", "masks")]
