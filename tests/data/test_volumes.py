"""Tests of reading and writing NIfTI: against nibabel, with bad files, and by mutation."""

import contextlib
import gzip
import logging
import os
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, inv_ornt_aff

from fedseg.data.volumes import read_image, read_mask, write_mask
from fedseg.errors import CaseError

AFFINE = np.array([[1.5, 0.1, 0, -40], [-0.1, 2, 0, 30], [0, 0, 3, 12], [0, 0, 0, 1.0]])
ORIENTATIONS = [
    np.array(list(zip(axes, flips, strict=True)))
    for axes in permutations(range(3))
    for flips in product((1, -1), repeat=3)
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Nibabel reports on its own log what is odd about a header."""
    logger = logging.getLogger("nibabel.global")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def save(
    path: Path, array: np.ndarray, affine: np.ndarray = AFFINE, kind: type = nib.Nifti1Image
) -> Path:
    nib.save(kind(array, affine), path)
    return path


def reoriented(array: np.ndarray, orientation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same volume stored with other axes."""
    stored = apply_orientation(array, orientation)
    return np.ascontiguousarray(stored), AFFINE @ inv_ornt_aff(orientation, array.shape)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=lambda o: "".join(map(str, o.ravel())))
def test_all_48_orientations_are_read_as_ras_and_written_back(
    tmp_path: Path, orientation: np.ndarray, kind: type
) -> None:
    rng = np.random.default_rng(0)
    scan = rng.integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    labels = rng.integers(0, 3, (4, 5, 6)).astype(np.uint8)
    stored, affine = reoriented(scan, orientation)
    path = save(tmp_path / "scan.nii", stored, affine, kind)
    mask_path = save(tmp_path / "mask.nii.gz", reoriented(labels, orientation)[0], affine, kind)

    image = read_image(path)
    canonical = nib.as_closest_canonical(nib.load(path))
    assert image.array.dtype == np.float32
    assert np.array_equal(image.array, canonical.get_fdata())
    assert np.array_equal(image.array, scan)
    assert np.allclose(image.spacing, canonical.header.get_zooms(), atol=1e-5)
    assert np.array_equal(read_mask(mask_path, image=image).array, labels)

    written = tmp_path / "written.nii.gz"
    write_mask(written, labels, image)
    back = nib.load(written)
    assert type(back) is kind
    assert back.shape == stored.shape
    assert np.array_equal(back.affine, nib.load(path).affine)
    assert back.get_data_dtype() == np.uint8
    assert np.array_equal(np.asanyarray(back.dataobj), reoriented(labels, orientation)[0])
    assert np.array_equal(read_mask(written, image=image).array, labels)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_number_formats(tmp_path: Path, ending: str, dtype: type) -> None:
    values = np.arange(60).reshape(3, 4, 5)
    image = read_image(save(tmp_path / f"scan{ending}", values.astype(dtype)))
    assert np.array_equal(image.array, values)


@pytest.mark.parametrize("scale", [(1, 0), (0.37, -1024.5), (2, 0), (1, 7), (1e-3, 1e30)])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u1", "<i4", "<f4", ">f8"])
def test_scaled_values_are_those_of_nibabel(
    tmp_path: Path, dtype: str, scale: tuple[float, float]
) -> None:
    values = np.random.default_rng(0).integers(0, 250, (5, 6, 7)).astype(dtype)
    stored = nib.Nifti1Image(values, AFFINE, nib.Nifti1Header(endianness=dtype[0]))
    stored.header.set_data_dtype(dtype)
    content = bytearray(stored.to_bytes())
    content[112:120] = np.array(scale, f"{dtype[0]}f4").tobytes()  # scl_slope, scl_inter
    path = tmp_path / "scan.nii"
    path.write_bytes(content)
    expected = nib.load(path).get_fdata(dtype=np.float32)
    assert scale == (1, 0) or not np.array_equal(expected, values)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(expected, AFFINE)).get_fdata()
    assert np.array_equal(read_image(path).array, canonical)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_reading_holds_the_file_and_one_float32_copy(tmp_path: Path, ending: str) -> None:
    values = np.random.default_rng(0).integers(-1000, 1000, (80, 70, 60)).astype(np.int16)
    stored = nib.Nifti1Image(values, np.diag([-1, -1, 1, 1]))
    stored.header.set_slope_inter(2, -1024)
    nib.save(stored, tmp_path / f"scan{ending}")
    tracemalloc.start()
    try:
        read_image(tmp_path / f"scan{ending}")
        assert tracemalloc.get_traced_memory()[1] < 1.35 * (2 + 4) * values.size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_slope_and_intercept_apply_to_the_scan_and_not_to_its_mask(
    tmp_path: Path, ending: str
) -> None:
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    stored = nib.Nifti1Image(values, AFFINE)
    stored.header.set_slope_inter(2, -1024)
    stored.header["cal_max"] = 400
    path = tmp_path / f"scan{ending}"
    nib.save(stored, path)
    image = read_image(path)
    assert np.array_equal(image.array, 2.0 * values - 1024)
    labels = (values % 3).astype(np.uint8)
    write_mask(tmp_path / "mask.nii.gz", labels, image)
    written = nib.load(tmp_path / "mask.nii.gz")
    assert np.array_equal(written.get_fdata(), labels)
    assert float(written.header["cal_max"]) == 0


@pytest.mark.parametrize(("kind", "header"), [(nib.Nifti1Image, 352), (nib.Nifti2Image, 544)])
def test_mask_of_a_scan_tells_nothing_that_its_header_tells(
    tmp_path: Path, kind: type, header: int
) -> None:
    stored = kind(np.zeros((3, 4, 5), np.int16), AFFINE)
    for field in {"descrip", "aux_file", "db_name", "intent_name"}.intersection(stored.header):
        stored.header[field] = b"Erika Muster"
    stored.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Erika Muster 1970"))
    nib.save(stored, tmp_path / "scan.nii")
    assert b"Erika" in (tmp_path / "scan.nii").read_bytes()
    image = read_image(tmp_path / "scan.nii")
    write_mask(tmp_path / "mask.nii", np.ones((3, 4, 5), np.uint8), image)
    content = (tmp_path / "mask.nii").read_bytes()
    assert b"Erika" not in content
    assert len(content) == header + 60


def test_qform_scan_gets_a_mask_with_the_same_affine(tmp_path: Path) -> None:
    stored = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), None)
    angle = np.deg2rad(20)
    turned = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    stored.set_sform(None, 0)
    stored.set_qform(nib.affines.from_matvec(turned @ np.diag([2, 2, 5.0]), [1, 2, 3]), 1)
    nib.save(stored, tmp_path / "scan.nii")
    image = read_image(tmp_path / "scan.nii")
    assert image.spacing == pytest.approx((2, 2, 5))
    write_mask(tmp_path / "mask.nii", np.ones((4, 4, 4), np.uint8), image)
    written = nib.load(tmp_path / "mask.nii")
    assert np.array_equal(written.affine, nib.load(tmp_path / "scan.nii").affine)


def test_write_that_fails_keeps_the_old_mask_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = read_image(save(tmp_path / "scan.nii", np.zeros((3, 4, 5), np.int16)))
    target = tmp_path / "mask.nii"
    target.write_bytes(b"old")

    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_mask(target, np.ones((3, 4, 5), np.uint8), image)
    assert target.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mask.nii", "scan.nii"]


def sheared(degrees: float) -> np.ndarray:
    """An affine with tilted slices of 2 mm."""
    affine = np.diag([1.0, 1, 2, 1])
    affine[1, 2] = 2 * np.tan(np.radians(degrees))
    return affine


def test_a_scan_may_lie_oblique_and_its_axes_be_rounded(tmp_path: Path) -> None:
    """Voxels are measured by their edges: that is right at right angles alone."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0].round(3)
        affine = nib.affines.from_matvec(turn @ np.diag([0.7, 0.8, 5]), [1, 2, 3])
        volume = read_image(save(tmp_path / "scan.nii", np.zeros((9, 9, 9), np.int16), affine))
        true = abs(np.linalg.det(affine[:3, :3]))
        assert np.prod(volume.spacing) == pytest.approx(true, rel=1e-3)
    read_image(save(tmp_path / "scan.nii", np.zeros((9, 9, 9), np.int16), sheared(0.9)))
    with pytest.raises(CaseError, match="sheared"):
        read_image(save(tmp_path / "scan.nii", np.zeros((9, 9, 9), np.int16), sheared(1.1)))


# What is wrong with a scan, and a word that the error must have. The functions write the file.
def _whole(folder: Path) -> bytes:
    values = np.random.default_rng(0).integers(-1000, 1000, (20, 20, 20))
    return save(folder / "whole.nii", values.astype(np.int16)).read_bytes()


def _claim(folder: Path, side: int) -> bytes:
    header = nib.Nifti1Header()
    header.set_data_shape((side, side, side))
    header.set_data_dtype(np.float64)
    header.set_sform(np.diag([0.05, 0.05, 0.05, 1]), 1)
    header["magic"] = b"n+1"
    header["vox_offset"] = 352
    return header.binaryblock + bytes(4 + 1000)


def _singular(path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4))
    image.header.set_sform(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), 1)
    path.write_bytes(image.header.binaryblock + bytes(4 + 128))


def _rgb(path: Path) -> None:
    save(path, np.zeros((4, 4, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])))


def _analyze(path: Path) -> None:
    path.write_bytes(nib.Spm2AnalyzeHeader().binaryblock)


def _filled(value: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        array = np.zeros((4, 5, 6), np.float32)
        array[1, 2, 3] = value
        save(path, array)

    return write


def _holding(content: Callable[[Path], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content(path.parent)) and None


BAD_SCANS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("a.nii", lambda path: None, "no such file"),
    "folder": ("a.nii.gz", lambda path: path.mkdir(), "no such file"),
    "dangling link": ("a.nii", lambda path: path.symlink_to("nowhere.nii"), "no such file"),
    "empty": ("a.nii", lambda path: path.touch(), "not a NIfTI file"),
    "empty gz": ("a.nii.gz", lambda path: path.touch(), "NIfTI|damaged"),
    "random bytes": (
        "a.nii.gz",
        lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
        "NIfTI|damaged",
    ),
    "text": ("a.nii", lambda path: path.write_text("this is no scan" * 100), "not a NIfTI file"),
    "cut .nii": ("a.nii", _holding(lambda f: _whole(f)[:9000]), "damaged or truncated"),
    "cut .nii.gz": (
        "a.nii.gz",
        _holding(lambda f: gzip.compress(_whole(f))[:9000]),
        "damaged or truncated",
    ),
    "cut header": ("a.nii", _holding(lambda f: _whole(f)[:200]), "NIfTI|damaged"),
    "flipped bits": (
        "a.nii.gz",
        _holding(lambda f: (b := gzip.compress(_whole(f)))[:5000] + b"x" * 50 + b[5050:]),
        "damaged or truncated",
    ),
    "30000 cubed": ("a.nii", _holding(lambda f: _claim(f, 30000)), "voxels"),
    "30000 cubed gz": ("a.nii.gz", _holding(lambda f: gzip.compress(_claim(f, 30000))), "voxels"),
    "900 cubed of a small file": ("a.nii", _holding(lambda f: _claim(f, 900)), "damaged"),
    "900 cubed of a small gz": (
        "a.nii.gz",
        _holding(lambda f: gzip.compress(_claim(f, 900))),
        "damaged or truncated: 1352 bytes",
    ),
    "2D": ("a.nii", lambda path: save(path, np.zeros((8, 8), np.int16)), "2D.*expected one 3D"),
    "4D": ("a.nii", lambda path: save(path, np.zeros((4, 4, 4, 3), np.int16)), "4D.*one 3D"),
    "one slice": (
        "a.nii",
        lambda path: save(path, np.zeros((8, 8, 1), np.int16)),
        r"\(8, 8, 1\) is no volume",
    ),
    "NaN": ("a.nii.gz", _filled(np.nan), "1 voxels are NaN or Inf"),
    "Inf": ("a.nii.gz", _filled(-np.inf), "1 voxels are NaN or Inf"),
    "colour": ("a.nii", _rgb, "expected numbers"),
    "complex": (
        "a.nii",
        lambda path: save(path, np.zeros((4, 4, 4), np.complex64)),
        "expected numbers",
    ),
    "singular affine": ("a.nii", _singular, "singular"),
    "sheared": (
        "a.nii",
        lambda path: save(path, np.zeros((9, 9, 9), np.int16), sheared(25)),
        "sheared: axes at 65 degrees, expected right angles",
    ),
    "voxels of a metre": (
        "a.nii",
        lambda path: save(path, np.zeros((9, 9, 9), np.int16), np.diag([1000.0, 1000, 1000, 1])),
        "covers 9e.*mm, expected 1 to 3000",
    ),
    "voxels in metres": (
        "a.nii",
        lambda path: save(path, np.zeros((9, 9, 9), np.int16), np.diag([1e-3, 1e-3, 1e-3, 1])),
        "covers 0.009.*it must be in mm",
    ),
    "no NIfTI format": ("a.nii", _analyze, "NIfTI|convert"),
}


@pytest.mark.parametrize("kind", BAD_SCANS)
def test_bad_scan_is_one_line_with_file_and_mend(tmp_path: Path, kind: str) -> None:
    name, write, expected = BAD_SCANS[kind]
    path = tmp_path / name
    write(path)
    with pytest.raises(CaseError, match=expected) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert caught.value.mend and message.endswith(f"; {caught.value.mend}")
    if kind not in ("NaN", "Inf"):
        with pytest.raises(CaseError, match=expected):
            read_mask(path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_claim_of_30000_cubed_allocates_nothing(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / ("a.nii" if pack is bytes else "a.nii.gz")
    path.write_bytes(pack(_claim(tmp_path, 30000)))
    tracemalloc.start()
    try:
        with pytest.raises(CaseError):
            read_image(path)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


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


def test_file_without_permission(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.zeros((4, 4, 4), np.int16))
    path.chmod(0)
    with no_root(), pytest.raises(CaseError, match="no permission to read it; chmod"):
        read_image(path)


BAD_MASKS: dict[str, tuple[np.ndarray, np.ndarray, str]] = {
    "label 7": (np.full((4, 5, 6), 7, np.uint8), AFFINE, "label 7, expected 0, 1, 2"),
    "negative": (np.full((4, 5, 6), -1, np.int16), AFFINE, "label -1, expected 0, 1, 2"),
    "fractions": (np.full((4, 5, 6), 0.25, np.float32), AFFINE, "fractions such as 0.25"),
    "nearly whole": (np.full((4, 5, 6), 1.0001, np.float32), AFFINE, "such as 1.0001, expected"),
    "NaN": (np.full((4, 5, 6), np.nan, np.float32), AFFINE, "NaN or Inf"),
    "Inf": (np.full((4, 5, 6), np.inf, np.float32), AFFINE, "NaN or Inf"),
    "shape": (np.ones((4, 5, 7), np.uint8), AFFINE, r"\(4, 5, 7\) but image is \(4, 5, 6\)"),
    "shifted": (
        np.ones((4, 5, 6), np.uint8),
        AFFINE + np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]]),
        "2 mm away from its image",
    ),
    "mirrored": (np.ones((4, 5, 6), np.uint8), np.diag([-1, 1, 1, 1]) @ AFFINE, "mm away"),
    "other spacing": (
        np.ones((4, 5, 6), np.uint8),
        AFFINE @ np.diag([1, 1, 1.3, 1]),
        "mm away from its image",
    ),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_bad_mask_is_one_line_with_got_and_expected(tmp_path: Path, kind: str) -> None:
    array, affine, expected = BAD_MASKS[kind]
    image = read_image(save(tmp_path / "scan.nii", np.zeros((4, 5, 6), np.int16)))
    path = save(tmp_path / "mask.nii.gz", array, affine)
    with pytest.raises(CaseError, match=expected) as caught:
        read_mask(path, image=image)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.mend


def test_float_mask_of_whole_labels_and_an_affine_off_by_rounding_are_fine(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "scan.nii", np.zeros((4, 5, 6), np.int16)))
    labels = np.random.default_rng(0).integers(0, 3, (4, 5, 6))
    path = save(tmp_path / "mask.nii", labels.astype(np.float64), AFFINE + 1e-4)
    mask = read_mask(path, image=image)
    assert mask.array.dtype == np.uint8
    assert np.array_equal(mask.array, labels)


def test_label_map_gives_our_labels_and_refuses_the_rest(tmp_path: Path) -> None:
    values = np.array([0, 3, 4, 5] * 30).reshape(4, 5, 6)
    path = save(tmp_path / "mask.nii", values.astype(np.int16))
    labels = read_mask(path, label_map={3: 1, 4: 2, 5: 0}).array
    assert np.array_equal(labels, np.choose(values, [0, 0, 0, 1, 2, 0]))
    with pytest.raises(CaseError, match=r"label 5, expected 0, 3, 4; map it with label-map"):
        read_mask(path, label_map={3: 1, 4: 2})


def _mutations() -> st.SearchStrategy[list[tuple[int, int]]]:
    header = st.tuples(st.integers(0, 347), st.sampled_from([0, 1, 127, 128, 255]))
    anywhere = st.tuples(st.integers(0, 800), st.integers(0, 255))
    return st.lists(st.one_of(header, header, anywhere), max_size=12)


@settings(
    max_examples=200, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=_mutations(),
    keep=st.one_of(st.none(), st.integers(0, 900)),
    packed=st.sampled_from(["no", "before", "after"]),
)
def test_mutated_files_are_read_or_refused(
    tmp_path: Path, changes: list[tuple[int, int]], keep: int | None, packed: str
) -> None:
    values = (np.arange(210) % 3).astype(np.int16).reshape(5, 6, 7)
    content = nib.Nifti1Image(values, AFFINE).to_bytes()
    if packed == "before":  # the mutation then hits the compressed bytes
        content = gzip.compress(content, mtime=0)
    damaged = bytearray(content[:keep])
    for position, value in changes:
        if position < len(damaged):
            damaged[position] = value
    path = tmp_path / ("a.nii" if packed == "no" else "a.nii.gz")
    path.write_bytes(gzip.compress(damaged) if packed == "after" else damaged)
    for read in (read_image, read_mask):
        try:
            volume = read(path)
        except CaseError as error:
            assert "\n" not in str(error)
        else:
            assert volume.array.ndim == 3
            assert np.all(np.isfinite(volume.array))
            assert all(0 < mm <= 3000 for mm in volume.spacing)
            true = abs(np.linalg.det(volume.stored_affine[:3, :3]))
            assert np.prod(volume.spacing) == pytest.approx(true, rel=1e-3)
