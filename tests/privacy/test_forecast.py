"""What is foretold is what is measured, and absurd settings are called so."""

import math
import re
from typing import Any

import numpy as np
import pytest

from fedseg.config import StudyConfig
from fedseg.errors import ConfigError
from fedseg.privacy.accountant import epsilon_of
from fedseg.privacy.forecast import (
    check_forecast,
    expected_cosine,
    forecast,
    mean_norm,
    noise_deviation,
)
from fedseg.privacy.mechanisms import mechanism_of, private_steps
from fedseg.privacy.noise import add_noise


def study(mode: str = "central-dp", **privacy: Any) -> StudyConfig:
    keys = {f"privacy.{key.replace('_', '-')}": value for key, value in privacy.items()}
    given = {"privacy.clip": 1.0, "privacy.noise-multiplier": 1.0, "privacy.mode": mode}
    return StudyConfig.from_run_config({**given, **keys})


def updates(sites: int, size: int, agreement: float, rng: np.random.Generator) -> np.ndarray:
    """Updates at a clip of 1 whose cosines with one another are `agreement`, on average."""
    common = rng.standard_normal(size)
    own = rng.standard_normal((sites, size))
    mixed = math.sqrt(agreement) * common + math.sqrt(1 - agreement) * own
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


@pytest.mark.parametrize("size", [300, 5000, 60_000])
@pytest.mark.parametrize("sites", [3, 20])
@pytest.mark.parametrize("agreement", [0.1, 1.0])
@pytest.mark.parametrize("mode", ["central-dp", "local-dp"])
@pytest.mark.parametrize("multiplier", [0.01, 0.1, 1.0])
def test_the_cosine_is_what_simulation_measures(
    size: int, sites: int, agreement: float, mode: str, multiplier: float
) -> None:
    rng = np.random.default_rng(size + sites)
    config = study(mode, noise_multiplier=multiplier)
    deviation = noise_deviation(config, sites=sites, batch_size=2)
    assert deviation is not None
    length = mean_norm(clip=1.0, sites=sites, agreement=agreement)
    predicted = expected_cosine(deviation * math.sqrt(size) / length)
    measured = []
    for _ in range(max(3, 30_000 // size)):  # one cosine has a deviation of 1 / sqrt(size)
        sent = updates(sites, size, agreement, rng).astype(np.float32)
        true = sent.mean(0)
        if mode == "local-dp":
            for update in sent:
                add_noise(update, multiplier)
            released = sent.mean(0)
        else:
            total = sent.sum(0)
            add_noise(total, multiplier)
            released = total / sites
        measured.append(true @ released / np.linalg.norm(true) / np.linalg.norm(released))
    assert np.mean(measured) == pytest.approx(predicted, abs=0.05)


def test_record_dp_is_foretold_for_a_round_of_steps() -> None:
    config = study("record-dp", case_rate=0.5, noise_multiplier=0.2)
    steps = private_steps(config, batch_size=2)
    deviation = noise_deviation(config, sites=3, batch_size=2, cases=8)
    size, moved = 20_000, np.zeros((3, 20_000))
    for site in range(3):
        for _ in range(steps):
            step = np.zeros(size, np.float32)
            add_noise(step, 0.2)
            moved[site] += step / (0.5 * 8) / steps
    assert moved.mean(0).std() == pytest.approx(deviation, rel=0.03)
    assert noise_deviation(config, sites=3, batch_size=2) is None


@pytest.mark.parametrize("mode", ["central-dp", "local-dp", "record-dp"])
def test_epsilons_are_the_accountants(mode: str) -> None:
    config = study(mode, noise_multiplier=4.0)
    found = forecast(config, sites=3, parameters=100, batch_size=2, cases=10)
    mechanism = mechanism_of(config, batch_size=2)
    assert mechanism is not None and list(found.epsilons) == [1, 2, 3, 4, 5, 6]
    for number, epsilon in found.epsilons.items():
        assert epsilon == epsilon_of([(mechanism, number)], delta=1e-5)


def test_local_noise_is_accounted_for_the_diameter_of_what_an_update_may_be() -> None:
    local, central = (
        mechanism_of(study(mode, noise_multiplier=2.0), batch_size=2)
        for mode in ("local-dp", "central-dp")
    )
    assert local is not None and central is not None
    assert (local.noise_multiplier, central.noise_multiplier) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("patches", "rate", "epochs", "fixed", "expected"),
    [(8, 0.2, 1, "", 20), (4, 0.5, 2, "", 8), (1, 1.0, 1, "", 1), (8, 0.2, 3, 7, 21)],
)
def test_steps_of_record_dp_dont_depend_on_the_number_of_cases(
    patches: int, rate: float, epochs: int, fixed: Any, expected: int
) -> None:
    train = {
        "train.patches-per-case": patches,
        "train.local-epochs": epochs,
        "train.steps-per-epoch": fixed,
    }
    config = StudyConfig.from_run_config({**train, "privacy.case-rate": rate})
    assert private_steps(config, batch_size=2) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        # FLIP, issue 1145: a cosine of .001 and an epsilon of 70,333 went unnoticed.
        (
            {"noise_multiplier": 0.0065, "parameters": 4_800_000},
            r"^an epsilon of \d\d,\d{3} bounds",
        ),
        ({"noise_multiplier": 1.0, "parameters": 3_000_000}, "^the noise is 577 times the update"),
    ],
)
def test_absurd_settings_are_called_absurd(settings: dict[str, Any], words: str) -> None:
    parameters = settings.pop("parameters")
    found = forecast(study(**settings), sites=3, parameters=parameters, batch_size=2)
    assert re.search(words, found.absurd)
    with pytest.raises(ConfigError, match=r"^privacy\.mode: central-dp is absurd") as caught:
        check_forecast(found, force=False)
    assert "\n" not in str(caught.value) and "privacy.force = true" in str(caught.value)
    check_forecast(found, force=True)


def test_many_sites_and_a_small_network_are_usable() -> None:
    found = forecast(study(noise_multiplier=4.0), sites=5000, parameters=1_000_000, batch_size=2)
    assert found.absurd == "" and found.verdict.startswith("usable")
    assert found.cosine == pytest.approx(expected_cosine(0.8))
    weak = forecast(study(), sites=300, parameters=1_000_000, batch_size=2)
    assert "weak privacy" in weak.verdict and "hardly usable" in weak.verdict


@pytest.mark.parametrize("mode", ["central-dp", "local-dp"])
def test_so_many_sites_are_enough(mode: str) -> None:
    found = forecast(study(mode), sites=3, parameters=10_000, batch_size=2)
    assert found.enough is not None
    there = forecast(study(mode), sites=found.enough, parameters=10_000, batch_size=2)
    assert there.cosine == pytest.approx(0.3, abs=0.01)


def test_a_budget_is_counted_in_rounds() -> None:
    found = forecast(study(max_epsilon=8.0), sites=3, parameters=10, batch_size=2)
    assert found.paid == 2 and list(found.epsilons) == [1, 2]
    poor = forecast(study(max_epsilon=0.5), sites=3, parameters=10, batch_size=2)
    assert poor.paid == 0 and not poor.epsilons
    with pytest.raises(ConfigError, match="doesn't pay for one round"):
        check_forecast(poor, force=True)


def test_of_many_rounds_a_dozen_are_shown() -> None:
    config = StudyConfig.from_run_config(
        {
            "federation.rounds": 1000,
            "privacy.mode": "central-dp",
            "privacy.clip": 1.0,
            "privacy.noise-multiplier": 10.0,
        }
    )
    shown = list(forecast(config, sites=3, parameters=10, batch_size=2).epsilons)
    assert shown[0] == 1 and shown[-1] == 1000 and len(shown) <= 13


def test_without_a_mode_there_is_nothing_to_foretell() -> None:
    with pytest.raises(ConfigError, match="without noise there is nothing"):
        forecast(StudyConfig(), sites=3, parameters=10, batch_size=2)
