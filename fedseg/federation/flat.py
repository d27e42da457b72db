"""The shared parameters as one flat float32 vector: what is compressed, clipped and averaged.

Names, shapes and order come from the receiver's own model, never from what arrived.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["Layout", "flatten", "layout_of", "unflatten"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each tensor lies in the flat vector.

    Attributes:
        shapes: Shape of each tensor, in the order they are laid out: by name.
        dtypes: Type of each tensor in the model; the vector itself is float32.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def digest(self) -> str:
        """What tells this model's names and shapes from another's: hex, 64 letters."""
        return hashlib.sha256(json.dumps(list(self.shapes.items())).encode()).hexdigest()

    def spans(self) -> dict[str, tuple[int, int]]:
        """Start and stop of each tensor in the vector."""
        spans, start = {}, 0
        for name, shape in self.shapes.items():
            spans[name] = (start, start + math.prod(shape))
            start = spans[name][1]
        return spans


def layout_of(state: Mapping[str, torch.Tensor]) -> Layout:
    """Lay tensors out by name, so that a dict's order never matters."""
    names = sorted(state)
    return Layout(
        shapes={name: tuple(state[name].shape) for name in names},
        dtypes={name: state[name].dtype for name in names},
    )


def flatten(state: Mapping[str, torch.Tensor], layout: Layout) -> torch.Tensor:
    """Join tensors to one float32 vector `[N]` on the CPU."""
    vector = torch.empty(layout.size, dtype=torch.float32)
    for name, (start, stop) in layout.spans().items():
        vector[start:stop] = state[name].detach().reshape(-1)
    return vector


def unflatten(vector: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """Cut a vector `[N]` into tensors of the model's shapes and types (views where it can)."""
    return {
        name: vector[start:stop].reshape(layout.shapes[name]).to(layout.dtypes[name])
        for name, (start, stop) in layout.spans().items()
    }
