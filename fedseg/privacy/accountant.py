"""What privacy costs: epsilon of Gaussian releases, by Google's Renyi accountant.

It is the accountant that Flower brings as `flwr[dp]` (package dp-accounting). Renyi accounting
(Mironov, CSF 2017; sampled: Mironov, Talwar and Zhang, 2019) gives an upper bound that is a little
above the least epsilon, for any number of releases and any noise.

Nothing is amplified by drawing some of the sites: the draw derives from the study's seed, which is
known, and amplification holds for a secret draw only.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from fedseg.errors import ConfigError

__all__ = ["Mechanism", "check_accountant", "epsilon_of", "most_releases"]

_MOST = 10**6
"""Releases that are looked at, at most."""


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """A release of a sum with Gaussian noise.

    Attributes:
        noise_multiplier: Standard deviation of the noise by what one member can change (L2).
        rate: Each member is in a step with this chance, by a secret draw; 1: always.
        steps: Noised sums that make one release.
    """

    noise_multiplier: float
    rate: float = 1.0
    steps: int = 1


Spent = Sequence[tuple[Mechanism, int]]
"""Mechanisms, and how often each was released."""


def check_accountant() -> None:
    """Check that the accountant is installed.

    Raises:
        ConfigError: It isn't.
    """
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        raise ConfigError(
            "privacy.mode: package dp-accounting isn't installed here; run `pip install "
            "'fedseg[dp]'` (local-dp, record-dp: at every site, too)"
        ) from None


def epsilon_of(spent: Spent, *, delta: float) -> float:
    """Epsilon of all releases together, at `delta`; under adding or removing one member.

    Raises:
        ConfigError: The accountant isn't installed.
    """
    check_accountant()
    return _epsilon(tuple((mechanism, count) for mechanism, count in spent if count), delta)


@functools.lru_cache(maxsize=256)
def _epsilon(spent: tuple[tuple[Mechanism, int], ...], delta: float) -> float:
    from dp_accounting import dp_event, rdp

    if not spent:
        return 0.0
    # It warns of orders whose series doesn't converge; the bound holds without them.
    logging.getLogger("absl").setLevel(logging.ERROR)
    accountant = rdp.RdpAccountant()
    for mechanism, count in spent:
        event = dp_event.GaussianDpEvent(mechanism.noise_multiplier)
        if mechanism.rate < 1:
            event = dp_event.PoissonSampledDpEvent(mechanism.rate, event)
        accountant.compose(event, count * mechanism.steps)
    return float(accountant.get_epsilon(delta))


def most_releases(mechanism: Mechanism, *, delta: float, max_epsilon: float) -> int:
    """Count the releases that a budget pays for."""
    low, high = 0, 1
    while high < _MOST and epsilon_of([(mechanism, high)], delta=delta) <= max_epsilon:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if epsilon_of([(mechanism, middle)], delta=delta) <= max_epsilon:
            low = middle
        else:
            high = middle
    return low
