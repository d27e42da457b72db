"""Gradient inversion: draw the patch whose gradient looks like an update that was seen.

After Geiping et al. (NeurIPS 2020): the attacker knows the network, its weights and the labels, and
moves an image until the cosine of its gradient with the update is largest, with total variation as
prior. Knowing the labels and a step of one patch makes it an optimistic attacker; better priors
than total variation exist, so what he gets is a lower bound all the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import SSIMMetric
from torch import nn

from fedseg.segmentation.losses import Loss

__all__ = [
    "Likeness",
    "PatchLoss",
    "flat_gradient",
    "guess_from_labels",
    "invert",
    "likeness",
    "segmentation_loss",
    "step_update",
]

PatchLoss = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""`(network, images [B, 1, x, y, z]) -> scalar`; the labels are in it: the attacker knows them."""

_LOWEST, _HIGHEST = -2.0, 2.0
"""What preprocessing clips intensities to."""

_SMOOTH = 0.03
"""Weight of total variation: on phantoms .01 to .03 gave the best patches, .001 and .1 worse."""

_STEP = 0.1
"""Peak step of Adam, in units of the network's input."""


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How like the true patch an image is.

    Attributes:
        psnr: Peak signal-to-noise ratio, dB, of a peak as wide as the network's input range.
        ssim: Structural similarity, at most 1.
    """

    psnr: float
    ssim: float


def segmentation_loss(
    loss: Loss, labels: torch.Tensor, annotated: Sequence[Sequence[str]]
) -> PatchLoss:
    """Mean loss of patches whose labels are known: int64 `[B, x, y, z]`, and regions of each."""

    def of_images(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        logits = network(images)
        losses = [
            loss(logits[i : i + 1], labels[i : i + 1], regions)
            for i, regions in enumerate(annotated)
        ]
        return torch.stack(losses).mean()

    return of_images


def step_update(
    network: nn.Module, loss: PatchLoss, images: torch.Tensor, *, learning_rate: float
) -> np.ndarray:
    """Update of one step of plain gradient descent, float32 `[N]`."""
    update = -learning_rate * flat_gradient(network, loss(network, images))
    return np.asarray(update.cpu().numpy(), np.float32)


def flat_gradient(network: nn.Module, loss: torch.Tensor, *, keep: bool = False) -> torch.Tensor:
    """Gradient of a loss by all trainable parameters, `[N]`; `keep` lets it be derived again."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, create_graph=keep)
    return torch.cat([part.reshape(-1) for part in found])


def invert(
    network: nn.Module,
    loss: PatchLoss,
    update: np.ndarray,
    *,
    shape: Sequence[int],
    iterations: int,
    seed: int,
    smooth: float = _SMOOTH,
) -> torch.Tensor:
    """Reconstruct the patches of one gradient step.

    Args:
        network: With the weights that the step began with; in float32, as built.
        loss: What the step descended.
        update: What was seen of it, `[N]`; its scale doesn't matter.
        shape: Of the images, `[B, 1, x, y, z]`.
        iterations: Steps of the attacker.
        seed: Draws the first guess.
        smooth: Weight of total variation.

    Returns:
        Images float32 of that shape, within what preprocessing clips to.
    """
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(tuple(shape), generator=generator).to(device).requires_grad_()
    goal = _direction(torch.from_numpy(-update.astype(np.float64)).float().to(device))
    optimizer = torch.optim.Adam([images], lr=_STEP)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        found = _direction(flat_gradient(network, loss(network, images), keep=True))
        distance = 1 - found @ goal + smooth * _total_variation(images)
        (images.grad,) = torch.autograd.grad(distance, [images])
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(_LOWEST, _HIGHEST)
    return images.detach()


def _direction(vector: torch.Tensor) -> torch.Tensor:
    length = torch.linalg.vector_norm(vector)
    direction: torch.Tensor = vector / length.clamp_min(torch.finfo(vector.dtype).tiny)
    return direction


def _total_variation(images: torch.Tensor) -> torch.Tensor:
    steps = [images.diff(dim=axis).abs().mean() for axis in (2, 3, 4)]
    return torch.stack(steps).sum()


def guess_from_labels(
    labels: torch.Tensor, images: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """Guess a patch without any update: its labels, each in its mean intensity elsewhere.

    Args:
        labels: int64 `[P, x, y, z]` of other patches.
        images: `[P, 1, x, y, z]` of these.
        known: Labels `[x, y, z]` of the patch to guess.

    Returns:
        float32 `[x, y, z]`.
    """
    guess = torch.full(known.shape, float(images.mean()))
    for label in np.unique(known.numpy()).tolist():
        inside = images[:, 0][labels == label]
        if inside.numel():
            guess[known == label] = inside.mean()
    return guess


def likeness(image: torch.Tensor, truth: torch.Tensor) -> Likeness:
    """Compare an image with the true patch, both `[x, y, z]`."""
    peak = _HIGHEST - _LOWEST
    error = float((image.double() - truth.double()).square().mean())
    # Equal images have no ratio; float32 can't tell more than this.
    psnr = 10 * np.log10(peak**2 / max(error, 1e-12))
    side = min(7, *(n - (n + 1) % 2 for n in truth.shape))
    measure = SSIMMetric(spatial_dims=3, data_range=peak, win_size=side)
    return Likeness(psnr=float(psnr), ssim=float(measure(image[None, None], truth[None, None])))
