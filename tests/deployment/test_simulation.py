"""`flwr run .` on one machine, as a researcher types it."""

import json
import re
from pathlib import Path

import pytest
from processes import CHECKOUT, SMALL, Run, Workplace

from fedseg.segmentation.metrics import METRICS
from fedseg.segmentation.model_file import load_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FILES = ("config.json", "plan.json", "manifest.json", "history.jsonl")
MODELS = ("model-last.safetensors", "model-best.safetensors")


def check_run_folder(run: Run, sites: list[str], *, rounds: int) -> None:
    assert run.status == "finished:completed"
    folder = run.folder
    assert folder is not None
    assert folder.is_absolute()
    assert all((folder / name).is_file() for name in (*FILES, *MODELS))
    manifest = run.manifest()
    assert manifest["status"] == "completed"
    assert manifest["flwr_runs"] == [run.id]
    assert list(manifest["sites"]) == sites
    history = run.history()
    assert [line["round"] for line in history] == list(range(rounds + 1))
    for line in history[1:]:
        assert list(line["sites"]) == sites
        for site in line["sites"].values():
            assert (site["status"], site["reason"]) == ("ok", None)
            assert site["weight"] > 0
            assert site["bytes_up"] > 0
        assert line["bytes_up"] == sum(site["bytes_up"] for site in line["sites"].values())
        assert line["bytes_down"] > 0
    for site in history[-1]["sites"].values():
        assert {f"liver.{metric}" for metric in METRICS} <= set(site["metrics"])
        assert site["metrics"]["cases"] > 0
    for name in MODELS:
        load_model(folder / name)
    table, _, after = run.output.partition(f"Round {rounds}: mean over cases")[2].partition("└")
    assert all(word in table for word in ("liver", "tumor", "Dice", "federated", *sites))
    assert f"Run folder: {folder.parent}" in after
    assert folder.name in after


def server_lines(run: Run) -> list[str]:
    """What the server said; Ray marks what the simulated sites say by their process."""
    return [
        line
        for line in run.output.splitlines()
        if line.startswith("fedseg: ") and "pid=" not in line
    ]


def failure(run: Run) -> str:
    """The one line that says why, after a check that there is nothing more."""
    assert run.status == "finished:failed"
    assert "Traceback" not in run.output
    said = server_lines(run)
    assert said, run.output
    return said[-1].removeprefix("fedseg: ")


@pytest.fixture(scope="module")
def phantom_run(workplace: Workplace) -> Run:
    before = (CHECKOUT / "pyproject.toml").read_bytes()
    run = workplace.simulate(SMALL, sites=3)
    assert (CHECKOUT / "pyproject.toml").read_bytes() == before
    return run


def test_phantoms(phantom_run: Run) -> None:
    check_run_folder(phantom_run, ["site-0", "site-1", "site-2"], rounds=2)
    assert not (CHECKOUT / "uv.lock").exists()
    for line in phantom_run.history():
        assert line["global"]["liver.dice"] is not None
        assert line["unseen"]["cases"] == 1


def test_compare_and_report(workplace: Workplace, phantom_run: Run) -> None:
    """The run's phantoms are made again: its model gets the scores that the sites sent."""
    assert phantom_run.folder is not None
    # As many threads as a simulated site has: the last bits depend on it.
    one_thread = workplace.env(OMP_NUM_THREADS="1")
    said = workplace.call("fedseg", "compare", phantom_run.folder, env=one_thread)
    assert "Each model after 4 steps" in said
    found = json.loads((phantom_run.folder / "comparison.json").read_text())
    alone = [f"local: site-{number}" for number in range(3)]
    assert list(found["rows"]) == [*alone, "pooled", "federated"]
    federated = phantom_run.history()[-1]["federated"]
    assert found["rows"]["federated"] == pytest.approx(federated, nan_ok=True)
    workplace.call("fedseg", "report", phantom_run.folder)
    page = (phantom_run.folder / "report.html").read_text()
    assert "all data in one place" in page


def test_folder_that_is_split(workplace: Workplace, phantoms: Path) -> None:
    folder = {"data.source": "folder", "data.dir": str(phantoms / "site-0")}
    run = workplace.simulate({**SMALL, **folder, "federation.rounds": 1}, sites=2)
    check_run_folder(run, ["site-0", "site-1"], rounds=1)
    line = run.history()[1]
    assert [site["training"]["cases"] for site in line["sites"].values()] == [1, 1]
    assert line["federated"]["cases"] == 2


def test_folder_of_each_site(workplace: Workplace, phantoms: Path) -> None:
    folders = {"data.source": "folder", "data.dir": str(phantoms), "data.partition": "folders"}
    toml = phantoms / "site-1" / "site.toml"
    toml.write_text(toml.read_text().replace('"site-1"', '"basel"'))
    run = workplace.simulate({**SMALL, **folders, "federation.rounds": 1}, sites=3)
    check_run_folder(run, ["basel", "site-0", "site-2"], rounds=1)


def test_wrong_value_is_one_line(workplace: Workplace) -> None:
    run = workplace.simulate({**SMALL, "train.batch-size": 0}, sites=2)
    line = failure(run)
    assert re.match(r"train\.batch-size: got 0; expected .*1", line)
    assert run.folder is None


def test_all_sites_fail_by_name(workplace: Workplace, phantoms: Path, tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for number in range(4):
            (tmp_path / kind / f"patient-{number}.nii.gz").write_bytes(b"no scan")
    broken = {"data.source": "folder", "data.dir": str(tmp_path)}
    run = workplace.simulate({**SMALL, **broken}, sites=2)
    line = failure(run)
    assert line.startswith("round 1: got 0 good updates; expected at least 2")
    for name in ("site-0", "site-1"):
        assert f"{name}: failed, it has no usable case" in line
    manifest = run.manifest()
    assert manifest["status"] == "failed"
    for text in (line, str(manifest), str(run.history())):
        assert str(tmp_path) not in text
        assert "patient-" not in text
    assert [site["reason"] for site in run.history()[1]["sites"].values()] == ["no-cases"] * 2


def test_missing_folder_is_said_by_name_and_without_its_path(
    workplace: Workplace, tmp_path: Path
) -> None:
    missing = {"data.source": "folder", "data.dir": str(tmp_path / "nowhere")}
    run = workplace.simulate({**SMALL, **missing, "federation.connect-deadline": 40.0}, sites=2)
    line = failure(run)
    assert line.startswith("sites: got 0")
    server = server_lines(run)
    assert str(tmp_path) not in "\n".join(server)
    for name in ("site-0", "site-1"):
        assert any(f"{name} can't take part: its folder can't be used" in said for said in server)
