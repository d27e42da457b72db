"""Read and write NIfTI volumes, always handing out RAS axis order and checked contents."""

import gzip
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import (
    apply_orientation,
    io_orientation,
    ornt_transform,
)
from nibabel.spatialimages import HeaderDataError

from fedseg.errors import CaseError

__all__ = ["MAX_VOXELS", "Volume", "read_image", "read_mask", "write_mask"]

MAX_VOXELS = 2**30
"""A header that claims more is refused before anything is allocated."""

_MAX_EXTENT = 3000.0
"""mm along an axis; a wrong unit would resample to more voxels than memory holds."""

_RAS = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A scan or mask in RAS axis order.

    Attributes:
        array: Voxels `[X, Y, Z]`; float32 for a scan, uint8 for a mask.
        spacing: Voxel size in mm.
        stored: Header of the file, for writing a mask on the same grid.
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
    path: Path, *, image: Volume | None = None, label_map: Mapping[int, int] | None = None
) -> Volume:
    """Read a mask as uint8 labels 0 background, 1 liver, 2 tumor.

    Args:
        path: The file.
        image: The scan it belongs to: shape and affine must agree.
        label_map: Mask value to label, where the mask has values of its own.

    Raises:
        CaseError: The file is unreadable, lies on another grid, or has other values.
    """
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
    allowed = label_map if label_map is not None else {0: 0, 1: 1, 2: 2}
    allowed = {0: 0, **allowed}
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
    stored = apply_orientation(labels, to_stored).astype(np.uint8)
    header = like.stored.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"], header["cal_max"] = 0, 0
    # A scan's free text and extensions (DICOM headers) can name a patient; a mask needs none.
    for text in ("aux_file", "intent_name", "db_name"):
        header[text] = b""
    header["descrip"] = b"fedseg"
    header["intent_code"] = 0
    header.extensions.clear()
    image = nib.Nifti1Image(np.ascontiguousarray(stored), None, header)
    image.header.set_slope_inter(1, 0)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        nib.save(image, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, dtype: type) -> Volume:
    try:
        if not path.is_file():
            raise CaseError(path, "no such file", "correct the path")
        with np.errstate(all="ignore"):  # what overflows is found as Inf
            image = nib.load(path)
            _check_header(path, image)
            array = _voxels(path, image, dtype)
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
    affine = np.asarray(image.affine, np.float64)
    orientation = io_orientation(affine)
    array = apply_orientation(array, orientation)
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
    return Volume(
        array=np.ascontiguousarray(array),
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        stored=image.header,
        stored_shape=tuple(image.shape),
        stored_affine=affine,
        path=path,
    )


def _voxels(path: Path, image: Any, dtype: type) -> np.ndarray:
    """Read the voxels; memory is taken for what the file holds, not for what its header claims."""
    voxels = int(np.prod([int(n) for n in image.shape], dtype=object))
    needed = int(image.dataobj.offset) + voxels * image.get_data_dtype().itemsize
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            content = file.read(needed)
            file.read(2**20)  # to the end, where the checksum is; nibabel stops before it
        got = len(content)
    else:
        content, got = b"", path.stat().st_size
    if got < needed:
        raise CaseError(
            path,
            f"damaged or truncated: {got} bytes, expected {needed} for shape {image.shape}",
            "copy or export it again",
        )
    if content:
        image = image.from_bytes(content)
    return np.asarray(image.get_fdata(dtype=dtype, caching="unchanged"))


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
    _check_affine(path, shape, np.asarray(image.affine, np.float64))


def _check_affine(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> None:
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / np.where(sizes > 0, sizes, 1)
    finite = np.all(np.isfinite(affine)) and np.all(np.isfinite(directions))
    if not finite or abs(np.linalg.det(directions)) < 1e-3:
        raise CaseError(
            path,
            "affine is singular or not finite, expected three directions",
            "export it with its geometry",
        )
    extent = sizes * shape
    if extent.min() < 1 or extent.max() > _MAX_EXTENT:
        raise CaseError(
            path,
            f"covers {' x '.join(f'{mm:.3g}' for mm in extent)} mm, expected 1 to {_MAX_EXTENT:g}",
            "correct its voxel size: it must be in mm",
        )


def _check_grid(path: Path, mask: Volume, image: Volume) -> None:
    if mask.stored_shape != image.stored_shape:
        raise CaseError(
            path,
            f"shape {mask.stored_shape} but image is {image.stored_shape}",
            "re-export the mask",
        )
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in image.stored_shape])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    apart = np.linalg.norm(((mask.stored_affine - image.stored_affine) @ corners)[:3], axis=0).max()
    if apart > 0.5 * min(image.spacing):
        raise CaseError(
            path,
            f"affine puts the mask {apart:.3g} mm away from its image",
            "re-export the mask on the image's grid",
        )
