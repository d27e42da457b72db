"""What either end reads from the other, spoilt at any depth: read, or refused by name.

Arrays are in `test_collect` and `test_compression`, messages of secure aggregation in
`privacy/test_secagg_wire`, numbers in `test_hostile_numbers`, ledgers and records in `test_audit`.
"""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from spoilt import spoilt

from fedseg.arrays import arrays_to_state
from fedseg.config import StudyConfig
from fedseg.data.fingerprint import Fingerprint, fingerprint_of, shared_scans
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan
from fedseg.errors import ConfigError, ModelError, ProtocolError, Reason, StudyError
from fedseg.federation.checkpoints import Checkpoint, Progress, load_checkpoint, save_checkpoint
from fedseg.federation.resume import resume
from fedseg.federation.run_folder import RunFolder
from fedseg.federation.spool import open_update
from fedseg.greeting import read_greeting
from fedseg.messages import TRAIN_METRICS, Task, read_answer, stored_study
from fedseg.peers import Peers
from fedseg.privacy.secagg_state import State
from fedseg.receipts import describe, receipt_of
from fedseg.segmentation.model_file import read_model_file

STUDY = StudyConfig.from_run_config({})
PLAN = make_plan(STUDY)
FEW = settings(max_examples=150, deadline=None)

SCALAR = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=80),
    st.binary(max_size=80),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
)
"""What Flower's config records can hold."""

NUMBER = st.integers(-(2**63), 2**63 - 1) | st.floats() | st.lists(st.floats(), max_size=2)
KEYS = st.sampled_from(
    ["status", "reason", "name", "simulated", "sites", "json", "data", "hash", "study", "peers"]
)
CONFIGS = st.dictionaries(KEYS | st.text(max_size=9), SCALAR, max_size=6)
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        **{name: CONFIGS.map(ConfigRecord) for name in ("status", "site", "fingerprint", "config")},
        **{name: CONFIGS.map(ConfigRecord) for name in ("secagg", "ledger", "update")},
        "metrics": st.dictionaries(
            st.sampled_from(TRAIN_METRICS) | st.text(max_size=9), NUMBER, max_size=4
        ).map(MetricRecord),
    },
)


def message(content: RecordDict) -> Message:
    return make_message(Metadata(1, "m", 1, 2, "", "", 1.0, 9.0, "train"), content=content)


@given(records=RECORDS, sane=st.booleans())
@FEW
def test_any_records_are_an_answer_or_a_reason(records: dict[str, Any], sane: bool) -> None:
    if sane:
        records["status"] = ConfigRecord({"status": "ok", "reason": ""})
    answer = read_answer(message(RecordDict(records)), declared=TRAIN_METRICS)
    assert answer.status in ("ok", "failed", "refused")
    assert answer.reason is None or isinstance(answer.reason, Reason)
    assert all(np.isfinite(value) for value in answer.metrics.values())
    assert set(answer.metrics) <= set(TRAIN_METRICS)
    greeting = read_greeting(message(RecordDict(records)))
    assert len(greeting.name) <= 32 and 0 <= greeting.sites < 10**6
    assert len(receipt_of(message(RecordDict(records))).ledger) in (0, 64)
    # A site's ledger must take whatever leaves.
    json.dumps(describe(RecordDict(records)), allow_nan=False)


TASK = Task(
    study_run="2026-11-25T00-00-00-abcd",
    config_digest="d" * 64,
    plan=PLAN.to_json(),
    round_number=1,
    rounds=2,
    peers=Peers.of(["a", "b", "c"]),
    study=STUDY.model_dump_json(by_alias=True),
)


@given(
    changed=st.dictionaries(st.sampled_from([*TASK.to_record()]), SCALAR, max_size=3),
    dropped=st.sets(st.sampled_from([*TASK.to_record()]), max_size=2),
)
@FEW
def test_any_task_is_read_or_refused(changed: dict[str, Any], dropped: set[str]) -> None:
    entries = {**TASK.to_record(), **changed}
    record = ConfigRecord({key: value for key, value in entries.items() if key not in dropped})
    asked = message(RecordDict({"config": record}))
    with contextlib.suppress(ConfigError):
        task = Task.from_message(asked)
        assert "/" not in task.study_run and task.study_run[0] != "."
        assert len(task.study_run) <= 64
        Plan.from_json(task.plan)
    with contextlib.suppress(ConfigError):
        StudyConfig.from_json(stored_study(asked) or "")


@given(given_plan=spoilt(json.loads(PLAN.to_json())))
@FEW
def test_any_plan_is_read_or_refused(given_plan: Any) -> None:
    with contextlib.suppress(ConfigError):
        plan = Plan.from_json(json.dumps(given_plan))
        assert max(plan.patch_size) <= 1024 and plan.batch_size <= 1024 and plan.width <= 256


@given(given_study=spoilt(json.loads(STUDY.model_dump_json(by_alias=True))))
@FEW
def test_any_study_is_read_or_refused(given_study: Any) -> None:
    with contextlib.suppress(ConfigError):
        StudyConfig.from_json(json.dumps(given_study))


CASES = [
    {"liver.hu": {50: 1.0}, "body.hu": {40: 1.0}, "spacing.x": {20: 1.0}, "lesion.ml": {4: 2.0}}
] * 6
PRINT = fingerprint_of(CASES, modalities=["ct"] * 6, min_count=2)


@given(texts=st.lists(spoilt(json.loads(PRINT.to_json())), min_size=1, max_size=3))
@FEW
def test_what_passes_for_a_fingerprint_can_be_planned_by(texts: list[Any]) -> None:
    found = [PRINT]
    for text in texts:
        with contextlib.suppress(ConfigError):
            found.append(Fingerprint.from_json(json.dumps(text)))
    plan = make_plan(STUDY, found)
    assert Plan.from_json(plan.to_json()) == plan
    shared_scans({f"site-{n}": one for n, one in enumerate(found)})


@given(
    data=st.binary(max_size=200),
    declared=st.tuples(st.sampled_from(["float32", "float16", "uint8", "O"]), st.integers(0, 9)),
)
@FEW
def test_any_weights_of_a_server_are_read_or_refused(data: bytes, declared: Any) -> None:
    array = SimpleNamespace(
        dtype=declared[0], shape=[declared[1]], stype="numpy.ndarray", data=data
    )
    record: Any = {"w": array}
    with contextlib.suppress(ValueError, TypeError, KeyError, EOFError):
        arrays_to_state(record, {"w": torch.zeros(declared[1])})
    assert not isinstance(record, ArrayRecord)


STATE = State(run="r", round=1, stage="shares", channel=b"c" * 16, survivors=(0, 1))


@given(text=spoilt(json.loads(STATE.to_json())).map(json.dumps) | st.text(max_size=40))
@FEW
def test_any_stored_state_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ProtocolError):
        State.from_json(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder to resume from."""
    root = tmp_path_factory.mktemp("runs")
    study = StudyConfig.from_run_config({"output.dir": str(root)})
    folder = RunFolder.create(study, PLAN, "2026-11-25T00-00-00-abcd")
    line = {"round": 1, "global": {}, "federated": {}, "sites": {}}
    progress = Progress(round=1, history=[line], late={"a": (1, "m")})
    checkpoint = Checkpoint(model={"w": torch.ones(2)}, strategy={}, progress=progress)
    save_checkpoint(folder.path / "checkpoint", checkpoint)
    return folder.path


def resumed(run: Path) -> StudyConfig:
    return StudyConfig.from_run_config({"output.dir": str(run.parent), "output.resume": run.name})


@given(data=st.data())
@FEW
def test_any_files_of_a_run_are_resumed_or_refused(run: Path, data: st.DataObject) -> None:
    good = {name: (run / name).read_bytes() for name in ("config.json", "plan.json")}
    name = data.draw(st.sampled_from(sorted(good)))
    kind = st.binary(max_size=60) | spoilt(json.loads(good[name])).map(
        lambda value: json.dumps(value).encode()
    )
    (run / name).write_bytes(data.draw(kind))
    try:
        with contextlib.suppress(StudyError):
            assert resume(resumed(run), typed=()).checkpoint.progress.round == 1
    finally:
        (run / name).write_bytes(good[name])


@given(data=st.data())
@FEW
def test_any_tensor_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    path = folder / "state.safetensors"
    progress = json.loads(json.dumps({"round": 1, "late": {}, "history": [{"round": 1}]}))
    metadata = {
        "format": data.draw(st.sampled_from(["fedseg-checkpoint-1", "fedseg-model-1", "x"])),
        "progress": json.dumps(data.draw(spoilt(progress))),
        "plan": json.dumps(data.draw(spoilt(json.loads(PLAN.to_json())))),
        "scheme": data.draw(st.sampled_from(["none", "int8", "x"])),
        "top-k": data.draw(st.sampled_from(["1.0", "nan", "x"])),
    }
    name = data.draw(st.sampled_from(["model/w", "strategy/w", "values", "../x"]))
    save_file({name: torch.zeros(3)}, path, metadata=metadata)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    with contextlib.suppress(StudyError):
        load_checkpoint(folder)
    with contextlib.suppress(ModelError):
        read_model_file(path)
    with contextlib.suppress(ValueError):
        open_update(path, size=3)
