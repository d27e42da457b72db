"""What a site does to its update before it leaves: clip it, and with local-dp add noise."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedseg.config import StudyConfig
from fedseg.federation.flat import flatten, layout_of, unflatten
from fedseg.privacy.clipping import clip_factor, norm_of
from fedseg.privacy.noise import add_noise

__all__ = ["Protected", "clips_updates", "protect"]

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Protected:
    """An update as it may leave.

    Attributes:
        update: Change of the shared parameters.
        clip: What that was clipped to, None if it wasn't.
        noise: Standard deviation of the noise added to each value.
    """

    update: State
    clip: float | None = None
    noise: float = 0.0

    @property
    def notes(self) -> dict[str, float]:
        """What the ledger says of it."""
        return {} if self.clip is None else {"clip": self.clip, "noise": self.noise}


def clips_updates(study: StudyConfig) -> bool:
    """Whether updates are clipped; with record-dp the gradients of cases are."""
    return study.privacy.clip is not None and study.privacy.mode != "record-dp"


def protect(update: State, study: StudyConfig) -> Protected:
    """Clip an update's L2 norm, then add the noise of local-dp."""
    privacy = study.privacy
    if privacy.clip is None or not clips_updates(study):
        return Protected(update=update)
    factor = clip_factor(norm_of(update.values()), privacy.clip)
    clipped = {name: tensor * factor for name, tensor in update.items()}
    if privacy.mode != "local-dp" or privacy.noise_multiplier is None:
        return Protected(update=clipped, clip=privacy.clip)
    layout = layout_of(clipped)
    vector = flatten(clipped, layout)
    noise = privacy.noise_multiplier * privacy.clip
    add_noise(vector.numpy(), noise)
    noised = unflatten(vector, layout)
    return Protected(update=noised, clip=privacy.clip, noise=noise)
