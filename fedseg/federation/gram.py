"""Inner products of all pairs of updates: norms, cosines and distances follow from them."""

from collections.abc import Sequence

import torch

from fedseg.federation.chunks import CHUNK, spans
from fedseg.federation.spool import SpooledUpdate

__all__ = ["gram", "squared_distances", "squared_norms"]

_STACK = 2**21
"""Most values multiplied at once, of all updates together: 16 MiB."""


def gram(updates: Sequence[SpooledUpdate]) -> torch.Tensor:
    """Multiply the matrix of updates with its transpose.

    Computed and summed in float64, chunk by chunk: the squares of any finite float32 fit, and
    nothing is lost where distances are small beside norms.

    Args:
        updates: S updates of one size, at least one.

    Returns:
        Inner products float64 `[S, S]`, in the order of the updates.
    """
    products = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    length = min(CHUNK, _STACK // len(updates))
    stack = torch.empty(0, dtype=torch.float64)
    for start, stop in spans(updates[0].size, length):
        if stack.numel() != len(updates) * (stop - start):  # one for all but the last
            stack = torch.empty(len(updates), stop - start, dtype=torch.float64)
        for row, update in zip(stack, updates, strict=True):
            row.copy_(update.chunk(start, stop))
        products.addmm_(stack, stack.T)
    return products


def squared_distances(products: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances float64 `[S, S]` from inner products; 0 on the diagonal."""
    norms = products.diagonal()
    distances = (norms[:, None] + norms[None, :] - 2 * products).clamp_min(0)
    return distances.fill_diagonal_(0)


def squared_norms(updates: Sequence[SpooledUpdate]) -> list[float]:
    """Squared L2 norm of each update, summed in float64."""
    norms = []
    for update in updates:
        chunks = (update.chunk(start, stop).double() for start, stop in spans(update.size, CHUNK))
        norms.append(sum(float(chunk.dot(chunk)) for chunk in chunks))
    return norms
