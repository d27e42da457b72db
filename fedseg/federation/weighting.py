"""Weight of a site's update: `(metrics) -> float`, from what the site says of its training."""

from collections.abc import Callable, Mapping

from fedseg.data.plan import REGIONS

__all__ = ["WEIGHTINGS"]

Weighting = Callable[[Mapping[str, float]], float]


def cases(metrics: Mapping[str, float]) -> float:
    """Training cases of the site (McMahan et al., AISTATS 2017)."""
    return metrics["cases"]


def patches(metrics: Mapping[str, float]) -> float:
    """Patches the site trained on this round."""
    return metrics["patches"]


def voxels(metrics: Mapping[str, float]) -> float:
    """Voxels of the site's preprocessed training images."""
    return metrics["voxels"]


def equal(metrics: Mapping[str, float]) -> float:
    """Each site alike."""
    return 1.0


def inverse_steps(metrics: Mapping[str, float]) -> float:
    """Cases by local steps: a site's mean step, not how many it did, then counts by its cases."""
    return metrics["cases"] / max(metrics["steps"], 1.0)


def annotated(metrics: Mapping[str, float]) -> float:
    """Cases times the share of the regions that the site annotates; see `mean.undiluted`, too."""
    return metrics["cases"] * metrics["annotated"] / len(REGIONS)


WEIGHTINGS: dict[str, Weighting] = {
    "cases": cases,
    "patches": patches,
    "voxels": voxels,
    "equal": equal,
    "inverse-steps": inverse_steps,
    "annotated": annotated,
}
