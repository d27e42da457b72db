"""Numbers of a hostile site: whatever they are, the run goes on and its history is finite JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from read_run import history
from updates import spooled

from fedseg.federation.collect import plausible_training
from fedseg.federation.masked import SUMMED
from fedseg.federation.mean import fair_factors, shares, step_factors
from fedseg.federation.weighting import WEIGHTINGS
from fedseg.messages import PERSONAL, TRAIN_METRICS
from fedseg.privacy.fixed_point import LIMBS
from fedseg.segmentation.metrics import add, empty_sums, plausible, summarise, sums_of_case

Run = Callable[..., Any]

ODD = st.sampled_from([-1.0, 0.5, 1e-300, 1e15, 1e16, 1e300, float("nan"), float("inf")])
NUMBER = st.integers(0, 5).map(float) | ODD | st.floats()


def some_changed(names: tuple[str, ...]) -> st.SearchStrategy[dict[str, float]]:
    """Good numbers but for a few."""
    few = st.dictionaries(st.sampled_from(names), NUMBER, max_size=5)
    return few.map(lambda changed: {**dict.fromkeys(names, 1.0), **changed})


@given(parts=st.lists(some_changed(tuple(empty_sums())), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_what_passes_for_sums_of_cases_makes_finite_numbers(parts: list[dict[str, float]]) -> None:
    kept = [sums for sums in parts if plausible(sums)]
    json.dumps(summarise(add(kept)), allow_nan=False)


@given(one=some_changed(TRAIN_METRICS), other=some_changed(TRAIN_METRICS))
@settings(max_examples=300, deadline=None)
def test_what_passes_for_training_gives_finite_weights(
    tmp_path_factory: pytest.TempPathFactory, one: dict[str, float], other: dict[str, float]
) -> None:
    kept = [metrics for metrics in (one, other) if plausible_training(metrics)]
    rows = [np.ones(3, np.float32)] * len(kept)
    updates = spooled(tmp_path_factory.mktemp("spool"), rows)
    for weigh in WEIGHTINGS.values():
        weights = [weigh(metrics) for metrics in kept]
        if sum(weights) > 0:
            factors = [*shares(weights), *step_factors(shares(weights), [m["steps"] for m in kept])]
            assert np.isfinite(factors).all() and min(factors) >= 0
    for q in (0.0, 0.2, 5.0) if kept else ():
        assert np.isfinite(fair_factors(updates, [m["first_loss"] for m in kept], q=q)).all()


def test_honest_numbers_pass() -> None:
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 3, (2, 9, 8, 7))
    one = sums_of_case(prediction, truth, spacing=(1, 2, 3))
    for sums in (one, add([one, one]), empty_sums(), {**one, PERSONAL + "kept": 1.0}):
        assert plausible(sums)
    assert plausible_training({**dict.fromkeys(TRAIN_METRICS, 3.0), "loss": -1.0, "patches": 0.0})
    # What is too little or too much is told apart where the fuzzing might not look.
    assert not plausible({**one, "liver.tp": -1.0}) and not plausible({"cases": 1.0})
    assert not plausible_training(dict.fromkeys(TRAIN_METRICS, 0.0))


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> dict[int, dict[str, Any]]:
    names = ("aachen", "bonn", "chemnitz")
    return {
        n: {"data-dir": str(make_site(name, seed=n)), "device": "cpu"}
        for n, name in enumerate(names, start=1)
    }


def answering(kind: str, numbers: dict[str, float]) -> Callable[[Message], Message]:
    """Answer a kind of message with other numbers."""

    def reply(message: Message) -> Message:
        if message.metadata.message_type == kind:
            message.content["metrics"] = MetricRecord({**message.content["metrics"], **numbers})
        return message

    return reply


@pytest.mark.parametrize(
    "numbers",
    [
        {"liver.tp": -1.0, "liver.fp": 2.0, "liver.fn": 0.0},  # 2 TP + FP + FN = 0
        {"liver.dice.sum": 1e10, "liver.dice.count": 1e-300},
        {"cases": 1e300},
    ],
    ids=["negative", "fraction", "huge"],
)
def test_hostile_scores_cost_only_themselves(
    numbers: dict[str, float], run_study: Run, sites: dict[int, Any]
) -> None:
    folder, _ = run_study(
        sites, {"federation.personal": True}, reply={3: answering("evaluate", numbers)}
    )
    line = history(folder)[2]
    assert line["sites"]["chemnitz"]["no_metrics"] == "bad-update"
    assert line["federated"]["cases"] == 2
    personal = json.loads((folder.path / "manifest.json").read_text())["personal"]
    assert set(personal) == {"aachen", "bonn"}


def test_scores_that_are_left_out_cost_only_themselves(
    run_study: Run, sites: dict[int, Any]
) -> None:
    def nothing_but(message: Message) -> Message:
        if message.metadata.message_type == "evaluate":
            message.content["metrics"] = MetricRecord({PERSONAL + "kept": 1.0})
            message.content["status"] = ConfigRecord({"status": "ok", "reason": ""})
        return message

    folder, _ = run_study(
        sites, {"federation.rounds": 1, "federation.personal": True}, reply={3: nothing_but}
    )
    personal = json.loads((folder.path / "manifest.json").read_text())["personal"]
    assert set(personal) == {"aachen", "bonn"}


@pytest.mark.parametrize("numbers", [{"steps": 0.0}, {"voxels": -1.0}, {"loss": 1e300}])
def test_hostile_training_costs_only_itself(
    numbers: dict[str, float], run_study: Run, sites: dict[int, Any]
) -> None:
    config = {"federation.strategy": "fednova", "federation.rounds": 1}
    folder, _ = run_study(sites, config, reply={3: answering("train", numbers)})
    sites_of = history(folder)[1]["sites"]
    assert sites_of["chemnitz"]["reason"] == "bad-update"
    assert sites_of["aachen"]["status"] == sites_of["bonn"]["status"] == "ok"


def test_hostile_words_under_a_mask_cost_only_the_scores(
    run_study: Run, sites: dict[int, Any]
) -> None:
    """Whoever masks words may make any sum of them; of this one a count is far below 0."""

    def less(message: Message) -> Message:
        if message.metadata.message_type == "evaluate":
            words = message.content["update"]["words"].numpy().copy()
            place = LIMBS * SUMMED["evaluate"].index("liver.tp") + LIMBS - 1
            words[place : place + 1] -= np.uint32(2**29)  # an array wraps without a warning
            message.content["update"] = ArrayRecord({"words": Array(words)})
        return message

    config = {
        "privacy.secure-aggregation": True,
        "federation.guard": False,
        "federation.personal": False,
    }
    folder, _ = run_study(sites, config, reply={3: less})
    for line in history(folder)[1:]:
        assert "failed" not in line and line["federated"] == {}
        assert "what no cases have" in line["scored"]["failed"]
