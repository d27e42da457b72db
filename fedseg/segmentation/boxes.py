"""The box around a region: what is worked on instead of a whole volume."""

import numpy as np

__all__ = ["Box", "bounding_box"]

Box = tuple[slice, slice, slice]


def bounding_box(region: np.ndarray) -> Box:
    """Smallest box that holds all of `[X, Y, Z]` that isn't 0; an empty one where all is."""
    seen = [np.zeros(n, bool) for n in region.shape]
    for row, plane in enumerate(region):  # a plane at a time: no second volume
        seen[0][row] = plane.any()
        if seen[0][row]:
            seen[1] |= plane.any(1)
            seen[2] |= plane.any(0)
    if not seen[0].any():
        return (slice(0, 0),) * 3
    x, y, z = (slice(int(side.argmax()), len(side) - int(side[::-1].argmax())) for side in seen)
    return (x, y, z)
