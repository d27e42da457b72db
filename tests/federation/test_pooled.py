"""Federated averaging against its oracle: one step over sites equals the pooled step."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedseg.config import StudyConfig, TrainConfig
from fedseg.data.planning import make_plan
from fedseg.federation.reduce import spool, weighted_mean
from fedseg.federation.strategies import STRATEGIES, make_strategy, next_state, train_config
from fedseg.federation.weighting import WEIGHTINGS
from fedseg.messages import Task
from fedseg.segmentation.losses import dice_ce
from fedseg.segmentation.models import build_model
from fedseg.segmentation.training import fit

State = dict[str, torch.Tensor]
SIZES = {"aachen": 1, "bonn": 2, "chemnitz": 5}


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


def step(samples: tuple[torch.Tensor, torch.Tensor], state: State | None) -> State:
    """One full-batch SGD step in float64 from the same seeded start."""
    study = StudyConfig.from_run_config(
        {"model.width": 4, "model.depth": 2, "train.patch-size": "8,8,8"}
    )
    network = build_model(make_plan(study), seed=3).double()
    if state is not None:
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


def start() -> State:
    study = StudyConfig.from_run_config(
        {"model.width": 4, "model.depth": 2, "train.patch-size": "8,8,8"}
    )
    return build_model(make_plan(study), seed=3).double().state_dict()


def one_round(
    updates: dict[str, State],
    weights: dict[str, float],
    state: State,
    folder: Path,
    name: str = "fedavg",
) -> State:
    """Spool, average and step as the server does."""
    study = StudyConfig.from_run_config({"federation.strategy": name})
    strategy = make_strategy(study)
    task = Task(study_run="r", config_digest="d", plan="{}", round_number=1, rounds=1)
    train_config(strategy, 1, state, task.to_record(), [1, 2, 3])
    paths = {site: spool(folder, site, update) for site, update in updates.items()}
    template = Message(RecordDict(), dst_node_id=1, message_type="train")
    template.metadata.__dict__["_message_id"] = "m"
    return next_state(strategy, 1, state, weighted_mean(paths, weights), template)


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
    pooled_samples = (
        torch.cat([image for image, _ in parts.values()]),
        torch.cat([labels for _, labels in parts.values()]),
    )
    pooled = step(pooled_samples, before)
    updates = {
        site: {name: after - before[name] for name, after in step(part, before).items()}
        for site, part in parts.items()
    }
    weights = {site: WEIGHTINGS[weighting]({"patches": n, "cases": n}) for site, n in SIZES.items()}
    moved = one_round(updates, weights, before, tmp_path)

    way = torch.cat([(pooled[name] - before[name]).ravel() for name in before])
    apart = torch.cat([(pooled[name] - moved[name]).ravel() for name in before])
    error = float(apart.norm() / way.norm())
    assert (error <= 1e-6) == equals, error


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_strategy_and_weighting_matches_numpy(
    tmp_path: Path, strategy: str, weighting: str
) -> None:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"w": (3, 4), "b": (), "k": (2, 1, 3, 3, 3)}

    def draw() -> State:
        return {
            name: torch.from_numpy(np.asarray(rng.standard_normal(s), np.float32))
            for name, s in shapes.items()
        }

    before, updates = draw(), {site: draw() for site in SIZES}
    metrics = {site: {"cases": n, "patches": 7 * n * n} for site, n in SIZES.items()}
    weights = {site: float(WEIGHTINGS[weighting](m)) for site, m in metrics.items()}
    moved = one_round(updates, weights, before, tmp_path, strategy)

    total = sum(weights.values())
    for name, tensor in before.items():
        mean = sum(weights[s] / total * updates[s][name].double().numpy() for s in SIZES)
        np.testing.assert_allclose(moved[name].numpy(), tensor.numpy() + mean, atol=1e-6)
        assert moved[name].dtype == torch.float32
        assert moved[name].shape == tensor.shape
        assert not torch.equal(moved[name], tensor)


def test_the_mean_does_not_depend_on_the_order(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    updates = {f"site-{n}": {"w": torch.randn(50, 50, generator=rng) * 10**n} for n in range(6)}
    weights = {site: float(n + 1) for n, site in enumerate(updates)}
    paths = {site: spool(tmp_path, site, update) for site, update in updates.items()}
    forward = weighted_mean(paths, weights)
    backward = weighted_mean(dict(reversed(paths.items())), weights)
    assert torch.equal(forward["w"], backward["w"])
