"""Tests of the trackers: each registered one keeps every number; none can harm a run."""

import contextlib
import importlib.util
import json
import logging
import math
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from written_run import lines

from fedseg.config import StudyConfig
from fedseg.errors import ConfigError
from fedseg.report.trackers import PACKAGES, TRACKERS, check_trackers, scalars, tracking

Found = dict[str, dict[int, float]]


def study(trackers: str, **more: Any) -> StudyConfig:
    return StudyConfig.from_run_config({"output.trackers": trackers, **more})


def read_tensorboard(folder: Path) -> Found:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        key: {event.step: event.value for event in events.Scalars(key)}
        for key in events.Tags()["scalars"]
    }


def read_mlflow(folder: Path) -> Found:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedseg")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.seed"] == "0"
    return {
        key: {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, key)}
        for key in run.data.metrics
    }


def read_wandb(folder: Path) -> Found:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its own process writes; this waits for its end
    found: Found = {}
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        for data in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            entries = {
                entry.key or ".".join(entry.nested_key): json.loads(entry.value_json)
                for entry in record.history.item
            }
            for key, value in entries.items():
                if not key.startswith("_"):
                    found.setdefault(key, {})[entries["_step"]] = value
    return found


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format behind W&B's header of 7 bytes; see its log_format.md."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # too little of the block is left for a record
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield parts
            parts = b""


READERS = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.filterwarnings("ignore")  # other people's packages, on import
@pytest.mark.parametrize("name", TRACKERS)
def test_every_tracker_keeps_every_number(
    name: str, tmp_path: Path, offline: None, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip(PACKAGES[name], reason=f"the extra fedseg[{name}] isn't installed")
    folder = tmp_path / "2026-11-25T00-00-00-abcd"
    folder.mkdir()
    history = lines()
    config = study(name)
    check_trackers(config)
    # A run that is killed and goes on writes into the same place.
    for part in (history[:3], history[3:]):
        with tracking(folder, config) as track:
            for line in part:
                track(line)
    assert not [record for record in caplog.records if record.name.startswith("fedseg")]
    found = READERS[name](folder)
    wanted: Found = {}
    for line in history:
        for key, value in scalars(line).items():
            wanted.setdefault(key, {})[line["round"]] = value
    assert set(wanted) <= set(found)
    for key, values in wanted.items():
        assert found[key] == pytest.approx(values, rel=1e-6), key


def test_every_tracker_says_what_it_needs() -> None:
    assert set(PACKAGES) == set(TRACKERS) == set(READERS)


def test_scalars_of_a_line() -> None:
    line = lines()[3]
    line["privacy"] = {"epsilon": 2.5}
    found = scalars(line)
    assert found["global/liver.dice"] == 0.9
    assert found["sites/bonn/liver.dice"] == pytest.approx(0.8)
    assert found["sites/bonn/loss"] == 0.5
    assert found["round/bytes_up"] == 6_000_000 and found["privacy/epsilon"] == 2.5
    assert "unseen/tumor.dice" not in found  # undefined
    assert not [key for key in found if key.endswith((".cases", "/cases", "/skipped"))]
    assert all(math.isfinite(value) for value in found.values())


def test_no_tracker_by_default(tmp_path: Path) -> None:
    with tracking(tmp_path, StudyConfig()) as track:
        track(lines()[1])
    assert not list(tmp_path.iterdir())


def test_unknown_names_and_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="got 'mlfow', did you mean 'mlflow'"):
        check_trackers(study("mlfow"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedseg\[wandb\]'") as caught:
        check_trackers(study("wandb"))
    assert "\n" not in str(caught.value)
    check_trackers(study(""))


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A tracker from outside, `own_tracker:good`, and ones that fail."""
    seen: list[Any] = []

    @contextlib.contextmanager
    def good(folder: Path, config: StudyConfig) -> Iterator[Any]:
        def write(number: int, found: Mapping[str, float]) -> None:
            seen.append((number, found["global/liver.dice"]))

        yield write
        seen.append("closed")

    @contextlib.contextmanager
    def fails_at_round_2(folder: Path, config: StudyConfig) -> Iterator[Any]:
        def write(number: int, found: Mapping[str, float]) -> None:
            if number == 2:
                raise RuntimeError("server away")

        yield write
        raise RuntimeError("can't close")

    def fails_to_open(folder: Path, config: StudyConfig) -> Any:
        raise RuntimeError("no login")

    module = ModuleType("own_tracker")
    vars(module).update(good=good, late=fails_at_round_2, never=fails_to_open)
    monkeypatch.setitem(sys.modules, "own_tracker", module)
    return seen


def test_one_that_fails_harms_neither_the_run_nor_the_others(
    own: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = study("own_tracker:never, own_tracker:late, own_tracker:good")
    check_trackers(config)
    with caplog.at_level(logging.WARNING), tracking(tmp_path, config) as track:
        for line in lines():
            track(line)
    assert own == [*((n, dice) for n, dice in enumerate((0.1, 0.6, 0.7, 0.9, 0.8))), "closed"]
    told = [record.message for record in caplog.records]
    assert [message.split(";")[0] for message in told] == [
        "tracker own_tracker:never: no login",
        "tracker own_tracker:late: server away",
        "tracker own_tracker:late: can't close",
    ]


def test_an_error_of_the_run_passes_through(own: list[Any], tmp_path: Path) -> None:
    config = study("own_tracker:good")
    with pytest.raises(KeyboardInterrupt), tracking(tmp_path, config) as track:
        track(lines()[1])
        raise KeyboardInterrupt
    assert own == [(1, 0.6), "closed"]


def test_scalars_of_a_line_that_has_sums_only() -> None:
    line = lines()[3]
    line["sites"] = {name: {"status": "ok", "metrics": {}} for name in line["sites"]}
    line["secagg"] = {"summed": 4, "sums": {"loss": 2.0}}
    found = scalars(line)
    assert found["round/loss"] == 0.5
    assert not any(key.startswith("sites/") for key in found)
