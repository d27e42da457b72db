"""Updates wait on disk, as they arrived, until the round's checkpoint is whole.

Memory is then the same for any number of sites, every reducer may read the updates as often as it
likes, and a server killed while it collects still has what came. A file is read range by range and
never mapped: pages of a mapping count as this process's memory.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedseg.errors import StudyError
from fedseg.federation.codecs import Parts
from fedseg.federation.compression import Scheme, decode, indexed, make_scheme
from fedseg.segmentation.tensor_file import write_tensors

__all__ = ["SpooledUpdate", "StoredArray", "check_room", "no_room", "open_update", "spool"]

_DTYPES = {"F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1"}
"""Types that compression sends, as safetensors and numpy name them."""


@dataclass(frozen=True, kw_only=True)
class SpooledUpdate:
    """A site's update on disk.

    Attributes:
        site: Name of the site.
        size: Number of values of the flat update.
        scheme: How it is compressed.
        parts: The encoded arrays: on disk, or tensors.
        scale: Factor of every value: below 1 where the server clips the update.
    """

    site: str
    size: int
    scheme: Scheme
    parts: Parts
    scale: float = 1.0

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        """Decode values `[start, stop)` as float32; not to be written to."""
        values = decode(self.parts, self.scheme, start, stop)
        return values if self.scale == 1 else values * self.scale


@dataclass(frozen=True, kw_only=True)
class StoredArray:
    """An array `[N]` in a file, of which ranges are read.

    Attributes:
        path: The file.
        offset: Byte at which it begins.
        dtype: Its type, as numpy names it.
        length: Number of values.
    """

    path: Path
    offset: int
    dtype: str
    length: int

    def __getitem__(self, span: slice, /) -> torch.Tensor:
        """Read a range from the file.

        Raises:
            ValueError: The file has become shorter.
        """
        start, stop, _ = span.indices(self.length)
        count = max(0, stop - start)
        offset = self.offset + start * np.dtype(self.dtype).itemsize
        values = np.fromfile(self.path, self.dtype, count, offset=offset)
        if len(values) != count:
            raise ValueError(f"{self.path}: the file has become shorter")
        return torch.from_numpy(values)


def spool(folder: Path, site: str, parts: Mapping[str, torch.Tensor], *, scheme: Scheme) -> Path:
    """Keep a site's checked arrays; the file has its name only once it is whole.

    Raises:
        StudyError: The disk is full or can't be written; what was spooled before is still there.
    """
    path = folder / f"{site}.safetensors"
    notes = {"scheme": scheme.name, "top-k": repr(scheme.top_k)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, parts, metadata=notes)
    except OSError as error:
        raise no_room(folder, error) from None
    return path


def no_room(folder: Path, error: OSError) -> StudyError:
    """Make the error of an update that can't be written."""
    return StudyError(
        f"{folder}: an update can't be written ({error}); free space, then go on with output.resume"
    )


def open_update(path: Path, *, size: int) -> SpooledUpdate:
    """Open a spooled update of `size` values.

    Raises:
        ValueError: The file is damaged, or holds no update of that size: a machine that lost power
            may leave such a file, a killed process doesn't.
    """
    try:
        header, start = _header(path)
        notes = header.pop("__metadata__")
        scheme = make_scheme(notes["scheme"], top_k=float(notes["top-k"]))
        stored = {
            name: StoredArray(
                path=path,
                offset=start + entry["data_offsets"][0],
                dtype=_DTYPES[entry["dtype"]],
                length=entry["shape"][0],
            )
            for name, entry in header.items()
        }
        end = start + max(entry["data_offsets"][1] for entry in header.values())
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a spooled update ({error})") from None
    expected = {
        name: (np.dtype(str(dtype).removeprefix("torch.")), length)
        for name, (dtype, length) in scheme.sizes(size).items()
    }
    found = {name: (np.dtype(array.dtype), array.length) for name, array in stored.items()}
    if found != expected or path.stat().st_size != end:
        raise ValueError(f"{path}: not a whole update of {size} values")
    return SpooledUpdate(
        site=path.stem, size=size, scheme=scheme, parts=indexed(stored, scheme, size=size)
    )


def _header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Read a safetensors header: its length in 8 bytes, then JSON; and where the data begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("a header longer than the file")
        return json.loads(file.read(length)), 8 + length


def check_room(folder: Path, *, needed: int) -> None:
    """Check before a round that its updates fit on the disk.

    Args:
        folder: Where they will be kept; made if it isn't there.
        needed: Bytes.

    Raises:
        StudyError: They don't.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StudyError(
            f"{folder}: {free / 1024**2:.0f} MB free; a round needs {needed / 1024**2:.0f} MB for "
            "the updates; free space or set output.dir"
        )
