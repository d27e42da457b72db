"""Tests of the leak test as a whole, on tiny sites."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedseg.data.planning import make_plan
from fedseg.errors import DataError
from fedseg.privacy.leak_sites import cohorts_of, open_sites, small_study
from fedseg.privacy.leakage import LeakReport, leak_test
from fedseg.privacy.probe import GUESS, TRUTH
from fedseg.privacy.rehearsal import (
    LeakOptions,
    Rehearsal,
    get_weights,
    rehearse,
    set_weights,
)
from fedseg.privacy.views import SETTINGS
from fedseg.report.leak_table import leak_text
from fedseg.segmentation.models import build_model

MakeSite = Callable[..., Path]


@pytest.fixture
def rehearsal(make_site: MakeSite) -> Callable[..., Rehearsal]:
    folder = make_site("aachen", cases=12)

    def make(**options: float) -> Rehearsal:
        study = small_study(seed=0, folder=folder)
        plan = make_plan(study).model_copy(
            update={"width": 2, "depth": 2, "patch_size": (8, 8, 8), "spacing": (3.0, 3.0, 3.0)}
        )
        cohorts = cohorts_of(open_sites(study, sites=3, cases=0), plan, seed=0)
        short = {"rounds": 2, "steps": 2, "iterations": 2, **options}
        return Rehearsal(
            study=study,
            plan=plan,
            cohorts=cohorts,
            options=LeakOptions(**short),  # type: ignore[arg-type]
            device=torch.device("cpu"),
        )

    return make


def as_text(report: LeakReport) -> str:
    return json.dumps(report.to_json(), sort_keys=True, allow_nan=False)


def test_report_has_every_setting_and_repeats_itself(
    rehearsal: Callable[..., Rehearsal],
) -> None:
    report = leak_test(rehearsal())
    assert list(report.rows) == list(SETTINGS)
    assert (report.facts["members"], report.facts["others"]) == (6, 6)
    for row in report.rows.values():
        for found in (row.alignment, row.loss):
            assert 0 <= found.low <= found.auc <= found.high <= 1
    assert list(report.images) == [TRUTH, GUESS, *SETTINGS]
    assert all(image.shape == (8, 8, 8) for image in report.images.values())
    # Same updates but for their length: the cosine must not tell them apart.
    assert report.rows["clipping"].alignment == report.rows["none"].alignment
    # The secure sum is plain averaging: whoever gets the model can do the same with it.
    assert report.rows["secagg, sum"].loss == report.rows["none"].loss
    assert as_text(leak_test(rehearsal())) == as_text(report)
    assert as_text(leak_test(rehearsal(seed=1))) != as_text(report)
    text = leak_text(report)
    for name in (*SETTINGS, GUESS, "LOWER bound"):
        assert name in text
    assert max(len(line) for line in text.splitlines()) <= 140


def test_noise_moves_the_model_as_far_as_it_should(rehearsal: Callable[..., Rehearsal]) -> None:
    test = rehearsal(noise_multiplier=5.0)
    network = build_model(test.plan, seed=0)
    first = get_weights(network)
    moved = {}
    for name in ("clipping", "central-dp"):
        set_weights(network, first)
        terms = rehearse(test, network, name, SETTINGS[name])
        moved[name] = np.linalg.norm(get_weights(network) - first)
    # Two rounds of noise on a sum of three sites: sqrt(2 N) z C / 3.
    expected = np.sqrt(2 * first.size) * 5 * terms.clip / 3
    assert moved["central-dp"] == pytest.approx(expected, rel=0.1)
    assert moved["clipping"] <= 2 * terms.clip


def test_rounds_average_what_each_site_trained(rehearsal: Callable[..., Rehearsal]) -> None:
    test = rehearsal(rounds=1)
    network = build_model(test.plan, seed=0)
    first = get_weights(network)
    seen: list[np.ndarray] = []
    rehearse(test, network, "none", SETTINGS["none"], on_round=lambda n, u, t: seen.append(u))
    assert seen[0].shape == (3, first.size)
    assert all(np.abs(update).max() > 0 for update in seen[0])
    assert np.allclose(get_weights(network), first + seen[0].mean(0), atol=1e-6)


def test_halves_of_a_site_are_disjoint_and_all_its_cases(
    rehearsal: Callable[..., Rehearsal],
) -> None:
    files = [
        getattr(case.image, "filename", None)
        for cohort in rehearsal().cohorts
        for case in (*cohort.members, *cohort.others)
    ]
    assert len(set(files)) == len(files) == 12


def test_too_few_cases_are_one_line(make_site: MakeSite) -> None:
    study = small_study(folder=make_site("bonn", cases=11))
    with pytest.raises(DataError, match="got 11 usable cases for 3 sites; expected at least 4 a"):
        open_sites(study, sites=3, cases=0)


def test_phantoms_are_of_one_kind_a_site() -> None:
    sites = open_sites(small_study(), sites=3, cases=4)
    assert [len(site.cases) for site in sites] == [4, 4, 4]
    assert len({site.cases[0].image.parent for site in sites}) == 3
