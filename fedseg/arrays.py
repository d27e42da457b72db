"""Tensors on the wire: .npy arrays, decoded under bounds.

`np.load` allocates whatever a header claims; here nothing is decoded that isn't exactly the tensor
that the receiver's own model expects.

torch takes seconds to import, and most answers of a site have no tensor: it is imported where it is
used.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord

if TYPE_CHECKING:
    import torch

__all__ = ["array_bytes", "arrays_to_state", "state_to_arrays"]

_HEADER_BYTES = 4096
"""An array travels as .npy; its header is far shorter than this."""


def state_to_arrays(
    state: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None
) -> ArrayRecord:
    """Pack tensors as .npy arrays, cast to `dtype` where one is given."""
    return ArrayRecord(
        {
            name: Array(np.asarray(_cast(tensor.detach().cpu(), dtype).numpy(), order="C"))
            for name, tensor in state.items()
        }
    )


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None:
        return tensor
    import torch

    most = torch.finfo(dtype).max  # beyond it a cast gives infinity
    return tensor.clamp(-most, most).to(dtype)


def array_bytes(record: ArrayRecord) -> int:
    """Bytes that packed arrays take on the wire."""
    return sum(len(array.data) for array in record.values())


def arrays_to_state(
    record: ArrayRecord, like: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Unpack arrays after checking that they are just those of `like`.

    Nothing is decoded that isn't exactly the tensor it is for, so a hostile header can't make this
    side allocate more than the model.

    Raises:
        ValueError: Names, shapes, types or sizes differ.
    """
    import torch

    if set(record) != set(like):
        raise ValueError("other names than the model's")
    state = {}
    for name, tensor in like.items():
        array = record[name]
        dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
        declared = (array.stype, array.dtype, tuple(array.shape))
        if declared != ("numpy.ndarray", dtype.name, tuple(tensor.shape)):
            raise ValueError("other shapes or types than the model's")
        state[name] = torch.from_numpy(_decode(array.data, tuple(tensor.shape), dtype))
    return state


def _decode(data: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Read a .npy of just this shape and type; `np.load` allocates whatever the header claims."""
    file = io.BytesIO(data[:_HEADER_BYTES])
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError("another .npy version")
    header = np.lib.format.read_array_header_1_0(file)
    if header != (shape, False, dtype):
        raise ValueError("a header with another shape or type")
    if len(data) != file.tell() + dtype.itemsize * math.prod(shape):
        raise ValueError("another number of bytes")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape).copy()
