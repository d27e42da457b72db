"""Reconstruction under each setting: one training patch of each site, one step of descent."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedseg.privacy.inversion import (
    Likeness,
    guess_from_labels,
    invert,
    likeness,
    segmentation_loss,
    step_update,
)
from fedseg.privacy.rehearsal import Floats, Rehearsal, known_patches, set_weights
from fedseg.privacy.views import SETTINGS
from fedseg.segmentation.models import build_model

__all__ = ["GUESS", "TRUTH", "Reconstructions", "probe"]

log = logging.getLogger(__name__)

TRUTH, GUESS = "true patch", "labels alone"
"""Names of images beside those of the settings."""

_SIDE = 16
"""Voxels of the patch along each axis; more where the network needs them."""

_KNOWN = 8
"""Other patches that the attacker has: he knows mean intensities from them."""

_PATCH, _OTHERS, _NOISE = 71, 72, 73


@dataclass(frozen=True, kw_only=True)
class Reconstructions:
    """What became of the first site's patch.

    Attributes:
        shape: Voxels of the patch.
        likeness: Setting to how like the true patch its reconstruction is.
        guesses: The same of guesses that need no update.
        images: The true patch, the guess from its labels and the reconstructions, `[x, y, z]`.
    """

    shape: tuple[int, int, int]
    likeness: Mapping[str, Likeness]
    guesses: Mapping[str, Likeness]
    images: Mapping[str, np.ndarray]


def probe(test: Rehearsal, weights: Floats) -> Reconstructions:
    """Let each site do one step of plain descent with one patch, and reconstruct the first site's.

    Where a sum over the sites is seen, the patches of all sites are reconstructed together, which
    is the better attack. The attacker knows all labels.

    Args:
        test: Sites and options.
        weights: Where the step begins, `[N]`.
    """
    x, y, z = (min(n, max(_SIDE, 2**test.plan.depth)) for n in test.plan.patch_size)
    network = build_model(test.plan).to(test.device)
    set_weights(network, weights)
    drawn = [
        known_patches(test, cohort.members, 1, (x, y, z), _PATCH, site)
        for site, cohort in enumerate(test.cohorts)
    ]
    images = torch.cat([image for image, _ in drawn])
    labels = torch.cat([label for _, label in drawn])
    regions = [cohort.annotated for cohort in test.cohorts]
    losses = [
        segmentation_loss(test.loss, labels[i : i + 1], [regions[i]]) for i in range(len(drawn))
    ]
    rate = test.study.train.learning_rate
    updates = np.stack(
        [
            step_update(network, loss, images[i : i + 1], learning_rate=rate)
            for i, loss in enumerate(losses)
        ]
    )
    terms, found = test.terms(updates), {}
    for number, (name, setting) in enumerate(SETTINGS.items(), 1):
        rng = np.random.default_rng([test.options.seed, _NOISE, *name.encode()])
        together = setting.of_all
        guess = invert(
            network,
            segmentation_loss(test.loss, labels, regions) if together else losses[0],
            setting.view(updates, 0, terms, rng),
            shape=images.shape if together else images[:1].shape,
            iterations=test.options.iterations,
            seed=test.options.seed,
        )
        found[name] = guess[0, 0].cpu()
        log.info("reconstruction %d of %d: %s", number, len(SETTINGS), name)
    truth = images[0, 0].cpu()
    others = test.cohorts[0].others
    other_images, other_labels = known_patches(test, others, _KNOWN, (x, y, z), _OTHERS, 0)
    painted = guess_from_labels(other_labels.cpu(), other_images.cpu(), labels[0].cpu())
    flat = torch.full_like(truth, float(other_images.mean()))
    shown = {TRUTH: truth, GUESS: painted, **found}
    return Reconstructions(
        shape=(x, y, z),
        likeness={name: likeness(image, truth) for name, image in found.items()},
        guesses={"mean intensity": likeness(flat, truth), GUESS: likeness(painted, truth)},
        images={name: image.numpy() for name, image in shown.items()},
    )
