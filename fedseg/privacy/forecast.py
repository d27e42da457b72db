"""What differential privacy will cost and leave over, told before anything runs.

The update of a round is a mean m of n clipped vectors plus noise w of N parameters. Noise of so
many dimensions is nearly orthogonal to m, so with r = |w| / |m|

    cosine(m, m + w) = 1 / sqrt(1 + r^2),   |w| = deviation * sqrt(N)

and |m| = C sqrt(a + (1 - a) / n) where each vector reaches the clip C and a is the mean cosine
between two of them. All numbers here are for a = 1, the best that can be.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedseg.config import StudyConfig
from fedseg.errors import ConfigError
from fedseg.privacy.accountant import epsilon_of, most_releases
from fedseg.privacy.mechanisms import MEMBERS, mechanism_of, private_steps

__all__ = [
    "Forecast",
    "check_forecast",
    "expected_cosine",
    "forecast",
    "mean_norm",
    "noise_deviation",
]

ABSURD_EPSILON, WEAK_EPSILON = 100.0, 10.0
"""Above: no bound worth the name; above: weaker than what is commonly called private."""

ABSURD_COSINE, WEAK_COSINE = 0.05, 0.3
"""Below: the noise is more than 20 (3) times the update. Federations and DP-SGD that learnt from
scratch had a cosine of .3 to .97 (McMahan et al., ICLR 2018; De et al., 2022)."""

_SHOWN = 12
"""Rounds whose epsilon is foretold, about."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a study's settings come to.

    Attributes:
        mode: `privacy.mode`.
        member: What epsilon protects.
        epsilons: Epsilon after some of the rounds, the first and the last among them.
        delta: Delta.
        paid: Rounds that `privacy.max-epsilon` pays for; None without a budget.
        parameters: Number of shared values.
        sites: Sites of a round.
        ratio: Norm of the noise by that of the mean update, at the least; None if not known.
        cosine: Expected between the noised and the true mean update, at the most.
        enough: About how many sites it would take for a cosine of .3.
        absurd: Why such a run is refused, `""` if it isn't.
        verdict: All of it in words.
    """

    mode: str
    member: str
    epsilons: Mapping[int, float]
    delta: float
    paid: int | None
    parameters: int
    sites: int
    ratio: float | None
    cosine: float | None
    enough: int | None
    absurd: str
    verdict: str


def expected_cosine(ratio: float) -> float:
    """Cosine to expect where the noise is `ratio` times as long as the update."""
    return 1 / math.sqrt(1 + ratio**2)


def mean_norm(*, clip: float, sites: int, agreement: float = 1.0) -> float:
    """Norm of the mean of clipped updates whose cosines among themselves are `agreement`."""
    return clip * math.sqrt(agreement + (1 - agreement) / sites)


def noise_deviation(
    study: StudyConfig, *, sites: int, batch_size: int, cases: float | None = None
) -> float | None:
    """Standard deviation of the noise on each value of a round's mean update.

    With record-dp it is that of the mean over the steps, of which each moves the weights by its
    mean gradient; None where the number of training cases of a site isn't known.
    """
    privacy = study.privacy
    assert privacy.clip is not None and privacy.noise_multiplier is not None
    noise = privacy.noise_multiplier * privacy.clip
    if privacy.mode == "central-dp":
        return noise / sites
    if privacy.mode == "local-dp":
        return noise / math.sqrt(sites)
    if cases is None:
        return None
    steps = private_steps(study, batch_size=batch_size)
    return noise / (privacy.case_rate * cases * math.sqrt(steps * sites))


def forecast(
    study: StudyConfig,
    *,
    sites: int,
    parameters: int,
    batch_size: int,
    cases: float | None = None,
) -> Forecast:
    """Foretell what a study's settings come to.

    Args:
        study: The study config.
        sites: Sites of a round.
        parameters: Number of shared values.
        batch_size: Patches a step.
        cases: Training cases of a site (record-dp).

    Raises:
        ConfigError: The study has no differential privacy, or the accountant isn't installed.
    """
    privacy, rounds = study.privacy, study.federation.rounds
    mechanism = mechanism_of(study, batch_size=batch_size)
    if mechanism is None or privacy.clip is None:
        raise ConfigError(
            "privacy.mode: got 'none'; expected 'central-dp', 'local-dp' or 'record-dp': without "
            "noise there is nothing to foretell"
        )
    delta, budget = privacy.delta, privacy.max_epsilon
    paid = None if budget is None else most_releases(mechanism, delta=delta, max_epsilon=budget)
    last = rounds if paid is None else min(rounds, paid)
    step = max(1, math.ceil(last / _SHOWN))
    shown = sorted({1, *range(step, last, step), last}) if last else []
    epsilons = {n: epsilon_of([(mechanism, n)], delta=delta) for n in shown}
    deviation = noise_deviation(study, sites=sites, batch_size=batch_size, cases=cases)
    ratio = cosine = enough = None
    if deviation is not None:
        ratio = deviation * math.sqrt(parameters) / mean_norm(clip=privacy.clip, sites=sites)
        cosine = expected_cosine(ratio)
        more = ratio / math.sqrt(WEAK_COSINE**-2 - 1)
        enough = math.ceil(sites * (more if privacy.mode == "central-dp" else more**2))
    absurd = _absurd(epsilons, cosine, ratio)
    return Forecast(
        mode=privacy.mode,
        member=MEMBERS[privacy.mode],
        epsilons=epsilons,
        delta=delta,
        paid=paid,
        parameters=parameters,
        sites=sites,
        ratio=ratio,
        cosine=cosine,
        enough=enough,
        absurd=absurd,
        verdict=absurd or _verdict(epsilons, cosine, ratio),
    )


def _absurd(epsilons: Mapping[int, float], cosine: float | None, ratio: float | None) -> str:
    if not epsilons:
        return "privacy.max-epsilon doesn't pay for one round: raise it or privacy.noise-multiplier"
    faults = []
    last = max(epsilons.values())
    if last > ABSURD_EPSILON:
        faults.append(f"an epsilon of {last:,.0f} bounds nothing: more noise, or fewer rounds")
    if cosine is not None and cosine < ABSURD_COSINE:
        faults.append(
            f"the noise is {ratio:,.0f} times the update, so that what is learnt is noise: a "
            "smaller network, more sites, or less noise"
        )
    return "; ".join(faults)


def _verdict(epsilons: Mapping[int, float], cosine: float | None, ratio: float | None) -> str:
    words = []
    last = max(epsilons.values())
    if last > WEAK_EPSILON:
        words.append(f"weak privacy: an epsilon of {last:.1f} is above 10")
    if cosine is not None and cosine < WEAK_COSINE:
        words.append(
            f"hardly usable: the noise is {ratio:.1f} times the update; expect a far worse model"
        )
    return "; ".join(words) or "usable: what that costs in Dice only a run can tell"


def check_forecast(found: Forecast, *, force: bool) -> None:
    """Refuse settings that nobody can want, unless the study insists.

    Raises:
        ConfigError: They are absurd; or the budget doesn't pay for one round, force or not.
    """
    if found.absurd and (not force or not found.epsilons):
        raise ConfigError(
            f"privacy.mode: {found.mode} is absurd with these settings: {found.absurd}; `fedseg "
            "privacy plan` shows the numbers"
            + ("; privacy.force = true runs it all the same" if found.epsilons else "")
        )
