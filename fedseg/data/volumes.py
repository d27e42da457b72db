"""Read NIfTI and DICOM volumes, always as RAS axis order and checked contents; write NIfTI."""

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling

from fedseg.data import dicom
from fedseg.data.cases import is_dicom, nifti_stem
from fedseg.data.grids import check_affine, check_apart, ras_affine
from fedseg.data.labels import label_of_segment
from fedseg.errors import CaseError
from fedseg.site_config import LabelMap

__all__ = ["MAX_VOXELS", "Volume", "read_image", "read_mask", "write_mask"]

MAX_VOXELS = 2**30
"""A header that claims more is refused before anything is allocated."""

_RAS = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A scan or mask in RAS axis order.

    Attributes:
        array: Voxels `[X, Y, Z]`; float32 for a scan, uint8 for a mask.
        spacing: Voxel size in mm.
        stored: NIfTI header of the file, for writing a mask on the same grid; of DICOM, of the grid
            that ITK gives the series.
        stored_shape: Shape in the file's own axis order.
        stored_affine: The file's own affine.
        path: The file, for errors.
    """

    array: np.ndarray
    spacing: tuple[float, float, float]
    stored: Any
    stored_shape: tuple[int, ...]
    stored_affine: np.ndarray
    path: Path = Path("scan")


def read_image(path: Path) -> Volume:
    """Read a scan as float32 with every voxel finite.

    Args:
        path: A NIfTI file, a folder with one DICOM series, or a file of a DICOM series.

    Raises:
        CaseError: The file is unreadable, no 3D volume in mm, or has NaN or Inf.
    """
    volume = _read(path, np.float32)
    bad = int(volume.array.size - np.count_nonzero(np.isfinite(volume.array)))
    if bad:
        raise CaseError(
            path, f"{bad} voxels are NaN or Inf, expected finite numbers", "export the scan again"
        )
    return volume


def read_mask(
    path: Path, *, image: Volume | None = None, label_map: LabelMap | None = None
) -> Volume:
    """Read a mask as uint8 labels 0 background, 1 liver, 2 tumor.

    Args:
        path: A NIfTI or DICOM-SEG file.
        image: The scan it belongs to: shape and affine must agree.
        label_map: Mask value to label, where the mask has values of its own; of a DICOM-SEG its
            segments' names (lower case) or numbers.

    Raises:
        CaseError: The file is unreadable, lies on another grid, or has other values.
    """
    if nifti_stem(path) is None and dicom.is_segmentation(path):
        return _read_segmentation(path, image, label_map)
    volume = _read(path, np.float32)
    if image is not None:
        _check_grid(path, volume, image)
    values = np.unique(volume.array)
    if not np.all(np.isfinite(values)):
        raise CaseError(path, "mask has NaN or Inf, expected labels 0, 1, 2", "export it again")
    odd = values[values != np.round(values)]
    if odd.size:
        raise CaseError(
            path,
            f"mask has fractions such as {odd[0]!s}, expected whole labels 0, 1, 2",
            "export a label mask, not a probability or a resampled mask",
        )
    numbers = {key: label for key, label in (label_map or {}).items() if isinstance(key, int)}
    allowed = {0: 0, **(numbers or {1: 1, 2: 2})}
    for value in values:
        if int(value) not in allowed:
            raise CaseError(
                path,
                f"mask has label {value:g}, expected {', '.join(map(str, sorted(allowed)))}",
                "map it with label-map in site.toml",
            )
    labels = np.zeros(volume.array.shape, np.uint8)
    for value in values:
        labels[volume.array == value] = allowed[int(value)]
    return Volume(**{**vars(volume), "array": labels})


def write_mask(path: Path, labels: np.ndarray, like: Volume) -> None:
    """Write labels `[X, Y, Z]` (RAS) on the exact grid and affine of `like`, atomically."""
    to_stored = ornt_transform(_RAS, io_orientation(like.stored_affine))
    stored = np.empty(like.stored_shape, np.uint8, order="F")  # as it lies in the file
    _copy(apply_orientation(labels, to_stored), stored)
    header = like.stored.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"], header["cal_max"], header["intent_code"] = 0, 0, 0
    # A scan's free text and extensions (DICOM headers) can name a patient; a mask needs none.
    for text in {"aux_file", "intent_name", "db_name"}.intersection(header):  # two in NIfTI-2
        header[text] = b""
    header["descrip"] = b"fedseg"
    header.extensions.clear()
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(stored, None, header)
    image.header.set_slope_inter(1, 0)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        nib.save(image, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, dtype: npt.DTypeLike) -> Volume:
    if nifti_stem(path) is None and (path.is_dir() or is_dicom(path)):
        return _dicom_volume(path, *dicom.read_series(path, max_voxels=MAX_VOXELS))
    try:
        if not path.is_file():
            raise CaseError(path, "no such file", "correct the path")
        with np.errstate(all="ignore"):  # what overflows is found as Inf
            image = nib.load(path)
            _check_header(path, image)
            stored = _voxels(path, image)
            affine = np.asarray(image.affine, np.float64)
            scale = (image.dataobj.slope, image.dataobj.inter)
            return _volume(path, stored, image.header, affine, dtype=dtype, scale=scale)
    except MemoryError:
        raise CaseError(path, "doesn't fit in memory", "crop the scan") from None
    except ImageFileError:
        raise CaseError(
            path, "not a NIfTI file, or damaged", "export it again as .nii or .nii.gz"
        ) from None
    except PermissionError:
        raise CaseError(
            path, "no permission to read it", "chmod it for the SuperNode's user"
        ) from None
    except (OSError, EOFError, zlib.error, HeaderDataError, ArithmeticError, ValueError) as error:
        raise CaseError(
            path, f"damaged or truncated ({type(error).__name__})", "copy or export it again"
        ) from None


def _volume(
    path: Path,
    stored: np.ndarray,
    header: Any,
    affine: np.ndarray,
    *,
    dtype: npt.DTypeLike,
    scale: tuple[float, float] = (1, 0),
) -> Volume:
    """Bring an array on the file's own grid into RAS axis order."""
    orientation = io_orientation(affine)
    axes = orientation[:, 0].astype(int)
    shape, spacing = np.empty(3, int), np.empty(3)
    shape[axes] = stored.shape
    spacing[axes] = np.linalg.norm(affine[:3, :3], axis=0)
    array = np.empty(shape, dtype)
    _copy(stored, apply_orientation(array, ornt_transform(_RAS, orientation)), scale)
    return Volume(
        array=array,
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        stored=header,
        stored_shape=stored.shape,
        stored_affine=affine,
        path=path,
    )


def _copy(source: np.ndarray, target: np.ndarray, scale: tuple[float, float] = (1, 0)) -> None:
    """Copy voxels, scaled as nibabel does, into an array that may lie otherwise in memory.

    A few rows at a time: the cache then still holds what came along with the last voxels.
    """
    for start in range(0, source.shape[1], 4):
        target[:, start : start + 4] = apply_read_scaling(source[:, start : start + 4], *scale)


def _dicom_volume(path: Path, array: np.ndarray, affine: np.ndarray) -> Volume:
    check_affine(path, array.shape, affine)
    header = nib.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
    header.set_xyzt_units("mm")
    header.set_sform(affine, "scanner")
    header.set_qform(affine, "scanner")
    return _volume(path, array, header, affine, dtype=array.dtype)


def _read_segmentation(path: Path, image: Volume | None, label_map: LabelMap | None) -> Volume:
    """Read a DICOM-SEG; it may cover a part of its series only."""
    labels = _dicom_volume(
        path,
        *dicom.read_segmentation(
            path,
            lambda number, name: label_of_segment(number, name, label_map),
            max_voxels=MAX_VOXELS,
        ),
    )
    if image is None:
        return labels
    target, affine = (
        ras_affine(volume.stored_affine, volume.stored_shape) for volume in (image, labels)
    )
    start = np.round((np.linalg.inv(target) @ affine)[:3, 3]).astype(int)
    target[:3, 3] = target[:3, :3] @ start + target[:3, 3]
    # Rounding the start hides half a voxel, so less than that must do.
    check_apart(path, labels.array.shape, affine - target, 0.25 * min(image.spacing))
    stop = start + labels.array.shape
    if start.min() < 0 or np.any(stop > image.array.shape):
        raise CaseError(path, "reaches outside its image", "export it on the grid of its series")
    array = np.zeros(image.array.shape, np.uint8)
    array[tuple(slice(*ends) for ends in zip(start, stop, strict=True))] = labels.array
    return Volume(**{**vars(image), "array": array, "path": path})


def _voxels(path: Path, image: Any) -> np.ndarray:
    """Read the voxels; memory is taken for what the file holds, not for what its header claims."""
    proxy = image.dataobj
    voxels = int(np.prod([int(n) for n in proxy.shape], dtype=object))
    needed = int(proxy.offset) + voxels * proxy.dtype.itemsize
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        # Deflate packs at most 1032 bytes into one; a buffer is taken for all that is asked for.
        content = file.read(min(needed, 1032 * path.stat().st_size))
        file.read(2**20)  # to the end, where gzip has its checksum; nibabel stops before it
    if len(content) < needed:
        raise CaseError(
            path,
            f"damaged or truncated: {len(content)} bytes, expected {needed} for {proxy.shape}",
            "copy or export it again",
        )
    flat = np.frombuffer(content, proxy.dtype, voxels, int(proxy.offset))
    return flat.reshape(proxy.shape, order="F")


def _check_header(path: Path, image: Any) -> None:
    shape = tuple(image.shape)
    if not isinstance(image, nib.Nifti1Image):  # Nifti2Image is one, too
        raise CaseError(path, f"a {type(image).__name__}", "convert it to .nii or .nii.gz")
    if len(shape) != 3:
        raise CaseError(
            path, f"{len(shape)}D of shape {shape}, expected one 3D volume", "export one volume"
        )
    if min(shape) < 2:
        raise CaseError(
            path,
            f"shape {shape} is no volume, expected 2 voxels or more along each axis",
            "export the whole scan",
        )
    if np.prod([int(n) for n in shape], dtype=object) > MAX_VOXELS:
        raise CaseError(path, f"shape {shape} is over {MAX_VOXELS} voxels", "crop the scan")
    if image.get_data_dtype().kind not in "iuf":
        raise CaseError(
            path, f"voxels of type {image.get_data_dtype()}, expected numbers", "export it again"
        )
    check_affine(path, shape, np.asarray(image.affine, np.float64))


def _check_grid(path: Path, mask: Volume, image: Volume) -> None:
    most = 0.5 * min(image.spacing)
    if nifti_stem(image.path) is None and mask.array.shape == image.array.shape:
        # Converters store a series with axes of their own: the axes may differ, the places not.
        ours, theirs = (ras_affine(v.stored_affine, v.stored_shape) for v in (image, mask))
        check_apart(path, image.array.shape, theirs - ours, most)
        return
    if mask.stored_shape != image.stored_shape:
        raise CaseError(
            path,
            f"shape {mask.stored_shape} but image is {image.stored_shape}",
            "re-export the mask",
        )
    check_apart(path, image.stored_shape, mask.stored_affine - image.stored_affine, most)
