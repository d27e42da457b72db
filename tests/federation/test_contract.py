"""Every strategy with every weighting, every model: two rounds of real steps against an oracle."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message
from safetensors.torch import load_file
from torch import nn
from updates import State, identity, spooled, study, template

from fedseg.config import StudyConfig
from fedseg.data.plan import CLASSES
from fedseg.errors import ConfigError
from fedseg.federation.flat import Layout, flatten, layout_of, unflatten
from fedseg.federation.reduce import reducer_of
from fedseg.federation.strategies import (
    STRATEGIES,
    check_strategy,
    least_sites,
    make_strategy,
    next_state,
    train_config,
)
from fedseg.federation.weighting import WEIGHTINGS
from fedseg.segmentation.models import MODELS

COUNT = 7  # Bulyan against one malicious site
STEPS = [2 + site % 3 for site in range(COUNT)]
CASES = [1 + 2 * site for site in range(COUNT)]
ANNOTATED = [1 + site % 2 for site in range(COUNT)]


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    with identity():
        yield


def two_convolutions() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1), nn.LeakyReLU(), nn.Conv3d(4, CLASSES, 1)
        )


def train(site: int, state: State) -> tuple[State, dict[str, float]]:
    """A few steps of SGD on the site's own noise."""
    network = two_convolutions()
    network.load_state_dict(state)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    rng = torch.Generator().manual_seed(site)
    image = torch.randn(2, 1, 6, 6, 6, generator=rng) * (1 + site)
    labels = torch.randint(0, CLASSES, (2, 6, 6, 6), generator=rng)
    losses = []
    for _ in range(STEPS[site]):
        loss = nn.functional.cross_entropy(network(image), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    metrics = {
        "cases": CASES[site],
        "voxels": 1000.0 * CASES[site] ** 2,
        "annotated": ANNOTATED[site],
        "patches": 2 * STEPS[site],
        "steps": STEPS[site],
        "first_loss": losses[0],
        "loss": sum(losses) / len(losses),
    }
    return dict(network.state_dict()), {key: float(value) for key, value in metrics.items()}


def tumor_span(layout: Layout) -> list[tuple[int, int]]:
    """Rows of tumour in the last convolution `2`, by hand."""
    bias, weight = layout.spans()["2.bias"][0], layout.spans()["2.weight"][0]
    return [(bias + 2, bias + 3), (weight + 8, weight + 12)]


def oracle_weights(name: str, metrics: Sequence[Mapping[str, float]]) -> np.ndarray:
    by_hand = {
        "cases": CASES,
        "patches": [2 * steps for steps in STEPS],
        "voxels": [1000 * cases**2 for cases in CASES],
        "equal": [1] * COUNT,
        "inverse-steps": [cases / steps for cases, steps in zip(CASES, STEPS, strict=True)],
        "annotated": [cases * n / 2 for cases, n in zip(CASES, ANNOTATED, strict=True)],
    }
    return np.array(by_hand[name], float)


def oracle_reduce(
    config: StudyConfig,
    rows: np.ndarray,
    weights: np.ndarray,
    metrics: Sequence[Mapping[str, float]],
) -> np.ndarray:
    """All reducers as one reads them in their papers, float64 `[N]` from `[S, N]`."""
    name, count = config.federation.strategy, len(rows)
    malicious = config.federation.malicious_sites
    apart = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    scores = np.sort(apart, axis=1)[:, 1 : count - malicious - 1].sum(1)
    order = np.argsort(scores)
    if name == "krum":
        return rows[order[0]]
    if name == "multikrum":
        kept = order[: count - malicious - 2]
        return np.average(rows[kept], axis=0, weights=weights[kept])
    if name == "bulyan":
        kept = rows[order[: count - 2 * malicious]]
        nearest = np.argsort(np.abs(kept - np.median(kept, axis=0)), axis=0)
        return np.take_along_axis(kept, nearest[: count - 4 * malicious], 0).mean(0)
    if name == "fedmedian":
        return np.median(rows, axis=0)
    if name == "fedtrimmedavg":
        cut = math.floor(0.2 * count)
        return np.sort(rows, axis=0)[cut : count - cut].mean(0)
    if name == "qfedavg":
        loss, q = np.array([site["first_loss"] for site in metrics]), config.federation.q
        norms = (rows**2).sum(1)
        lipschitz = 2 * loss.sum() / norms.sum()
        h = q * loss ** (q - 1) * lipschitz**2 * norms + lipschitz * loss**q
        return (lipschitz * loss**q) @ rows / h.sum()
    part = weights / weights.sum()
    if config.federation.weighting == "annotated" and weights[np.array(ANNOTATED) == 1].any():
        blind = np.array(ANNOTATED) == 1  # these add to the mean of the others, at most half
        part = weights / weights[~blind].sum()
        part[blind] *= min(1, 0.5 / part[blind].sum())
    if name == "fednova":
        steps = np.array(STEPS)
        return (part @ steps) / part.sum() * (part @ (rows / steps[:, None]))
    return part @ rows


class OracleServer:
    """What the strategy does beyond averaging, in float64."""

    def __init__(self, config: StudyConfig) -> None:
        self.name, self.built = config.federation.strategy, vars(make_strategy(config))
        self.beta = config.federation.server_momentum
        self.m: np.ndarray | float = 0.0
        self.v: np.ndarray | float = 0.0

    def step(self, change: np.ndarray, number: int) -> np.ndarray:
        if self.name == "fedavgm":
            self.m = self.beta * self.m + change
            return np.asarray(self.built["server_learning_rate"] * self.m)
        if self.name not in ("fedadam", "fedyogi", "fedadagrad"):
            return change
        beta, rate, square = self.beta, self.built["eta"], change**2
        if self.name == "fedadagrad":
            beta, self.v = 0.0, self.v + square
        elif self.name == "fedyogi":
            self.v = self.v - 0.01 * square * np.sign(self.v - square)
        else:
            self.v = 0.9 * self.v + 0.1 * square
            rate *= math.sqrt(1 - 0.9 ** (number + 1)) / (1 - beta ** (number + 1))
        self.m = beta * self.m + (1 - beta) * change
        return np.asarray(rate * self.m / (np.sqrt(self.v) + self.built["tau"]))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_rounds_are_those_of_the_oracle(tmp_path: Path, name: str, weighting: str) -> None:
    config = study(strategy=name, weighting=weighting)
    try:
        check_strategy(config)
    except ConfigError:
        assert weighting != "cases"
        return
    assert least_sites(config) <= COUNT
    state: State = dict(two_convolutions().state_dict())
    layout = layout_of(state)
    rows = tumor_span(layout)
    strategy, reduce = make_strategy(config), reducer_of(config, tumor_rows=rows)
    server, expected = OracleServer(config), flatten(state, layout).double().numpy()
    for number in (1, 2):
        before = flatten(state, layout)
        train_config(strategy, number, state, ConfigRecord(), list(range(1, COUNT + 1)))
        trained, metrics = zip(*(train(site, state) for site in range(COUNT)), strict=True)
        changes = [(flatten(after, layout) - before).numpy() for after in trained]
        weights = [WEIGHTINGS[weighting](site) for site in metrics]
        updates = spooled(tmp_path / str(number), changes)
        change = reduce(updates, weights, metrics)
        state = next_state(strategy, number, state, unflatten(change, layout), template())

        exact = np.stack(changes).astype(np.float64)
        by_hand = oracle_weights(weighting, metrics)
        mean = oracle_reduce(config, exact, by_hand, metrics)
        if weighting == "annotated" and name != "multikrum":
            only = by_hand * (np.array(ANNOTATED) == 2)
            of_tumor = oracle_reduce(config, exact, only, metrics)
            for start, stop in rows:
                mean[start:stop] = of_tumor[start:stop]
        expected = expected + server.step(mean, number)
        found = flatten(state, layout).numpy()
        np.testing.assert_allclose(found, expected, atol=2e-6)
        assert (found != before.numpy()).mean() > 0.9


def one_vector(message: Message, record: str) -> np.ndarray:
    (array,) = message.content.array_records[record].values()
    return array.numpy().astype(np.float64)


@pytest.mark.parametrize("name", MODELS)
def test_two_rounds_of_every_model_are_those_of_the_oracle(
    run_study: Callable[..., Any], make_site: Callable[..., Path], name: str
) -> None:
    cases = {1: 2, 2: 4, 3: 3}
    nodes = {
        node: {"data-dir": str(make_site(f"site-{node}", cases=count, seed=node)), "device": "cpu"}
        for node, count in cases.items()
    }
    depth, side = (5, 32) if name == "unet++" else (3, 16)
    config = {
        "model.name": name,
        "model.depth": depth,
        "train.patch-size": f"{side},{side},{side}",
        "train.validation-fraction": 0.0,
        "train.steps-per-epoch": 1,
        "federation.sites": "3",
        "federation.guard": False,
    }
    folder, grid = run_study(nodes, config)

    def of_round(messages: list[Message], number: int) -> list[Message]:
        to_train = [m for m in messages if m.metadata.message_type == "train"]
        return to_train[3 * (number - 1) : 3 * number]

    ends = load_file(folder.path / "model-last.safetensors")
    last = np.concatenate([ends[key].numpy().ravel() for key in sorted(ends)])
    for number, after in ((1, one_vector(of_round(grid.sent, 2)[0], "arrays")), (2, last)):
        before = one_vector(of_round(grid.sent, number)[0], "arrays")
        mean = np.zeros_like(before)
        for update in of_round(grid.received, number):
            site = cases[update.metadata.src_node_id]
            mean += site / sum(cases.values()) * one_vector(update, "update")
        np.testing.assert_allclose(after, before + mean, atol=2e-6)
        assert (after != before).mean() > 0.9
