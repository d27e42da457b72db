"""Read DICOM series and DICOM-SEG into arrays; needs the extra `fedseg[dicom]` (highdicom).

Arrays are `[column, row, slice]` with slices along rows x columns, and affines RAS: the grid which
ITK, and so 3D Slicer, gives the same series.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedseg.data.dicom_series import MISSING_EXTRA, find_series, header_of
from fedseg.errors import CaseError

__all__ = ["is_segmentation", "read_segmentation", "read_series"]

_RAS = np.diag([-1.0, -1, 1, 1])
_TO_SEGMENT = 'give it a label with label-map in site.toml, such as {"%s" = 0}'

_SPACING_TOLERANCE = 0.05
"""Of the mean slice spacing: written positions are rounded, a missing slice is off by 1."""

_TILT = 0.5
"""Pixels that the last slice may lie beside the normal of the first."""


def is_segmentation(path: Path) -> bool:
    """Tell whether a file is a DICOM-SEG.

    Raises:
        CaseError: It is damaged DICOM, or DICOM can't be read here.
    """
    header = header_of(path)
    return header is not None and header.kind == "seg"


@contextmanager
def _foreign(path: Path) -> Iterator[None]:
    """Turn whatever a DICOM library raises about foreign bytes into one line."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    except CaseError:
        raise
    except MemoryError:
        raise CaseError(path, "doesn't fit in memory", "crop the scan") from None
    except ModuleNotFoundError:
        raise CaseError(path, *MISSING_EXTRA.split("; ")) from None
    except PermissionError:
        raise CaseError(
            path, "no permission to read it", "chmod it for the SuperNode's user"
        ) from None
    except (
        Exception
    ) as error:  # no list of them is complete: odd headers break any line of a parser
        text = " ".join(str(error).split())
        if "missing dependencies" in text or "plugins are missing" in text:
            raise CaseError(
                path, "compressed in a way that needs a codec", "pip install 'highdicom[libjpeg]'"
            ) from None
        raise CaseError(
            path, f"can't be read as DICOM ({text[:120]})", "export the series again"
        ) from None


def read_series(path: Path, *, max_voxels: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the CT or MR series in a folder, or that of a file among others.

    Args:
        path: The folder, or a file of the series.
        max_voxels: A series that claims more is refused before its pixels are read.

    Returns:
        float32 `[column, row, slice]`, in HU or as rescaled, and its affine (RAS, mm).

    Raises:
        CaseError: It is no one regular volume, or can't be read.
    """
    files = _files(path)
    with _foreign(path):
        import pydicom
        from highdicom.image import Image, get_volume_from_series

        headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
        frames = sum(int(header.get("NumberOfFrames") or 1) for header in headers)
        _check_pixels(path, headers, frames, max_voxels)
        how: dict[str, Any] = {
            "dtype": np.float32,
            "apply_real_world_transform": False,
            "apply_presentation_lut": False,
            "rtol": _SPACING_TOLERANCE,
        }
        if len(files) == 1 and "PerFrameFunctionalGroupsSequence" in headers[0]:
            volume = Image.from_dataset(pydicom.dcmread(files[0]), copy=False).get_volume(**how)
        else:
            _check_stack(path, headers)
            volume = get_volume_from_series([pydicom.dcmread(file) for file in files], **how)
        return _oriented(volume.array, volume.affine)


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise CaseError(path, "no such file", "correct the path")
    images = find_series(path if path.is_dir() else path.parent).images
    if path.is_dir():
        if len(images) != 1:
            raise CaseError(
                path, f"{len(images)} CT or MR series in it, expected one", "keep one a folder"
            )
        return next(iter(images.values()))
    header = header_of(path)
    if header is None or header.kind != "image":
        raise CaseError(path, "no CT or MR image", "give a file or folder of a CT or MR series")
    return images[header.series]


def _check_pixels(path: Path, headers: Sequence[Any], frames: int, max_voxels: int) -> None:
    grids = {(int(h.Rows), int(h.Columns), int(h.get("SamplesPerPixel") or 1)) for h in headers}
    if len(grids) > 1:
        raise CaseError(path, f"slices of {len(grids)} sizes, expected one", "export one series")
    ((rows, columns, samples),) = grids
    if samples != 1:
        raise CaseError(path, "colour images, expected grey ones", "export the original series")
    if frames * rows * columns > max_voxels:
        raise CaseError(
            path, f"{frames} slices of {rows} x {columns} are over {max_voxels} voxels", "crop it"
        )
    if frames < 2:
        raise CaseError(path, "one slice is no volume, expected 2 or more", "export all slices")


def _check_stack(path: Path, headers: Sequence[Any]) -> None:
    """Refuse what is no stack of equally spaced slices at right angles to them."""
    turns = np.array([header.ImageOrientationPatient for header in headers], float)
    places = np.array([header.ImagePositionPatient for header in headers], float)
    pixel = np.array([header.PixelSpacing for header in headers], float)
    for values, what in ((turns, "orientations"), (pixel, "pixel spacings")):
        if np.ptp(values, axis=0).max() > 1e-3:
            raise CaseError(path, f"slices with mixed {what}, expected one", "export one series")
    normal = np.cross(turns[0, :3], turns[0, 3:])
    if not abs(np.linalg.norm(normal) - 1) < 1e-2:
        raise CaseError(
            path, "orientation is no two directions at right angles", "export it with its geometry"
        )
    order = np.argsort(places @ normal)
    along = (places @ normal)[order]
    gaps = np.diff(along)
    if gaps.min() < 1e-3:
        raise CaseError(
            path, "two slices at one position, expected one", "export one phase or time point"
        )
    step = float(np.median(gaps))
    if np.abs(gaps - step).max() > _SPACING_TOLERANCE * step:
        odd = int(np.abs(gaps - step).argmax())
        raise CaseError(
            path,
            f"slices {odd + 1} and {odd + 2} are {gaps[odd]:.4g} mm apart but others {step:.4g} mm",
            "export all slices of an evenly spaced series",
        )
    shift = places[order[-1]] - places[order[0]]
    beside = float(np.linalg.norm(shift - (shift @ normal) * normal))
    if beside > _TILT * pixel.min():
        raise CaseError(
            path, f"gantry tilt: slices shift by {beside:.3g} mm", "reformat it without tilt"
        )


def _oriented(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From highdicom's `[slice, row, column]` in LPS."""
    array, affine = array.transpose(2, 1, 0), np.array(affine, float)[:, [2, 1, 0, 3]]
    if np.linalg.det(affine[:3, :3]) < 0:  # slices run against rows x columns
        affine[:3, 3] += affine[:3, 2] * (array.shape[2] - 1)
        affine[:3, 2] *= -1
        array = array[:, :, ::-1]
    return array, _RAS @ affine


def read_segmentation(
    path: Path, label_of: Callable[[int, str], int | None], *, max_voxels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Read a DICOM-SEG; where segments overlap the highest label wins (a tumour lies in a liver).

    Args:
        path: The file.
        label_of: Label of a segment by its number and name, None where it has none.
        max_voxels: A file that claims more is refused before its pixels are read.

    Returns:
        uint8 labels `[column, row, slice]` of the part it covers, and their affine (RAS, mm).

    Raises:
        CaseError: It is fractional, a segment has no label, or it can't be read.
    """
    with _foreign(path):
        import pydicom
        from highdicom.seg import Segmentation

        seg = Segmentation.from_dataset(pydicom.dcmread(path), copy=False)
        if seg.segmentation_type.value == "FRACTIONAL":
            raise CaseError(
                path, "fractional segments, expected BINARY or LABELMAP", "threshold it"
            )
        labels = _segment_labels(path, seg, label_of)
        geometry = seg.get_volume_geometry(rtol=_SPACING_TOLERANCE)
        if geometry is None:
            raise CaseError(
                path, "its slices are no regular volume", "export it on the grid of its series"
            )
        if np.prod([int(n) for n in geometry.spatial_shape], dtype=object) > max_voxels:
            raise CaseError(
                path, f"shape {geometry.spatial_shape} is over {max_voxels} voxels", "crop it"
            )
        merged = np.zeros(geometry.spatial_shape, np.uint8)
        for number, label in labels.items():
            part = seg.get_volume(
                segment_numbers=[number],
                combine_segments=True,
                relabel=True,
                dtype=np.uint8,
                rtol=_SPACING_TOLERANCE,
            )
            np.maximum(merged, part.array * np.uint8(label), out=merged)
        return _oriented(merged, geometry.affine)


def _segment_labels(
    path: Path, seg: Any, label_of: Callable[[int, str], int | None]
) -> dict[int, int]:
    labels = {}
    for number in seg.segment_numbers:
        name = str(seg.get_segment_description(number).segment_label)
        label = label_of(int(number), name)
        if label is None:
            raise CaseError(
                path,
                f"segment {number} '{name}' has no label, expected liver or tumor",
                _TO_SEGMENT % name,
            )
        if label:
            labels[int(number)] = label
    return labels
