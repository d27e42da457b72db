"""Clip a vector to an L2 norm: what one site or case can change is bounded by it."""

import math
from collections.abc import Iterable

import torch

__all__ = ["clip_factor", "norm_of"]

_MARGIN = 1e-6
"""Rounding to float32 can't take a clipped vector past its bound."""


def norm_of(tensors: Iterable[torch.Tensor]) -> float:
    """L2 norm of all tensors as one vector, summed in float64."""
    # MPS has no float64. One number is read at the end: reading makes a GPU wait for Python.
    parts = [(t.cpu() if t.device.type == "mps" else t).double() for t in tensors]
    squares = [part.square().sum() for part in parts]
    return math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0


def clip_factor(norm: float, clip: float) -> float:
    """Factor that takes a vector of that norm down to `clip`; 1 where it is within, as 0 is.

    All of the vector shrinks alike (flat clipping; McMahan et al., ICLR 2018). A norm that isn't
    finite gives 0: such a vector counts for nothing.
    """
    if not math.isfinite(norm):
        return 0.0
    return 1.0 if norm <= clip else (1 - _MARGIN) * clip / norm
