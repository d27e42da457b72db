"""Draw a prediction on its scan: one axial slice as a PNG, as a radiologist looks at it."""

import struct
import zlib

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from fedseg.data.plan import REGIONS
from fedseg.data.preprocess import modality_of

__all__ = ["COLOURS", "axial_slice", "draw_overlay", "encode_png"]

COLOURS = {"liver": (86, 180, 233), "tumor": (230, 159, 0)}
"""Sky blue and orange of Okabe and Ito: told apart on grey, with any kind of colour blindness."""

_ABDOMEN = (-160.0, 240.0)
"""HU of the usual soft-tissue window: width 400, level 40."""

_SIDE = 512
"""Longer side of a picture in pixels."""

_FILL = 0.3
"""Opacity of a filled region: the tissue below stays visible."""

Picture = npt.NDArray[np.float32]


def axial_slice(prediction: np.ndarray, truth: np.ndarray | None = None) -> int:
    """Choose the slice with the largest tumour, else the largest liver, else the middle one.

    Args:
        prediction: Labels `[X, Y, Z]`.
        truth: The mask on the same grid; where there is one, it decides.
    """
    for labels in (prediction,) if truth is None else (truth, prediction):
        for lowest in sorted(REGIONS.values(), reverse=True):
            area: npt.NDArray[np.intp] = np.count_nonzero(labels >= lowest, axis=(0, 1))
            if area.any():
                return int(area.argmax())
    return int(prediction.shape[2]) // 2


def draw_overlay(
    image: np.ndarray,
    prediction: np.ndarray,
    *,
    truth: np.ndarray | None = None,
    spacing: tuple[float, float, float],
    window: tuple[float, float] | None = None,
    at: int | None = None,
) -> bytes:
    """Draw one axial slice with the prediction's outlines on it.

    Liver is blue, tumour orange. With a mask to compare with, its regions are filled: colour
    outside an outline was missed, an outline without colour is a false alarm. Without one, the
    prediction is filled. Seen from the feet: the patient's right is on the left, front is up.

    Args:
        image: Scan `[X, Y, Z]` in RAS axis order (HU for CT).
        prediction: Labels on the same grid; all 0 draws the scan alone.
        truth: The mask on the same grid.
        spacing: Voxel size in mm.
        window: What is black and white; None: -160 to 240 HU for CT, 1 to 99% of an MR.
        at: Index of the slice; None: see `axial_slice`.

    Returns:
        A PNG file.

    Raises:
        ValueError: Shapes differ or aren't three-dimensional.
    """
    for labels in (prediction,) if truth is None else (prediction, truth):
        if labels.shape != image.shape or image.ndim != 3:
            raise ValueError(f"labels {labels.shape}: expected the image's shape {image.shape}")
    z = axial_slice(prediction, truth) if at is None else at
    low, high = window or _usual_window(image)
    shape = _pixels(image.shape, spacing)
    grey = np.clip((image[:, :, z].astype(np.float32) - low) / max(high - low, 1e-6), 0, 1)
    picture = np.repeat(_seen_from_the_feet(grey, shape)[..., None], 3, axis=2) * 255
    filled = prediction if truth is None else truth
    for region, lowest in REGIONS.items():
        # A tumour isn't liver-coloured: its own colour must not be mixed with blue.
        inside = filled[:, :, z] == 1 if region == "liver" else filled[:, :, z] >= lowest
        _paint(picture, _region(inside, shape), COLOURS[region], _FILL)
    for region, lowest in REGIONS.items():
        inside = _region(prediction[:, :, z] >= lowest, shape)
        _paint(picture, inside & ~ndimage.binary_erosion(inside, iterations=2), COLOURS[region], 1)
    return encode_png(np.round(picture).astype(np.uint8))


def _usual_window(image: np.ndarray) -> tuple[float, float]:
    if modality_of(image, "auto") == "ct":
        return _ABDOMEN
    low, high = np.percentile(image, (1, 99))
    return float(low), float(high)


def _pixels(shape: tuple[int, ...], spacing: tuple[float, float, float]) -> tuple[int, int]:
    """Height and width of the picture: square pixels, whatever the voxels are."""
    width, height = shape[0] * spacing[0], shape[1] * spacing[1]
    scale = _SIDE / max(width, height)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _seen_from_the_feet(plane: np.ndarray, shape: tuple[int, int]) -> Picture:
    """Turn `[x, y]`, x to the patient's right and y to the front, into rows and columns."""
    rows = plane[::-1, ::-1].T.astype(np.float32)
    scales = [wanted / n for wanted, n in zip(shape, rows.shape, strict=True)]
    picture: Picture = ndimage.zoom(rows, scales, order=1, mode="nearest", grid_mode=True)
    return picture


def _region(inside: np.ndarray, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    if not inside.any():
        return np.zeros(shape, bool)
    # Interpolated and cut at one half, an outline is smooth where voxels are large.
    return np.asarray(_seen_from_the_feet(inside, shape) >= 0.5)


def _paint(
    picture: Picture, where: np.ndarray, colour: tuple[int, int, int], opacity: float
) -> None:
    picture[where] += opacity * (np.array(colour, np.float32) - picture[where])


def encode_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode `[height, width, 3]` (PNG specification, third edition)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(rows, 6)),
            chunk(b"IEND", b""),
        )
    )
