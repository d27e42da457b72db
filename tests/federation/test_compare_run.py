"""Tests of comparing a finished run: from its folder alone."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedseg import cli
from fedseg.errors import ConfigError, StudyError
from fedseg.federation.compare_run import compare_run, run_steps
from fedseg.report.comparison_table import comparison_text
from fedseg.report.run_files import read_run

CPU = torch.device("cpu")
Run = Callable[..., Any]


@pytest.fixture
def sites(make_site: Callable[..., Path], tmp_path: Path) -> Path:
    for n, name in enumerate(("aachen", "bonn")):
        make_site(f"sites/{name}", seed=n)
    return tmp_path / "sites"


@pytest.fixture
def finished(run_study: Run, sites: Path) -> Path:
    """A run of two simulated sites."""
    nodes = {n + 1: {"partition-id": n, "num-partitions": 2} for n in range(2)}
    data = {"data.source": "folder", "data.partition": "folders", "data.dir": str(sites)}
    folder, _ = run_study(nodes, {**data, "federation.personal": False})
    return Path(folder.path)


def test_a_simulated_run_needs_nothing_but_its_folder(finished: Path, sites: Path) -> None:
    found = compare_run(finished, device=CPU)
    assert found == json.loads((finished / "comparison.json").read_text())
    history = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    assert found["steps"] == run_steps(history) == 4
    assert list(found["rows"]) == ["local: aachen", "local: bonn", "pooled", "federated"]
    # The last round scored the same model on the same held-out cases.
    assert found["rows"]["federated"] == history[-1]["federated"]
    for name, site in history[-1]["sites"].items():
        assert found["per_site"]["federated"][name] == site["metrics"]
    assert "liver.hd95" in history[-1]["federated"]
    assert "liver.hd95" not in history[1]["federated"]
    again = compare_run(finished, device=CPU, sites=sites)
    assert again == found


def test_the_report_and_the_table_read_it(finished: Path) -> None:
    found = compare_run(finished, device=CPU, steps=2)
    run = read_run(finished)
    assert run.steps == 2
    assert list(run.compared) == list(found["rows"])
    assert list(run.matrix) == ["aachen", "bonn"]
    text = comparison_text(found)
    for words in (
        "after 2 steps",
        "aachen alone",
        "pooled",
        "federated",
        "lowest ┃ spread ┃ aachen",
        "liver Dice",
    ):
        assert words in text


def test_many_sites_with_long_names_stay_readable(finished: Path) -> None:
    found = compare_run(finished, device=CPU, steps=1)
    names = [f"university-hospital-of-town-{n:02d}" for n in range(9)]
    row = found["matrix"]["bonn"]["bonn"]
    found["matrix"] = {name: {other: row for other in names} for name in names}
    found["per_site"] = {"federated": found["matrix"][names[0]]}
    found["spread"] |= {f"local: {name}": found["spread"]["federated"] for name in names}
    text = comparison_text(found)
    assert "…" not in text
    assert all(len(line) <= 120 for line in text.splitlines())
    for name in names:
        assert text.count(f"│ {name} alone │") == text.count(f"│ {names[0]} alone │") > 0
        assert sum(f"┃ {name} ┃" in line for line in text.splitlines()) == 2  # a matrix a region


def test_the_command_prints_the_table_or_json(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in ([], ["--json"]):
        command = ["fedseg", "compare", str(finished), "--steps", "1", *extra]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code
        shown = capsys.readouterr().out
        if extra:
            assert json.loads(shown) == json.loads((finished / "comparison.json").read_text())
        else:
            assert "after 1 steps" in shown and "bonn alone" in shown
            assert shown.splitlines()[-1].startswith(f"Written: {finished / 'comparison.json'};")


def test_nothing_of_a_case_is_in_the_file(finished: Path) -> None:
    compare_run(finished, device=CPU, steps=1)
    text = (finished / "comparison.json").read_text()
    assert "case-" not in text and str(finished) not in text


def test_real_sites_need_their_folders(finished: Path, sites: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    manifest["sites"]["bonn"]["simulated"] = False
    (finished / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StudyError, match="say --sites DIR for a folder of site folders"):
        compare_run(finished, device=CPU, steps=1)
    assert compare_run(finished, device=CPU, steps=1, sites=sites)["cases"] == 2
    with pytest.raises(StudyError, match="no such folder"):
        compare_run(finished, device=CPU, steps=1, sites=sites / "none")


def test_a_folder_that_is_no_finished_run(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(StudyError, match=r"can.t read its config\.json and plan\.json"):
        compare_run(tmp_path, device=CPU)
    (finished / "history.jsonl").write_text("{")
    with pytest.raises(StudyError, match="missing or damaged; say --steps"):
        compare_run(finished, device=CPU)
    (finished / "history.jsonl").write_text('{"round": 0, "sites": {}}\n')
    with pytest.raises(StudyError, match="got no round of training"):
        compare_run(finished, device=CPU)


def test_code_of_the_study_needs_consent(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    config["train"]["loss"] = "somebody.losses:mine"
    (finished / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="say --allow-custom-code"):
        compare_run(finished, device=CPU)


def test_steps_of_a_run_are_those_of_its_busiest_site() -> None:
    history = [
        {"round": 0, "sites": {}},
        {"sites": {"a": {"training": {"steps": 3.0}}, "b": {"training": {"steps": 5.0}}}},
        {"sites": {"a": {"training": {"steps": 4.0}}, "b": {"status": "late", "training": None}}},
    ]
    assert run_steps(history) == 9
