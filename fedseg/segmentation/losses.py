"""Losses: `(logits, labels, annotated) -> scalar`.

`annotated` names the regions the site annotates. A class it doesn't is merged into the class that
its voxels are labelled as (marginal loss; Shi et al., Medical Image Analysis 2021).
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

__all__ = ["LOSSES", "dice_ce"]

Loss = Callable[[torch.Tensor, torch.Tensor, Sequence[str]], torch.Tensor]


def dice_ce(logits: torch.Tensor, labels: torch.Tensor, annotated: Sequence[str]) -> torch.Tensor:
    """Soft Dice of the foreground classes plus cross-entropy, both a mean over samples.

    Dice is taken per sample and class (Milletari et al., 3DV 2016, without the squares), so that
    the loss of a batch is the mean of its samples' losses.

    Args:
        logits: `[B, C, x, y, z]`.
        labels: int64 `[B, x, y, z]`, values 0, 1, 2.
        annotated: Regions of the labels, `("liver", "tumor")` or `("liver",)`.

    Returns:
        A scalar.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if "tumor" not in annotated:
        logits = torch.cat([logits[:, :1], torch.logsumexp(logits[:, 1:], 1, keepdim=True)], 1)
        labels = labels.clamp(max=1)
    log_probabilities = functional.log_softmax(logits, 1)
    cross_entropy = functional.nll_loss(log_probabilities, labels)
    probabilities = log_probabilities.exp()[:, 1:]
    truth = torch.stack([labels == c for c in range(1, logits.shape[1])], 1).to(logits.dtype)
    space = (2, 3, 4)
    overlap = (probabilities * truth).sum(space)
    total = probabilities.sum(space) + truth.sum(space)
    dice = (2 * overlap + 1) / (total + 1)
    return 1 - dice.mean() + cross_entropy


LOSSES: dict[str, Loss] = {"dice-ce": dice_ce}
