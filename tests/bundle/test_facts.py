"""Facts of a model card."""

import json
from pathlib import Path

import pytest
from small_model import plan_of

from fedseg.bundle.card import model_card
from fedseg.bundle.facts import UNTOLD, Facts, evaluation_rows, facts_of
from fedseg.errors import DataError


def write_run(folder: Path, *, privacy: object = None, simulated: bool = False) -> Path:
    folder.mkdir()
    site = {"status": "ok", "training": {"cases": 5.0}}
    line = {
        "round": 2,
        "global": {"cases": 4, "liver.dice": 0.91234, "liver.dice.cases": 3, "tumor.dice": None},
        "federated": {},
        "sites": {"aachen": site, "bonn": {**site, "training": {"cases": 7.0}}},
        "privacy": privacy,
    }
    (folder / "history.jsonl").write_text(json.dumps(line) + "\n")
    sites = {name: {"simulated": simulated} for name in ("aachen", "bonn")}
    manifest = {"run": "r", "fedseg": "0.1.0", "packages": {"torch": "2.13"}, "sites": sites}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.json").write_text(json.dumps({"data": {"source": "phantom"}}))
    return folder


def of(folder: Path, round_number: str = "2") -> Facts:
    notes = {"run": "r", "round": round_number}
    return facts_of("liver", notes, folder, license="CC0", authors="us")


def test_run_is_summed_up(tmp_path: Path) -> None:
    facts = of(write_run(tmp_path / "r"))
    assert facts.data == "12 cases at 2 sites (7, 5), over 2 rounds; no scan left its site"
    assert facts.rows == (("cases held out at the server", "liver", "dice", "0.912", "-", "3"),)
    assert facts.scores == {"global.liver.dice": 0.9123}
    assert not facts.phantoms
    assert facts.versions["torch"] == "2.13"


def write_history(folder: Path, *lines: dict[str, object]) -> None:
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_secure_aggregation_tells_the_sum_of_a_round(tmp_path: Path) -> None:
    """Its sites send masked words: a line has nothing of a site's own training."""
    folder = write_run(tmp_path / "r")
    sites = {name: {"status": "ok", "training": {}} for name in ("aachen", "bonn", "chemnitz")}
    first = {"summed": 3, "sums": {"cases": 30.0, "loss": 1.0}}
    second = {"summed": 2, "sums": {"cases": 19.0, "loss": 1.0}}
    write_history(
        folder,
        {"round": 0},
        {"round": 1, "sites": sites, "secagg": first},
        {"round": 2, "sites": sites, "secagg": second},
    )
    told = "30 cases at 3 sites (the largest sum of a round), over 2 rounds; no scan left its site"
    assert of(folder).data == told


@pytest.mark.parametrize("secagg", [None, {}, {"summed": 2, "sums": {"loss": 1.0}}])
def test_no_number_of_cases_is_no_zero(tmp_path: Path, secagg: object) -> None:
    folder = write_run(tmp_path / "r")
    write_history(folder, {"round": 1, "sites": {"a": {"training": {}}}, "secagg": secagg})
    assert of(folder).data == UNTOLD


def test_run_without_rounds_tells_nothing_of_privacy(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    write_history(folder)
    assert (of(folder).data, of(folder).privacy) == (UNTOLD, UNTOLD)


def test_scores_of_another_round_are_not_taken(tmp_path: Path) -> None:
    facts = of(write_run(tmp_path / "r"), "1")
    assert facts.rows == () and facts.scores == {}


def test_privacy_that_was_spent_is_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", privacy={"epsilon": 3.5, "delta": 1e-5})
    assert of(folder).privacy == "epsilon 3.5, delta 1e-05, up to round 2"
    config = {"data": {"source": "phantom"}, "privacy": {"mode": "record-dp"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert of(folder).privacy.startswith("record-dp, which protects a case: epsilon 3.5, ")
    assert of(write_run(tmp_path / "s")).privacy.startswith("No differential privacy")


def test_simulated_phantoms_are_called_so(tmp_path: Path) -> None:
    facts = of(write_run(tmp_path / "r", simulated=True))
    assert facts.phantoms and "12 phantoms (synthetic CT) at 2 sites" in facts.data
    card = model_card(plan_of(), facts, {})
    assert "no clinical value" in card.splitlines()[2]
    assert "no clinical value" not in model_card(plan_of(), of(write_run(tmp_path / "s")), {})


def test_model_file_alone_tells_nothing_of_its_data() -> None:
    facts = facts_of("liver", {"round": "3"}, None, license="CC0", authors="us")
    assert (facts.data, facts.privacy, facts.rows, facts.round) == (UNTOLD, UNTOLD, (), "3")
    card = model_card(plan_of(), facts, {})
    assert card.count(UNTOLD) == 3


def test_an_evaluation_brings_intervals(tmp_path: Path) -> None:
    path = tmp_path / "hospital-x.json"
    content = {
        "all": {"cases": 9, "liver.dice": 0.9, "liver.dice.cases": 8, "tumor.dice": None},
        "intervals": {"liver.dice": [0.85, 0.94], "tumor.dice": "?"},
    }
    path.write_text(json.dumps(content))
    row = ("hospital-x", "liver", "dice", "0.900", "0.850 to 0.940", "8")
    assert evaluation_rows(path) == (row,)


@pytest.mark.parametrize("text", ["", "[1]", "{", "{}", '{"all": {"liver.dice": null}}'])
def test_what_is_no_evaluation_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "e.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"e\.json: no .*`fedseg evaluate --json`"):
        evaluation_rows(path)
