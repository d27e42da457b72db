"""What goes wrong in one round or at one site, and mustn't cost more than that."""

import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from attackers import attacker
from flwr.app import Message
from local_grid import LocalGrid
from read_run import history, last_run, same, weights
from torch import nn

from fedseg.errors import ConfigError, StudyError
from fedseg.federation import server_evaluation
from fedseg.federation.mean import step_factors
from fedseg.segmentation.layers import place
from fedseg.segmentation.lightning_backend import BACKENDS
from fedseg.segmentation.metrics import empty_sums

Run = Callable[..., Any]
ALL = {"federation.sites": "4"}
NAMES = ("aachen", "bonn", "chemnitz", "dortmund")


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> dict[int, dict[str, Any]]:
    return {
        n + 1: {"data-dir": str(make_site(name, seed=n)), "device": "cpu"}
        for n, name in enumerate(NAMES)
    }


@pytest.mark.parametrize(
    "kept", [{"train.optimizer-state": "keep"}, {"federation.shared": "all-but-norm"}]
)
def test_a_step_that_is_not_finite_costs_a_site_one_round(
    kept: dict[str, Any], run_study: Run, sites: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, trained = BACKENDS["torch"], []

    def diverging(network: Any, batches: Any, loss: Any, *rest: Any, **more: Any) -> Any:
        trained.append(more["round_number"])
        if trained == [1]:  # the first to train in the first round
            return fit(network, batches, lambda *b: loss(*b) * float("nan"), *rest, **more)
        return fit(network, batches, loss, *rest, **more)

    monkeypatch.setitem(BACKENDS, "torch", diverging)
    folder, _ = run_study(sites, {**ALL, "federation.rounds": 3, **kept})
    found = [
        [(site["status"], site["reason"]) for site in line["sites"].values()]
        for line in history(folder)[1:]
    ]
    assert found[0].count(("failed", "not-finite")) == 1
    assert found[1] == found[2] == [("ok", None)] * 4


def test_a_node_that_is_gone_is_not_waited_for(
    run_study: Run, sites: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower takes no message for a node that isn't registered any more: its id is empty."""
    push = LocalGrid.push_messages

    def gone(self: Any, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            hello = message.metadata.message_type.startswith("query")
            away = message.metadata.dst_node_id == 4 and not hello
            ids += [""] if away else list(push(self, [message]))
        return ids

    monkeypatch.setattr(LocalGrid, "push_messages", gone)
    began = time.monotonic()
    folder, _ = run_study(sites, {**ALL, "federation.round-deadline": 600.0})
    assert time.monotonic() - began < 300
    for line in history(folder)[1:]:
        site = line["sites"]["dortmund"]
        assert (site["status"], site["reason"]) == ("failed", "unreachable")
        assert site["no_metrics"] == "unreachable"


def test_a_site_that_was_restarted_is_found_again_by_its_name(
    run_study: Run, sites: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After round 1 dortmund's node is another one, as without registered keys."""
    push = LocalGrid.push_messages

    def restarted(self: Any, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            if kind == "evaluate" and node == 4:
                self.add_node(5, self.node_configs.pop(4))
            there = node in self.node_configs
            ids += list(push(self, [message])) if there else [""]
        return ids

    monkeypatch.setattr(LocalGrid, "push_messages", restarted)
    folder, grid = run_study(sites, {**ALL, "federation.rounds": 3})
    assert history(folder)[1]["sites"]["dortmund"]["no_metrics"] == "unreachable"
    for line in history(folder)[2:]:
        assert line["sites"]["dortmund"]["status"] == "ok"
        assert "no_metrics" not in line["sites"]["dortmund"]
    hellos = [m for m in grid.sent if m.metadata.message_type == "query.hello"]
    assert [m.metadata.dst_node_id for m in hellos] == [1, 2, 3, 4, 5]
    received = json.loads((folder.path / "manifest.json").read_text())["received"]
    assert sum((e["site"], e["kind"]) == ("dortmund", "hello") for e in received) == 2


def test_a_site_that_is_late_is_not_asked_for_scores(
    run_study: Run, sites: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pull = LocalGrid.pull_messages

    def busy(self: Any, message_ids: Iterable[str]) -> Any:
        (message_id,) = message_ids
        message = self._pending.get(message_id)
        trains = message and message.metadata.message_type == "train"
        return [] if trains and message.metadata.dst_node_id == 4 else pull(self, [message_id])

    monkeypatch.setattr(LocalGrid, "pull_messages", busy)
    config = {**ALL, "federation.round-deadline": 3.0, "federation.personal": True}
    folder, grid = run_study(sites, config)
    asked = [m for m in grid.sent if m.metadata.dst_node_id == 4]
    kinds = [m.metadata.message_type for m in asked]
    assert kinds.count("train") == 1 and "evaluate" not in kinds
    for line in history(folder)[1:]:
        assert line["sites"]["dortmund"]["no_metrics"] == "deadline"
        assert line["federated"]["cases"] == 3


def test_a_round_without_the_site_that_annotates_tumour_is_no_better_one(
    run_study: Run, sites: dict[int, Any]
) -> None:
    for node in (1, 2, 3):
        toml = Path(sites[node]["data-dir"], "site.toml")
        toml.write_text(toml.read_text() + 'labels = "liver"\n')
    evaluations: list[Message] = []

    def silent_once(message: Message) -> Message:
        """Its scores of round 2 don't arrive."""
        if message.metadata.message_type != "evaluate":
            return message
        evaluations.append(message)
        if len(evaluations) == 2:
            message.content.metric_records.clear()
        return message

    config = {**ALL, "federation.rounds": 4, "federation.patience": 3}
    folder, _ = run_study(sites, config, reply={4: silent_once})
    lines = history(folder)[1:]
    known = [line["federated"]["tumor.dice"] is not None for line in lines]
    assert known == [True, False, True, True]
    regions = ("liver.dice", "tumor.dice")
    means = {
        line["round"]: sum(line["federated"][key] for key in regions)
        for line, whole in zip(lines, known, strict=True)
        if whole
    }
    best = max(means, key=means.__getitem__)
    page = (folder.path / "report.html").read_text()
    assert f"The best model is that of round {best}." in page


def test_a_run_that_ended_for_a_bad_update_asks_its_site_again(
    run_study: Run, sites: dict[int, Any]
) -> None:
    config = {**ALL, "federation.min-sites": 4}
    with pytest.raises(StudyError, match=r"got 3 good updates; .*bonn: quarantined"):
        run_study(sites, config, reply={2: attacker("100x")})
    folder = last_run(run_study)
    resumed, grid = run_study(sites, {"output.resume": str(folder)})
    trains = [m for m in grid.sent if m.metadata.message_type == "train"]
    assert trains[0].metadata.dst_node_id == 2
    assert len(trains) == 1 + 4
    assert same(resumed, run_study(sites, config)[0])


def test_a_late_update_is_no_second_site(
    run_study: Run, sites: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pull = LocalGrid.pull_messages

    def slow(self: Any, message_ids: Iterable[str]) -> Any:
        """Dortmund's first update comes in round 2, in which bonn and chemnitz are silent."""
        (message_id,) = message_ids
        message = self._pending.get(message_id)
        if message and message.metadata.message_type == "train":
            number = message.content["config"]["server-round"]
            node = message.metadata.dst_node_id
            asked = [m.metadata.message_type for m in self.sent]
            if node == 4 and number == 1 and "evaluate" not in asked:
                return []
            if node in (2, 3) and number == 2:
                return []
        return pull(self, [message_id])

    monkeypatch.setattr(LocalGrid, "pull_messages", slow)
    config = {
        **ALL,
        "federation.round-deadline": 3.0,
        "federation.min-sites": 3,
        "federation.late": "carry",
        "federation.guard": False,
    }
    with pytest.raises(StudyError, match=r"round 2: got 2 good updates; expected at least 3"):
        run_study(sites, config)


def test_a_resume_changes_only_what_is_typed(run_study: Run, sites: dict[int, Any]) -> None:
    config = {**ALL, "federation.round-deadline": 600.0, "train.schedule": "constant"}
    first, _ = run_study(sites, {**config, "federation.rounds": 1})
    # The app's own default is two rounds: nobody asked for it here.
    run_study(sites, {"output.resume": str(first.path)})
    assert [line["round"] for line in history(first)] == [0, 1]
    grown, _ = run_study(sites, {"output.resume": str(first.path), "federation.rounds": 2})
    assert [line["round"] for line in history(grown)] == [0, 1, 2]


def test_a_resume_waits_for_the_sites_it_began_with(
    run_study: Run, sites: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"federation.sites": "", "federation.min-sites": 2, "federation.rounds": 1}
    began, _ = run_study({n: sites[n] for n in (1, 2, 3)}, {**config, "federation.sites": "3"})
    stored = json.loads((began.path / "config.json").read_text())
    stored["federation"]["sites"] = ""
    (began.path / "config.json").write_text(json.dumps(stored))
    looks: list[int] = []
    nodes = LocalGrid.get_nodes

    def one_by_one(self: Any) -> Any:
        looks.append(1)
        return list(nodes(self))[: 1 + len(looks) // 3]

    monkeypatch.setattr(LocalGrid, "get_nodes", one_by_one)
    more = {"output.resume": str(began.path), "federation.rounds": 2}
    resumed, _ = run_study({n: sites[n] for n in (1, 2, 3)}, more)
    assert len(history(resumed)[2]["sites"]) == 3


def test_what_one_site_says_of_its_steps_does_not_stretch_the_others() -> None:
    honest = step_factors([0.25] * 4, [10, 10, 10, 10])
    assert honest == [0.25] * 4
    claimed = step_factors([0.25] * 4, [10, 4000, 10, 10])
    assert max(claimed) == 0.5
    # Two slow sites beside two fast ones that have more cases.
    assert step_factors([0.1, 0.1, 0.4, 0.4], [10, 10, 100, 100])[2] == pytest.approx(0.328)


@pytest.mark.parametrize("by", [{"federation.strategy": "fednova"}, {"train.minutes": 1.0}])
def test_steps_are_not_divided_by_twice(
    by: dict[str, Any], run_study: Run, sites: dict[int, Any]
) -> None:
    with pytest.raises(ConfigError, match="divides by the steps already"):
        run_study(sites, {**ALL, **by, "federation.weighting": "inverse-steps"})


@pytest.mark.parametrize("others", [2, 5])
def test_a_run_that_was_broken_off_keeps_its_state_while_others_run(
    others: int, run_study: Run, sites: dict[int, Any], tmp_path: Path
) -> None:
    kept = {
        **ALL,
        "train.optimizer-state": "keep",
        "federation.shared": "all-but-norm",
        "train.schedule": "constant",
    }
    broken = []

    def killed(message: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.src_node_id == 4:
            broken.append(message)
            if len(broken) == 2:
                raise KeyboardInterrupt
        return message

    with pytest.raises(KeyboardInterrupt):
        run_study(sites, {**kept, "federation.rounds": 3}, reply={4: killed})
    folder = last_run(run_study)
    for number in range(others):
        once = {"federation.rounds": 1, "train.seed": number + 1}
        run_study(sites, {**ALL, "train.optimizer-state": "keep", **once})
    resumed, _ = run_study(sites, {"output.resume": str(folder)})
    whole, _ = run_study(sites, {**kept, "federation.rounds": 3})
    assert same(resumed, whole)
    shutil.rmtree(tmp_path / "runs")


def test_scoring_on_a_gpu_leaves_the_global_model_where_it_is_averaged(
    run_study: Run,
    sites: dict[int, Any],
    make_site: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device here is torch's `meta`, whose tensors can't be added to the CPU's either."""
    scored: list[str] = []

    def on_device(network: nn.Module, *_: Any, device: torch.device, **__: Any) -> dict[str, float]:
        place(network, device)
        scored.append(next(network.parameters()).device.type)
        return empty_sums()

    monkeypatch.setattr(server_evaluation, "choose_device", lambda _: torch.device("meta"))
    monkeypatch.setattr(server_evaluation, "evaluate_cases", on_device)
    held_out = {"data.server-dir": str(make_site("held-out", cases=1, seed=9))}
    folder, _ = run_study(sites, {**ALL, **held_out, "federation.rounds": 1})
    assert set(scored) == {"meta"}
    tensors = weights(folder).values()
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)
