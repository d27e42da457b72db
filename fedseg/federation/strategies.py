"""Strategies: `(StudyConfig) -> Strategy`. Flower's own classes, fed one already averaged reply.

On one reply a strategy's average is the identity, so the server never holds more than one update;
what the strategy does beyond averaging (momentum, adaptive steps, a client term) stays its own.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedProx, Strategy

from fedseg.config import StudyConfig
from fedseg.messages import ARRAYS, state_to_arrays
from fedseg.registry import resolve

__all__ = ["STRATEGIES", "make_strategy", "next_state", "train_config"]


def fedavg(study: StudyConfig) -> Strategy:
    """Weighted mean (McMahan et al., AISTATS 2017)."""
    return FedAvg()


def fedprox(study: StudyConfig) -> Strategy:
    """Weighted mean with a proximal term in the sites' loss (Li et al., MLSys 2020)."""
    return FedProx(proximal_mu=study.federation.proximal_mu)


STRATEGIES: dict[str, Callable[[StudyConfig], Strategy]] = {"fedavg": fedavg, "fedprox": fedprox}


def make_strategy(study: StudyConfig) -> Strategy:
    """Build the strategy that `federation.strategy` names."""
    strategy = resolve("federation.strategy", study.federation.strategy, STRATEGIES)(study)
    assert isinstance(strategy, Strategy)
    return strategy


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
