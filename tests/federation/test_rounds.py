"""Rounds over real messages: who takes part, what travels, when training ends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attackers import attacker
from flwr.app import Array, Message
from local_grid import LocalGrid, sent_weights
from read_run import history, same, weights
from safetensors.torch import load_file

from fedseg.errors import ConfigError, StudyError

Run = Callable[..., Any]


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> dict[int, dict[str, Any]]:
    names = ("aachen", "bonn", "chemnitz", "dortmund")
    return {
        n + 1: {"data-dir": str(make_site(name, seed=n)), "device": "cpu"}
        for n, name in enumerate(names)
    }


ALL = {"federation.sites": "4"}


def test_a_fraction_of_the_sites_is_drawn_anew_each_round(
    run_study: Run, sites: dict[int, Any]
) -> None:
    config = {**ALL, "federation.fraction": 0.5, "federation.rounds": 6}
    folder, _ = run_study(sites, config)
    drawn = [
        {n for n, s in line["sites"].items() if s.get("status") == "ok"}
        for line in history(folder)[1:]
    ]
    assert all(len(names) == 2 for names in drawn)
    assert set().union(*drawn) == {"aachen", "bonn", "chemnitz", "dortmund"}
    assert len({frozenset(names) for names in drawn}) > 1
    again, _ = run_study(sites, config)
    assert same(folder, again)


@pytest.mark.parametrize("secure", [False, True])
def test_sites_without_held_out_cases_are_asked_for_no_scores(
    run_study: Run, sites: dict[int, Any], capsys: pytest.CaptureFixture[str], secure: bool
) -> None:
    config = {
        **ALL,
        "federation.rounds": 2,
        "federation.personal": True,
        "train.validation-fraction": 0.0,
        "data.server-cases": 0,
        "privacy.secure-aggregation": secure,
        "federation.guard": not secure,
    }
    folder, grid = run_study(sites, config)
    assert not [m for m in grid.sent if m.metadata.message_type == "evaluate"]
    assert len(history(folder)) == 3
    assert "took part in; none holds cases out" in (folder.path / "report.html").read_text()
    shown = capsys.readouterr().out
    assert "Nothing was scored: no cases are held out, at the server or at the sites." in shown


@pytest.mark.parametrize("late", ["drop", "carry"])
def test_a_late_update_is_recorded_and_carried_only_where_asked(
    late: str, run_study: Run, sites: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pull = LocalGrid.pull_messages
    asked: dict[str, int] = {}

    def slow_pull(self: Any, message_ids: Any) -> Any:
        """Dortmund's first training isn't done before the others begin their second."""
        (message_id,) = message_ids
        message = self._pending.get(message_id)
        if message and message.metadata.dst_node_id == 4:
            config = message.content.config_records.get("config", {})
            first = message.metadata.message_type == "train" and config["server-round"] == 1
            asked[message_id] = asked.get(message_id, 0) + 1
            rounds = [
                m.content["config"]["server-round"]
                for m in self.sent
                if m.metadata.message_type == "train"
            ]
            if first and max(rounds) == 1:
                return []
        return pull(self, message_ids)

    monkeypatch.setattr(LocalGrid, "pull_messages", slow_pull)
    config = {
        **ALL,
        "federation.rounds": 3,
        "federation.round-deadline": 0.2,
        "federation.guard": False,
    }
    folder, _ = run_study(sites, {**config, "federation.late": late})
    lines = history(folder)
    assert lines[1]["sites"]["dortmund"]["status"] == "late"
    assert lines[2]["sites"]["dortmund"]["status"] == "late"
    (entry,) = lines[3]["late"]
    assert set(entry.pop("received")) == {"train"}
    assert entry == {"site": "dortmund", "round": 1, "status": "ok", "used": late == "carry"}
    assert lines[3]["sites"]["dortmund"]["status"] == "ok"


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4", "top-k"])
def test_compressed_updates_are_small_and_near(
    scheme: str, run_study: Run, sites: dict[int, Any]
) -> None:
    config = {**ALL, "model.width": 8}  # so that headers of arrays hardly count
    plain, _ = run_study(sites, config)
    packed, grid = run_study(sites, {**config, "federation.compression": scheme})
    ratio = history(packed)[1]["bytes_up"] / history(plain)[1]["bytes_up"]
    assert ratio < {"fp16": 0.51, "int8": 0.27, "int4": 0.15, "top-k": 0.11}[scheme]
    start = next(m for m in grid.sent if m.metadata.message_type == "train")
    begun = sent_weights(start, weights(plain))
    moved = {k: weights(plain)[k] - begun[k] for k in begun}
    error = sum(float(((weights(packed)[k] - weights(plain)[k]) ** 2).sum()) for k in begun)
    length = sum(float((change**2).sum()) for change in moved.values())
    bound = {"fp16": 0.01, "int8": 0.05, "int4": 0.3, "top-k": 1.0}[scheme]
    assert error**0.5 < bound * length**0.5


def test_half_precision_downloads_halve_what_is_sent(run_study: Run, sites: dict[int, Any]) -> None:
    plain, _ = run_study(sites, ALL)
    half, _ = run_study(sites, {**ALL, "federation.download": "fp16"})
    assert history(half)[1]["bytes_down"] < 0.6 * history(plain)[1]["bytes_down"]
    for name, tensor in weights(plain).items():
        assert torch.allclose(tensor, weights(half)[name], atol=0.02)


@pytest.mark.parametrize("shared", ["all-but-norm", "all-but-head"])
def test_local_layers_stay_at_the_site(
    shared: str, run_study: Run, sites: dict[int, Any], home: Path
) -> None:
    folder, grid = run_study(sites, {**ALL, "federation.shared": shared})
    kept = [load_file(path) for path in sorted(home.rglob("round-2/local.safetensors"))]
    assert len(kept) == 4
    stays = set(kept[0])
    mark = ".adn.N." if shared == "all-but-norm" else "model.2.1.conv.unit0.conv."
    assert stays == {name for name in weights(folder) if mark in name}
    assert all(set(tensors) == stays for tensors in kept)
    # They don't travel, either way.
    size = sum(tensor.numel() for n, tensor in weights(folder).items() if n not in stays)
    for message in (*grid.sent, *grid.received):
        for record in message.content.array_records.values():
            assert [array.shape for array in record.values()] == [(size,)]
    # The server's copy of them is as it began, each site has its own.
    name = max(stays, key=lambda n: kept[0][n].numel())
    assert len({tuple(tensors[name].flatten().tolist()) for tensors in kept}) == 4
    assert not any(torch.equal(tensors[name], weights(folder)[name]) for tensors in kept)
    again, _ = run_study(sites, {**ALL, "federation.shared": shared})
    assert same(folder, again)


def test_training_ends_when_nothing_gets_better(run_study: Run, sites: dict[int, Any]) -> None:
    config = {**ALL, "federation.rounds": 8, "federation.patience": 2}
    stuck = {"train.learning-rate": 1e-12, "federation.monitor": "federated.liver.dice"}
    folder, _ = run_study(sites, {**config, **stuck})
    lines = history(folder)
    assert [line["round"] for line in lines] == [0, 1, 2, 3]


@pytest.mark.parametrize("key", ["liver.dise", "liver.hd95", "liver.volume_error_ml", "cases"])
def test_a_monitor_that_no_line_has_or_that_falls_as_models_get_better_is_refused(
    key: str, run_study: Run, sites: dict[int, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"federation\.monitor: got"):
        run_study(sites, {**ALL, "federation.monitor": f"federated.{key}"})


@pytest.mark.parametrize(("minutes", "least", "most"), [(1e-6, 1, 1), (0.02, 3, 10**6)])
def test_a_time_budget_and_nothing_else_ends_a_round(
    run_study: Run, sites: dict[int, Any], minutes: float, least: int, most: int
) -> None:
    config = {**ALL, "train.minutes": minutes, "federation.rounds": 1, "train.steps-per-epoch": 2}
    folder, _ = run_study(sites, config)
    for site in history(folder)[1]["sites"].values():
        assert least <= site["training"]["steps"] <= most
        assert site["training"]["seconds"] >= 60 * minutes * 0.9 or most == 1


def test_sites_keep_a_personal_model_only_where_it_is_better(
    run_study: Run, sites: dict[int, Any], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"train.steps-per-epoch": 8, "train.learning-rate": 1e-2, "federation.personal": True}
    folder, _ = run_study(sites, {**ALL, **more})
    manifest = json.loads((folder.path / "manifest.json").read_text())
    personal = manifest["personal"]
    assert list(personal) == ["aachen", "bonn", "chemnitz", "dortmund"]
    files = {path.stem for path in (home / "cache").rglob("personal/*.safetensors")}
    for name, entry in personal.items():
        mean = {
            which: sum(entry[which][f"{region}.dice"] or 0 for region in ("liver", "tumor"))
            for which in ("global", "personal")
        }
        assert entry["kept"] == (mean["personal"] > mean["global"])
        assert (f"{folder.run_id}-{name}" in files) == entry["kept"]
    assert "Personal model better" in capsys.readouterr().out


def test_too_few_sites_for_a_strategy(run_study: Run, sites: dict[int, Any]) -> None:
    with pytest.raises(StudyError, match="bulyan"):
        run_study(sites, {**ALL, "federation.strategy": "bulyan"})


def opposite(message: Message) -> Message:
    """Send the change with its sign turned, a hundred times as large."""
    if message.metadata.message_type == "train":
        update = message.content["update"]
        for name in update:
            update[name] = Array(-100 * update[name].numpy())
    return message


GUARDED = {**ALL, "federation.rounds": 2, "federation.parole": 2}


def test_a_hostile_update_is_quarantined_with_its_reason(
    run_study: Run, sites: dict[int, Any]
) -> None:
    folder, _ = run_study(sites, GUARDED, reply={2: opposite})
    for line in history(folder)[1:]:
        site = line["sites"]["bonn"]
        assert (site["status"], site["reason"]) == ("quarantined", "update-norm")
        assert site["guard"]["norm"] > 10
        assert site["weight"] == 0
    # The mean is that of the other three.
    others = {node: config for node, config in sites.items() if node != 2}
    alone, _ = run_study(others, {**GUARDED, "federation.sites": "3"})
    assert same(folder, alone)


def test_without_the_guard_it_moves_the_model(run_study: Run, sites: dict[int, Any]) -> None:
    guarded, _ = run_study(sites, GUARDED, reply={2: opposite})
    open_, _ = run_study(sites, {**GUARDED, "federation.guard": False}, reply={2: opposite})
    assert history(open_)[1]["sites"]["bonn"]["status"] == "ok"
    assert not same(guarded, open_)


def test_a_probe_needs_cases_at_the_server(
    run_study: Run, sites: dict[int, Any], make_site: Callable[..., Path]
) -> None:
    with pytest.raises(StudyError, match=r"federation\.guard-probe: the server has no cases"):
        run_study(sites, {**ALL, "federation.guard-probe": 0.5})
    held_out = {"data.server-dir": str(make_site("held-out", cases=1, seed=9))}
    probed, _ = run_study(sites, {**ALL, **held_out, "federation.guard-probe": 100.0})
    assert {s["status"] for s in history(probed)[1]["sites"].values()} == {"ok"}
    strict, _ = run_study(
        sites,
        {**ALL, **held_out, "federation.guard-probe": 0.0, "train.learning-rate": 1e-2},
        reply={2: opposite},
    )
    assert history(strict)[1]["sites"]["bonn"]["status"] == "quarantined"


def test_a_site_that_sent_no_numbers_is_on_parole(run_study: Run, sites: dict[int, Any]) -> None:
    broken = attacker("NaN")
    trained: list[Message] = []

    def once(message: Message) -> Message:
        """NaN in the first round, good updates in the others."""
        if message.metadata.message_type == "train":
            trained.append(message)
            return broken(message) if len(trained) == 1 else message
        return message

    config = {**ALL, "federation.rounds": 4, "federation.parole": 2}
    folder, _ = run_study(sites, config, reply={2: once})
    found = [
        (line["sites"]["bonn"]["status"], line["sites"]["bonn"]["reason"])
        for line in history(folder)[1:]
    ]
    assert found[0] == ("failed", "not-finite")
    assert found[1][0] == "quarantined"
    assert found[-1] == ("ok", None)


def test_a_site_with_many_more_steps_is_no_outlier_where_its_mean_step_counts(
    run_study: Run, sites: dict[int, Any]
) -> None:
    """An update forty times as long in forty times the steps is as good as the others."""

    def many_steps(message: Message) -> Message:
        if "update" not in message.content.array_records:
            return message
        update = message.content.array_records["update"]
        for name, array in list(update.items()):
            update[name] = Array(40 * array.numpy())
        message.content.metric_records["metrics"]["steps"] *= 40
        return message

    def status(strategy: str) -> str:
        config = {**ALL, "federation.rounds": 1, "federation.strategy": strategy}
        folder, _ = run_study(sites, config, reply={2: many_steps})
        return str(history(folder)[1]["sites"]["bonn"]["status"])

    assert status("fedavg") == "quarantined"
    assert status("fednova") == "ok"


def test_a_strategy_does_not_go_below_its_least_sites_in_a_round(
    run_study: Run, sites: dict[int, Any]
) -> None:
    """Krum chosen for a bad site among five has nothing to choose from when four are left."""
    config = {**ALL, "federation.strategy": "fedtrimmedavg", "federation.trim": 0.25}
    config |= {"federation.rounds": 1, "federation.min-sites": 2}
    with pytest.raises(StudyError, match=r"expected at least 4 \(federation.strategy\)"):
        run_study(sites, config, reply={2: attacker("NaN")})
