"""Tests of the view of a run that goes on."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from written_run import line, lines, write_history, write_run

from fedseg.errors import StudyError
from fedseg.report.live import finished, follow, left, sparkline, view
from fedseg.report.run_files import find_run, read_run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "2026-11-25T00-00-00-abcd")


@pytest.fixture
def folder(tmp_path: Path, original: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


def status(folder: Path, **entries: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def shown(drawn: Any) -> str:
    text = io.StringIO()
    Console(file=text, width=80).print(drawn)
    return text.getvalue()


def test_sparkline() -> None:
    assert sparkline([0.0, 0.49, 0.5, 0.99, 1.0, -1.0, 2.0]) == "▁▄▅██▁█"
    assert sparkline([0.0] * 50 + [1.0], width=3) == "▁▁█"
    assert sparkline([]) == ""


def test_view_of_a_running_study(folder: Path) -> None:
    write_history(folder, lines()[:3])
    status(folder, status="running")
    text = shown(view(read_run(folder)))
    assert "2026-11-25T00-00-00-abcd: running · round 2 of 4 · last round 40 s" in text
    assert "about 80 s left" in " ".join(text.split())
    assert re.search(r"Dice, liver +▁▅▆ +0\.700 \(best 0\.700\)", text)
    bonn = next(row for row in text.splitlines() if "bonn" in row)
    cells = [cell.strip() for cell in bonn.strip("│").split("│")]
    assert cells == ["bonn", "quarantined", "12 s", "2.00 MB", "0.600", "0.300"]


def test_before_the_first_round_and_after_a_failure(folder: Path) -> None:
    (folder / "history.jsonl").unlink()
    status(folder, status="failed", error="no sites [bold]came")
    run = read_run(folder)
    assert "failed\nno sites [bold]came" in shown(view(run))
    assert finished(run) and left(run) is None


def test_follows_until_the_end(folder: Path) -> None:
    """Each wait ends when the run has written something."""
    write_history(folder, [])
    status(folder, status="running")
    events = iter(
        [
            lambda: write_history(folder, [line(0)]),
            lambda: write_history(folder, [line(0), line(1)]),
            lambda: status(folder, status="completed"),
        ]
    )
    seen: list[str] = []
    run = follow(folder, lambda drawn: seen.append(shown(drawn)), lambda: next(events)())
    assert [("round 0" in text, "round 1" in text, "completed" in text) for text in seen] == [
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (False, True, True),
    ]
    assert run.manifest["status"] == "completed"


def test_runs_are_found_by_id_folder_and_latest(folder: Path) -> None:
    root = folder.parent
    (root / "latest").symlink_to(folder.name)
    assert (
        find_run(folder.name, root) == find_run("latest", root) == find_run(str(folder)) == folder
    )
    for name in ("nothing", "", "."):
        with pytest.raises(StudyError, match="expected a run's id, its folder or latest"):
            find_run(name, root)


def test_a_failed_round_shows_with_its_reason(folder: Path) -> None:
    found = lines()[:3]
    found[1]["failed"] = "secure aggregation: 2 of 4 sites are left"
    write_history(folder, found)
    status(folder, status="running")
    text = " ".join(shown(view(read_run(folder))).split())
    assert "1 failed" in text and "2 of 4 sites are left" in text
