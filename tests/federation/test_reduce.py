"""Tests of the reducers: each equals Flower's own strategy on the same replies."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.serverapp import strategy as flower
from updates import State, by_flower, identity, spooled, study

from fedseg.config import StudyConfig
from fedseg.federation.flat import layout_of
from fedseg.federation.reduce import REDUCERS, reducer_of

COUNT = 11  # enough for Bulyan with two malicious sites


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    with identity():
        yield


def model(seed: int = 0) -> State:
    shapes = {"b": (), "a.weight": (8, 3, 5, 5, 5), "c.bias": (8,), "d": (37, 11)}
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def site_numbers(count: int = COUNT) -> list[dict[str, float]]:
    rng = np.random.default_rng(4)
    return [
        {
            "cases": float(rng.integers(2, 40)),
            "steps": float(rng.integers(3, 60)),
            "first_loss": float(rng.uniform(0.2, 2.0)),
            "annotated": float(1 + n % 2),
        }
        for n in range(count)
    ]


def changes(size: int, count: int = COUNT) -> list[np.ndarray]:
    """Updates that have much in common, and two that have nothing to do with it."""
    rng = np.random.default_rng(5)
    common = rng.standard_normal(size)
    rows = [0.05 * (common + rng.standard_normal(size)) for _ in range(count)]
    rows[3], rows[6] = 3 * rng.standard_normal(size), -10 * rows[6]
    return [row.astype(np.float32) for row in rows]


RATE = 30.0  # 1 / L; see the last test for what a local learning rate would do
FLOWER: dict[str, tuple[StudyConfig, Callable[[], flower.Strategy]]] = {
    "fedavg": (study(), flower.FedAvg),
    "fedmedian": (study(strategy="fedmedian"), flower.FedMedian),
    "fedtrimmedavg": (
        study(strategy="fedtrimmedavg", trim=0.3),
        lambda: flower.FedTrimmedAvg(beta=0.3),
    ),
    "krum": (
        study(strategy="krum", malicious_sites=2),
        lambda: flower.Krum(num_malicious_nodes=2),
    ),
    "multikrum": (
        study(strategy="multikrum", malicious_sites=2),
        lambda: flower.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=COUNT - 4),
    ),
    "bulyan": (
        study(strategy="bulyan", malicious_sites=2),
        lambda: flower.Bulyan(num_malicious_nodes=2),
    ),
    "qfedavg": (
        study(strategy="qfedavg", q=0.4, server_learning_rate=RATE),
        lambda: flower.QFedAvg(client_learning_rate=RATE, q=0.4),
    ),
}


def reduced(
    tmp_path: Path, config: StudyConfig, rows: Sequence[np.ndarray], **options: object
) -> np.ndarray:
    numbers = site_numbers(len(rows))
    weights = [site["cases"] for site in numbers]
    updates = spooled(tmp_path, rows)
    return reducer_of(config, **options)(updates, weights, numbers).numpy()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FLOWER)
def test_equals_flower_s_own_strategy_on_the_same_replies(tmp_path: Path, name: str) -> None:
    config, build = FLOWER[name]
    before = model()
    layout = layout_of(before)
    rows = changes(layout.size)
    numbers = [
        {"num-examples": int(site["cases"]), "train_loss": site["first_loss"]}
        for site in site_numbers()
    ]
    expected = by_flower(build(), before, rows, numbers, layout)
    found = reduced(tmp_path, config, rows)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found).max() > 1e-3


@pytest.mark.parametrize("name", [*REDUCERS, "fedavg"])
def test_the_same_bits_again_whoever_came_first(tmp_path: Path, name: str) -> None:
    rows = changes(70_000, 7)
    config = study(strategy=name if name != "mean" else "fedprox")
    numbers = site_numbers(7)
    weights = [site["cases"] for site in numbers]
    names = [f"site-{n}" for n in range(7)]
    results = []
    for number, order in enumerate((range(7), reversed(range(7)), (3, 6, 0, 5, 1, 2, 4))):
        arrived = {names[n]: rows[n] for n in order}  # spooled in this order, opened by name
        updates = spooled(tmp_path / str(number), arrived)
        results.append(reducer_of(config)(updates, weights, numbers))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["fedavg", "fednova"])
def test_only_sites_that_annotate_tumour_move_its_rows(tmp_path: Path, name: str) -> None:
    rows = changes(500)
    config = study(strategy=name, weighting="annotated")
    found = reduced(tmp_path / "a", config, rows, tumor_rows=[(40, 60)])
    spoilt = [row.copy() for row in rows]
    for row, site in zip(spoilt, site_numbers(), strict=True):
        if site["annotated"] == 1:
            row[40:60] = 1e6
    moved = reduced(tmp_path / "b", config, spoilt, tumor_rows=[(40, 60)])
    np.testing.assert_array_equal(moved, found)
    assert (np.delete(found, range(40, 60)) != 0).all()


def test_where_no_site_annotates_tumour_its_rows_are_as_the_others(tmp_path: Path) -> None:
    rows, numbers = changes(500), [{**site, "annotated": 1.0} for site in site_numbers()]
    reduce = reducer_of(study(weighting="annotated"), tumor_rows=[(40, 60)])
    found = reduce(spooled(tmp_path, rows), [1.0] * COUNT, numbers)
    np.testing.assert_allclose(found, np.mean(rows, axis=0), atol=1e-6)


def test_other_weightings_treat_all_rows_alike(tmp_path: Path) -> None:
    rows = changes(500)
    found = reduced(tmp_path, study(), rows, tumor_rows=[(40, 60)])
    weights = [site["cases"] for site in site_numbers()]
    np.testing.assert_allclose(found, np.average(rows, axis=0, weights=weights), atol=1e-6)


def test_q_fedavg_learns_after_many_adam_steps_where_the_local_rate_would_not(
    tmp_path: Path,
) -> None:
    """40 steps of 0.001 in 100,000 weights: a change of norm 1 for a loss of 1."""
    rng = np.random.default_rng(0)
    rows = [row.astype(np.float32) for row in 0.004 * rng.standard_normal((3, 100_000))]
    ours = reduced(tmp_path / "a", study(strategy="qfedavg"), rows)
    local = study(strategy="qfedavg", server_learning_rate=1e-3)
    flowers = reduced(tmp_path / "b", local, rows)
    mean = np.linalg.norm(np.mean(rows, axis=0))
    assert 0.5 < np.linalg.norm(ours) / mean < 1
    assert np.linalg.norm(flowers) / mean < 0.01
