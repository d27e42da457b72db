"""A short study in this process, whose updates a leak test attacks."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.cache import CachedCase
from fedseg.data.patches import batches, planned_batches
from fedseg.data.plan import Plan
from fedseg.privacy.leak_sites import Cohort
from fedseg.privacy.views import Setting, Terms
from fedseg.registry import resolve
from fedseg.segmentation.losses import LOSSES, Loss
from fedseg.segmentation.training import fit

__all__ = [
    "LeakOptions",
    "Rehearsal",
    "get_weights",
    "known_patches",
    "median_norm",
    "rehearse",
    "set_weights",
]

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
OnRound = Callable[[int, Floats, Terms], None]

_TRAINING, _NOISE = 62, 63
"""Keep the draws of different things apart."""


@dataclass(frozen=True, kw_only=True)
class LeakOptions:
    """How long the test trains and attacks, and how strong the protections are.

    Attributes:
        rounds: Rounds of the short study.
        steps: Optimiser steps of a site in a round.
        clip: Clip norm, as a share of the median norm of the first round's updates; for the
            reconstruction, of its step's updates.
        noise_multiplier: z of the noise N(0, (zC)^2).
        iterations: Steps of a reconstruction.
        seed: Decides everything.
    """

    rounds: int = 6
    steps: int = 16
    clip: float = 0.5
    noise_multiplier: float = 1.0
    iterations: int = 300
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Sites, and how they train.

    Attributes:
        study: Optimiser, loss and augmentation.
        plan: Network and patches.
        cohorts: The sites' cases.
        options: How long and how strong.
        device: Where networks run.
    """

    study: StudyConfig
    plan: Plan
    cohorts: Sequence[Cohort]
    options: LeakOptions
    device: torch.device

    @property
    def loss(self) -> Loss:
        """The study's loss."""
        return resolve("train.loss", self.study.train.loss, LOSSES)

    def terms(self, updates: Floats) -> Terms:
        """Strength of the protections of updates like these `[k, N]`."""
        return Terms(
            clip=self.options.clip * median_norm(updates),
            noise_multiplier=self.options.noise_multiplier,
            word_clip=self.study.privacy.secagg_clip,
        )


def rehearse(
    test: Rehearsal,
    network: nn.Module,
    name: str,
    setting: Setting,
    *,
    terms: Terms | None = None,
    on_round: OnRound | None = None,
) -> Terms:
    """Train the network in place, by rounds of averaging what the setting lets through.

    Args:
        test: Sites and options.
        network: With the weights to start from, on its device.
        name: The setting's, for the log.
        setting: The protection.
        terms: Its strength; by default as the first round's updates say.
        on_round: Called with the round, the updates `[k, N]` and the terms, while the network has
            the weights that the round began with.

    Returns:
        The terms.
    """
    options = test.options
    for number in range(1, options.rounds + 1):
        began = get_weights(network)
        updates = np.stack(
            [_local_update(test, network, began, number, site) for site in range(len(test.cohorts))]
        )
        set_weights(network, began)
        terms = terms or test.terms(updates)
        if on_round:
            on_round(number, updates, terms)
        rng = np.random.default_rng([options.seed, _NOISE, number, *name.encode()])
        set_weights(network, began + setting.mean(updates, terms, rng))
        log.info("%s: round %d of %d", name, number, options.rounds)
    assert terms is not None  # there is a round
    return terms


def _local_update(
    test: Rehearsal, network: nn.Module, began: Floats, number: int, site: int
) -> Floats:
    set_weights(network, began)
    train, plan, steps = test.study.train, test.plan, test.options.steps
    drawn = planned_batches(
        test.cohorts[site].members,
        plan,
        train,
        steps=steps,
        device=test.device,
        rng=np.random.default_rng([test.options.seed, _TRAINING, number, site]),
    )
    fit(
        network,
        drawn,
        test.loss,
        train,
        steps=steps,
        round_number=number,
        rounds=test.options.rounds,
        annotated=test.cohorts[site].annotated,
        device=test.device,
    )
    update: Floats = get_weights(network) - began
    return update


def known_patches(
    test: Rehearsal,
    cases: Sequence[CachedCase],
    count: int,
    shape: Sequence[int],
    *stream: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut patches as they are, each on a region: images and labels, see `batches`.

    Args:
        test: Says the seed and where patches go.
        cases: Where they are cut.
        count: How many.
        shape: Voxels of each.
        stream: Tells this draw from others of the seed.
    """
    return next(
        batches(
            cases,
            steps=1,
            batch_size=count,
            patch_size=shape,
            foreground=1.0,
            augmentation="none",
            device=test.device,
            rng=np.random.default_rng([test.options.seed, *stream]),
        )
    )


def median_norm(updates: Floats) -> float:
    """Median L2 norm of updates `[k, N]`."""
    return float(np.median(np.linalg.norm(updates.astype(np.float64), axis=1)))


def get_weights(network: nn.Module) -> Floats:
    """All trainable parameters as one vector, float32 `[N]`."""
    parts = [p.detach().reshape(-1).cpu() for p in network.parameters() if p.requires_grad]
    vector: Floats = torch.cat(parts).float().numpy()
    return vector


def set_weights(network: nn.Module, vector: Floats) -> None:
    """Put a vector `[N]` into a network."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    parts = torch.split(torch.from_numpy(vector), [p.numel() for p in parameters])
    with torch.no_grad():
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(part.reshape(parameter.shape))
