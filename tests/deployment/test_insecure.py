"""A SuperLink and SuperNodes on one machine: who takes part, what a site keeps to itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import SMALL, Process, Run, Workplace, wait_until

from fedseg.data.volumes import read_mask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SITES = ("aachen", "basel")


@pytest.fixture(scope="module")
def folders(workplace: Workplace, phantoms: Path) -> dict[str, Path]:
    """A folder for each site, named in its site.toml; its case names tell whose they are."""
    folders = {}
    for number, name in enumerate(SITES):
        folder = workplace.root / f"hospital-{name}"
        (phantoms / f"site-{number}").rename(folder)
        toml = folder / "site.toml"
        toml.write_text(toml.read_text().replace(f'"site-{number}"', f'"{name}"'))
        for path in (*folder.glob("images/*"), *folder.glob("masks/*")):
            path.rename(path.with_name(f"{name}-patient-{path.name}"))
        folders[name] = folder
    return folders


@pytest.fixture(scope="module")
def nodes(workplace: Workplace, folders: dict[str, Path]) -> dict[str, Process]:
    """A SuperLink, a SuperNode for each site and one that has no data-dir."""
    workplace.superlink()
    workplace.connection("insecure = true")
    nodes = {}
    for name, folder in folders.items():
        config = {
            "data-dir": str(folder),
            "cache-dir": str(cache(workplace, name)),
            "device": "cpu",
            "threads": 1,
        }
        nodes[name] = workplace.supernode(name, config)
    nodes["nobody"] = workplace.supernode("nobody", {"name": "nobody", "device": "cpu"})
    workplace.wait_online(3)
    return nodes


def cache(workplace: Workplace, name: str) -> Path:
    return workplace.root / f"cache-of-{name}"


@pytest.fixture(scope="module")
def run(workplace: Workplace, nodes: dict[str, Process]) -> Run:
    return workplace.deploy(SMALL)


def masks_of(folder: Path) -> list[bytes]:
    """The masks of a site as voxels in RAS order."""
    return sorted(read_mask(path).array.tobytes() for path in folder.glob("masks/*.nii.gz"))


def test_two_sites_train(run: Run) -> None:
    assert run.status == "finished:completed"
    assert run.manifest()["status"] == "completed"
    assert run.manifest()["sites"] == {
        name: {"verified": False, "simulated": False} for name in SITES
    }
    history = run.history()
    assert [line["round"] for line in history] == [0, 1, 2]
    for line in history[1:]:
        assert list(line["sites"]) == list(SITES)
        for site in line["sites"].values():
            assert site["status"] == "ok"
            assert site["bytes_up"] > 0
            assert site["metrics"]["liver.dice"] is not None
    assert all(name in run.output for name in SITES)


def test_node_without_data_is_turned_away(run: Run, nodes: dict[str, Process]) -> None:
    refused = [line for line in run.output.splitlines() if "can't take part" in line]
    assert len(refused) == 1
    assert "its node has neither data-dir nor partition-id" in refused[0]
    log = nodes["nobody"].text()
    assert "no-data" in log
    assert "round 1" not in log
    assert "nobody" not in run.history()[1]["sites"]


def test_node_without_data_is_named(run: Run, nodes: dict[str, Process]) -> None:
    refused = [line for line in run.output.splitlines() if "can't take part" in line]
    assert refused[0].startswith("fedseg: nobody can't take part")


def test_a_site_sees_its_own_cases_only(
    workplace: Workplace, run: Run, nodes: dict[str, Process], folders: dict[str, Path]
) -> None:
    for name, other in (SITES, SITES[::-1]):
        kept = sorted(
            np.load(path).tobytes() for path in cache(workplace, name).glob("cases/*/*/truth.npy")
        )
        assert kept == masks_of(folders[name])
        assert not set(kept) & set(masks_of(folders[other]))
        assert str(folders[other]) not in nodes[name].text()
    left = workplace.root / "nobody" / "fedseg" / "cache"
    assert [path.name for path in left.iterdir()] == ["ledger.jsonl"]  # it said no, and noted that


def test_nothing_of_a_case_reaches_the_server(
    workplace: Workplace, run: Run, folders: dict[str, Path]
) -> None:
    assert run.folder is not None
    at_server = [path for path in run.folder.rglob("*") if path.is_file()]
    at_server += workplace.root.glob("state.db*")
    at_server += workplace.root.glob("logs/superlink.log")
    assert len(at_server) > 6
    for path in at_server:
        content = path.read_bytes()
        for folder in folders.values():
            assert str(folder).encode() not in content, path
        assert b"-patient-" not in content, path
    assert "-patient-" not in run.output


def test_plug_is_pulled(workplace: Workplace, run: Run, nodes: dict[str, Process]) -> None:
    """Last in this file: one of its SuperNodes dies in the middle of a round."""
    config: dict[str, Any] = {
        **SMALL,
        "train.steps-per-epoch": 200,
        "federation.sites": ",".join(SITES),
        "federation.min-sites": 1,
        "federation.round-deadline": 60.0,
        "federation.evaluate-every": 2,
    }
    said = len(nodes["basel"].text())
    begun = workplace.begin(config, where="hospital-net")
    wait_until(
        lambda: "basel · round 1 · step" in nodes["basel"].text()[said:], "basel trains", seconds=90
    )
    nodes["basel"].kill()
    broken = workplace.end(begun, where="hospital-net")
    assert broken.status == "finished:completed"
    for line in broken.history()[1:]:
        assert line["sites"]["aachen"]["status"] == "ok"
        assert line["sites"]["basel"]["status"] in ("late", "failed")
        assert line["sites"]["basel"]["reason"] in ("deadline", "unreachable", "crashed")
        assert f"round {line['round']} without basel" in broken.output
