"""Weight of a site's update in the mean: `(metrics) -> float`."""

from collections.abc import Callable, Mapping

__all__ = ["WEIGHTINGS"]

Weighting = Callable[[Mapping[str, float]], float]


def cases(metrics: Mapping[str, float]) -> float:
    """Training cases of the site (McMahan et al., AISTATS 2017)."""
    return metrics["cases"]


def patches(metrics: Mapping[str, float]) -> float:
    """Patches the site trained on this round."""
    return metrics["patches"]


def equal(metrics: Mapping[str, float]) -> float:
    """Each site alike."""
    return 1.0


WEIGHTINGS: dict[str, Weighting] = {"cases": cases, "patches": patches, "equal": equal}
