"""A round that is asked for again: the server must never hold two sums of the same updates.

Training follows from (seed, round, site), so two sums of one round over different sites would show
what is between them: one site's update.
"""

import contextlib
import copy
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from safetensors.torch import load_file
from test_crash import one_run
from test_secure_round import NAMES, SECURE, keys_for

from fedseg import client_app
from fedseg.config import StudyConfig
from fedseg.messages import CONFIG, Task, protocol_record, read_answer
from fedseg.privacy import secagg_server
from fedseg.privacy.roster import Terms
from fedseg.privacy.sent_once import note_sending

Run = Callable[..., Any]
CONFIG_OF_RUN = {**SECURE, "federation.rounds": 3, "train.schedule": "constant"}


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> dict[int, dict[str, Any]]:
    return {
        n + 1: {"data-dir": str(make_site(name, cases=2 + n % 3, seed=n)), "device": "cpu"}
        for n, name in enumerate(NAMES)
    }


def secagg_terms(run: str, **changed: Any) -> Terms:
    return Terms(
        **{"run": run, "round": 1, "share": 0.6, "clip": 1.0, "max_weight": 1.0, **changed}
    )


def is_train(message: Message) -> bool:
    return message.metadata.message_type == "train"


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "stage", [pytest.param("secure-unmasking", marks=pytest.mark.slow), "secure-scoring"]
)
def test_a_round_that_was_sent_is_lost_with_the_server_and_the_run_goes_on(
    stage: str, run_study: Run, sites: dict[int, Any], tmp_path: Path
) -> None:
    """Killed in round 2, when all have sent their words; once also when the sum was known."""
    output = {"output.dir": str(tmp_path / "killed")}
    killed = one_run(tmp_path, nodes=sites, config={**CONFIG_OF_RUN, **output}, stage=stage)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    folder = (tmp_path / "killed" / "latest").resolve()
    before = load_file(folder / "model-last.safetensors")
    resumed, grid = run_study(sites, {**output, "output.resume": folder.name})
    assert resumed.path == folder
    _, first, second, third = history(folder)
    assert "failed" not in first and "failed" not in third
    assert third["secagg"]["summed"] == 4 and third["federated"]["cases"] == 4
    assert "got 0 sites" in second["failed"]
    assert {site["reason"] for site in second["sites"].values()} == {"sent-already"}
    # Nobody computed anything for it, and no second word left.
    asked = [m.metadata.message_type for m in grid.sent]
    assert asked.count("train") == 4 and asked.count("evaluate") == 4
    after = load_file(folder / "model-last.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_round_of_which_nothing_was_sent_is_done_again(
    run_study: Run, sites: dict[int, Any], tmp_path: Path
) -> None:
    output = {"output.dir": str(tmp_path / "killed")}
    config = {**CONFIG_OF_RUN, **output}
    killed = one_run(tmp_path, nodes=sites, config=config, stage="secure-sending")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    folder = (tmp_path / "killed" / "latest").resolve()
    run_study(sites, {**output, "output.resume": folder.name})
    assert all("failed" not in line for line in history(folder))
    whole, _ = run_study(sites, CONFIG_OF_RUN)
    expected = load_file(whole.path / "model-last.safetensors")
    for name, tensor in load_file(folder / "model-last.safetensors").items():
        assert float((tensor - expected[name]).abs().max()) < 1e-6


@pytest.mark.parametrize("purpose", ["train", "evaluate", "final"])
def test_a_server_that_asks_again_in_a_new_run_with_other_sites_is_refused(
    purpose: str, run_study: Run, sites: dict[int, Any]
) -> None:
    config = {**SECURE, "federation.rounds": 1, "federation.personal": True}
    folder, grid = run_study(sites, config)
    study = StudyConfig.from_run_config(grid.run_config)

    def asks(number: int) -> Any:
        task = Task(
            study_run=folder.run_id,
            config_digest=study.digest(),
            plan=(folder.path / "plan.json").read_text(),
            round_number=number,
            rounds=9,
        ).to_record()
        asked = secagg_terms(folder.run_id, round=number, purpose=purpose)
        data = protocol_record(secagg_server.begin_message(asked))
        content = RecordDict({CONFIG: ConfigRecord(dict(task)), "secagg": data})
        message = Message(content, dst_node_id=1, message_type="query.secagg_keys")
        message.metadata.__dict__["_message_id"] = "again"
        # Another Flower run: nothing is left in the node's state there.
        fresh = Context(99, 1, dict(sites[1]), RecordDict(), dict(grid.run_config))
        return read_answer(client_app.app(message, fresh), declared=())

    answer = asks(1)
    assert (answer.status, answer.reason) == ("failed", "sent-already") and not answer.protocol
    assert asks(2).status == "ok"


def test_what_another_process_sent_meanwhile_is_not_sent_again(
    run_study: Run, sites: dict[int, Any], home: Path
) -> None:
    """Two runs at once: both began the round, one was quicker."""

    @contextlib.contextmanager
    def another(message: Message) -> Iterator[None]:
        if message.metadata.message_type == "train":
            run = Task.from_message(message).study_run
            note_sending(home / "cache", "aachen", secagg_terms(run))
        yield

    config = {**SECURE, "federation.rounds": 1}
    folder, grid = run_study(sites, config, around={1: another})
    line = history(folder.path)[1]
    assert line["sites"]["aachen"]["reason"] == "sent-already"
    assert line["secagg"]["summed"] == 3
    (refused,) = [m for m in grid.received if "update" not in m.content and is_train(m)]
    assert not refused.content.array_records and "secagg" not in refused.content


@pytest.mark.parametrize("step", ["shares", "confirm", "unmask"])
def test_a_server_that_asks_twice_at_once_gets_one_answer(
    step: str, run_study: Run, sites: dict[int, Any], home: Path
) -> None:
    """Each message has a process of its own, and each of these the state as it was before both.

    Of two lists of survivors at once the server would have both shares of who is in one of them.
    """
    keys_for(sites, home)
    answers = []

    @contextlib.contextmanager
    def twice(message: Message) -> Iterator[None]:
        if message.metadata.message_type == f"query.secagg_{step}":
            context = run_study.grid._contexts[1]  # type: ignore[attr-defined]
            state = RecordDict({name: copy.deepcopy(r) for name, r in context.state.items()})
            same = Context(context.run_id, 1, context.node_config, state, context.run_config)
            answers.append(read_answer(client_app.app(message, same), declared=()))
        yield

    config = {**SECURE, "federation.rounds": 1}
    folder, grid = run_study(sites, config, around={1: twice})
    kind = f"query.secagg_{step}"
    second = [
        read_answer(m, declared=())
        for m in grid.received
        if m.metadata.message_type == kind and m.metadata.src_node_id == 1
    ]
    assert {(answer.status, answer.reason) for answer in answers} == {("ok", None)}
    assert {(answer.status, answer.reason) for answer in second} == {("failed", "sent-already")}
    assert all(answer.protocol is None for answer in second)
    assert history(folder.path)[1]["secagg"]["summed"] == (3 if step == "shares" else 4)
