"""A fingerprint with epsilon: one case more or less hardly changes how likely any of it is.

Eight parts of it depend on the cases: the numbers of CT and MR cases, and seven histograms. A case
adds at most 1 to each, so Laplace noise of scale 8/epsilon on each part makes all of them together
epsilon-differentially private (Dwork et al., TCC 2006). All else is read off the noised parts, is
the same for any cases, or isn't sent.

Asked again, a site with the same cases sends the same bytes, else the noise could be averaged out:
it is drawn from the site's secret and the cases. Other cases draw anew, and spend epsilon again.
"""

import hashlib
import hmac
import json
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from fedseg.data.fingerprint import EDGES, CaseMeasure, Fingerprint, Histogram, memory_told

__all__ = ["noised_fingerprint", "parts_of"]

_VERSION = 1
"""Raise it when other numbers are noised: two numbers must not share their noise."""

_COUNTS = "ct, mr"
_PLANNED = (
    *("spacing.x", "spacing.y", "spacing.z", "extent.x", "extent.y", "extent.z"),
    "liver.hu",
)
"""Quantities that the plan reads; any other would only take of epsilon."""

_MERGED = 4
"""Bins in a group, for any cases: among 2, 3, 4 and 6 the one with which a simulated site of 20
cases and epsilon 10 told most (finer groups drown in noise, coarser ones tell little)."""

_SPURIOUS = 0.01
"""Chance that noise alone is told as cases, for each part."""

_MOST = 1e7
"""The most that a fingerprint may say of cases."""


def noised_fingerprint(
    measures: Sequence[CaseMeasure],
    *,
    modalities: Sequence[Literal["ct", "mr"]],
    min_count: int,
    epsilon: float,
    secret: bytes,
    device: Literal["cpu", "cuda", "mps"] = "cpu",
    memory_gb: int = 1,
) -> Fingerprint:
    """Make a fingerprint that is epsilon-differentially private under adding or removing a case.

    Args:
        measures: One for each case.
        modalities: One for each case.
        min_count: Least that a noised number may be, else it is 0.
        epsilon: Of all that the fingerprint tells about the cases.
        secret: The site's own.
        device: Kind of device.
        memory_gb: Its memory.
    """
    exact = parts_of(measures, modalities)
    key = _key(secret, measures, modalities, epsilon)
    scale = len(exact) / epsilon
    told = {
        name: _told(values + scale * _laplace(key, name, len(values)), scale, min_count)
        for name, values in exact.items()
    }
    ct, mr = (round(float(count)) for count in told.pop(_COUNTS))
    histograms = {name: Histogram() for name in EDGES}
    histograms |= {name: _histogram(name, groups) for name, groups in told.items()}
    return Fingerprint(
        histograms=histograms,
        ct=ct,
        mr=mr,
        liver=0,
        tumor=0,
        min_count=min_count,
        held_back=(
            *(name for name, count in (("ct", ct), ("mr", mr)) if not count),
            *("liver", "tumor"),
            *(name for name, histogram in histograms.items() if not histogram.count),
        ),
        device=device,
        memory_gb=memory_told(memory_gb),
    )


def parts_of(
    measures: Sequence[CaseMeasure], modalities: Sequence[Literal["ct", "mr"]]
) -> Mapping[str, np.ndarray]:
    """What is noised: a case more or less changes each part by at most 1, over all its numbers."""
    counts = np.array([sum(kind == wanted for kind in modalities) for wanted in ("ct", "mr")])
    return {_COUNTS: counts, **{name: _sums(name, measures) for name in _PLANNED}}


def _sums(name: str, measures: Sequence[CaseMeasure]) -> np.ndarray:
    """Mass in each group of bins; the mass of a case is 1."""
    groups: list[list[float]] = [[] for _ in range(0, len(EDGES[name]) - 1, _MERGED)]
    for case in measures:
        for index, mass in case.get(name, {}).items():
            groups[index // _MERGED].append(mass)
    # Exact, so that the order of the cases is nowhere in the result.
    return np.array([math.fsum(group) for group in groups])


def _key(
    secret: bytes,
    measures: Sequence[CaseMeasure],
    modalities: Sequence[str],
    epsilon: float,
) -> bytes:
    """Key of the noise: another one wherever what is noised, or the scale, may be another."""
    cases = sorted(
        json.dumps([kind, [sorted(case.get(name, {}).items()) for name in _PLANNED]])
        for case, kind in zip(measures, modalities, strict=True)
    )
    text = json.dumps(["fingerprint", _VERSION, epsilon, cases])
    return hmac.new(secret, text.encode(), hashlib.sha256).digest()


def _laplace(key: bytes, name: str, count: int) -> np.ndarray:
    """Laplace noise of scale 1 that nobody can foretell without the key."""
    stream = hashlib.shake_256(key + name.encode()).digest(8 * count)
    centred = ((np.frombuffer(stream, "<u8") >> np.uint64(11)) + 0.5) * 2.0**-53 - 0.5
    noise: np.ndarray = -np.sign(centred) * np.log1p(-2 * np.abs(centred))
    return noise


def _told(noised: np.ndarray, scale: float, min_count: int) -> np.ndarray:
    """Keep what is more than noise; without this, empty bins would outweigh the cases."""
    least = max(min_count, scale * math.log(len(noised) / (2 * _SPURIOUS)))
    kept: np.ndarray = np.where(noised >= least, np.minimum(noised, _MOST), 0.0)
    return kept


def _histogram(name: str, groups: np.ndarray) -> Histogram:
    if not groups.any():
        return Histogram()
    bins = len(EDGES[name]) - 1
    starts = range(0, bins, _MERGED)
    sizes = [min(start + _MERGED, bins) - start for start in starts]
    mass = np.repeat(groups / sizes, sizes)
    return Histogram(
        mass=tuple(float(f"{value:.6g}") for value in mass),
        groups=tuple(starts),
        count=round(min(float(groups.sum()), _MOST)),
    )
