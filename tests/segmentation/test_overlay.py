"""Tests of the picture of a prediction, read back by Pillow."""

import io

import numpy as np
import pytest

from fedseg.segmentation.overlay import COLOURS, axial_slice, draw_overlay

Image = pytest.importorskip("PIL.Image")

SHAPE = (40, 30, 8)


def read(picture: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(picture)) as opened:
        opened.verify()
    with Image.open(io.BytesIO(picture)) as opened:
        assert (opened.format, opened.mode) == ("PNG", "RGB")
        return np.asarray(opened).astype(int)


def scan() -> np.ndarray:
    image = np.full(SHAPE, -1000, np.float32)
    image[4:36, 4:26] = 40
    return image


def labels(*, x: slice, y: slice, z: slice, label: int = 1) -> np.ndarray:
    found = np.zeros(SHAPE, np.uint8)
    found[x, y, z] = label
    return found


NOTHING = np.zeros(SHAPE, np.uint8)


def shares(picture: np.ndarray, region: str) -> np.ndarray:
    """Where a picture's pixels have the colour of a region."""
    return np.asarray((picture == np.array(COLOURS[region])).all(axis=2))


def test_slice_with_the_largest_tumour_then_liver_then_the_middle() -> None:
    liver = labels(x=slice(5, 20), y=slice(5, 20), z=slice(1, 3))
    tumor = liver.copy()
    tumor[6:9, 6:9, 2] = 2
    assert axial_slice(NOTHING) == 4
    assert axial_slice(liver) == 1
    assert axial_slice(tumor) == 2
    # The mask decides where there is one; an empty one decides nothing.
    assert axial_slice(labels(x=slice(9), y=slice(9), z=slice(7, 8)), truth=tumor) == 2
    assert axial_slice(tumor, truth=NOTHING) == 2


def test_square_pixels_whatever_the_voxels_are() -> None:
    assert read(draw_overlay(scan(), NOTHING, spacing=(1, 1, 5))).shape == (384, 512, 3)
    assert read(draw_overlay(scan(), NOTHING, spacing=(1, 2, 5))).shape == (512, 341, 3)


def test_seen_from_the_feet() -> None:
    patients_right_front = labels(x=slice(30, 38), y=slice(20, 28), z=slice(0, 8))
    rows, columns = shares(
        read(draw_overlay(scan(), patients_right_front, spacing=(1, 1, 1))), "liver"
    ).nonzero()
    assert columns.max() < 256 and rows.max() < 192


def test_no_label_leaves_the_scan_in_grey_by_its_window() -> None:
    picture = read(draw_overlay(scan(), NOTHING, spacing=(1, 1, 1), window=(0, 80)))
    assert (picture[..., 0] == picture[..., 1]).all() and (picture[..., 1] == picture[..., 2]).all()
    assert picture[0, 0, 0] == 0
    assert picture[192, 256, 0] == 128


@pytest.mark.parametrize("image", [scan(), scan() + 2000], ids=["ct", "mr"])
def test_window_of_its_own(image: np.ndarray) -> None:
    picture = read(draw_overlay(image, NOTHING, spacing=(1, 1, 1)))
    assert picture[0, 0, 0] == 0
    assert 100 < picture[192, 256, 0] <= 255


def test_missed_is_filled_and_false_is_outlined() -> None:
    truth = labels(x=slice(22, 34), y=slice(8, 22), z=slice(0, 8))
    false = labels(x=slice(6, 18), y=slice(8, 22), z=slice(0, 8), label=2)
    picture = read(draw_overlay(scan(), false, truth=truth, spacing=(1, 1, 1), window=(-160, 240)))
    grey = round(255 * 200 / 400)
    missed = picture[192, 150]  # x = 28: patient's right, on the left
    expected = [round(0.7 * grey + 0.3 * part) for part in COLOURS["liver"]]
    assert np.abs(missed - expected).max() <= 1
    assert (picture[192, 360] == grey).all()  # x = 12, inside the outline
    # The outline of a false tumour is tumour and lies where the box ends.
    rows, columns = shares(picture, "tumor").nonzero()
    scale = 512 / 40
    assert abs(columns.min() - (40 - 18) * scale) <= 2 and abs(columns.max() - 34 * scale) <= 2
    assert abs(rows.min() - (30 - 22) * scale) <= 2 and abs(rows.max() - 22 * scale) <= 2


def test_without_a_mask_the_prediction_is_filled() -> None:
    tumor = labels(x=slice(10, 30), y=slice(8, 22), z=slice(0, 8), label=2)
    picture = read(draw_overlay(scan(), tumor, spacing=(1, 1, 1), window=(-160, 240)))
    expected = [round(0.7 * 128 + 0.3 * part) for part in COLOURS["tumor"]]
    assert np.abs(picture[192, 256] - expected).max() <= 1


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected the image's shape"):
        draw_overlay(scan(), NOTHING[:-1], spacing=(1, 1, 1))
