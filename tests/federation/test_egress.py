"""Tests of the one way out: what can't be judged or written down doesn't leave."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from local_grid import SMALL, LocalGrid
from read_run import history

from fedseg.config import StudyConfig
from fedseg.errors import StudyError
from fedseg.messages import query_content
from fedseg.privacy.ledger import read
from fedseg.site_config import SiteConfig

Run = Callable[..., Any]


@pytest.fixture
def sites(make_site: Callable[..., Path], tmp_path: Path) -> dict[int, dict[str, Any]]:
    return {
        n: {
            "data-dir": str(make_site(name, seed=n)),
            "device": "cpu",
            "ledger": str(tmp_path / f"{name}.jsonl"),
        }
        for n, name in enumerate(("aachen", "bonn", "chemnitz"), start=1)
    }


@pytest.fixture
def four_sites(
    sites: dict[int, Any], make_site: Callable[..., Path], tmp_path: Path
) -> dict[int, Any]:
    """One may refuse: the sum of two is never unmasked."""
    more = {"data-dir": str(make_site("dortmund", seed=4)), "device": "cpu"}
    return {**sites, 4: {**more, "ledger": str(tmp_path / "dortmund.jsonl")}}


def after_hello(change: Callable[[], None]) -> Callable[[Message], Message]:
    """Do something once the site has said hello."""

    def reply(message: Message) -> Message:
        if message.metadata.message_type == "query.hello":
            change()
        return message

    return reply


def from_site(grid: Any, node: int) -> list[Message]:
    return [m for m in grid.received if m.metadata.src_node_id == node]


def test_nothing_leaves_where_the_ledger_cannot_be_written(
    run_study: Run, sites: dict[int, Any], tmp_path: Path
) -> None:
    def spoil() -> None:
        (tmp_path / "bonn.jsonl").unlink()
        (tmp_path / "bonn.jsonl").mkdir()

    folder, grid = run_study(sites, {"federation.sites": 3}, reply={2: after_hello(spoil)})
    site = history(folder)[1]["sites"]["bonn"]
    assert (site["status"], site["reason"]) == ("failed", "ledger")
    for message in from_site(grid, 2)[1:]:
        assert set(message.content) == {"status", "metrics"}
        assert dict(message.content["status"]) == {"status": "failed", "reason": "ledger"}
        assert not message.content["metrics"]


def test_damaged_ledger_stops_a_site(run_study: Run, sites: dict[int, Any], tmp_path: Path) -> None:
    ledger = tmp_path / "bonn.jsonl"

    def spoil() -> None:
        ledger.write_bytes(ledger.read_bytes().replace(b"hello", b"hallo"))

    folder, _ = run_study(sites, {"federation.sites": 3}, reply={2: after_hello(spoil)})
    assert history(folder)[1]["sites"]["bonn"]["reason"] == "ledger"


def test_site_without_a_ledger_cannot_take_part(
    run_study: Run, sites: dict[int, Any], tmp_path: Path
) -> None:
    for number in (2, 3):
        sites[number]["ledger"] = str(tmp_path)
    with pytest.raises(StudyError, match="its ledger can't be written, so nothing left"):
        run_study(sites, {"federation.connect-deadline": 1.0})


def hello(node: dict[str, Any]) -> dict[str, Any]:
    """Greeting of a node that can't take part: no error, and its own ledger has the line."""
    grid = LocalGrid({4: {**node, "name": "dessau"}}, SMALL)
    asked = query_content(StudyConfig.from_run_config(SMALL))
    message = Message(asked, dst_node_id=4, message_type="query.hello")
    (message_id,) = grid.push_messages([message])
    (answer,) = grid.pull_messages([message_id])
    assert answer.has_content() and set(answer.content) == {"site", "ledger"}
    (line,) = read(SiteConfig().ledger_file)
    assert line["hash"] == answer.content["ledger"]["hash"]
    assert line["message"] == "hello" and line["reason"] == answer.content["site"]["reason"]
    return dict(answer.content["site"])


@pytest.mark.parametrize(
    "node",
    [
        {"data-dir": "~nobody-9/data"},
        {"site-config": "~nobody-9/site.toml"},
        {"site-config": "a\0b"},
        {"site-config": "deep.toml"},
        {"data-dir": ".", "cache-dir": "~nobody-9/cache"},
        {"data-dir": ".", "ledger": "~nobody-9/ledger.jsonl"},
    ],
)
@pytest.mark.usefixtures("run_study")
def test_faults_of_the_config_leave_as_a_reason_in_the_ledger(
    node: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep.toml").write_text("name = " + "[" * 5000)
    told = hello(node)
    assert (told["name"], told["reason"]) == ("dessau", "site-config")


@pytest.mark.usefixtures("run_study")
def test_what_nobody_thought_of_leaves_as_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("/data/patient")

    monkeypatch.setattr("fedseg.data.node.load_site_config", fail)
    told = hello({"data-dir": "."})
    assert (told["name"], told["reason"]) == ("dessau", "error")
    assert "patient" not in str(told)


@pytest.mark.usefixtures("run_study")
def test_number_of_partitions_that_is_none() -> None:
    told = hello({"partition-id": 0, "num-partitions": "three"})
    assert (told["sites"], told["reason"]) == (0, "error")


def test_refused_metrics_are_named_and_leave_the_model_alone(
    run_study: Run, sites: dict[int, Any], tmp_path: Path
) -> None:
    sites[3]["policy.metrics"] = "training"
    folder, grid = run_study(sites, {"federation.sites": 3})
    line = history(folder)[2]
    site = line["sites"]["chemnitz"]
    assert (site["status"], site["no_metrics"]) == ("ok", "policy-metrics")
    assert line["federated"]["cases"] == 2
    sent = [m for m in from_site(grid, 3) if m.metadata.message_type == "evaluate"]
    assert sent and not any(m.content["metrics"] for m in sent)
    told = [e for e in read(tmp_path / "chemnitz.jsonl") if e["message"] == "evaluate"]
    assert {(e["status"], e["reason"]) for e in told} == {("refused", "policy-metrics")}


SECURE = {
    "federation.sites": 4,
    "federation.min-sites": 2,
    "federation.rounds": 1,
    "privacy.secure-aggregation": True,
    "federation.guard": False,
}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("policy.min-evaluation-cases", 2, "policy-min-evaluation-cases"),
        ("policy.metrics", "training", "policy-metrics"),
    ],
)
def test_scores_are_judged_before_they_are_masked(
    key: str, value: Any, reason: str, run_study: Run, four_sites: dict[int, Any], tmp_path: Path
) -> None:
    """A study that masks scores doesn't get what the site's policy holds back."""
    four_sites[3][key] = value
    folder, grid = run_study(four_sites, {**SECURE, "federation.personal": True})
    line = history(folder)[1]
    assert line["sites"]["chemnitz"]["status"] == "ok" and line["secagg"]["summed"] == 4
    assert line["sites"]["chemnitz"]["no_metrics"] == reason
    assert line["scored"]["in_sum"] == ["aachen", "bonn", "dortmund"]
    assert line["federated"]["cases"] == 3
    asked = [m for m in from_site(grid, 3) if m.metadata.message_type == "evaluate"]
    assert len(asked) == 2 and all("update" not in m.content for m in asked)
    told = [e for e in read(tmp_path / "chemnitz.jsonl") if e["message"] == "evaluate"]
    assert {(e["status"], e["reason"]) for e in told} == {("refused", reason)}
    # The sites' own models are scored by a sum of its own, after the last round.
    received = json.loads((folder.path / "manifest.json").read_text())["received"]
    final = {e["site"]: e["reason"] for e in received if e.get("final")}
    assert final == {"aachen": None, "bonn": None, "chemnitz": reason, "dortmund": None}


def test_numbers_of_training_are_judged_before_they_are_masked(
    run_study: Run, four_sites: dict[int, Any]
) -> None:
    four_sites[3]["policy.metrics"] = "liver,tumor,cases"
    folder, grid = run_study(four_sites, SECURE)
    line = history(folder)[1]
    site = line["sites"]["chemnitz"]
    assert (site["status"], site["reason"]) == ("refused", "policy-metrics")
    assert line["secagg"]["in_sum"] == ["aachen", "bonn", "dortmund"]
    trained = [m for m in from_site(grid, 3) if m.metadata.message_type == "train"]
    assert trained and all("update" not in m.content for m in trained)


def test_refusal_of_the_fingerprint_is_in_the_manifest(
    run_study: Run, sites: dict[int, Any]
) -> None:
    sites[1]["policy.strategies"] = "krum"
    folder, _ = run_study(sites, {"federation.sites": 3})
    received = json.loads((folder.path / "manifest.json").read_text())["received"]
    found = {e["site"]: e["reason"] for e in received if e["kind"] == "fingerprint"}
    assert found == {"aachen": "policy-strategies", "bonn": None, "chemnitz": None}
    assert history(folder)[1]["sites"]["aachen"]["reason"] == "policy-strategies"


def test_peers_are_counted_in_the_roster_of_secure_aggregation(
    run_study: Run, four_sites: dict[int, Any], tmp_path: Path
) -> None:
    """A server that says there are more sites than take part is found out by the public keys."""
    four_sites[2]["policy.min-peers"] = 5

    def lie(messages: Any) -> Any:
        for message in messages:
            if "config" in message.content and "sites" in message.content["config"]:
                message.content["config"]["sites"] = 10
        return real(messages)

    real: Any = None

    def wrap(grid: Any) -> None:
        nonlocal real
        real = grid.push_messages
        grid.push_messages = lie

    def first(message: Message) -> Message:
        if real is None:
            wrap(run_study.grid)
        return message

    folder, _ = run_study(four_sites, SECURE, reply=dict.fromkeys(four_sites, first))
    site = history(folder)[1]["sites"]["bonn"]
    assert (site["status"], site["reason"]) == ("refused", "policy-min-peers")
    (told, *_) = (e for e in read(tmp_path / "bonn.jsonl") if e["message"] == "secagg_shares")
    assert told["reason"] == "policy-min-peers"


def test_broken_site_config_is_told_in_the_default_ledger(
    run_study: Run, sites: dict[int, Any], home: Path
) -> None:
    del sites[2]["ledger"]
    Path(sites[2]["data-dir"], "site.toml").write_text("policy.min-case = 3\n")
    run_study(sites)
    (line,) = read(home / "cache" / "ledger.jsonl")
    assert (line["message"], line["reason"]) == ("hello", "site-config")
