"""A run that is killed with -9 at any stage of a round goes on to the very same weights."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_run import STAGES
from safetensors.torch import load_file

Run = Callable[..., Any]

# What a site keeps between rounds is all on: moments, compression residual, local layers.
CONFIG = {
    "federation.rounds": 3,
    "federation.compression": "int8",
    "federation.shared": "all-but-norm",
    "federation.strategy": "fedavgm",
    "train.optimizer-state": "keep",
    "federation.guard": False,
}


@pytest.fixture
def nodes(make_site: Callable[..., Path]) -> dict[int, dict[str, Any]]:
    names = ("aachen", "bonn", "chemnitz")
    return {
        n + 1: {"data-dir": str(make_site(name, seed=n)), "device": "cpu"}
        for n, name in enumerate(names)
    }


def one_run(tmp_path: Path, **arguments: Any) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps(arguments))
    script = Path(__file__).with_name("one_run.py")
    return subprocess.run(
        [sys.executable, str(script), str(file)], capture_output=True, text=True, check=False
    )


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model-last.safetensors")


def rounds_of(folder: Path) -> list[int]:
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["round"] for line in lines]


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage, marks=() if stage == "while-saving" else pytest.mark.slow)
        for stage in STAGES
    ],
)
def test_killed_at_any_stage_and_resumed_to_the_same_bits(
    stage: str, run_study: Run, nodes: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    output = {"output.dir": str(tmp_path / "killed")}
    killed = one_run(tmp_path, nodes=nodes, config={**CONFIG, **output}, stage=stage)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    folder = (tmp_path / "killed" / "latest").resolve()
    # Only what the user types: the stored config counts, not these other values.
    resumed, grid = run_study(nodes, {**output, "output.resume": folder.name})

    whole, _ = run_study(nodes, CONFIG)
    assert resumed.path == folder
    assert rounds_of(folder) == [0, 1, 2, 3]
    expected = last_weights(whole.path)
    assert all(torch.equal(t, expected[name]) for name, t in last_weights(folder).items())
    assert load_file(folder / "model-best.safetensors").keys() == expected.keys()
    asked = [m for m in grid.sent if m.metadata.message_type == "train"]
    # A site whose update was spooled before the server died isn't asked again.
    assert len(asked) == {"before-send": 6, "while-collecting": 5}.get(stage, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["flwr_runs"]) == ("completed", [7, 7])


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    run_study: Run, nodes: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    output = {"output.dir": str(tmp_path / "full")}
    full = one_run(tmp_path, nodes=nodes, config={**CONFIG, **output}, stage="full-disk")
    assert full.returncode == 3, full.stderr[-2000:]
    assert "the checkpoint can't be written" in full.stderr
    assert "the last one is whole" in full.stderr
    folder = (tmp_path / "full" / "latest").resolve()
    assert not list((folder / "checkpoint").glob("*.partial"))

    run_study(nodes, {**output, "output.resume": str(folder)})
    whole, _ = run_study(nodes, CONFIG)
    expected = last_weights(whole.path)
    assert all(torch.equal(t, expected[name]) for name, t in last_weights(folder).items())


def test_resume_can_add_rounds(run_study: Run, nodes: dict[int, dict[str, Any]]) -> None:
    config = {"federation.rounds": 1, "train.schedule": "constant"}
    first, _ = run_study(nodes, config)
    more = {"output.resume": str(first.path), "federation.rounds": 3}
    resumed, _ = run_study(nodes, more)
    assert rounds_of(resumed.path) == [0, 1, 2, 3]
    whole, _ = run_study(nodes, {**config, "federation.rounds": 3})
    expected = last_weights(whole.path)
    assert all(torch.equal(t, expected[name]) for name, t in last_weights(resumed.path).items())
