"""Which mechanism a study runs, and whom it protects: the one place that says so.

central-dp   The server adds N(0, (zC)^2) to the sum of updates clipped to C, once a round. A member
             is a site: with or without it the sum moves by C at most.
local-dp     Each site adds N(0, (zC)^2) to its own update before it leaves. What it protects is all
             that a site's data may be, and from any data to any other a clipped update moves by up
             to 2C: it is accounted with half the multiplier.
record-dp    Each step of a site's training adds N(0, (zC)^2) to the sum of its cases' gradients,
             each clipped to C. A member is a case; it is in a step by a secret draw.
"""

import math

from fedseg.config import StudyConfig
from fedseg.privacy.accountant import Mechanism

__all__ = ["MEMBERS", "mechanism_of", "private_steps"]

MEMBERS = {"central-dp": "a site", "local-dp": "all data of a site", "record-dp": "a case"}
"""What epsilon protects."""


def mechanism_of(study: StudyConfig, *, batch_size: int) -> Mechanism | None:
    """Mechanism of one round; None without differential privacy.

    Args:
        study: The study config.
        batch_size: Patches a step, as planned.
    """
    privacy = study.privacy
    multiplier = privacy.noise_multiplier
    if privacy.mode == "none" or multiplier is None:
        return None
    if privacy.mode == "record-dp":
        steps = private_steps(study, batch_size=batch_size)
        return Mechanism(noise_multiplier=multiplier, rate=privacy.case_rate, steps=steps)
    halved = 2 if privacy.mode == "local-dp" else 1
    return Mechanism(noise_multiplier=multiplier / halved)


def private_steps(study: StudyConfig, *, batch_size: int) -> int:
    """Steps of a round of record-dp: the same for any number of cases, which they would tell.

    A case is in a step with chance q and then gives `batch_size` patches; in so many steps an epoch
    takes `train.patches-per-case` patches from it, on average.
    """
    train = study.train
    taken = study.privacy.case_rate * batch_size
    epoch = train.steps_per_epoch or math.ceil(train.patches_per_case / taken)
    return epoch * train.local_epochs
