"""The documentation: links that lead somewhere, and what has to be as the code has it."""

import re
from pathlib import Path

import pytest
import tomli

from fedseg.config import StudyConfig
from fedseg.errors import Reason
from fedseg.federation.compatible import compatible
from fedseg.federation.site_privacy import clips_updates
from fedseg.site_config import PolicyConfig

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *DOCS]


def prose(page: Path) -> str:
    """Text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def links(page: Path) -> list[tuple[Path, str]]:
    """File and anchor of each relative link."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    relative = [target.partition("#") for target in targets if not re.match("[a-z]+:", target)]
    return [
        ((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in relative
    ]


def anchors(page: Path) -> list[str]:
    """Anchors as GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]


def rows(page: Path, heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its head."""
    section = re.split(r"^#+ ", prose(page).partition(f"\n## {heading}\n")[2], flags=re.M)[0]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return table[2:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    assert len(anchors(page)) == len(set(anchors(page)))
    for path, anchor in links(page):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), f"{path.name}#{anchor}"


def test_readme_leads_to_every_page_and_each_page_to_another() -> None:
    assert {*PAGES[1:]} <= {path for path, _ in links(PAGES[0])}
    for page in DOCS:
        assert {path for path, _ in links(page)} - {page}, page.name


def test_readme_begins_with_the_one_command() -> None:
    first = PAGES[0].read_text(encoding="utf-8").splitlines()[:30]
    assert any("flwr run . --stream" in line for line in first)


def test_each_privacy_setting_of_readme_is_a_study_that_can_run() -> None:
    settings = {}
    for what, line in rows(PAGES[0], "Privacy"):
        keys = tomli.loads("\n".join(line.strip("`").split()))
        flat = {f"{part}.{key}": value for part in keys for key, value in keys[part].items()}
        settings[what.partition(",")[0]] = StudyConfig.from_run_config(flat)
    assert all(compatible(study) == [] for study in settings.values())
    assert settings["clip gradients"].train.max_grad_norm > 0
    assert clips_updates(settings["clip updates"])
    assert settings["secure aggregation"].privacy.secure_aggregation
    modes = [settings[what].privacy.mode for what in ("central DP", "local DP", "DP of each case")]
    assert modes == ["central-dp", "local-dp", "record-dp"]


def test_reasons_are_all_explained_once_and_there_are_no_others() -> None:
    table = rows(ROOT / "docs" / "troubleshooting.md", "Reasons")
    codes = [code for row in table for code in re.findall("`([^`]+)`", row[0])]
    (why,) = (row[1] for row in table if row[0] == "`policy-...`")
    of_rule = {f"policy-{name.replace('_', '-')}" for name in PolicyConfig.model_fields}
    told = {reason for reason in Reason if f"`{reason}`: `" in why}
    codes.remove("policy-...")
    ruled = {reason for reason in Reason if reason.refused and reason not in codes}
    assert ruled - told <= of_rule
    assert sorted(codes) == sorted({*Reason} - ruled)
