"""Tests of the strategies: Flower's own over a reduced reply, saved and restored, checked."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from safetensors.torch import load_file, save_file
from updates import State, identity, study, template

from fedseg.arrays import state_to_arrays
from fedseg.config import StudyConfig
from fedseg.errors import ConfigError
from fedseg.federation.reduce import REDUCERS
from fedseg.federation.strategies import (
    STRATEGIES,
    check_strategy,
    least_sites,
    make_strategy,
    next_state,
    restore_strategy,
    strategy_state,
    train_config,
)
from fedseg.federation.weighting import WEIGHTINGS

SHAPES: dict[str, tuple[int, ...]] = {"w": (3, 4), "b": (), "k": (2, 1, 3, 3, 3)}
SERVER_SIDE = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    with identity():
        yield


def draw(seed: int, *, scale: float = 1.0) -> State:
    rng = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


def one_round(strategy: Strategy, number: int, state: State, change: State) -> State:
    train_config(strategy, number, state, ConfigRecord(), [4, 5, 6])
    return next_state(strategy, number, state, change, template())


@pytest.mark.parametrize("name", STRATEGIES)
def test_going_on_from_what_was_kept_gives_the_same_bits(tmp_path: Path, name: str) -> None:
    config = study(strategy=name, server_learning_rate=0.02)
    strategy, state = make_strategy(config), draw(0)
    states = []
    for number in range(1, 5):
        state = one_round(strategy, number, state, draw(number, scale=0.01))
        states.append(state)
        if number == 2:
            kept = strategy_state(strategy)
            # As a checkpoint does: through a file, in no given order.
            save_file({key: kept[key] for key in sorted(kept, reverse=True)}, tmp_path / "kept")
    again, state = make_strategy(config), states[1]
    restore_strategy(again, load_file(tmp_path / "kept"))
    for number in (3, 4):
        state = one_round(again, number, state, draw(number, scale=0.01))
        for key, tensor in states[number - 1].items():
            assert torch.equal(state[key], tensor), key
    assert bool(kept) == (name in SERVER_SIDE)


def test_what_was_kept_matters() -> None:
    for name in SERVER_SIDE:
        config = study(strategy=name)
        strategy, fresh, state = make_strategy(config), make_strategy(config), draw(0)
        state = one_round(strategy, 1, state, draw(1, scale=0.01))
        change = draw(2, scale=0.01)
        with_memory = one_round(strategy, 2, state, change)
        assert not torch.equal(one_round(fresh, 2, state, change)["w"], with_memory["w"])


def test_a_strategy_that_has_not_seen_a_round_keeps_nothing() -> None:
    for name in STRATEGIES:
        assert strategy_state(make_strategy(study(strategy=name))) == {}


def test_a_strategy_from_outside_is_kept_by_its_lists_and_dicts_of_arrays() -> None:
    strategy = make_strategy(study())
    lists = [np.arange(n, dtype=np.float64) for n in range(12)]
    vars(strategy).update(moments={"a/b": np.ones(3)}, history=lists, other="text", none=[1, "2"])
    again = make_strategy(study())
    restore_strategy(again, strategy_state(strategy))
    found = vars(again)
    np.testing.assert_array_equal(found["moments"]["a/b"], np.ones(3))
    assert len(found["history"]) == 12
    for mine, theirs in zip(found["history"], lists, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert "none" not in found


def moments(
    state: Mapping[str, np.ndarray], changes: list[Mapping[str, np.ndarray]], config: StudyConfig
) -> dict[str, np.ndarray]:
    """The papers' formulas in float64 (Hsu et al., 2019; Reddi et al., 2021, algorithm 2)."""
    name, beta = config.federation.strategy, config.federation.server_momentum
    built = vars(make_strategy(config))
    result = {}
    for key, start in state.items():
        x, m, v = start.astype(np.float64), 0.0, 0.0
        for number, change in enumerate(changes, 1):
            delta = change[key].astype(np.float64)
            if name == "fedavgm":
                m = beta * m + delta
                x = x + built["server_learning_rate"] * m
                continue
            beta_1 = 0.0 if name == "fedadagrad" else beta
            m = beta_1 * m + (1 - beta_1) * delta
            square, rate = delta**2, built["eta"]
            if name == "fedadam":
                v = 0.9 * v + 0.1 * square
                rate *= np.sqrt(1 - 0.9 ** (number + 1)) / (1 - beta_1 ** (number + 1))
            elif name == "fedyogi":
                v = v - 0.01 * square * np.sign(v - square)
            else:
                v = v + square
            x = x + rate * m / (np.sqrt(v) + built["tau"])
        result[key] = x
    return result


@pytest.mark.parametrize("name", SERVER_SIDE)
@pytest.mark.parametrize("options", [{}, {"server_learning_rate": 0.03, "server_momentum": 0.4}])
def test_server_optimisers_are_their_papers_formulas(name: str, options: dict[str, float]) -> None:
    config = study(strategy=name, **options)
    strategy, state = make_strategy(config), draw(0)
    start = {key: tensor.numpy() for key, tensor in state.items()}
    changes = [draw(number, scale=0.02) for number in range(1, 5)]
    for number, change in enumerate(changes, 1):
        state = one_round(strategy, number, state, change)
    expected = moments(start, [{k: t.numpy() for k, t in c.items()} for c in changes], config)
    for key, tensor in state.items():
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor, expected[key], atol=2e-6)


@pytest.mark.parametrize("name", SERVER_SIDE)
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 10.0])
def test_by_default_a_weight_moves_little_further_than_the_updates(name: str, scale: float) -> None:
    strategy, state = make_strategy(study(strategy=name)), draw(0)
    start = {key: tensor.double() for key, tensor in state.items()}
    way = {key: torch.zeros_like(tensor) for key, tensor in start.items()}
    for number in range(1, 20):
        change, before = draw(number, scale=scale), state
        state = one_round(strategy, number, state, change)
        for key, tensor in state.items():
            way[key] += change[key].abs()
            assert ((tensor.double() - start[key]).abs() <= 3 * way[key] + 1e-6).all()
            if name != "fedavgm":  # adaptive: huge updates make steps of about the rate
                assert ((tensor - before[key]).abs() <= 0.2).all()


@pytest.mark.parametrize("name", sorted({"fedavg", "fedprox", *SERVER_SIDE}))
def test_fed_one_reduced_reply_equals_flower_fed_all_replies(name: str) -> None:
    """Two rounds of three sites: on one reply Flower's mean is the identity."""
    config, weights = study(strategy=name), [1, 2, 5]
    ours, flowers = make_strategy(config), make_strategy(config)
    state, theirs = draw(0), draw(0)
    for number in (1, 2):
        updates = [draw(10 * number + site, scale=0.01) for site in range(3)]
        shares = [weight / sum(weights) for weight in weights]
        mean = {
            key: sum(s * u[key] for s, u in zip(shares, updates, strict=True)) for key in SHAPES
        }
        state = one_round(ours, number, state, mean)
        train_config(flowers, number, theirs, ConfigRecord(), [4, 5, 6])
        replies = []
        for update, weight in zip(updates, weights, strict=True):
            arrays = state_to_arrays({key: theirs[key] + update[key] for key in SHAPES})
            record = MetricRecord({"num-examples": weight})
            content = RecordDict({"arrays": arrays, "metrics": record})
            replies.append(Message(content, reply_to=template()))
        arrays, _ = flowers.aggregate_train(number, replies)
        assert arrays is not None
        theirs = {key: torch.from_numpy(np.array(arrays[key].numpy())).float() for key in SHAPES}
        for key in SHAPES:
            np.testing.assert_allclose(state[key], theirs[key], atol=1e-6)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("weighting", [*WEIGHTINGS, "package:function"])
def test_what_uses_no_weights_refuses_a_weighting(name: str, weighting: str) -> None:
    config = study(strategy=name, weighting=weighting)
    weightless = name in ("fedmedian", "fedtrimmedavg", "krum", "bulyan", "qfedavg")
    divides = (name, weighting) == ("fednova", "inverse-steps")
    if not divides and (not weightless or weighting == "cases"):
        check_strategy(config)
        return
    with pytest.raises(ConfigError, match=rf"federation\.weighting: got '{weighting}'.*'{name}'"):
        check_strategy(config)


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"strategy": "fedavg"}, 1),
        ({"strategy": "fedadam"}, 1),
        ({"strategy": "fedmedian"}, 3),
        ({"strategy": "fedtrimmedavg"}, 5),
        ({"strategy": "fedtrimmedavg", "trim": 0.3}, 4),
        ({"strategy": "fedtrimmedavg", "trim": 0.0}, 1),
        ({"strategy": "krum"}, 5),
        ({"strategy": "multikrum", "malicious_sites": 2}, 7),
        ({"strategy": "bulyan"}, 7),
        ({"strategy": "bulyan", "malicious_sites": 2}, 11),
        ({"strategy": "package:function"}, 1),
    ],
)
def test_fewest_updates_with_which_a_strategy_does_what_it_is_for(
    options: dict[str, object], least: int
) -> None:
    assert least_sites(study(**options)) == least


def test_every_reducer_but_the_mean_is_a_strategy() -> None:
    assert set(REDUCERS) - {"mean"} < set(STRATEGIES)


def build_own(config: StudyConfig) -> Strategy:
    """A strategy from outside."""
    return STRATEGIES["fedavgm"](config)


def test_a_strategy_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    build: Callable[..., Strategy] = build_own
    monkeypatch.setattr("fedseg.federation.strategies.resolve", lambda *_: build)
    strategy = make_strategy(study(strategy="package:function"))
    assert one_round(strategy, 1, draw(0), draw(1)).keys() == SHAPES.keys()
