"""Federated averaging against its oracle: one step over sites equals the pooled step."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord
from updates import State, identity, spooled, template

from fedseg.config import StudyConfig
from fedseg.data.planning import make_plan
from fedseg.federation.flat import flatten, layout_of, unflatten
from fedseg.federation.reduce import reducer_of
from fedseg.federation.strategies import make_strategy, next_state, train_config
from fedseg.federation.weighting import WEIGHTINGS
from fedseg.sections import TrainConfig
from fedseg.segmentation.losses import dice_ce
from fedseg.segmentation.models import build_model
from fedseg.segmentation.training import fit

SIZES = {"aachen": 1, "bonn": 2, "chemnitz": 5}


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    with identity():
        yield


def start() -> State:
    study = StudyConfig.from_run_config(
        {"model.width": 4, "model.depth": 2, "train.patch-size": "8,8,8"}
    )
    return build_model(make_plan(study), seed=3).double().state_dict()


def step(samples: tuple[torch.Tensor, torch.Tensor], state: State) -> State:
    """One full-batch SGD step in float64."""
    study = StudyConfig.from_run_config(
        {"model.width": 4, "model.depth": 2, "train.patch-size": "8,8,8"}
    )
    network = build_model(make_plan(study)).double()
    network.load_state_dict(state)
    config = TrainConfig(
        optimizer="sgd",
        momentum=0.0,
        weight_decay=0.0,
        learning_rate=0.1,
        schedule="constant",
        max_grad_norm=0.0,
        precision="fp32",
    )
    fit(network, [samples], dice_ce, config, steps=1, round_number=1, rounds=1)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def samples() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(5)
    return {
        site: (
            torch.randn(n, 1, 8, 8, 8, generator=rng, dtype=torch.float64) * (1 + n),
            torch.randint(0, 3, (n, 8, 8, 8), generator=rng),
        )
        for site, n in SIZES.items()
    }


@pytest.mark.parametrize(("weighting", "equals"), [("patches", True), ("equal", False)])
def test_one_step_of_unequal_sites_is_the_pooled_step(
    tmp_path: Path, weighting: str, equals: bool
) -> None:
    parts, before = samples(), start()
    layout = layout_of(before)
    pooled_samples = (
        torch.cat([image for image, _ in parts.values()]),
        torch.cat([labels for _, labels in parts.values()]),
    )
    pooled = step(pooled_samples, before)

    study = StudyConfig.from_run_config({"federation.weighting": weighting})
    strategy = make_strategy(study)
    train_config(strategy, 1, before, ConfigRecord(), [1, 2, 3])
    origin = flatten(before, layout)
    assert origin.dtype == torch.float32
    changes = {}
    for site, part in parts.items():
        after = step(part, before)
        change = {name: after[name] - before[name] for name in before}
        changes[site] = flatten(change, layout).numpy()
    metrics = [{"cases": float(n), "patches": float(n)} for n in SIZES.values()]
    weights = [WEIGHTINGS[weighting](site) for site in metrics]
    change = reducer_of(study)(spooled(tmp_path, changes), weights, metrics)
    moved = next_state(strategy, 1, before, unflatten(change, layout), template())

    way = torch.cat([(pooled[name] - before[name]).ravel() for name in before])
    apart = torch.cat([(pooled[name] - moved[name]).ravel() for name in before])
    error = float(apart.norm() / way.norm())
    assert (error <= 1e-6) == equals, error
