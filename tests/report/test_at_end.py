"""Tests of what is written where a run ends."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from read_page import read_page
from written_run import write_run

from fedseg import cli
from fedseg.errors import StudyError
from fedseg.federation.history import score
from fedseg.report import at_end, trackers
from fedseg.site_config import fedseg_home

Run = Callable[..., Any]


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> dict[int, dict[str, Any]]:
    return {
        11 * (n + 1): {"data-dir": str(make_site(name, seed=n)), "device": "cpu"}
        for n, name in enumerate(("aachen", "bonn"))
    }


def test_a_study_ends_with_a_report(
    run_study: Run,
    sites: dict[int, Any],
    make_site: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = make_site("server", cases=4, seed=9)
    folder, _ = run_study(sites, {"data.server-dir": str(server), "federation.rounds": 1})

    content = (folder.path / "report.html").read_text()
    page = read_page(content)
    assert f"Report: {folder.path / 'report.html'}" in capsys.readouterr().out
    titles = [figure.all("figcaption")[0].text for figure in page.all("figure")]
    pictured = [title for title in titles if "at the server" in title]
    assert [title.partition(":")[0] for title in pictured] == ["Median case", "Worst case"]
    assert str(server) not in "".join(pictured) and "case-0" not in "".join(pictured)


def test_server_cases_with_the_liver_alone_say_nothing_about_tumours(
    run_study: Run, sites: dict[int, Any], make_site: Callable[..., Path]
) -> None:
    server = make_site("server", cases=3, seed=9)
    (server / "site.toml").write_text('labels = "liver"\n')
    folder, _ = run_study(sites, {"data.server-dir": str(server), "federation.rounds": 1})

    lines = list(map(json.loads, (folder.path / "history.jsonl").read_text().splitlines()))
    for line in lines:
        assert line["global"]["liver.dice"] is not None
        assert line["global"]["tumor.dice"] is None
        assert line["global"]["tumor.dice.cases"] == 0
        assert score(line) == (1, line["global"]["liver.dice"])
    pictures = json.loads((folder.path / "pictures" / "pictures.json").read_text())["pictures"]
    assert [set(picture["dice"]) for picture in pictures] == [{"liver"}] * 2


def test_a_site_has_its_own_report_and_sends_no_part_of_it(
    run_study: Run, sites: dict[int, Any]
) -> None:
    folder, grid = run_study(sites, {"federation.rounds": 1})

    own = fedseg_home() / "cache" / "reports" / folder.run_id
    assert sorted(path.name for path in own.iterdir()) == ["aachen.html", "bonn.html"]
    page = read_page((own / "aachen.html").read_text())
    assert "This file stays here." in page.text
    assert len(page.all("img")) == 2  # of three cases one is held out
    assert all("aachen" not in image.attributes["alt"] for image in page.all("img"))
    for message in grid.received:
        for record in message.content.array_records.values():
            assert all(array.dtype == "float32" for array in record.values())
        assert "png" not in str(message.content.config_records).lower()


def test_a_failed_run_has_a_report_that_says_so(
    run_study: Run, sites: dict[int, Any], tmp_path: Path
) -> None:
    runs = {"output.dir": str(tmp_path / "failing")}
    with pytest.raises(StudyError, match="got 1 good updates"):
        run_study(sites, runs, reply={11: spoilt})
    page = read_page((tmp_path / "failing" / "latest" / "report.html").read_text())
    assert "The run failed: round 1: got 1 good updates" in page.text


def spoilt(message: Message) -> Message:
    """A reply without its update."""
    for name in list(message.content.array_records):
        del message.content[name]
    return message


def test_a_report_that_fails_is_a_line_in_the_log(
    run_study: Run,
    sites: dict[int, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no\nroom")

    for name in ("_draw", "write_report", "draw_pictures"):
        monkeypatch.setattr(at_end, name, broken)
    folder, _ = run_study(sites, {"federation.rounds": 1})
    assert not (folder.path / "report.html").exists()
    assert not (fedseg_home() / "cache" / "reports").exists()


def test_a_site_without_held_out_cases_has_none(run_study: Run, sites: dict[int, Any]) -> None:
    run_study(sites, {"federation.rounds": 1, "train.validation-fraction": 0.0})
    assert not (fedseg_home() / "cache" / "reports").exists()


def test_trackers_get_every_round(
    run_study: Run, sites: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    @contextlib.contextmanager
    def listed(folder: Path, study: Any) -> Any:
        yield lambda number, found: seen.append(number)

    monkeypatch.setitem(trackers.TRACKERS, "listed", listed)
    run_study(sites, {"output.trackers": "listed"})
    assert seen == [0, 1, 2]


def test_commands_report_and_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "runs" / "2026-11-25T00-00-00-abcd")
    (folder.parent / "latest").symlink_to(folder.name)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fedseg", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    assert call("report", folder) == (0, f"{folder / 'report.html'}\n", "")
    assert call("report", "latest", "--runs", folder.parent)[1] == f"{folder / 'report.html'}\n"
    code, _, error = call("report", "2026", "--runs", folder.parent)
    assert code == 2 and error.startswith("fedseg: run: got '2026'") and error.count("\n") == 1
    code, out, _ = call("watch", "--once", folder)
    assert code == 0 and "completed · round 4 of 4" in out
