"""Noise at the sites, on updates or on steps: what leaves, what it costs, what it breaks."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file
from test_central_dp import CENTRAL, history, moved, received

from fedseg.config import StudyConfig
from fedseg.errors import ConfigError
from fedseg.federation.site_privacy import protect
from fedseg.privacy.accountant import Mechanism, epsilon_of
from fedseg.privacy.forecast import forecast

Run = Callable[..., Any]
COMMON = {key: value for key, value in CENTRAL.items() if not key.startswith("federation.")}
LOCAL = {
    **COMMON,
    "privacy.mode": "local-dp",
    "federation.sites": "3",
    "federation.personal": False,
    "federation.guard": False,
}
RECORD = {
    **LOCAL,
    "privacy.mode": "record-dp",
    "privacy.clip": 0.1,
    "privacy.case-rate": 0.5,
    "train.batch-size": 1,
}


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> dict[int, dict[str, Any]]:
    names = ("aachen", "bonn", "chemnitz")
    return {
        n + 1: {"data-dir": str(make_site(name, cases=3, seed=n)), "device": "cpu"}
        for n, name in enumerate(names)
    }


def test_an_update_is_clipped_then_noised() -> None:
    study = StudyConfig.from_run_config(
        {**LOCAL, "privacy.clip": 2.0, "privacy.noise-multiplier": 0.5}
    )
    update = {"b": torch.full((100, 300), 3.0), "a": torch.full((10_000,), -1.0)}
    protected = protect(update, study)
    assert (protected.clip, protected.noise) == (2.0, 1.0)
    factor = 2.0 / math.sqrt(9 * 30_000 + 10_000)
    noise = {name: protected.update[name] - tensor * factor for name, tensor in update.items()}
    assert float(noise["b"].std()) == pytest.approx(1.0, rel=0.02)
    assert noise["a"].shape == (10_000,) and protected.update["b"].dtype == torch.float32
    again = protect(update, study).update["a"]
    assert not torch.equal(again, protected.update["a"])
    zero = protect({"a": torch.zeros(5)}, study)
    assert torch.isfinite(zero.update["a"]).all()


@pytest.mark.parametrize("secure", [False, True])
def test_what_leaves_a_site_is_noised_and_accounted(
    secure: bool, run_study: Run, sites: Any
) -> None:
    config = {**LOCAL, "privacy.secure-aggregation": secure}
    folder, grid = run_study(sites, config)
    if not secure:
        for update in received(grid):
            assert float(update.std()) == pytest.approx(0.05, rel=0.05)
    noise = moved(folder).std()
    assert float(noise) == pytest.approx(0.05 * math.sqrt(2 / 3), rel=0.1)  # 2 rounds, 3 sites
    study = StudyConfig.from_run_config(config)
    foretold = forecast(study, sites=3, parameters=1000, batch_size=2)
    for line in history(folder)[1:]:
        assert line["privacy"]["epsilon"] == foretold.epsilons[line["round"]]
    # From any data to any other a clipped update moves by twice the clip.
    expected = epsilon_of([(Mechanism(noise_multiplier=0.5), 2)], delta=1e-5)
    assert history(folder)[2]["privacy"]["epsilon"] == expected


def test_the_server_does_not_clip_the_noise_away(run_study: Run, sites: Any) -> None:
    """The norm of what comes is that of its noise, a hundred times the clip."""
    folder, grid = run_study(sites, {**LOCAL, "federation.rounds": 1})
    mean = torch.stack(received(grid)).mean(0)
    assert torch.allclose(moved(folder), mean, atol=1e-6)
    assert float(received(grid)[0].norm()) > 100 * 0.05


def test_record_dp_trains_and_is_accounted_by_steps(run_study: Run, sites: Any) -> None:
    config = {**RECORD, "train.steps-per-epoch": 3}
    folder, _ = run_study(sites, config)
    lines = history(folder)
    mechanism = Mechanism(noise_multiplier=1.0, rate=0.5, steps=3)
    for line in lines[1:]:
        assert line["privacy"]["epsilon"] == epsilon_of([(mechanism, line["round"])], delta=1e-5)
        for site in line["sites"].values():
            assert site["status"] == "ok"
            # Not how many were drawn: 2 training cases x rate .5 x 1 patch x 3 steps.
            assert (site["training"]["steps"], site["training"]["patches"]) == (3, 3)
    assert torch.isfinite(moved(folder)).all() and moved(folder).any()


@pytest.mark.parametrize(
    ("name", "side", "depth"),
    [("attention-unet", 16, 3), pytest.param("unet++", 32, 5, marks=pytest.mark.slow)],
)
def test_record_dp_trains_the_other_networks(
    name: str, side: int, depth: int, run_study: Run, sites: Any
) -> None:
    config = {
        **RECORD,
        "model.name": name,
        "model.width": 2,
        "model.depth": depth,
        "train.patch-size": f"{side},{side},{side}",
        "train.steps-per-epoch": 1,
        "federation.rounds": 1,
    }
    folder, _ = run_study(sites, config)
    assert {site["status"] for site in history(folder)[1]["sites"].values()} == {"ok"}
    assert torch.isfinite(moved(folder)).all() and moved(folder).any()


def test_record_dp_draws_and_noises_anew_each_time(run_study: Run, sites: Any) -> None:
    config = {**RECORD, "federation.rounds": 1}
    one, other = (moved(run_study(sites, config)[0]) for _ in range(2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "krum"])
def test_record_dp_lets_all_follow(strategy: str, run_study: Run, sites: Any) -> None:
    """Compression with error feedback, kept moments and FedBN come after the noise."""
    config = {
        **RECORD,
        "federation.strategy": strategy,
        "federation.malicious-sites": 0,
        "federation.compression": "int8",
        "federation.shared": "all-but-norm",
        "train.optimizer-state": "keep",
    }
    folder, _ = run_study(sites, config)
    assert history(folder)[2]["privacy"]["releases"] == 2
    assert {site["status"] for site in history(folder)[2]["sites"].values()} == {"ok"}


def test_nobody_drawn_and_a_site_that_is_missing_break_nothing(run_study: Run, sites: Any) -> None:
    config = {
        **RECORD,
        "privacy.case-rate": 0.001,  # each step is empty
        "federation.rounds": 1,
        "federation.round-deadline": 1.0,
    }

    def silent(message: Message) -> Message | None:
        return None if message.metadata.message_type == "train" else message

    folder, _ = run_study(sites, config, reply={2: silent})
    lines = history(folder)[1]["sites"]
    assert [lines[name]["status"] for name in ("aachen", "bonn", "chemnitz")] == [
        "ok",
        "late",
        "ok",
    ]
    assert torch.isfinite(moved(folder)).all()


NETWORK = """
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv3d(1, classes, 3, padding=1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, image):
        if self.training:
            self.seen += 1
            self.mean += image.mean()
        return self.conv(image)

def build(plan, in_channels, classes):
    return Network(classes)
"""


@pytest.mark.parametrize("config", [CENTRAL, LOCAL, RECORD])
def test_buffers_that_training_writes_break_nothing(
    config: dict[str, Any],
    run_study: Run,
    sites: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "counting_net.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    allowed = {node: {**c, "policy.allow-custom-code": True} for node, c in sites.items()}
    folder, _ = run_study(allowed, {**config, "model.name": "counting_net:build"})
    sys.modules.pop("counting_net", None)
    end = load_file(folder.path / "model-last.safetensors")
    assert end["seen"].dtype == torch.int64 and int(end["seen"]) == 0
    # A running mean of images would leave with no noise on it.
    assert config is not RECORD or float(end["mean"]) == 0


@pytest.mark.parametrize(
    "clash",
    [
        (LOCAL, {"federation.compression": "int8"}),
        (RECORD, {"train.backend": "lightning"}),
        (RECORD, {"train.minutes": 1.0}),
    ],
)
def test_what_the_accounting_cant_follow_is_refused(
    clash: tuple[dict[str, Any], dict[str, Any]], run_study: Run, sites: Any
) -> None:
    base, change = clash
    (key,) = change
    with pytest.raises(ConfigError, match=rf"^{key}: got .* with privacy\.(mode|clip)"):
        run_study(sites, {**base, **change})
    assert run_study.grid.sent == []  # type: ignore[attr-defined]


def test_a_budget_ends_these_runs_too(run_study: Run, sites: Any) -> None:
    config = {**LOCAL, "privacy.noise-multiplier": 10.0, "privacy.max-epsilon": 1.5}
    folder, _ = run_study(sites, {**config, "federation.rounds": 5})
    lines = history(folder)
    assert len(lines) < 6 and lines[-1]["privacy"]["epsilon"] <= 1.5
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert "privacy.max-epsilon" in manifest["ended"]
