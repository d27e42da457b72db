"""Whatever the bytes of a site's folder are, `check` says it in findings or one line, and soon."""

import functools
import gzip
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedseg.data.checks.check import check_folder
from fedseg.data.phantom import KINDS, make_phantom
from fedseg.errors import FedSegError
from fedseg.site_config import load_site_config

FEW, MANY = 300, 1700
LIMIT_MS = 5000

FIELDS = nib.Nifti1Header().structarr.dtype
NUMBERS = [name for name in FIELDS.names if FIELDS[name].base.kind in "iuf"]
TEXTS = [name for name in FIELDS.names if FIELDS[name].base.kind == "S"]

SITE_TOML = (
    b'name = "aachen"\nlayout = "auto"\nlabels = ["liver", "tumor"]\nmodality = "ct"\n'
    b'label-map = {"1" = 1, "2" = 2}\ncache-dir = "/tmp/x"\n[policy]\nmin-cases = 2\n'
)
DATASET_JSON = json.dumps(
    {
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "modality": {"0": "CT"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        "file_ending": ".nii.gz",
    }
).encode()

Files = dict[str, bytes]


@functools.cache
def valid() -> tuple[bytes, bytes]:
    """Image and mask of a small phantom, as .nii."""
    phantom = make_phantom(KINDS["portal"], 0)
    every = (slice(None, None, 5),) * 3
    affine = phantom.affine @ np.diag([5, 5, 5, 1])
    image, mask = (
        nib.Nifti1Image(np.ascontiguousarray(array[every]), affine).to_bytes()
        for array in (phantom.image, phantom.mask)
    )
    return image, mask


def packed(image: bytes, mask: bytes) -> Files:
    return {
        "images/a.nii.gz": gzip.compress(image, 1, mtime=0),
        "masks/a.nii.gz": gzip.compress(mask, 1, mtime=0),
    }


def check(root: Path) -> None:
    """Check as the command line does; only findings and one-line errors may come out."""
    try:
        report = check_folder(root, load_site_config({}, folder=root))
    except FedSegError as error:
        assert "\n" not in str(error), str(error)
        return
    assert json.loads(json.dumps(report.to_json()))["cases"] == report.cases
    assert report.usable <= report.cases
    for finding in report.findings:
        assert "\n" not in str(finding), str(finding)
        assert all(vars(finding)[key] for key in ("file", "what", "got", "expected", "mend"))


@st.composite
def spoilt(draw: st.DrawFn, content: bytes, *, most: int = 8) -> bytes:
    """Change, cut, repeat or replace bytes, more often near the start, where the headers are."""
    kind = draw(st.sampled_from(["bytes", "bytes", "bytes", "cut", "insert", "repeat", "random"]))
    if kind == "random":
        return draw(st.binary(max_size=600))
    near = min(360, len(content) - 1)
    place = st.one_of(st.integers(0, near), st.integers(0, len(content) - 1))
    if kind == "cut":
        return content[: draw(place)]
    if kind == "insert":
        start = draw(place)
        return content[:start] + draw(st.binary(min_size=1, max_size=16)) + content[start:]
    if kind == "repeat":
        start, end = sorted((draw(place), draw(place)))
        return content[:end] + content[start:]
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        changed[draw(place)] = draw(st.integers(0, 255))
    return bytes(changed)


@st.composite
def odd_header(draw: st.DrawFn, content: bytes) -> bytes:
    """Set up to three header fields to values that nobody would expect."""
    header = nib.Nifti1Header(content[:348], check=False).structarr.copy()
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 9)) == 0:
            header[draw(st.sampled_from(TEXTS))] = draw(st.binary(max_size=80))
            continue
        name = draw(st.sampled_from(NUMBERS))
        kind = FIELDS[name].base
        if kind.kind == "f":
            value = st.one_of(
                st.sampled_from([0, -1, 1e-30, 1e30, 3e38, np.nan, np.inf, -np.inf]),
                st.floats(-1e4, 1e4, width=32),
            )
        else:
            low, high = np.iinfo(kind).min, np.iinfo(kind).max
            value = st.one_of(
                st.sampled_from([0, 1, low, high]), st.integers(low, high), st.integers(0, 9)
            )
        shape = FIELDS[name].shape
        index = (draw(st.integers(0, shape[0] - 1)),) if shape else ()
        header[name][index] = draw(value)
    return header.tobytes() + content[348:]


@st.composite
def folders(draw: st.DrawFn) -> Files:
    """A site's folder with one thing spoilt: a header, bytes, packed bytes or a text file."""
    image, mask = valid()
    kind = draw(st.sampled_from(["header", "header", "bytes", "plain", "packed", "text", "msd"]))
    at = draw(st.integers(0, 1))
    if kind in ("header", "bytes", "plain"):
        spoil = odd_header if kind == "header" else spoilt
        pair = [image, mask]
        pair[at] = draw(spoil(pair[at]))
        if kind == "plain":
            return {"images/a.nii": pair[0], "masks/a.nii": pair[1]}
        return packed(*pair)
    files = packed(image, mask)
    if kind == "packed":
        name = [*files][at]
        return {**files, name: draw(spoilt(files[name]))}
    if kind == "text":
        return {**files, "site.toml": draw(spoilt(SITE_TOML))}
    names = ("imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    return {
        **dict(zip(names, files.values(), strict=True)),
        "dataset.json": draw(spoilt(DATASET_JSON)),
        "site.toml": b'layout = "msd"\n' if at else b"",
    }


def check_files(files: Files, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    check(folder)


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=LIMIT_MS,
        derandomize=True,
        database=None,
        suppress_health_check=[*HealthCheck],
    )


def test_the_valid_files_are_valid(tmp_path: Path) -> None:
    check_files(packed(*valid()), tmp_path)
    assert check_folder(tmp_path).usable == 1


@examples(FEW)
@given(files=folders())
def test_spoilt_folders(tmp_path_factory: pytest.TempPathFactory, files: Files) -> None:
    check_files(files, tmp_path_factory.getbasetemp() / "fuzz")


@pytest.mark.slow
@examples(MANY)
@given(files=folders())
def test_many_spoilt_folders(tmp_path_factory: pytest.TempPathFactory, files: Files) -> None:
    check_files(files, tmp_path_factory.getbasetemp() / "fuzz-many")
