"""Recognise the same scan again, in one site or, by a keyed digest, across sites."""

import hashlib
import hmac

import numpy as np
import numpy.typing as npt

__all__ = ["case_digest", "content_digest", "keyed_digest"]

_WIDEST = 2**20
_FEWEST = 256
_CHUNK = 2**22
_TINY = 1e-300


def content_digest(array: npt.NDArray[np.float32]) -> bytes:
    """Digest of a scan's values that survives saving it again, turned or with other voxel sizes.

    It is the SHA-256 of the sorted shape and of how often each whole number occurs, so flips,
    order of axes, type, compression and affine don't matter: LiTS has scans of 3D-IRCADb flipped
    and with the spacing reset. Two different scans don't share all counts, for their noise differs.

    Args:
        array: Finite voxels `[X, Y, Z]`.
    """
    low, high = float(array.min()), float(array.max())
    scale, first = 1.0, float(np.rint(low))
    if not _FEWEST <= high - low <= _WIDEST:  # rounding would lose the scan, or there is no room
        scale, first = 65535 / max(high - low, _TINY), 0.0
    flat = array.reshape(-1)
    bins = int(np.rint(high - first)) + 1 if scale == 1.0 else 65536
    counts = np.zeros(bins, np.int64)
    for start in range(0, flat.size, _CHUNK):
        values = flat[start : start + _CHUNK].astype(np.float64)
        levels = np.rint(values) - first if scale == 1.0 else np.rint((values - low) * scale)
        counts += np.bincount(levels.astype(np.int64), minlength=bins)
    head = np.array([*sorted(array.shape), first, bins], "<f8")
    return hashlib.sha256(head.tobytes() + counts.astype("<i8").tobytes()).digest()


def case_digest(array: npt.NDArray[np.float32], key: bytes) -> str:
    """Digest by which sites of one study find a scan that several of them hold.

    Without the key nobody can tell whether a scan they have is behind a digest, and digests of two
    studies can't be compared. Whoever has the key and the scan can: that is its purpose.

    Args:
        array: Finite voxels `[X, Y, Z]`.
        key: The study's key, at least 16 bytes.

    Returns:
        HMAC-SHA256 of the scan's content digest, hexadecimal.
    """
    return keyed_digest(content_digest(array), key)


def keyed_digest(content: bytes, key: bytes) -> str:
    """Key a content digest; see `case_digest`.

    Raises:
        ValueError: The key is shorter than 16 bytes.
    """
    if len(key) < 16:
        raise ValueError("key: expected at least 16 bytes")
    return hmac.new(key, content, hashlib.sha256).hexdigest()
