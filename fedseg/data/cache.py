"""Preprocess a case once and keep it as memory-mapped arrays.

A round then reads only the patches it needs; in a deployment each message is a new process, so
what is dear lies on disk.
"""

import errno
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedseg.data.cases import Case, files_of
from fedseg.data.plan import REGIONS, Plan
from fedseg.data.preprocess import Modality, Placement, check_size, prepare, prepare_labels
from fedseg.data.volumes import read_image, read_mask
from fedseg.errors import CaseError, DataError
from fedseg.site_config import LabelMap

__all__ = ["CachedCase", "cache_bytes", "cached_case"]

_VERSION = 2
"""Raise it when preprocessing changes: old entries are then not found."""

_MAX_FOREGROUND = 20_000

_RECIPES_KEPT = 2
"""Plans a case is kept for: two studies side by side don't undo each other's work."""


@dataclass(frozen=True, kw_only=True)
class CachedCase:
    """A preprocessed case; arrays are memory-mapped, so holding many costs no memory.

    Attributes:
        image: float16 `[x, y, z]`.
        labels: uint8 `[x, y, z]`.
        foreground: Region to flat indices of up to 20,000 of its voxels.
        truth: uint8 `[X, Y, Z]`, the mask in the scan's own grid (RAS axis order).
        placement: Where the crop lies, for bringing a prediction back to that grid.
    """

    image: np.ndarray
    labels: np.ndarray
    foreground: dict[str, np.ndarray]
    truth: np.ndarray
    placement: Placement

    def release(self) -> None:
        """Give back the memory of what was read; the arrays stay open and can be read again.

        Touched pages of a mapped file count as the process's own, so a site's resident memory
        would grow with its number of cases.
        """
        for array in (self.image, self.labels, self.truth):
            mapped = getattr(array, "_mmap", None)
            if mapped is not None and hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)


def cached_case(
    case: Case,
    plan: Plan,
    cache: Path,
    *,
    modality: Modality = "auto",
    label_map: LabelMap | None = None,
) -> CachedCase:
    """Open a case's arrays, making them first where file, plan or code are new.

    Raises:
        CaseError: The case can't be used.
        DataError: The cache can't be written.
    """
    folder = cache / "cases" / _place(case) / _recipe(case, plan, modality, label_map)
    if folder.is_dir():
        try:
            found = _open(folder)
            os.utime(folder)  # the least recently used recipe goes first
            return found
        except (OSError, EOFError, ValueError, KeyError):
            # A power cut can leave empty files behind a finished rename.
            shutil.rmtree(folder, ignore_errors=True)
    try:
        _make(folder, case, plan, modality, label_map)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        # NumPy's own "N requested and M written" has no errno.
        reason = "disk is full" if full else error.strerror or str(error)
        raise DataError(
            f"{cache}: can't write the cache ({reason}); free space or set cache-dir"
        ) from None
    _evict(folder.parent)
    return _open(folder)


def cache_bytes(cache: Path) -> int:
    """Bytes that preprocessed cases take."""
    files = (cache / "cases").glob("*/*/*")
    return sum(path.stat().st_size for path in files if path.is_file())


def _evict(entries: Path) -> None:
    """Keep the recipes of a case that were used last; an open array outlives its file."""
    folders = [path for path in entries.iterdir() if not path.name.startswith(".")]
    folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for old in folders[_RECIPES_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def _open(folder: Path) -> CachedCase:
    def array(name: str) -> np.ndarray:
        stored: np.ndarray = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return stored

    placement = json.loads((folder / "placement.json").read_text(encoding="utf-8"))
    return CachedCase(
        image=array("image"),
        labels=array("labels"),
        foreground={name: array(name) for name in REGIONS},
        truth=array("truth"),
        placement=Placement.from_json(placement),
    )


def _place(case: Case) -> str:
    """Name of a case's entries: where it lies, so that a changed file replaces its old entry."""
    return _digest([str(path.resolve()) for path in (case.image, case.mask)])


def _recipe(case: Case, plan: Plan, modality: Modality, label_map: LabelMap | None) -> str:
    """Name of one entry: identity of the files, plan and code."""
    identity = []
    for path in (case.image, case.mask):
        try:
            stats = [file.stat() for file in files_of(path)]
        except OSError:
            raise CaseError(path, "no such file", "correct the path") from None
        identity.append([[stat.st_size, stat.st_mtime_ns] for stat in stats])
    steps = plan.model_dump(include={"spacing", "ct_window", "mr_percentiles", "patch_size"})
    return _digest(
        [_VERSION, identity, steps, modality, sorted((label_map or {}).items(), key=str)]
    )


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _make(
    folder: Path, case: Case, plan: Plan, modality: Modality, label_map: LabelMap | None
) -> None:
    scan = read_image(case.image)
    mask = read_mask(case.mask, image=scan, label_map=label_map)
    prepared = prepare(scan, plan, modality=modality)
    check_size(prepared.image, plan, case.image)
    labels = prepare_labels(mask.array, prepared)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        np.save(temporary / "image.npy", prepared.image.astype(np.float16))
        np.save(temporary / "labels.npy", labels)
        np.save(temporary / "truth.npy", mask.array)
        (temporary / "placement.json").write_text(json.dumps(prepared.placement.to_json()))
        for name, lowest in REGIONS.items():
            np.save(temporary / f"{name}.npy", _some_indices(labels >= lowest))
        try:
            os.rename(temporary, folder)
        except OSError:
            # Another process made the same entry meanwhile; its content is the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _some_indices(region: np.ndarray) -> np.ndarray:
    indices = np.flatnonzero(region)
    if indices.size > _MAX_FOREGROUND:
        indices = np.random.default_rng(0).choice(indices, _MAX_FOREGROUND, replace=False)
    return np.sort(indices).astype(np.int64)
