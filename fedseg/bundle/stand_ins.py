"""In a bundle these stand in for FedSeg's types that need more packages than MONAI.

The modules that are copied beside it use no more of them than this.
"""

from types import SimpleNamespace
from typing import Any

__all__ = ["CLASSES", "MAX_VOXELS", "Plan", "Volume"]

CLASSES = 3
"""Background, liver, tumor."""

MAX_VOXELS = 2**30


class Plan(SimpleNamespace):
    """The plan as it is in inference.json."""

    def __init__(self, **fields: Any) -> None:
        """Take JSON's lists as the tuples that they were."""
        super().__init__(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


class Volume(SimpleNamespace):
    """A scan in RAS axis order: `array` `[X, Y, Z]`, `spacing` in mm, `path` for errors."""
