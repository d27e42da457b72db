"""Record-level differential privacy: DP-SGD (Abadi et al., CCS 2016), the record is the case.

In each step every case is drawn with chance q, on its own and in secret. All patches of a drawn
case are one forward pass and one gradient g_k, over all parameters that are trained; it is clipped
as a whole, so that with or without a case the sum moves by C at most. The optimiser follows

    (sum_k g_k min(1, C / |g_k|) + N(0, (z C)^2)) / (q n)

with n the number of cases, which is taken as public (a site tells it). One backward pass a case is
exact for any network; with patches per case it costs no more than one pass over all patches.
"""

import secrets
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from fedseg.data.augmentation import RECIPES
from fedseg.data.cache import CachedCase
from fedseg.data.patches import draw_sample
from fedseg.privacy.clipping import clip_factor, norm_of
from fedseg.privacy.noise import add_noise
from fedseg.segmentation.training import Gradient, LossOf

__all__ = ["Batch", "case_batches", "clipped_sum", "drawn_cases", "noised_gradient"]

Batch = tuple[torch.Tensor, torch.Tensor]


def drawn_cases(count: int, rate: float, rng: np.random.Generator) -> list[int]:
    """Draw each of `count` cases with chance `rate`, on its own: none may be drawn, or all."""
    return [int(i) for i in np.flatnonzero(rng.random(count) < rate)]


def case_batches(
    cases: Sequence[CachedCase],
    *,
    rate: float,
    steps: int,
    batch_size: int,
    patch_size: Sequence[int],
    foreground: float,
    augmentation: str,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    device: torch.device | None = None,
    rng: np.random.Generator | None = None,
) -> Iterator[list[Batch]]:
    """Yield for each step one batch for each case that is drawn, maybe none.

    Args:
        cases: The site's training cases.
        rate: Chance of each to be in a step.
        steps: Number of steps.
        batch_size: Patches of a drawn case: image float32 `[B, 1, x, y, z]`, labels int64
            `[B, x, y, z]`.
        patch_size: Voxels.
        foreground: Share of patches centred on a region.
        augmentation: Name of a recipe, a key of `augmentation.RECIPES`.
        spacing: mm a voxel.
        device: Where patches are changed, and yielded; the CPU by default.
        rng: By default seeded from the operating system's entropy: the accounting counts on a draw
            that nobody can repeat, so the study's seed has no part in it. Tests give one.
    """
    rng = rng or np.random.default_rng(secrets.randbits(256))
    for _ in range(steps):
        # One stream a case: what a case gives doesn't depend on who else is drawn.
        streams = rng.spawn(len(cases))
        yield [
            _patches(
                cases[index],
                streams[index],
                batch_size,
                patch_size=patch_size,
                foreground=foreground,
                recipe=augmentation,
                spacing=spacing,
                device=device or torch.device("cpu"),
            )
            for index in drawn_cases(len(cases), rate, rng)
        ]


def _patches(
    case: CachedCase,
    rng: np.random.Generator,
    count: int,
    *,
    patch_size: Sequence[int],
    foreground: float,
    recipe: str,
    spacing: Sequence[float],
    device: torch.device,
) -> Batch:
    samples = [
        draw_sample(
            case,
            rng,
            patch_size=patch_size,
            foreground=foreground,
            recipe=RECIPES[recipe],
            spacing=spacing,
            device=device,
        )
        for _ in range(count)
    ]
    images, labels = zip(*samples, strict=True)
    return torch.stack(images)[:, None], torch.stack(labels).long()


def clipped_sum(
    batches: Iterable[Batch], loss_of: LossOf, parameters: Sequence[nn.Parameter], *, clip: float
) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """Sum the clipped gradients of a step's cases.

    A gradient that isn't finite counts as zero: whether it does depends on its case alone.

    Args:
        batches: One of each drawn case.
        loss_of: Loss of a batch.
        parameters: What is trained.
        clip: Largest L2 norm of a case's gradient.

    Returns:
        The sum, one tensor a parameter; the loss of each case; the number of patches.
    """
    total = [torch.zeros_like(parameter) for parameter in parameters]
    losses: list[torch.Tensor] = []
    patches = 0
    for batch in batches:
        loss = loss_of(batch)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        used = [gradient for gradient in found if gradient is not None]
        factor = clip_factor(norm_of(used), clip)
        for part, gradient in zip(total, found, strict=True):
            if gradient is not None and factor:
                part.add_(gradient, alpha=factor)
        losses.append(loss.detach())
        patches += batch[0].shape[0]
    return total, losses, patches


def noised_gradient(
    parameters: Sequence[nn.Parameter],
    *,
    clip: float,
    noise_multiplier: float,
    expected: float,
    key: bytes | None = None,
) -> Gradient:
    """Make the `gradient` of `training.fit`.

    Args:
        parameters: What is trained.
        clip: Largest L2 norm of a case's gradient.
        noise_multiplier: Standard deviation of the noise, as a multiple of `clip`.
        expected: Cases of a step to expect, q n.
        key: Of the noise, for a test of one step; by default each step has a fresh one.
    """
    last = torch.zeros((), device=parameters[0].device)

    def gradient(batches: Sequence[Batch], loss_of: LossOf) -> tuple[torch.Tensor, int]:
        nonlocal last
        total, losses, patches = clipped_sum(batches, loss_of, parameters, clip=clip)
        vector = torch.cat([part.reshape(-1).float().cpu() for part in total])
        add_noise(vector.numpy(), noise_multiplier * clip, key=key)
        start = 0
        for parameter in parameters:
            part = vector[start : start + parameter.numel()].reshape(parameter.shape) / expected
            # Laid out as the weights are: fused optimisers walk over both as they lie in memory.
            parameter.grad = torch.empty_like(parameter).copy_(part)
            start += parameter.numel()
        last = torch.stack(losses).mean() if losses else last  # of nobody there is no loss
        return last, patches

    return gradient
