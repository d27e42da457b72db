"""A SuperNode or the SuperLink dies in a round; the study goes on to the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import (
    FEDERATION,
    SMALL,
    Process,
    Run,
    Workplace,
    free_port,
    stop_tree,
    wait_until,
)
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SITES = ("aachen", "basel")
STUDY: dict[str, Any] = {
    **SMALL,
    "train.steps-per-epoch": 150,
    "train.optimizer-state": "keep",
    "federation.rounds": 2,
    "federation.sites": ",".join(SITES),
    "federation.compression": "int8",
    "federation.shared": "all-but-norm",
    "federation.round-deadline": 45.0,
    "federation.connect-deadline": 90.0,
    "federation.evaluate-every": 2,
}


class Hospitals:
    """A SuperLink with a database on one port, and a SuperNode a site."""

    def __init__(self, workplace: Workplace, phantoms: Path) -> None:
        self.place, self.port = workplace, free_port()
        self.folders = {}
        for number, name in enumerate(SITES):
            folder = (phantoms / f"site-{number}").rename(workplace.root / name)
            toml = folder / "site.toml"
            toml.write_text(toml.read_text().replace(f'"site-{number}"', f'"{name}"'))
            self.folders[name] = folder
        self.superlink = workplace.superlink(port=self.port)
        workplace.connection("insecure = true")
        self.nodes = {name: self.start(name) for name in SITES}
        workplace.wait_online(len(SITES))

    def start(self, name: str, again: str = "") -> Process:
        config = {
            "data-dir": str(self.folders[name]),
            "cache-dir": str(self.place.root / f"cache-{name}"),
            "device": "cpu",
            "threads": 1,
        }
        return self.place.supernode(name + again, config, env=self.place.env(name))

    def begun(self, **more: Any) -> Process:
        return self.place.begin({**STUDY, **more}, where=FEDERATION)

    def until_basel_trains(self, round_number: int, process: Process) -> None:
        said = f"basel · round {round_number} · step"
        wait_until(
            lambda: process.popen.poll() is not None or said in self.nodes["basel"].text(),
            "basel trains",
            seconds=240,
        )
        assert process.popen.poll() is None, process.text()


def weights(run: Run) -> dict[str, torch.Tensor]:
    assert run.folder is not None
    found: dict[str, torch.Tensor] = load_file(run.folder / "model-last.safetensors")
    return found


def newest_run(output: Path) -> Path:
    return (output / "latest").resolve()


@pytest.fixture(scope="module")
def hospitals(workplace: Workplace, phantoms: Path) -> Hospitals:
    return Hospitals(workplace, phantoms)


@pytest.fixture(scope="module")
def undisturbed(hospitals: Hospitals) -> dict[str, torch.Tensor]:
    """Weights of the study that nothing happened to."""
    run = hospitals.place.end(hospitals.begun(), where=FEDERATION)
    assert run.status == "finished:completed", run.output
    return weights(run)


def resumed(hospitals: Hospitals, output: Path) -> Run:
    """Go on with the study that broke off, as its coordinator would."""
    more = {"output.dir": str(output), "output.resume": newest_run(output).name}
    place = hospitals.place
    run = place.end(hospitals.begun(**more), where=FEDERATION)
    assert run.status == "finished:completed", run.output
    return Run(run.id, run.status, run.output, newest_run(output))


def same_bits(run: Run, expected: dict[str, torch.Tensor]) -> None:
    found = weights(run)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert [line["round"] for line in run.history() if line["global"] or line["sites"]]
    assert len(run.manifest()["flwr_runs"]) == 2


def test_supernode_dies_in_a_round_and_the_study_is_resumed(
    hospitals: Hospitals, undisturbed: dict[str, torch.Tensor]
) -> None:
    output = hospitals.place.root / "runs" / "supernode"
    hospitals.nodes["basel"].log.write_text("")
    begun = hospitals.begun(**{"output.dir": str(output)})
    hospitals.until_basel_trains(2, begun)
    hospitals.nodes["basel"].kill()
    hospitals.place.finish(begun)
    assert "round 2: got 1 good updates; expected at least 2" in begun.text()
    hospitals.place.processes.remove(hospitals.nodes["basel"])
    hospitals.nodes["basel"] = hospitals.start("basel", "-again")
    same_bits(resumed(hospitals, output), undisturbed)


def test_superlink_is_restarted_from_its_database_and_the_study_is_resumed(
    hospitals: Hospitals, undisturbed: dict[str, torch.Tensor]
) -> None:
    place, output = hospitals.place, hospitals.place.root / "runs" / "superlink"
    said = len(hospitals.nodes["basel"].text())
    begun = hospitals.begun(**{"output.dir": str(output)})
    wait_until(
        lambda: "basel · round 2 · step" in hospitals.nodes["basel"].text()[said:],
        "basel trains",
        seconds=240,
    )
    hospitals.superlink.kill()
    hospitals.superlink = place.superlink(port=hospitals.port)
    place.finish(begun)
    same_bits(resumed(hospitals, output), undisturbed)


def test_a_supernode_that_is_restarted_takes_part_again(hospitals: Hospitals) -> None:
    """Without a registered key it is another node then, of the same name."""
    place, output = hospitals.place, hospitals.place.root / "runs" / "restarted"
    basel = hospitals.nodes["basel"]
    basel.log.write_text("")
    more = {"output.dir": str(output), "federation.min-sites": 1, "federation.rounds": 3}
    begun = hospitals.begun(**more)
    hospitals.until_basel_trains(1, begun)
    stop_tree(basel.popen.pid, reap=basel.popen.poll)
    place.processes.remove(basel)
    hospitals.nodes["basel"] = hospitals.start("basel", "-restarted")
    run = place.end(begun, where=FEDERATION)
    assert run.status == "finished:completed", run.output
    lines = Run(run.id, run.status, run.output, newest_run(output)).history()
    status = [line["sites"]["basel"]["status"] for line in lines[1:]]
    assert status[0] in ("late", "failed") and status[-1] == "ok", status
    assert {line["sites"]["aachen"]["status"] for line in lines[1:]} == {"ok"}
