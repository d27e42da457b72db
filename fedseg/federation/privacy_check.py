"""Whether a study's privacy settings make sense for the sites and the network that are there."""

import logging

from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.plan import Plan
from fedseg.federation.drawing import count_of
from fedseg.privacy.forecast import check_forecast, forecast
from fedseg.segmentation.sharing import split_state

__all__ = ["check_privacy", "shared_size"]

log = logging.getLogger(__name__)


def shared_size(network: nn.Module, study: StudyConfig) -> int:
    """Number of values that are shared, and so clipped and noised."""
    shared = split_state(network, study.federation.shared).shared
    return sum(tensor.numel() for tensor in shared.values())


def check_privacy(study: StudyConfig, network: nn.Module, plan: Plan, *, sites: int) -> None:
    """Check at the start of a run, new or resumed, what its settings come to.

    Raises:
        ConfigError: They are absurd, and the study doesn't insist.
    """
    if study.privacy.mode == "none":
        return
    found = forecast(
        study,
        sites=count_of(study, sites),
        parameters=shared_size(network, study),
        batch_size=plan.batch_size,
    )
    check_forecast(found, force=study.privacy.force)
    rounds, epsilon = max(found.epsilons.items())
    log.info(
        "privacy: %s protects %s; epsilon %.2f after %d rounds at delta %g; %s",
        *(found.mode, found.member, epsilon, rounds, found.delta, found.verdict),
    )
