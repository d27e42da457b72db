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
from safetensors.torch import load_file

from fedseg.data.plan import Plan
from fedseg.errors import ConfigError, FedSegError, StudyError
from fedseg.federation.secure_site import SUMMED
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


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> dict[int, dict[str, Any]]:
    return {
        n + 1: {"data-dir": str(make_site(name, cases=2 + n % 3, seed=n)), "device": "cpu"}
        for n, name in enumerate(NAMES)
    }


def history(folder: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder.path / "history.jsonl").read_text().splitlines()]


def weights(folder: Any) -> dict[str, torch.Tensor]:
    return load_file(folder.path / "model-last.safetensors")


def initial(folder: Any) -> dict[str, torch.Tensor]:
    plan = Plan.from_json((folder.path / "plan.json").read_text())
    return build_model(plan, seed=0).state_dict()


def farthest(one: Any, other: Any) -> float:
    return max(float((t - weights(other)[n]).abs().max()) for n, t in weights(one).items())


def silent_once(stage: str) -> Callable[[Message], Message | None]:
    """Drop a site's first reply of a stage."""
    asked = 0

    def reply(message: Message) -> Message | None:
        nonlocal asked
        asked += message.metadata.message_type == stage
        return None if asked == 1 and message.metadata.message_type == stage else message

    return reply


def test_secure_run_equals_the_plain_run_and_shows_only_sums(
    run_study: Run, sites: dict[int, Any]
) -> None:
    plain, _ = run_study(sites, PLAIN)
    secure, grid = run_study(sites, SECURE)
    assert farthest(plain, secure) < 1e-5  # 2 rounds; see the steps of fixed point below
    one, other = history(plain)[1], history(secure)[1]
    sums = other["secagg"]["sums"]
    for key in SUMMED[1:-1]:
        if key != "seconds":
            expected = sum(site["training"][key] for site in one["sites"].values())
            assert sums[key] == pytest.approx(expected, abs=1e-8)
    assert sums["weight"] == sum(site["weight"] for site in one["sites"].values())
    assert other["secagg"]["clipped"] == 0 and other["secagg"]["sites"] == 4
    assert [site["status"] for site in other["sites"].values()] == ["ok"] * 4
    # On the wire: masked words and no number beside them; bytes are those of float32.
    uploads = [m for m in grid.received if m.metadata.message_type == "train"]
    assert len(uploads) == 8
    for message in uploads:
        assert set(message.content) == {"status", "metrics", "update", "secagg", "ledger"}
        assert not message.content["metrics"]
        words = message.content["update"]["words"].numpy()
        assert words.dtype == np.uint32
        assert abs(words.astype(np.float64).mean() / 2**31 - 1) < 6 / math.sqrt(3 * len(words))
    # Nothing secret is left at a site.
    for context in grid._contexts.values():
        state = json.loads(context.state["secagg"]["state"])
        assert state == {"run": secure.run_id, "round": 2, "stage": "done"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_site_that_vanishes_at_a_stage_is_left_out(
    stage: str, run_study: Run, sites: dict[int, Any]
) -> None:
    config = {**SECURE, "federation.rounds": 1, "federation.round-deadline": 1.0}
    folder, _ = run_study(sites, config, reply={4: silent_once(stage)})
    line = history(folder)[1]
    assert "failed" not in line
    without = stage != "query.secagg_unmask"
    assert line["secagg"]["summed"] == (3 if without else 4)
    assert line["sites"]["dortmund"]["status"] == ("late" if without else "ok")
    kept = {k: v for k, v in sites.items() if k != 4} if without else sites
    count = str(len(kept))
    plain, _ = run_study(kept, {**PLAIN, "federation.rounds": 1, "federation.sites": count})
    assert farthest(plain, folder) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_below_the_threshold_a_round_fails_and_the_run_goes_on(
    stage: str, run_study: Run, sites: dict[int, Any]
) -> None:
    """Two of four are gone in round 1; three must be left."""
    config = {**SECURE, "federation.round-deadline": 1.0, "federation.rounds": 2}
    folder, grid = run_study(sites, config, reply={n: silent_once(stage) for n in (3, 4)})
    start, first, second = history(folder)
    assert "secagg" not in first and "expected at least" in first["failed"]
    trained = [m for m in grid.sent if m.metadata.message_type == "train"]
    if stage in STAGES[:2]:
        assert len(trained) == 4  # nothing is trained in vain
    if stage == "train":  # of the two the server doesn't know whether they are still busy
        assert "failed" in second and weights(folder).keys() == initial(folder).keys()
        assert all(torch.equal(t, initial(folder)[n]) for n, t in weights(folder).items())
    else:
        assert "failed" not in second and second["secagg"]["summed"] == 4
    assert start["round"] == 0
    # Also of a round that failed a site keeps no secret.
    for context in grid._contexts.values():
        assert set(json.loads(context.state["secagg"]["state"])) == {"run", "round", "stage"}


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
    folder, _ = run_study(sites, {**SECURE, "federation.rounds": 1})
    line = history(folder)[1]
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
    run_study: Run, sites: dict[int, Any]
) -> None:
    config = {**SECURE, "federation.rounds": 1, "privacy.secagg-max-weight": 2.0}
    folder, _ = run_study(sites, config)
    line = history(folder)[1]
    assert line["sites"]["chemnitz"]["reason"] == "secure-aggregation"
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
