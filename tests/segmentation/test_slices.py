"""Tests of the picture of slices, read back by another program."""

import io

import numpy as np
import pytest

from fedseg.segmentation.slices import draw_slices

Image = pytest.importorskip("PIL.Image")


def pixels(volumes: list[np.ndarray], spacing: tuple[float, float, float]) -> np.ndarray:
    png = draw_slices(volumes, window=(-2, 2), spacing=spacing)
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"))


def test_a_column_a_volume_in_square_millimetres() -> None:
    grey = [np.full((4, 4, 2), value, np.float32) for value in (-2, 0, 2)]
    picture = pixels(grey, (3.0, 3.0, 6.0))
    assert picture.shape == (4 * 6 + 3 * 144, 4 * 6 + 3 * 144)
    for column, expected in enumerate((0, 128, 255)):
        left = 6 + column * 150
        for top in (6, 156, 306):
            assert np.all(picture[top : top + 144, left : left + 144] == expected)
    assert np.all(picture[:, :6] == 255)


def test_axes_are_those_of_a_radiologist() -> None:
    """x runs to the patient's right, y to the front, z up; each picture shows where they are."""
    for axis, corners in enumerate(
        (((6, 6), (156, 6), None), ((6, 6), None, (306, 6)), (None, (156, 6), (306, 6)))
    ):
        volume = np.full((3, 3, 3), -2, np.float32)
        volume[tuple(slice(2, 3) if i == axis else slice(None) for i in range(3))] = 2
        picture = pixels([volume], (1.0, 1.0, 1.0))
        for corner in corners:
            if corner:
                top, left = corner
                assert picture[top + 5, left + 5] == 255
                assert picture[top + 138, left + 138] == 0
