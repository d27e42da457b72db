"""Tests of comparing a federated model with each site alone and all data in one place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedseg.config import StudyConfig
from fedseg.data.cache import cached_case
from fedseg.data.patches import batches
from fedseg.data.planning import make_plan
from fedseg.data.sites import find_cases
from fedseg.errors import DataError
from fedseg.segmentation import comparison
from fedseg.segmentation.comparison import Share, compare, spread, train_together
from fedseg.segmentation.evaluation import score_cases
from fedseg.segmentation.losses import dice_ce
from fedseg.segmentation.metrics import METRICS, add, summarise
from fedseg.segmentation.models import build_model
from fedseg.segmentation.training import fit

CPU = torch.device("cpu")
STUDY = StudyConfig.from_run_config(
    {
        "model.width": 4,
        "model.depth": 2,
        "train.patch-size": "16,16,16",
        "train.spacing": "3,3,3",
        "train.batch-size": 1,
        "train.precision": "fp32",
        "train.augmentation": "none",
    }
)
PLAN = make_plan(STUDY)


@pytest.fixture
def shares(make_site: Callable[..., Path], tmp_path: Path) -> list[Share]:
    found = []
    for index, name in enumerate(("aachen", "bonn")):
        folder = make_site(name, cases=3 + index, seed=index)
        cases = [cached_case(case, PLAN, tmp_path / "cache") for case in find_cases(folder).cases]
        found.append(Share(name=name, training=cases[1:], validation=cases[:1]))
    return found


def states_equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_everything_is_scored_on_every_sites_held_out_cases(shares: list[Share]) -> None:
    federated = build_model(PLAN, seed=5)
    found = compare(federated, shares, PLAN, STUDY, steps=3, device=CPU)
    assert (found["steps"], found["cases"]) == (3, 2)
    assert list(found["rows"]) == ["local: aachen", "local: bonn", "pooled", "federated"]
    assert {site: list(row) for site, row in found["matrix"].items()} == {
        name: ["aachen", "bonn"] for name in ("aachen", "bonn")
    }
    alone = train_together(shares[1:], PLAN, STUDY, steps=3, device=CPU, name="bonn")
    for network, row, cells in (
        (federated, found["rows"]["federated"], found["per_site"]["federated"]),
        (alone, found["rows"]["local: bonn"], found["matrix"]["bonn"]),
    ):
        parts = {
            share.name: score_cases(
                network, share.validation, PLAN, device=CPU, precision="fp32", distances=True
            )
            for share in shares
        }
        assert row == summarise(add(part for found in parts.values() for part in found))
        assert cells == {site: summarise(add(part)) for site, part in parts.items()}
    assert set(found["differences"]) == {"local: aachen", "local: bonn", "pooled"}
    entry = found["differences"]["pooled"]["liver.dice"]
    rows = found["rows"]
    assert entry["pairs"] == 2
    apart = rows["federated"]["liver.dice"] - rows["pooled"]["liver.dice"]
    assert entry["difference"] == pytest.approx(apart)
    assert set(found["spread"]) == set(rows)


def test_a_model_starts_seeded_and_takes_so_many_steps_of_the_whole_schedule(
    shares: list[Share], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []

    def watched(network: Any, drawn: Any, loss: Any, config: Any, **options: Any) -> Any:
        assert states_equal(network, build_model(PLAN, seed=STUDY.train.seed))
        optimizer = torch.optim.AdamW(network.parameters())
        step = options.pop("on_step")

        def noted(*values: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])
            step(*values)

        return fit(network, drawn, loss, config, optimizer=optimizer, on_step=noted, **options)

    monkeypatch.setattr(comparison, "fit", watched)
    train_together(shares, PLAN, STUDY, steps=5, device=CPU, name="pooled")
    assert len(rates) == 5
    assert rates[0] == STUDY.train.learning_rate
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.2 * rates[0]


def test_one_site_trains_as_fit_does_on_its_cases(shares: list[Share]) -> None:
    mine = train_together(shares[:1], PLAN, STUDY, steps=4, device=CPU, name="aachen")
    again = train_together(shares[:1], PLAN, STUDY, steps=4, device=CPU, name="aachen")
    other = train_together(shares[:1], PLAN, STUDY, steps=4, device=CPU, name="bonn")
    assert states_equal(mine, again)
    assert not states_equal(mine, other)
    network = build_model(PLAN, seed=STUDY.train.seed)
    drawn = batches(
        shares[0].training,
        steps=4,
        batch_size=1,
        patch_size=PLAN.patch_size,
        foreground=STUDY.train.foreground,
        augmentation="none",
        spacing=PLAN.spacing,
        rng=np.random.default_rng([STUDY.train.seed, 0, *b"aachen"]).spawn(1)[0],
    )
    fit(network, drawn, dice_ce, STUDY.train, steps=4, round_number=1, rounds=1)
    assert states_equal(mine, network)


def test_pooled_batches_keep_each_sites_annotation(
    shares: list[Share], monkeypatch: pytest.MonkeyPatch
) -> None:
    liver = Share(
        name="bonn",
        training=shares[1].training,
        validation=shares[1].validation,
        annotated=("liver",),
    )
    seen: list[tuple[tuple[str, ...], int]] = []

    def loss(logits: torch.Tensor, labels: torch.Tensor, annotated: Any) -> torch.Tensor:
        seen.append((tuple(annotated), int(labels.max())))
        return dice_ce(logits, labels, annotated)

    monkeypatch.setitem(comparison.LOSSES, "dice-ce", loss)
    for share in (liver,):  # what its masks would hold
        for case in share.training:
            object.__setattr__(case, "labels", np.minimum(case.labels, 1))
    train_together([shares[0], liver], PLAN, STUDY, steps=40, device=CPU, name="pooled")
    groups = {annotated for annotated, _ in seen}
    assert groups == {("liver", "tumor"), ("liver",)}
    assert all(most < 2 for annotated, most in seen if annotated == ("liver",))
    both = sum(annotated == ("liver", "tumor") for annotated, _ in seen)
    assert 6 <= both <= 26  # 2 of 5 cases
    found = compare(build_model(PLAN), [shares[0], liver], PLAN, STUDY, steps=1, device=CPU)
    assert found["rows"]["pooled"]["tumor.volume_ml.cases"] == 1
    assert found["per_site"]["federated"]["bonn"]["tumor.dice"] is None
    assert "tumor" in found["spread"]["federated"]


def test_without_held_out_cases_there_is_nothing_to_compare(shares: list[Share]) -> None:
    bare = [Share(name=share.name, training=share.training, validation=()) for share in shares]
    with pytest.raises(DataError, match=r"no held-out cases; set train\.validation-fraction"):
        compare(build_model(PLAN), bare, PLAN, STUDY, steps=1, device=CPU)


def test_spread_names_the_worst_site() -> None:
    per_site = {
        "a": {"liver.dice": 0.9, "tumor.dice": None},
        "b": {"liver.dice": 0.7, "tumor.dice": None},
        "c": {"liver.dice": None, "tumor.dice": None},
    }
    found = spread(per_site)
    assert found == {"liver": {"worst": "b", "dice": 0.7, "spread": pytest.approx(0.2)}}
    assert "dice" in METRICS
