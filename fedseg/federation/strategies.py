"""Strategies: `(StudyConfig) -> Strategy`. Flower's own classes, fed one already reduced reply.

On one reply a strategy's average is the identity, so the server never holds more than a chunk of
the updates; what a strategy does beyond averaging (momentum, adaptive steps, a client term) stays
its own. Those that average otherwise have a reducer of their own, see `reduce`.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
    Strategy,
)

from fedseg.arrays import state_to_arrays
from fedseg.config import StudyConfig
from fedseg.errors import ConfigError
from fedseg.messages import ARRAYS
from fedseg.registry import resolve

__all__ = [
    "STRATEGIES",
    "check_strategy",
    "least_sites",
    "make_strategy",
    "next_state",
    "restore_strategy",
    "strategy_state",
    "train_config",
]

_RATE, _TAU = 0.03, 0.01
"""Server's learning rate and adaptivity of the FedOpt strategies. Of a mean change far below tau a
weight makes at most three times the step, of one far above it a step of about the rate. On phantoms
(benchmarks/strategies_plain.py) Flower's defaults, 0.1 or 0.01 and 0.001, scored below each site's
own model, and two of three lost a model that was trained already; these did neither."""

_GLOBAL = "current_arrays"


def fedavg(study: StudyConfig) -> Strategy:
    """Weighted mean (McMahan et al., AISTATS 2017)."""
    return FedAvg()


def fedprox(study: StudyConfig) -> Strategy:
    """Weighted mean with a proximal term in the sites' loss (Li et al., MLSys 2020)."""
    return FedProx(proximal_mu=study.federation.proximal_mu)


def fedavgm(study: StudyConfig) -> Strategy:
    """Momentum at the server (Hsu et al., 2019).

    By default a step is the running mean of the updates. Flower's rate of 1 adds them up instead:
    with a momentum of 0.9 ten times as far.
    """
    settings = study.federation
    momentum = settings.server_momentum
    return FedAvgM(
        server_learning_rate=settings.server_learning_rate or 1 - momentum,
        server_momentum=momentum,
    )


def fedadam(study: StudyConfig) -> Strategy:
    """Adam at the server (Reddi et al., ICLR 2021)."""
    return FedAdam(
        eta=study.federation.server_learning_rate or _RATE,
        tau=_TAU,
        beta_1=study.federation.server_momentum,
        beta_2=0.9,  # the paper's 0.99 takes a hundred rounds to forget the first ones
    )


def fedyogi(study: StudyConfig) -> Strategy:
    """Yogi at the server (Reddi et al., ICLR 2021)."""
    return FedYogi(
        eta=study.federation.server_learning_rate or _RATE,
        tau=_TAU,
        beta_1=study.federation.server_momentum,
    )


def fedadagrad(study: StudyConfig) -> Strategy:
    """Adagrad at the server (Reddi et al., ICLR 2021)."""
    return FedAdagrad(eta=study.federation.server_learning_rate or _RATE, tau=_TAU)


STRATEGIES: dict[str, Callable[[StudyConfig], Strategy]] = {
    "fedavg": fedavg,
    "fedprox": fedprox,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "fedadagrad": fedadagrad,
    # The reducer does all that these do: Flower's mean of its one result leaves it as it is.
    "fednova": fedavg,
    "fedmedian": fedavg,
    "fedtrimmedavg": fedavg,
    "krum": fedavg,
    "multikrum": fedavg,
    "bulyan": fedavg,
    "qfedavg": fedavg,
}

_WEIGHTLESS = ("fedmedian", "fedtrimmedavg", "krum", "bulyan", "qfedavg")


def make_strategy(study: StudyConfig) -> Strategy:
    """Build the strategy that `federation.strategy` names."""
    strategy = resolve("federation.strategy", study.federation.strategy, STRATEGIES)(study)
    assert isinstance(strategy, Strategy)
    return strategy


def check_strategy(study: StudyConfig) -> None:
    """Check at the start that the strategy can do what the study asks for.

    Raises:
        ConfigError: It takes all sites alike, or one of them, and a weighting is named; or it
            divides by steps, and so does the weighting.
    """
    name, weighting = study.federation.strategy, study.federation.weighting
    if weighting == "inverse-steps" and (name == "fednova" or study.train.minutes):
        by = "train.minutes" if study.train.minutes else "federation.strategy 'fednova'"
        raise ConfigError(
            f"federation.weighting: got 'inverse-steps' with {by}, which divides by the steps "
            "already; take 'cases'"
        )
    if name in _WEIGHTLESS and weighting != "cases":
        raise ConfigError(
            f"federation.weighting: got '{weighting}' with federation.strategy '{name}', which "
            "uses no weights; expected 'cases'; leave it out or take another strategy"
        )


def least_sites(study: StudyConfig) -> int:
    """Fewest updates of a round with which the strategy does what it is for.

    Krum and Bulyan have their papers' bounds; the median of two is their mean, and a trimmed mean
    that leaves out nobody is a mean.
    """
    settings = study.federation
    untrimmed = next((n for n in range(1, 101) if int(settings.trim * n) >= 1), 1)
    least = {
        "krum": 2 * settings.malicious_sites + 3,
        "multikrum": 2 * settings.malicious_sites + 3,
        "bulyan": 4 * settings.malicious_sites + 3,
        "fedmedian": 3,
        "fedtrimmedavg": untrimmed,
    }
    return least.get(settings.strategy, 1)


def strategy_state(strategy: Strategy) -> dict[str, torch.Tensor]:
    """What a strategy keeps between rounds, as tensors: momentum, second moments.

    Any attribute that is a list or a dict of arrays is kept. The global weights that a strategy
    holds are not: it is given them again.
    """
    state = {}
    for attribute, value in vars(strategy).items():
        if attribute == _GLOBAL or not isinstance(value, list | dict):
            continue
        items = value.items() if isinstance(value, dict) else enumerate(value)
        kind = "dict" if isinstance(value, dict) else "list"
        for key, array in items:
            if isinstance(array, np.ndarray | np.generic):
                name = f"{attribute}/{kind}/{key}"
                state[name] = torch.from_numpy(np.array(array))
    return state


def restore_strategy(strategy: Strategy, state: Mapping[str, torch.Tensor]) -> None:
    """Give a new strategy what `strategy_state` kept of an old one, bit for bit."""
    lists: dict[str, dict[int, np.ndarray]] = {}
    dicts: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in state.items():
        attribute, kind, key = name.split("/", 2)
        if kind == "list":
            lists.setdefault(attribute, {})[int(key)] = tensor.numpy().copy()
        else:
            dicts.setdefault(attribute, {})[key] = tensor.numpy().copy()
    for attribute, arrays in dicts.items():
        setattr(strategy, attribute, arrays)
    for attribute, numbered in lists.items():
        setattr(strategy, attribute, [numbered[index] for index in sorted(numbered)])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Flower from logging `Received 1 results`: that one is the mean of all sites."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


class _ChosenNodes:
    """The part of a grid that `configure_train` uses, with just the chosen nodes."""

    def __init__(self, node_ids: list[int]) -> None:
        self._node_ids = node_ids

    def get_node_ids(self) -> Iterable[int]:
        return self._node_ids


def train_config(
    strategy: Strategy,
    round_number: int,
    state: Mapping[str, torch.Tensor],
    config: ConfigRecord,
    node_ids: list[int],
) -> ConfigRecord:
    """Let the strategy configure the round.

    It keeps what it needs of the global weights and adds its own keys to the config.
    """
    for minimum in ("min_train_nodes", "min_available_nodes"):
        setattr(strategy, minimum, len(node_ids))
    grid = cast(Grid, _ChosenNodes(node_ids))
    with _quiet():
        messages = strategy.configure_train(round_number, state_to_arrays(state), config, grid)
    for message in messages:
        record: ConfigRecord = message.content.config_records["config"]
        return record
    return config


def next_state(
    strategy: Strategy,
    round_number: int,
    state: Mapping[str, torch.Tensor],
    mean: Mapping[str, torch.Tensor],
    to: Message,
) -> dict[str, torch.Tensor]:
    """Let the strategy make the next global weights from the mean update.

    Args:
        strategy: Flower's strategy.
        round_number: Absolute round, from 1.
        state: Global float weights of this round.
        mean: Mean change.
        to: Any message of the round, for Flower's metadata.
    """
    moved = {name: tensor + mean[name] for name, tensor in state.items()}
    content = RecordDict(
        {ARRAYS: state_to_arrays(moved), "metrics": MetricRecord({"num-examples": 1})}
    )
    with _quiet():
        arrays, _ = strategy.aggregate_train(round_number, [Message(content, reply_to=to)])
    assert isinstance(arrays, ArrayRecord)
    # FedOpt strategies return float64: cast back to what the network has.
    result = {
        name: torch.from_numpy(array.numpy()).to(state[name].dtype)
        for name, array in arrays.items()
    }
    return {name: result[name].reshape(tensor.shape) for name, tensor in state.items()}
