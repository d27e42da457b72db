"""Secure aggregation over real messages: the same model whoever drops out, and only sums."""

import base64
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from flwr.app import Message
from markupsafe import escape
from read_run import history, last_run, weights

from fedseg import site_work
from fedseg.data.plan import Plan
from fedseg.errors import ConfigError, FedSegError, StudyError
from fedseg.federation import train_round
from fedseg.federation.audit import audit_run
from fedseg.federation.compare_run import run_steps
from fedseg.federation.masked import SUMMED
from fedseg.segmentation.models import build_model

Run = Callable[..., Any]
NAMES = ("aachen", "bonn", "chemnitz", "dortmund")
PLAIN = {
    "federation.guard": False,
    "federation.sites": "4",
    "federation.personal": False,
    "train.spacing": "3,3,3",
    "train.ct-window": "-200,300",
    "train.steps-per-epoch": 1,
    "train.optimizer": "sgd",  # AdamW makes much of last bits where gradients are near 0
}
SECURE = {**PLAIN, "privacy.secure-aggregation": True}
STAGES = ("query.secagg_keys", "query.secagg_shares", "train", "query.secagg_unmask")
SCORING = (*STAGES[:2], "evaluate", STAGES[3])


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> dict[int, dict[str, Any]]:
    return {
        n + 1: {"data-dir": str(make_site(name, cases=2 + n % 3, seed=n)), "device": "cpu"}
        for n, name in enumerate(NAMES)
    }


def initial(folder: Any) -> dict[str, torch.Tensor]:
    plan = Plan.from_json((folder.path / "plan.json").read_text())
    return build_model(plan, seed=0).state_dict()


def difference(one: Any, other: Any) -> torch.Tensor:
    theirs = weights(other)
    return torch.cat([(t - theirs[n]).ravel().double() for n, t in weights(one).items()])


def farthest(one: Any, other: Any) -> float:
    return float(difference(one, other).abs().max())


def silent_once(stage: str, *, time: int = 1) -> Callable[[Message], Message | None]:
    """Drop a site's n-th reply of a stage: the first is for training, the second for scoring."""
    asked = 0

    def reply(message: Message) -> Message | None:
        nonlocal asked
        asked += message.metadata.message_type == stage
        return None if asked == time and message.metadata.message_type == stage else message

    return reply


def keeps_no_secret(grid: Any) -> bool:
    states = [json.loads(c.state["secagg"]["state"]) for c in grid._contexts.values()]
    return all(set(state) <= {"run", "round", "purpose", "stage"} for state in states)


def test_secure_run_equals_the_plain_run_and_shows_only_sums(
    run_study: Run, sites: dict[int, Any]
) -> None:
    plain, _ = run_study(sites, PLAIN)
    secure, grid = run_study(sites, SECURE)
    assert farthest(plain, secure) < 1e-5  # 2 rounds; see the steps of fixed point below
    one, other = history(plain)[1], history(secure)[1]
    sums = other["secagg"]["sums"]
    for key in SUMMED["train"][1:-1]:
        if key != "seconds":
            expected = sum(site["training"][key] for site in one["sites"].values())
            assert sums[key] == pytest.approx(expected, abs=1e-8)
    assert sums["weight"] == sum(site["weight"] for site in one["sites"].values())
    assert other["secagg"]["clipped"] == 0 and other["secagg"]["sites"] == 4
    assert [site["status"] for site in other["sites"].values()] == ["ok"] * 4
    # Scores are those of the plain run, and of no site alone.
    for one, other in zip(history(plain)[1:], history(secure)[1:], strict=True):
        assert other["federated"].keys() == one["federated"].keys()
        for key, value in one["federated"].items():
            assert other["federated"][key] == pytest.approx(value, abs=5e-3), key
        assert other["federated"]["cases"] == one["federated"]["cases"] > 0
        assert other["scored"]["summed"] == 4
        for site in other["sites"].values():
            assert site["metrics"] == {} == site["training"] and site["weight"] == 0
    # On the wire: masked words and no number beside them; bytes are those of float32.
    uploads = [m for m in grid.received if m.metadata.message_type in ("train", "evaluate")]
    assert len(uploads) == 16
    for message in uploads:
        assert set(message.content) == {"status", "metrics", "update", "secagg", "ledger"}
        assert not message.content["metrics"]
        words = message.content["update"]["words"].numpy()
        assert words.dtype == np.uint32
        assert abs(words.astype(np.float64).mean() / 2**31 - 1) < 6 / math.sqrt(3 * len(words))
    # Nothing secret is left at a site.
    for context in grid._contexts.values():
        state = json.loads(context.state["secagg"]["state"])
        last = {"round": 2, "purpose": "evaluate", "stage": "done"}
        assert state == {"run": secure.run_id, **last}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_round_differs_from_the_plain_one_by_fixed_point_at_most(
    optimizer: str, run_study: Run, sites: dict[int, Any]
) -> None:
    """Each of n words is rounded by less than 1: the mean by less than n c W / (S sum w)."""
    config = {"train.optimizer": optimizer, "federation.rounds": 1}
    plain, _ = run_study(sites, {**PLAIN, **config})
    secure, _ = run_study(sites, {**SECURE, **config})
    scale, weight = (2**31 - 1) // 4, history(secure)[1]["secagg"]["sums"]["weight"]
    bound = 4 * 1.0 * 1000.0 / (scale * weight)
    largest = max(float(tensor.abs().max()) for tensor in weights(plain).values())
    moved = max(float((t - initial(plain)[n]).abs().max()) for n, t in weights(plain).items())
    assert moved > 100 * bound
    assert 0 < farthest(plain, secure) < bound + 2 * largest * 2**-24


def test_adamw_makes_of_fixed_point_what_it_makes_of_any_noise_of_that_size(
    run_study: Run, sites: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a gradient is near 0, AdamW's step hangs on last bits: rounds drift apart by them.

    Over two rounds secure and plain differ a hundred times as much as fixed point rounds. So do two
    plain runs, one with normal noise of the same size (sqrt(n) / 2 steps) on each round's mean.
    """
    config = {"train.optimizer": "adamw", "train.steps-per-epoch": 2}
    plain, _ = run_study(sites, {**PLAIN, **config})
    secure, _ = run_study(sites, {**SECURE, **config})
    step = 1000.0 / ((2**31 - 1) // 4 * history(secure)[1]["secagg"]["sums"]["weight"])
    rng, real = np.random.default_rng(0), train_round.next_state

    def noised(strategy: Any, number: int, before: Any, change: Any, to: Message) -> Any:
        for tensor in change.values():
            tensor += torch.from_numpy(rng.normal(0, step, tuple(tensor.shape)))
        return real(strategy, number, before, change, to)

    monkeypatch.setattr(train_round, "next_state", noised)
    noisy, _ = run_study(sites, {**PLAIN, **config})
    apart = [difference(plain, other).square().mean().sqrt() for other in (secure, noisy)]
    assert min(apart) > 2 * step
    assert 0.2 < apart[0] / apart[1] < 5


@pytest.mark.parametrize("stage", STAGES)
def test_a_site_that_vanishes_at_a_stage_is_left_out(
    stage: str, run_study: Run, sites: dict[int, Any]
) -> None:
    config = {**SECURE, "federation.rounds": 1, "federation.round-deadline": 1.0}
    folder, grid = run_study(sites, config, reply={4: silent_once(stage)})
    line = history(folder)[1]
    assert "failed" not in line and keeps_no_secret(grid)
    without = stage != "query.secagg_unmask"
    assert line["secagg"]["summed"] == (3 if without else 4)
    assert line["sites"]["dortmund"]["status"] == ("late" if without else "ok")
    kept = {k: v for k, v in sites.items() if k != 4} if without else sites
    count = str(len(kept))
    plain, _ = run_study(kept, {**PLAIN, "federation.rounds": 1, "federation.sites": count})
    assert farthest(plain, folder) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_below_the_threshold_a_round_fails_and_the_run_goes_on(
    stage: str, run_study: Run, sites: dict[int, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of four are gone in round 1; three must be left."""
    rounds = 4 if stage == "train" else 2
    config = {**SECURE, "federation.round-deadline": 1.0, "federation.rounds": rounds}
    folder, grid = run_study(sites, config, reply={n: silent_once(stage) for n in (3, 4)})
    start, first, *more, last = history(folder)
    assert "secagg" not in first and "expected at least" in first["failed"]
    # The same model isn't scored twice: over other sites its scores would show one's own.
    assert start["round"] == 0 and first["federated"] == {}
    trained = [m for m in grid.sent if m.metadata.message_type == "train"]
    if stage in STAGES[:2]:
        assert len(trained) == 4  # nothing is trained in vain
    # Of the two that train the server doesn't know for two rounds whether they are still busy.
    assert all("failed" in line for line in more)
    assert "failed" not in last and last["secagg"]["summed"] == 4
    assert last["federated"]["cases"] == 4
    shown = capsys.readouterr()
    assert f"{len(more) + 1} of {rounds} rounds failed" in shown.out
    assert f"round 1/{rounds} in" in shown.err and "failed, the model stays as it is" in shown.err
    assert keeps_no_secret(grid)
    page = (folder.path / "report.html").read_text()
    assert f"<td>all</td><td>failed</td><td>{escape(first['failed'])}</td>" in page


def test_a_run_of_which_every_round_failed_is_failed(run_study: Run, sites: dict[int, Any]) -> None:
    config = {**SECURE, "federation.round-deadline": 1.0, "federation.rounds": 2}
    with pytest.raises(StudyError, match=r"every round failed \(2\).*expected at least"):
        run_study(sites, config, reply={n: silent_once("train") for n in (3, 4)})
    path = last_run(run_study) / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["status"] == "failed" and "every round failed (2)" in manifest["error"]
    assert "every round failed (2)" in (path.parent / "report.html").read_text()


@pytest.mark.parametrize("stage", SCORING)
def test_who_vanishes_while_scoring_is_left_out_of_the_scores(
    stage: str, run_study: Run, sites: dict[int, Any]
) -> None:
    config = {**SECURE, "federation.rounds": 1, "federation.round-deadline": 1.0}
    time = 1 if stage == "evaluate" else 2
    folder, grid = run_study(sites, config, reply={4: silent_once(stage, time=time)})
    line = history(folder)[1]
    assert line["secagg"]["summed"] == 4 and keeps_no_secret(grid)
    assert {site["status"] for site in line["sites"].values()} == {"ok"}
    without = stage != "query.secagg_unmask"
    assert line["scored"]["summed"] == (3 if without else 4)
    assert line["federated"]["cases"] == (3 if without else 4)


def test_below_the_threshold_a_round_has_no_scores_and_the_run_goes_on(
    run_study: Run, sites: dict[int, Any]
) -> None:
    config = {**SECURE, "federation.round-deadline": 1.0}
    reply = {n: silent_once("evaluate") for n in (3, 4)}
    folder, grid = run_study(sites, config, reply=reply)
    _, first, second = history(folder)
    assert first["secagg"]["summed"] == 4 and first["federated"] == {}
    assert "expected at least 3" in first["scored"]["failed"]
    assert second["federated"]["cases"] == 4 and keeps_no_secret(grid)


def busy_with_scoring(grid: Any, node: int) -> None:
    """Let a node be at work on the scores of round 1 until the others train for round 2."""
    real, busy = grid.pull_messages, False

    def number(message: Message) -> int:
        return int(message.content["config"]["server-round"])

    def pull(message_ids: Any) -> Any:
        nonlocal busy
        message = grid._pending.get(message_ids[0])
        if message is not None and message.metadata.dst_node_id == node:
            busy |= message.metadata.message_type == "evaluate" and number(message) == 1
            trained = [m for m in grid.sent if m.metadata.message_type == "train"]
            if busy and not any(number(m) == 2 for m in trained):
                return []
        return real(message_ids)

    grid.pull_messages = pull


def test_a_late_scorer_delays_no_round_and_its_answer_is_read_in_the_end(
    run_study: Run, sites: dict[int, Any], tmp_path: Path
) -> None:
    ledgers = {node: tmp_path / f"{node}.jsonl" for node in sites}
    for node, config in sites.items():
        config["ledger"] = str(ledgers[node])

    def first(message: Message) -> Message:
        if message.metadata.message_type == "query.hello":
            busy_with_scoring(run_study.grid, 4)  # type: ignore[attr-defined]
        return message

    config = {**SECURE, "federation.round-deadline": 5.0, "federation.rounds": 3}
    folder, _ = run_study(sites, config, reply={1: first})
    _, one, two, three = history(folder)
    assert one["secagg"]["summed"] == 4
    assert one["scored"]["summed"] == 3
    assert one["sites"]["dortmund"]["no_metrics"] == "deadline"
    # Three are enough: nobody waits until the fourth is done with what it does.
    assert two["secagg"]["summed"] == 3 and two["secagg"]["seconds"]["keys"] < 4
    assert two["sites"]["dortmund"]["status"] == "late"
    assert three["secagg"]["summed"] == 4
    came = {(told["site"], kind) for told in three["unwaited"] for kind in told["received"]}
    kinds = ("evaluate", "secagg_keys", "secagg_forget")
    assert came == {("dortmund", kind) for kind in kinds}
    found = audit_run(folder.path, list(ledgers.values()))
    assert found.clean and not [p for p in found.problems if "doesn't say" in p.what]


def test_where_all_are_late_with_scores_the_next_round_waits(
    run_study: Run, sites: dict[int, Any]
) -> None:
    """Who is left alone would be too few: then it is better to wait."""

    def first(message: Message) -> Message:
        if message.metadata.message_type == "query.hello":
            for node in (3, 4):
                busy_with_scoring(run_study.grid, node)  # type: ignore[attr-defined]
        return message

    config = {**SECURE, "federation.round-deadline": 1.0}
    folder, _ = run_study(sites, config, reply={1: first})
    _, one, two = history(folder)
    assert "failed" in one["scored"] and "failed" in two
    waited = {name: site["seconds"] for name, site in two["sites"].items() if site["seconds"]}
    assert waited["chemnitz"] > 1 and waited["dortmund"] > 1


def test_personal_models_are_summed_too(
    run_study: Run, sites: dict[int, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"federation.personal": True, "federation.rounds": 1, "train.steps-per-epoch": 3}
    plain, _ = run_study(sites, {**PLAIN, **config})
    each = json.loads((plain.path / "manifest.json").read_text())["personal"]
    secure, grid = run_study(sites, {**SECURE, **config})
    manifest = json.loads((secure.path / "manifest.json").read_text())
    summed = manifest["personal_sum"]
    assert "personal" not in manifest and summed["sites"] == 4
    assert summed["kept"] == sum(entry["kept"] for entry in each.values())
    assert summed["personal"]["cases"] == 4
    for key in ("liver.dice", "liver.recall", "tumor.precision"):
        known = [entry["personal"] for entry in each.values()]
        counts = sum(site[f"{key}.cases"] for site in known)
        mean = sum((site[key] or 0) * site[f"{key}.cases"] for site in known) / counts
        assert summed["personal"][key] == pytest.approx(mean, abs=5e-3)
    assert summed["global"] == history(secure)[1]["federated"]
    for message in grid.received:
        assert not message.content.metric_records.get("metrics")
    assert f"{summed['kept']} of 4 sites" in capsys.readouterr().out
    page = (secure.path / "report.html").read_text()
    assert f"better than the shared one at {summed['kept']} of 4 sites" in page
    assert "its own scores stay at the site" in page
    assert run_steps(history(secure)) == 3 == run_steps(history(plain))


def test_a_resumed_secure_run_goes_on(run_study: Run, sites: dict[int, Any]) -> None:
    half, _ = run_study(sites, {**SECURE, "federation.rounds": 1, "train.schedule": "constant"})
    more = {
        **SECURE,
        "federation.rounds": 2,
        "train.schedule": "constant",
        "output.resume": str(half.path),
    }
    folder, _ = run_study(sites, more)
    assert [line["round"] for line in history(folder)] == [0, 1, 2]
    assert all("failed" not in line for line in history(folder))
    straight, _ = run_study(sites, {**SECURE, "federation.rounds": 2, "train.schedule": "constant"})
    assert farthest(folder, straight) < 1e-6


def test_fraction_and_server_optimisers_work(run_study: Run, sites: dict[int, Any]) -> None:
    config = {
        "federation.fraction": 0.75,
        "federation.strategy": "fedavgm",
        "federation.min-sites": 3,
    }
    secure, _ = run_study(sites, {**SECURE, **config})
    plain, _ = run_study(sites, {**PLAIN, **config})
    assert farthest(secure, plain) < 1e-5
    assert history(secure)[1]["secagg"]["sites"] == 3


def keys_for(sites: dict[int, Any], home: Path, *, unknown: str = "") -> None:
    """Give each site a signing key and pin the others' at it."""
    keys = {name: Ed25519PrivateKey.generate() for name in NAMES}
    public = {
        name: base64.b64encode(
            key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        ).decode()
        for name, key in keys.items()
    }
    for name, config in zip(NAMES, sites.values(), strict=True):
        path = home / f"{name}.pem"
        path.write_bytes(
            keys[name].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        peers = "\n".join(f'{n} = "{k}"' for n, k in public.items() if n not in (name, unknown))
        (Path(config["data-dir"]) / "site.toml").write_text(
            f'name = "{name}"\nsigning-key = "{path}"\n[peers]\n{peers}\n'
        )


def test_pinned_keys_are_signed_and_an_invented_peer_is_refused(
    run_study: Run, sites: dict[int, Any], home: Path
) -> None:
    keys_for(sites, home)
    folder, grid = run_study(sites, {**SECURE, "federation.rounds": 1})
    assert history(folder)[1]["secagg"]["signed"] is True
    assert "query.secagg_confirm" in {m.metadata.message_type for m in grid.sent}
    keys_for(sites, home, unknown="dortmund")
    with pytest.raises(StudyError, match="every round failed"):
        run_study(sites, {**SECURE, "federation.rounds": 1})
    line = json.loads((last_run(run_study) / "history.jsonl").read_text().splitlines()[1])
    assert "secagg" not in line and "threshold" in line["failed"]
    refused = [name for name, site in line["sites"].items() if site["status"] != "ok"]
    assert refused == ["aachen", "bonn", "chemnitz"]
    assert {line["sites"][name]["reason"] for name in refused} == {"secure-aggregation"}


def test_a_changed_upload_is_refused_and_the_rest_goes_on(
    run_study: Run, sites: dict[int, Any]
) -> None:
    def shorter(message: Message) -> Message:
        if message.metadata.message_type == "train":
            record = message.content["update"]
            words = record["words"].numpy()[:-1]
            message.content["update"] = type(record)([words])
        return message

    config = {**SECURE, "federation.rounds": 1}
    folder, _ = run_study(sites, config, reply={2: shorter})
    line = history(folder)[1]
    assert line["secagg"]["summed"] == 3
    assert line["sites"]["bonn"]["reason"] == "secure-aggregation"


def test_too_heavy_a_site_is_refused_and_a_norm_bound_holds(
    run_study: Run, sites: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**SECURE, "federation.rounds": 1, "privacy.secagg-max-weight": 2.0}
    trained, train = [], site_work.train_at_site

    def noted(*arguments: Any) -> Any:
        trained.append(arguments[4].name)
        return train(*arguments)

    monkeypatch.setattr(site_work, "train_at_site", noted)
    folder, _ = run_study(sites, config)
    line = history(folder)[1]
    assert line["sites"]["chemnitz"]["reason"] == "secure-aggregation"
    assert trained == ["aachen", "bonn", "dortmund"]  # not for nothing
    assert line["secagg"]["summed"] == 3
    bounded, _ = run_study(
        sites, {**SECURE, "federation.rounds": 1, "privacy.secagg-max-norm": 0.01}
    )
    start, end = initial(bounded), weights(bounded)
    moved = torch.cat([(end[name] - start[name]).ravel() for name in start])
    assert 0.001 < float(moved.norm()) < 0.01 + 1e-4  # of four bounded updates


@pytest.mark.parametrize(
    "clash",
    [
        {"federation.guard": True},
        {"federation.guard-probe": 0.5},
        {"federation.compression": "int8"},
        {"federation.late": "carry"},
        {"federation.weighting": "annotated"},
        {"federation.weighting": "voxels"},
        {"train.minutes": 1.0},
        *({"federation.strategy": name} for name in ("krum", "fedmedian", "qfedavg", "fednova")),
    ],
)
def test_what_needs_single_updates_is_refused_before_a_site_is_asked(
    clash: dict[str, Any], run_study: Run, sites: dict[int, Any]
) -> None:
    (key,) = clash
    with pytest.raises(ConfigError, match=rf"^{key}: got .* with privacy.secure-aggregation; "):
        run_study(sites, {**SECURE, **clash})
    assert run_study.grid.sent == []  # type: ignore[attr-defined]


def test_two_sites_are_too_few(run_study: Run, sites: dict[int, Any]) -> None:
    two = {node: sites[node] for node in (1, 2)}
    with pytest.raises(StudyError, match="expected at least 3"):
        run_study(two, {**SECURE, "federation.sites": "2"})
    assert issubclass(StudyError, FedSegError)
