"""Tests of the table of volumes."""

import csv
from pathlib import Path

import numpy as np
import pytest

from fedseg.data.volumes import Volume
from fedseg.data.whole_file import replace_file
from fedseg.errors import DataError
from fedseg.segmentation.volume_table import (
    Findings,
    add_row,
    findings_of,
    read_rows,
)

ONE = Findings(liver_ml=1501.234, tumor_ml=12.0, lesions=2)
OTHER = Findings(liver_ml=3.0, tumor_ml=0.0, lesions=0)


def test_volumes_are_voxels_times_their_size() -> None:
    labels = np.zeros((7, 6, 5), np.uint8)
    labels[1:5, 1:5, 1:4], labels[2, 2, 2], labels[4, 4, 3] = 1, 2, 2
    scan = Volume(
        array=labels,
        spacing=(2.0, 2.5, 3.0),
        stored=None,
        stored_shape=labels.shape,
        stored_affine=np.eye(4),
    )
    found = findings_of(labels, scan)
    assert found.liver_ml == pytest.approx(48 * 15 / 1000)
    assert found.tumor_ml == pytest.approx(2 * 15 / 1000)
    assert found.lesions == 2


def test_rows_are_added_and_replaced_in_order(tmp_path: Path) -> None:
    path = tmp_path / "volumes.csv"
    assert read_rows(path) == {}
    add_row(path, "b", ONE, 12.34)
    add_row(path, 'a, "quoted"', OTHER, None)
    add_row(path, "b", OTHER, 1.0)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["scan", "liver_ml", "tumor_ml", "lesions", "seconds"],
        ["b", "3.00", "0.00", "0", "1.0"],
        ['a, "quoted"', "3.00", "0.00", "0", ""],
    ]
    assert list(read_rows(path)) == ["b", 'a, "quoted"']
    assert [entry.name for entry in tmp_path.iterdir()] == ["volumes.csv"]


def test_cells_that_somebody_added_stay(tmp_path: Path) -> None:
    path = tmp_path / "volumes.csv"
    path.write_text("scan,liver_ml,tumor_ml,lesions,seconds\na,1,2,3,4,seen,twice\nb,1\n")
    add_row(path, "c", OTHER, None)
    add_row(path, "a", OTHER, 5.0)
    assert path.read_text().splitlines()[1:] == [
        "a,3.00,0.00,0,5.0,seen,twice",
        "b,1,,,",
        "c,3.00,0.00,0,",
    ]


def test_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "volumes.csv"
    add_row(path, "b\udcff", ONE, 1.0)
    add_row(path, "c", ONE, 1.0)
    assert list(read_rows(path)) == ["b\udcff", "c"]


@pytest.mark.parametrize("content", [b"scan,dice\na,1\n", b"", b"\x00\x01", b"\xff\xfe\n"])
def test_another_table_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "volumes.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"volumes\.csv: .*; move it away"):
        add_row(path, "a", ONE, 1.0)
    assert path.read_bytes() == content


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "folder" / "x").mkdir(parents=True)
    with pytest.raises(OSError):
        replace_file(tmp_path / "folder", b"new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder"]
