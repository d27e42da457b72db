"""Tests of `report.html`: what it says, that it is one safe file, and that nothing breaks it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from read_page import Element, read_page, row_of
from spoilt import spoilt
from written_run import SITES, comparison, line, lines, write_history, write_run

from fedseg.errors import StudyError
from fedseg.report.report import write_report

Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "2026-11-25T00-00-00-abcd")


@pytest.fixture
def folder(tmp_path: Path, original: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


def page_of(folder: Path) -> Element:
    return read_page(write_report(folder).read_text(encoding="utf-8"))


def edit(folder: Path, name: str, **entries: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **entries}))


def headline(page: Element) -> str:
    (found,) = [p.text for p in page.all("p") if p.attributes.get("class") == "lead"]
    return found


def test_headline_is_what_federating_gained(folder: Path) -> None:
    page = page_of(folder)
    assert headline(page) == (
        "Training together paid: Dice +0.200 for liver and +0.150 for tumours, against a site alone"
    )
    tiles = page.all("dl")[0].text
    assert "0.900" in tiles and "0.700 for a site alone" in tiles
    assert "0.920 with all data in one place" in tiles
    assert "trained for 120 steps" in page.text
    assert row_of(page, "against aachen alone")[0] == "+0.200 (+0.180 to +0.220)"


@pytest.mark.parametrize(
    ("liver", "tumor", "words"),
    [
        (0.65, 0.35, "did not pay: Dice \N{MINUS SIGN}0.050 for liver"),
        (0.75, 0.35, "paid in part: Dice +0.050 for liver and \N{MINUS SIGN}0.050 for tumours"),
        (0.75, None, "paid: Dice +0.050 for liver, against"),
    ],
)
def test_headline_says_where_it_lost(
    folder: Path, liver: float, tumor: float | None, words: str
) -> None:
    rows = comparison()["rows"]
    rows["federated"] = {"liver.dice": liver, "tumor.dice": tumor}
    edit(folder, "comparison.json", rows=rows)
    assert words in headline(page_of(folder))


def test_headline_without_comparison_is_the_best_round(folder: Path) -> None:
    (folder / "comparison.json").unlink()
    page = page_of(folder)
    assert headline(page) == (
        "The shared model reached a Dice of 0.900 for liver and 0.450 for tumours"
    )
    assert "0.100 before training" in page.all("dl")[0].text
    assert "Best of 4 rounds: round 3, scored on 4 cases held out at the server." in page.text
    assert "better than the shared one at 1 of 2 sites" in page.text
    assert "liver 0.800 against 0.775" in page.text
    assert "can't say what federating gained" in page.text


def test_monitored_metric_decides_the_best_round(folder: Path) -> None:
    history = lines()
    history[1]["federated"]["liver.dice"] = 0.99
    write_history(folder, history)
    edit(folder, "config.json", federation={"monitor": "federated.liver.dice", "rounds": 4})
    assert "The best model is that of round 1." in page_of(folder).text


def test_curves_show_scopes_and_sites(folder: Path) -> None:
    page = page_of(folder)
    figures = [figure for figure in page.all("figure") if figure.all("svg")]
    liver = figures[0].all("svg")[0]
    names = [group.all("title")[0].text for group in liver.all("g")]
    assert names == [
        *SITES,
        "cases held out at the sites",
        "a kind of scan that no site has",
        "cases held out at the server",
    ]
    summary = liver.all("desc")[0].text
    assert "cases held out at the server: 0.100 in round 0, 0.800 in round 4" in summary
    assert "highest 0.900 in round 3" in summary
    # A point lies where its value is: Dice 0.9 a tenth of the axis below 1.0.
    ticks = {text.text: float(text.attributes["y"]) for text in liver.all("text")}
    path = liver.all("g")[-1].all("path")[0].attributes["d"]
    points = [tuple(map(float, point.split())) for point in path[1:].split("L")]
    assert len(points) == 5
    assert points[3][1] + 4 == pytest.approx(0.9 * ticks["1.0"] + 0.1 * ticks["0.0"], abs=0.2)
    assert sorted(points) == points


def test_sites_have_their_numbers_and_the_worst_is_marked(folder: Path) -> None:
    page = page_of(folder)
    assert row_of(page, "aachen", caption="Held-out cases of each site") == [
        *("0.900 (2 cases)", "0.450 (2 cases)", "3", "3 of 4", "yes")
    ]
    # Chemnitz came late in round 3, and its update was used in round 4, where it has one, too.
    assert row_of(page, "chemnitz", caption="Held-out cases of each site") == [
        *("lowest 0.700 (2 cases)", "lowest 0.350 (2 cases)", "3", "3 of 4", "\N{EN DASH}")
    ]
    assert "lowest 0.700 (chemnitz), highest 0.900 (aachen), 0.200 apart" in page.text
    assert "aachen and bonn hold 2 scans in common." in page.text
    assert "Their names rest on their own word: bonn." in page.text


def test_undefined_is_a_dash_with_its_count(folder: Path) -> None:
    page = page_of(folder)
    dice = row_of(page, "tumours: Dice", caption="The best model")
    assert dice[2] == "\N{EN DASH} (0 cases)"
    assert dice[:2] == ["0.450 (4 cases)", "0.450"]
    matrix = row_of(page, "aachen alone", caption="by model and site")
    assert matrix == ["own 0.900", "0.400", "0.400"]


def test_lesions_by_size(folder: Path) -> None:
    page = page_of(folder)
    caption = "Lesions in cases held out at the server"
    assert row_of(page, "under 10 mm", caption=caption) == [
        "4",
        "2",
        "2",
        "0.500",
        "0.500",
        "0.500",
    ]
    assert row_of(page, "all", caption=caption)[0] == "12"
    assert "3.00 a scan; 1.00 in each of 2 scans without any lesion" in page.text


def test_who_was_missing_and_why(folder: Path) -> None:
    table = next(t for t in page_of(folder).all("table") if "went without" in t.text)
    rows = [[cell.text for cell in row.all("th", "td")] for row in table.all("tr")][1:]
    assert [row[:3] for row in rows] == [
        ["2", "bonn", "quarantined"],
        ["3", "chemnitz", "late"],
        ["4", "aachen", "refused"],
        ["4", "chemnitz", "came late"],
    ]
    assert "far larger than the others'" in rows[0][3]
    assert rows[3][3] == "update of round 3: averaged in this round, at a lower weight"


def test_costs_privacy_plan_and_origin(folder: Path) -> None:
    page = page_of(folder)
    facts = page.all("dl")[1].text
    assert (
        facts == "rounds 4 sites 3 time 3 min sent by the sites 24.0 MB sent to the sites 36.0 MB"
    )
    assert "No differential privacy" in page.text
    assert row_of(page, "training patch, voxels", caption="preprocesses")[0] == "16 x 16 x 16"
    assert row_of(page, "SHA-256 of the code")[0] == "c0de" * 16
    model = row_of(page, "model-best.safetensors")
    assert model[0] == "3" and re.fullmatch(r"[0-9a-f]{64}", model[2])
    assert row_of(page, "train.patch-size") == ["16, 16, 16"]


def test_privacy_spent(folder: Path) -> None:
    history = lines()
    history[4]["privacy"] = {"epsilon": 3.217, "delta": 1e-5}
    write_history(folder, history)
    edit(folder, "config.json", privacy={"mode": "central-dp", "secure-aggregation": True})
    edit(folder, "manifest.json", ended="after round 4: one more would pass privacy.max-epsilon")
    text = page_of(folder).text
    start = "Spent up to round 4 (privacy.mode is central-dp, which protects a site): epsilon 3.22"
    assert f"{start}, delta 1e-05." in text
    assert "the server saw only the sum" in text
    assert "Training ended after round 4: one more would pass privacy.max-epsilon." in text


def test_pictures_are_in_the_file(folder: Path) -> None:
    images = page_of(folder).all("img")
    assert len(images) == 4
    assert all(image.attributes["src"].startswith("data:image/png;base64,") for image in images)
    assert "case 2 of 3 at the server" in images[0].attributes["alt"]


def test_one_file_that_needs_nothing_else(folder: Path) -> None:
    content = write_report(folder).read_text(encoding="utf-8")
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<iframe", _without_data(content))
    assert "default-src 'none'" in content


def _without_data(content: str) -> str:
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", content)


def test_readable_by_a_screen_reader(folder: Path) -> None:
    page = page_of(folder)
    (html,) = page.all("html")
    assert html.attributes["lang"] == "en"
    ids = [
        e.attributes["id"]
        for e in page.all("svg", "title", "desc", "h2", "section")
        if "id" in e.attributes
    ]
    assert len(ids) == len(set(ids))
    for drawing in page.all("svg"):
        if drawing.attributes.get("aria-hidden") == "true":
            continue
        assert drawing.attributes["role"] == "img"
        for name in drawing.attributes["aria-labelledby"].split():
            assert next(e for e in drawing.children if e.attributes.get("id") == name).text
    assert all(len(image.attributes["alt"]) > 20 for image in page.all("img"))
    for table in page.all("table"):
        assert table.all("caption")[0].text
        heads = table.all("th")
        assert heads and all(head.attributes["scope"] in ("row", "col") for head in heads)
        width = len(table.all("thead")[0].all("th"))
        assert all(len(row.all("th", "td")) == width for row in table.all("tr"))
    for scrolled in [e for e in page.all("div") if e.attributes.get("class") == "scroll"]:
        assert scrolled.attributes["tabindex"] == "0" and scrolled.attributes["aria-label"]
    levels = [int(head.tag[1]) for head in page.all("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1


NASTY = "<script>alert(1)</script>\"'&{{ 7*7 }}"


def test_text_of_the_other_side_is_only_text(folder: Path) -> None:
    history = lines()
    for part in history[1:]:
        part["sites"][NASTY] = {**part["sites"]["bonn"], "status": NASTY, "reason": NASTY}
        part["sites"][NASTY]["detail"] = NASTY
        part["late"] = [{"site": NASTY, "round": 1, "used": False}]
    write_history(folder, history)
    rows = {f"local: {NASTY}": {"liver.dice": 0.99}, "federated": {"liver.dice": 0.5}}
    edit(folder, "comparison.json", rows=rows, matrix={NASTY: {NASTY: {"liver.dice": 0.5}}})
    edit(folder, "manifest.json", status="failed", error=NASTY, run=NASTY, packages={NASTY: NASTY})
    edit(folder, "plan.json", model=NASTY, reasons={"model": NASTY})
    edit(folder, "config.json", model={NASTY: NASTY})
    content = write_report(folder).read_text(encoding="utf-8")
    page = read_page(content)
    assert not page.all("script")
    assert "<script" not in content and "49" not in page.all("h1")[0].text
    assert page.text.count(NASTY) > 15


def test_pictures_from_elsewhere_are_not_read(folder: Path) -> None:
    outside = folder.parent / "secret.png"
    outside.write_bytes((folder / "pictures" / "0-scan.png").read_bytes())
    entry = {"title": "t", "case": "c", "dice": {}, "scan": "../../secret.png"}
    listed = {"pictures": [{**entry, "overlay": str(outside)}]}
    (folder / "pictures" / "pictures.json").write_text(json.dumps(listed))
    assert not page_of(folder).all("img")


def remove(*names: str) -> Edit:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def write(name: str, content: str | bytes) -> Edit:
    def spoil(folder: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)

    return spoil


CUT = "".join(json.dumps(part) + "\n" for part in lines()) + '{"round": 5, "glo'
BREAKS: dict[str, tuple[Edit, str]] = {
    "no history": (remove("history.jsonl"), "history.jsonl: no such file"),
    "cut off line": (write("history.jsonl", CUT), "line 6 is cut off and left out"),
    "damaged line": (
        write("history.jsonl", f"what\n{json.dumps(line(1))}\n"),
        "history.jsonl: line 1 is damaged and left out",
    ),
    "no config": (remove("config.json"), "config.json: no such file"),
    "no plan": (remove("plan.json"), "plan.json: no such file"),
    "no manifest": (remove("manifest.json"), "manifest.json: no such file"),
    "half a manifest": (write("manifest.json", '{"run": '), "manifest.json: damaged"),
    "half a comparison": (write("comparison.json", "{"), "comparison.json: damaged"),
    "half a model": (write("model-best.safetensors", b"12345678"), "model-last.safetensors"),
    "no text": (write("plan.json", b"\xff\xfe\x00"), "plan.json: damaged"),
    "no picture": (remove("pictures/0-scan.png"), "0-scan.png: no such file"),
    "only a manifest": (
        remove("history.jsonl", "config.json", "plan.json", "comparison.json"),
        "No round is finished yet",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_run_folders_give_what_is_there(folder: Path, name: str) -> None:
    spoil, words = BREAKS[name]
    spoil(folder)
    assert words in page_of(folder).text


def test_before_the_first_round(folder: Path) -> None:
    (folder / "history.jsonl").write_text("")
    (folder / "comparison.json").unlink()
    page = page_of(folder)
    assert headline(page) == "No round is finished yet"
    assert "No round of training is written down yet." in page.text


def test_a_running_and_a_failed_run_say_so(folder: Path) -> None:
    edit(folder, "manifest.json", status="running")
    assert "The run is going on" in page_of(folder).text
    edit(folder, "manifest.json", status="failed", error="round 3: got 1 good update.")
    assert "The run failed: round 3: got 1 good update." in page_of(folder).text
    edit(folder, "manifest.json", status="failed", error=None)
    assert "The run failed." in page_of(folder).text


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no run folder"):
        write_report(tmp_path)
    with pytest.raises(StudyError, match="no run folder"):
        write_report(tmp_path / "nothing")


def test_a_report_that_cannot_be_written_is_one_line(folder: Path) -> None:
    (folder / "report.html").mkdir()
    with pytest.raises(StudyError, match=r"report.html: can't be written"):
        write_report(folder)
    assert not list(folder.glob(".report*"))


@settings(max_examples=25, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_whatever_the_files_say_there_is_a_page(original: Path, data: st.DataObject) -> None:
    folder = original.parent / "spoilt"
    shutil.copytree(original, folder, dirs_exist_ok=True)
    valid = {"history.jsonl": lines()[3], "comparison.json": comparison()}
    for name in ("manifest.json", "config.json", "plan.json"):
        valid[name] = json.loads((folder / name).read_text())
    name = data.draw(st.sampled_from(sorted(valid)))
    (folder / name).write_text(json.dumps(data.draw(spoilt(valid[name]))))
    read_page(write_report(folder).read_text(encoding="utf-8"))
