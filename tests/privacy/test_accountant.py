"""The accountant against Opacus, privacy-loss distributions and the exact Gaussian."""

import math
import subprocess
import sys

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedseg.privacy.accountant import Mechanism, epsilon_of, most_releases

DELTA = 1e-5
ORDERS = [1 + x / 10 for x in range(1, 100)] + [*range(11, 64), 128, 256, 512]
CASES = [
    (Mechanism(noise_multiplier=1.0), 1),
    (Mechanism(noise_multiplier=1.0), 6),
    (Mechanism(noise_multiplier=0.5), 20),
    (Mechanism(noise_multiplier=5.0), 100),
    (Mechanism(noise_multiplier=0.05), 6),
    (Mechanism(noise_multiplier=1.0, rate=0.2, steps=20), 6),
    (Mechanism(noise_multiplier=2.0, rate=0.05, steps=40), 15),
    (Mechanism(noise_multiplier=1.5, rate=0.5, steps=10), 3),
]


def exact(multiplier: float, count: int, delta: float) -> float:
    """Least epsilon of a Gaussian (Balle and Wang, ICML 2018, theorem 8), by bisection."""
    mu = math.sqrt(count) / multiplier

    def excess(epsilon: float) -> float:
        second = math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
        return float(norm.cdf(mu / 2 - epsilon / mu) - second - delta)

    return float(brentq(excess, 0, 10 * mu**2 + 100 * mu))


@pytest.mark.parametrize(("mechanism", "count"), CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus: the best order is the smallest
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opacus_agrees_within_a_percent(mechanism: Mechanism, count: int) -> None:
    from opacus.accountants.analysis import rdp

    spent = rdp.compute_rdp(
        q=mechanism.rate,
        noise_multiplier=mechanism.noise_multiplier,
        steps=count * mechanism.steps,
        orders=ORDERS,
    )
    other, _ = rdp.get_privacy_spent(orders=ORDERS, rdp=spent, delta=DELTA)
    assert epsilon_of([(mechanism, count)], delta=DELTA) == pytest.approx(other, rel=0.01)


@pytest.mark.parametrize(("mechanism", "count"), [case for case in CASES if case[0].rate == 1])
def test_it_is_never_below_the_exact_epsilon_and_not_far_above(
    mechanism: Mechanism, count: int
) -> None:
    least = exact(mechanism.noise_multiplier, count, DELTA)
    assert least <= epsilon_of([(mechanism, count)], delta=DELTA) < 1.25 * least


@pytest.mark.parametrize(("mechanism", "count"), [case for case in CASES if case[0].rate < 1])
def test_it_is_never_below_privacy_loss_distributions(mechanism: Mechanism, count: int) -> None:
    from dp_accounting import dp_event, pld

    tight = pld.PLDAccountant()
    gaussian = dp_event.GaussianDpEvent(mechanism.noise_multiplier)
    tight.compose(dp_event.PoissonSampledDpEvent(mechanism.rate, gaussian), count * mechanism.steps)
    least = tight.get_epsilon(DELTA)
    assert 0.999 * least <= epsilon_of([(mechanism, count)], delta=DELTA) < 1.35 * least


def test_releases_add_up_whatever_their_kind() -> None:
    one, other = CASES[0][0], CASES[5][0]
    both = epsilon_of([(one, 2), (other, 1)], delta=DELTA)
    assert both == epsilon_of([(one, 1), (other, 1), (one, 1)], delta=DELTA)
    assert both > max(epsilon_of([(one, 2)], delta=DELTA), epsilon_of([(other, 1)], delta=DELTA))
    assert epsilon_of([], delta=DELTA) == epsilon_of([(one, 0)], delta=DELTA) == 0


def test_a_budget_pays_for_no_release_too_many() -> None:
    mechanism = Mechanism(noise_multiplier=1.0)
    for budget in (1.0, 4.9, 13.8, 40.0):
        count = most_releases(mechanism, delta=DELTA, max_epsilon=budget)
        assert epsilon_of([(mechanism, count)], delta=DELTA) <= budget
        assert epsilon_of([(mechanism, count + 1)], delta=DELTA) > budget


def test_without_the_package_the_error_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['dp_accounting'] = None\n"
        "from fedseg.errors import ConfigError\n"
        "from fedseg.privacy.accountant import Mechanism, epsilon_of\n"
        "try:\n"
        "    epsilon_of([(Mechanism(noise_multiplier=1.0), 1)], delta=1e-5)\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "pip install 'fedseg[dp]'" in found and found.count("\n") == 1
