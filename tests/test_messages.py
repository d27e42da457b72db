"""Records survive the wire, and hostile ones are turned away before they are decoded."""

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import ErrorCode

from fedseg.arrays import arrays_to_state, state_to_arrays
from fedseg.errors import ConfigError, Reason
from fedseg.greeting import read_greeting
from fedseg.messages import (
    TRAIN_METRICS,
    Task,
    answer_message,
    read_answer,
)

LIKE = {"w": torch.zeros(3, 2), "b": torch.zeros(()), "n": torch.zeros(4, dtype=torch.int64)}


def message(content: RecordDict | None = None, error: Error | None = None) -> Message:
    metadata = Metadata(1, "m", 1, 2, "", "", 1.0, 100.0, "train")
    if error is not None:
        return make_message(metadata, error=error)
    return make_message(metadata, content=content or RecordDict())


def test_arrays_round_trip_keeps_values_shapes_and_types() -> None:
    state = {"w": torch.randn(3, 2), "b": torch.tensor(2.5), "n": torch.arange(4)}
    back = arrays_to_state(state_to_arrays(state), LIKE)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype


def test_an_answer_round_trip() -> None:
    metrics = dict.fromkeys(TRAIN_METRICS, 2.0)
    sent = answer_message(message(), status="ok", metrics=metrics, update={"w": torch.ones(3)})
    answer = read_answer(sent, declared=TRAIN_METRICS)
    assert (answer.status, answer.reason, dict(answer.metrics)) == ("ok", None, metrics)
    assert answer.update is not None
    assert answer.bytes_up == len(answer.update["w"].data)


@pytest.mark.parametrize(
    "metrics",
    [{"cases": float("nan")}, {"patient": 1.0}, {"cases": [1.0, 2.0]}, {"loss": float("inf")}],
)
def test_undeclared_or_odd_numbers_are_a_bad_update(metrics: dict[str, float]) -> None:
    content = RecordDict(
        {
            "status": ConfigRecord({"status": "ok", "reason": ""}),
            "metrics": MetricRecord(metrics),
        }
    )
    answer = read_answer(message(content), declared=TRAIN_METRICS)
    assert (answer.status, answer.reason) == ("failed", Reason.BAD_UPDATE)


def test_a_traceback_of_flower_is_not_passed_on() -> None:
    text = "Traceback: /data/patient-7.nii.gz\nModuleNotFoundError: No module named 'hospital.net'"
    answer = read_answer(message(error=Error(1, text)), declared=())
    assert (answer.reason, answer.detail) == (Reason.MODEL_MISSING, "hospital.net")
    answer = read_answer(message(error=Error(2, "boom /data/patient-7.nii.gz")), declared=())
    assert (answer.reason, answer.detail) == (Reason.ERROR, "")
    gone = read_answer(message(error=Error(ErrorCode.NODE_UNAVAILABLE, "x")), declared=())
    assert gone.reason is Reason.UNREACHABLE


def test_a_site_cannot_choose_an_odd_name() -> None:
    for name in ("../etc", "A", "", "x" * 33, "<b>"):
        record = ConfigRecord({"name": name, "simulated": False, "sites": 0, "reason": ""})
        assert read_greeting(message(RecordDict({"site": record}))).name == ""


@pytest.mark.parametrize(
    "change",
    [
        {"study-run": "../../etc"},
        {"study-run": ".."},
        {"study-run": 3},
        {"server-round": -1},
        {"server-round": True},
        {"rounds": "x"},
        {"proximal-mu": -1.0},
        {"proximal-mu": float("nan")},
    ],
)
def test_a_hostile_task_is_refused(change: dict[str, object]) -> None:
    good = Task(study_run="r", config_digest="d", plan="{}", round_number=1, rounds=2)
    record = good.to_record()
    assert Task.from_message(message(RecordDict({"config": record}))) == good
    record.update(change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        Task.from_message(message(RecordDict({"config": record})))
