"""`fedseg privacy plan` reads what `flwr run` would, and says no to what is absurd."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedseg.privacy.accountant import Mechanism, epsilon_of

ROOT = Path(__file__).parents[1]
ON = (
    'privacy.mode="central-dp" privacy.clip=1 privacy.noise-multiplier=1.5 '
    'model.width=4 model.depth=3 federation.rounds=3 train.patch-size="16,16,16"'
)
Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(fedseg: Plan) -> Plan:
    """Call it on this checkout and return exit code, output and errors."""

    def call(*arguments: str, config: str = ON) -> tuple[int, str, str]:
        return fedseg("privacy", "plan", ROOT, "-c", config, *arguments)

    return call


def test_numbers_and_verdict(plan: Plan) -> None:
    code, out, _ = plan("--sites", "200")
    assert code == 0
    assert "central-dp protects a site: clip 1, noise multiplier 1.5, delta 1e-05" in out
    assert "200 sites, 18,756 shared parameters" in out
    assert "epsilon after round 3: 5.583" in out
    assert "noise by update: at least 1.03" in out
    assert "cosine of the noised and the true mean update: at most 0.6976" in out
    assert "verdict: usable" in out


def test_json_is_the_accountants(plan: Plan) -> None:
    _, out, _ = plan("--sites", "200", "--json")
    found = json.loads(out)
    mechanism = Mechanism(noise_multiplier=1.5)
    assert found["epsilons"]["2"] == epsilon_of([(mechanism, 2)], delta=1e-5)
    assert (found["absurd"], found["parameters"]) == ("", 18756)


def test_absurd_is_exit_1_unless_forced(plan: Plan) -> None:
    code, out, _ = plan("--sites", "3", "--parameters", "5000000")
    assert code == 1 and "verdict: ABSURD, the noise is 1,118 times the update" in out
    forced = f"{ON} privacy.force=true"
    code, out, _ = plan("--sites", "3", config=forced)
    assert code == 0 and "ABSURD" in out


def test_sites_come_from_the_study(plan: Plan) -> None:
    code, out, _ = plan(config=f'{ON} federation.sites="a,b,c"')
    assert code == 1 and "3 sites, " in out
    code, _, err = plan()
    assert code == 2 and "give --sites" in err


def test_record_dp_wants_the_number_of_cases(plan: Plan) -> None:
    config = ON.replace("central-dp", "record-dp")
    _, out, _ = plan("--sites", "3", config=config)
    assert "protects a case" in out and "not known without --cases" in out
    _, out, _ = plan("--sites", "3", "--cases", "100", config=config)
    assert "noise by update: at least" in out


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ("privacy.mod=1", "no Flower app, or a key that it lacks"),
        ("privacy.clip=[", "--run-config: "),
        ("privacy.clip=0", "privacy.clip: got 0; expected greater than 0"),
        ("privacy.clip=1", "privacy.mode: got 'none'"),
    ],
)
def test_errors_are_one_line(config: str, error: str, plan: Plan) -> None:
    code, _, err = plan("--sites", "3", config=config)
    assert code == 2 and error in err and err.strip().count("\n") == 0
