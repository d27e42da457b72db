"""Error feedback: what compression loses of an update is kept at the site and sent with the next.

Without it the same small changes are lost in every round; with it nothing is lost, only late
(Seide et al., 1-Bit SGD, Interspeech 2014; Karimireddy et al., Error Feedback Fixes SignSGD, ICML
2019).
"""

import logging
from pathlib import Path

import torch

from fedseg.federation.compression import Scheme, decode, encode
from fedseg.segmentation.kept import load_kept, save_kept

__all__ = ["encode_with_feedback"]

log = logging.getLogger(__name__)


def encode_with_feedback(
    vector: torch.Tensor, scheme: Scheme, *, before: Path, after: Path
) -> dict[str, torch.Tensor]:
    """Add what earlier rounds lost, pack, and keep what this round loses.

    Args:
        vector: The update, float32 `[N]`.
        scheme: How it is packed.
        before: The site's folder of the round that this one builds on; without a residual of this
            size there, the site starts with none.
        after: The site's folder of this round.

    Raises:
        ValueError: A value isn't finite, or larger than 2^120.
    """
    size = vector.numel()
    whole = vector + _residual(before, size)
    parts = encode(whole, scheme)
    save_kept(after, "residual", {"residual": whole - decode(parts, scheme, 0, size)})
    return parts


def _residual(folder: Path, size: int) -> torch.Tensor:
    """Read what the last round lost, zeros where nothing fits."""
    found = (load_kept(folder, "residual") or {}).get("residual")
    if found is None:
        log.info("no residual of %s: compression starts with none", folder.name)
    elif found.shape != (size,) or found.dtype != torch.float32:
        log.warning("residual of %s doesn't fit: compression starts with none", folder.name)
    else:
        return found
    return torch.zeros(size)
