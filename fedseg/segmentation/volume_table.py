"""The table of a prediction folder: how large liver and tumours are in each scan."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedseg.data.volumes import Volume
from fedseg.data.whole_file import replace_file
from fedseg.errors import DataError
from fedseg.segmentation.postprocess import lesion_count

__all__ = ["COLUMNS", "VOLUMES", "Findings", "add_row", "findings_of", "read_rows"]

VOLUMES = "volumes.csv"
"""Name of the table in a folder of masks."""

COLUMNS = ("scan", "liver_ml", "tumor_ml", "lesions", "seconds")

_MORE = "more"
"""Key of cells that somebody added behind a row's own."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a mask has.

    Attributes:
        liver_ml: Volume of the liver with its tumours, mL.
        tumor_ml: Volume of the tumours, mL.
        lesions: Number of tumours: components that don't touch, not even by a corner.
    """

    liver_ml: float
    tumor_ml: float
    lesions: int


def findings_of(labels: np.ndarray, scan: Volume) -> Findings:
    """Measure labels `[X, Y, Z]` on a scan's grid."""
    voxel = float(np.prod(scan.spacing)) / 1000
    counts = np.zeros(3, np.int64)
    for plane in labels:  # counting all at once would turn the volume into 64-bit integers
        counts += np.bincount(plane.ravel(), minlength=3)
    return Findings(
        liver_ml=float(counts[1:].sum()) * voxel,
        tumor_ml=float(counts[2]) * voxel,
        lesions=lesion_count(labels),
    )


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Read a table by scan; no rows where it isn't there.

    Raises:
        DataError: It can't be read, or is another table.
    """
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            reader = csv.DictReader(file, restkey=_MORE, restval="")
            rows = {str(row.get("scan")): dict(row) for row in reader}
            columns = tuple(reader.fieldnames or ())
    except FileNotFoundError:
        return {}
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: can't be read ({error}); move it away") from None
    if columns != COLUMNS:
        raise DataError(
            f"{path}: columns {','.join(columns)[:80]}; expected {','.join(COLUMNS)}; move it away"
        )
    return rows


def add_row(path: Path, scan: str, findings: Findings, seconds: float | None) -> None:
    """Add a scan's row to the table, or put it in place of the scan's old one.

    The table is written anew beside its place: it is there whole at any time.

    Args:
        path: The table.
        scan: Name of the scan's mask.
        findings: What it has.
        seconds: What its prediction took; None where that isn't known.

    Raises:
        DataError: It can't be read, or is another table.
        OSError: It can't be written.
    """
    rows = read_rows(path)
    rows[scan] = {
        **rows.get(scan, {}),
        "scan": scan,
        "liver_ml": f"{findings.liver_ml:.2f}",
        "tumor_ml": f"{findings.tumor_ml:.2f}",
        "lesions": str(findings.lesions),
        "seconds": "" if seconds is None else f"{seconds:.1f}",
    }
    replace_file(path, _as_text(rows).encode("utf-8", "surrogateescape"))


def _as_text(rows: Mapping[str, Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows.values():
        writer.writerow([*(row[column] for column in COLUMNS), *row.get(_MORE, ())])
    return text.getvalue()
