"""Tests of the policy: each rule alone, at its border, and what can't be judged."""

from pathlib import Path
from typing import Any

import pytest

from fedseg.config import StudyConfig
from fedseg.errors import Reason, SiteError
from fedseg.privacy import policy as rules
from fedseg.privacy.policy import (
    Departure,
    Request,
    check_departure,
    check_request,
    enough_cases,
)
from fedseg.site_config import PolicyConfig

SECURE = {"privacy.secure-aggregation": True, "federation.guard": False}


def reason_of(policy: dict[str, Any], judged: Request | Departure) -> str | None:
    config = PolicyConfig.model_validate(policy)
    try:
        if isinstance(judged, Request):
            check_request(config, judged)
        else:
            check_departure(config, judged)
    except SiteError as error:
        return error.reason.value
    return None


def request(config: dict[str, Any] | None = None, **given: Any) -> Request:
    study = StudyConfig.from_run_config(config or {})
    return Request(**{"kind": "train", "study": study, **given})


def departure(config: dict[str, Any] | None = None, **given: Any) -> Departure:
    study = StudyConfig.from_run_config(config or {})
    return Departure(**{"kind": "train", "study": study, **given})


SUMS = {"cases": 5.0, "skipped": 0.0, "liver.dice.sum": 4.0, "liver.dice.count": 5.0}

BROKEN = [
    ({"queries": ["hello"]}, request(), "policy-queries"),
    ({"queries": ["hello"]}, request(kind="secagg"), "policy-queries"),
    ({}, request({"train.loss": "pkg.mod:loss"}), "policy-custom-code"),
    ({}, request({"model.name": "pkg.mod:net"}), "policy-custom-code"),
    ({}, request(model="pkg.mod:net"), "policy-custom-code"),
    ({}, request({**SECURE, "federation.weighting": "pkg.mod:w"}), "policy-custom-code"),
    ({"models": ["unet++"]}, request(), "policy-models"),
    ({"models": ["unet"]}, request(model="unet++"), "policy-models"),
    ({"strategies": ["fedavg"]}, request({"federation.strategy": "krum"}), "policy-strategies"),
    ({"min-peers": 3}, request(peers=2), "policy-min-peers"),
    ({"min-peers": 1}, request(peers=None), "policy-min-peers"),
    ({"require-secure-aggregation": True}, request(), "policy-secure-aggregation"),
    ({"privacy-modes": ["local-dp", "record-dp"]}, request(), "policy-privacy-modes"),
    ({"max-epsilon": 1e9}, request(), "policy-max-epsilon"),
    ({"min-noise": 1e-9}, request(), "policy-min-noise"),
    ({"max-clip": 1e9}, request(), "policy-max-clip"),
    ({"max-clip": 1.0}, request({**SECURE, "privacy.secagg-max-norm": 1.1}), "policy-max-clip"),
    ({"max-bytes": 99}, departure(size=100), "policy-max-bytes"),
    ({"max-bytes": 99}, departure(kind="fingerprint", size=100), "policy-max-bytes"),
    ({"metrics": ["liver"]}, departure(metrics={"tumor.tp": 1.0}), "policy-metrics"),
    ({"metrics": ["liver"]}, departure(metrics={"liver2": 1.0}), "policy-metrics"),
    (
        {"metrics": ["training", "liver"]},
        departure(kind="evaluate", metrics=SUMS),
        "policy-metrics",
    ),
    (
        {"metrics": ["liver"]},
        departure(kind="evaluate", metrics={"personal.tumor.tp": 1.0}),
        "policy-metrics",
    ),
    (
        {"min-evaluation-cases": 6},
        departure(kind="evaluate", metrics=SUMS),
        "policy-min-evaluation-cases",
    ),
    (
        {"min-evaluation-cases": 2},
        departure(kind="evaluate", metrics={**SUMS, "tumor.dice.count": 1.0}),
        "policy-min-evaluation-cases",
    ),
    (
        {"min-evaluation-cases": 2},
        departure(kind="evaluate", metrics={**SUMS, "tumor.lesions.free.cases": 1.0}),
        "policy-min-evaluation-cases",
    ),
    ({"share-fingerprint": False}, departure(fingerprint=True), "policy-fingerprint"),
    ({"max-clip": 1.0}, departure(norm=1.01), "policy-max-clip"),
    ({"max-clip": 1.0}, departure(norm=float("nan")), "policy-max-clip"),
]

KEPT = [
    ({}, request()),
    ({"queries": ["train"]}, request()),
    ({"allow-custom-code": True}, request({"train.loss": "pkg.mod:loss"})),
    ({}, request({"federation.weighting": "pkg.mod:w"})),  # runs at the server alone
    ({"models": ["unet"], "strategies": ["fedavg", "krum"]}, request(model="unet")),
    ({"min-peers": 2}, request(peers=2)),
    ({"require-secure-aggregation": True}, request(SECURE)),
    ({"privacy-modes": ["none"]}, request()),
    ({"max-clip": 1.0}, request({**SECURE, "privacy.secagg-max-norm": 1.0})),
    ({"models": ["unet++"], "min-peers": 9}, request(kind="hello")),
    ({"max-bytes": 100}, departure(size=100)),
    ({"metrics": ["training"]}, departure(metrics={"loss": 1.0})),
    ({"metrics": ["liver", "cases", "skipped"]}, departure(kind="evaluate", metrics=SUMS)),
    ({"metrics": ["kept"]}, departure(kind="evaluate", metrics={"personal.kept": 1.0})),
    ({"min-evaluation-cases": 5}, departure(kind="evaluate", metrics=SUMS)),
    (
        {"min-evaluation-cases": 5},
        departure(kind="evaluate", metrics={**SUMS, "tumor.dice.count": 0.0}),
    ),
    ({"min-evaluation-cases": 9}, departure(metrics={"cases": 5.0})),
    ({"max-clip": 1.0}, departure(norm=1.00001)),
    ({"max-clip": 1.0}, departure(norm=50.0, noise=0.5)),
    ({"max-clip": 1.0}, departure()),
]


@pytest.mark.parametrize(("policy", "judged", "reason"), BROKEN)
def test_broken_rule(policy: dict[str, Any], judged: Request | Departure, reason: str) -> None:
    assert reason_of(policy, judged) == reason


@pytest.mark.parametrize(("policy", "judged"), KEPT)
def test_kept_rules(policy: dict[str, Any], judged: Request | Departure) -> None:
    assert reason_of(policy, judged) is None


def test_cases() -> None:
    policy = PolicyConfig.model_validate({"min-cases": 3})
    enough_cases(policy, training=3)
    with pytest.raises(SiteError) as caught:
        enough_cases(policy, training=2)
    assert caught.value.reason == Reason.POLICY_MIN_CASES


def test_what_cannot_be_judged_is_refused() -> None:
    nonsense: Any = "many"
    assert reason_of({"max-bytes": 9}, departure(size=nonsense)) == "policy-error"
    assert reason_of({"min-peers": 1}, request(peers=nonsense)) == "policy-error"


def test_rule_that_answers_anything_but_true_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        rules._OF_A_REQUEST,  # type: ignore[arg-type]
        Reason.POLICY_MODELS,
        lambda policy, request: "yes",
    )
    assert reason_of({}, request()) == "policy-models"


def test_every_key_of_the_policy_is_judged_somewhere() -> None:
    """A key that nothing reads protects nobody."""
    elsewhere = {"min_count", "fingerprint_min_cases", "fingerprint_epsilon"}  # data.measure
    source = Path(rules.__file__).read_text(encoding="utf-8")
    for key in PolicyConfig.model_fields:
        assert f"policy.{key}" in source or key in elsewhere, key
