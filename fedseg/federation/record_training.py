"""A site's training with record-level differential privacy: what `training.fit` is given for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.cache import CachedCase
from fedseg.data.plan import Plan
from fedseg.privacy.mechanisms import private_steps
from fedseg.privacy.record_dp import Batch, case_batches, noised_gradient
from fedseg.segmentation.training import Gradient

__all__ = ["PrivateSteps", "private_round", "unchanged_buffers"]


@dataclass(frozen=True, kw_only=True)
class PrivateSteps:
    """What `training.fit` is given.

    Attributes:
        steps: Steps of the round.
        batches: Of each step, one batch for each case that is drawn.
        gradient: Makes the noised gradient of a step.
        patches: To expect over the round; how many were drawn would tell of the draw.
    """

    steps: int
    batches: Iterator[Sequence[Batch]]
    gradient: Gradient
    patches: int


def private_round(
    network: nn.Module,
    cases: Sequence[CachedCase],
    plan: Plan,
    study: StudyConfig,
    device: torch.device,
) -> PrivateSteps:
    """Prepare a round: how many steps, who is drawn, and how gradients are clipped and noised."""
    privacy = study.privacy
    assert privacy.clip is not None and privacy.noise_multiplier is not None
    steps = private_steps(study, batch_size=plan.batch_size)
    expected = privacy.case_rate * len(cases)
    return PrivateSteps(
        steps=steps,
        batches=case_batches(
            cases,
            rate=privacy.case_rate,
            steps=steps,
            batch_size=plan.batch_size,
            patch_size=plan.patch_size,
            foreground=study.train.foreground,
            augmentation=study.train.augmentation,
            spacing=plan.spacing,
            device=device,
        ),
        gradient=noised_gradient(
            [parameter for parameter in network.parameters() if parameter.requires_grad],
            clip=privacy.clip,
            noise_multiplier=privacy.noise_multiplier,
            expected=expected,
        ),
        patches=round(expected * plan.batch_size * steps),
    )


@contextmanager
def unchanged_buffers(network: nn.Module) -> Iterator[None]:
    """Put a network's buffers back: what a forward pass wrote into them has no noise on it."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    yield
    for name, buffer in network.named_buffers():
        buffer.copy_(before[name])
