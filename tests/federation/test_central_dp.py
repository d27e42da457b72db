"""Central differential privacy: what is released, what it costs, and that nothing resets it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attackers import attacker
from flwr.app import Message
from local_grid import LocalGrid
from read_run import history, weights
from updates import spooled

from fedseg.config import StudyConfig
from fedseg.data.plan import Plan
from fedseg.errors import ConfigError, StudyError
from fedseg.federation import rounds
from fedseg.federation.central_dp import clipped, noised_mean, sensitivity
from fedseg.federation.mean import combined, shares
from fedseg.privacy.accountant import Mechanism, epsilon_of
from fedseg.privacy.forecast import forecast
from fedseg.segmentation.models import build_model

Run = Callable[..., Any]
KEY = bytes(range(32))
CENTRAL: dict[str, Any] = {
    "privacy.mode": "central-dp",
    "privacy.clip": 0.05,
    "privacy.noise-multiplier": 1.0,
    "privacy.force": True,  # three sites and 20,000 parameters: the noise is all there is
    "federation.weighting": "equal",
    "federation.guard": False,
    "federation.sites": "3",
    "federation.personal": False,
    "train.spacing": "3,3,3",
    "train.ct-window": "-200,300",
    "train.batch-size": 2,
    "train.steps-per-epoch": 1,
}
QUIET = {**CENTRAL, "privacy.noise-multiplier": 1e-9}


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> dict[int, dict[str, Any]]:
    names = ("aachen", "bonn", "chemnitz")
    return {
        n + 1: {"data-dir": str(make_site(name, cases=2, seed=n)), "device": "cpu"}
        for n, name in enumerate(names)
    }


def moved(folder: Any) -> torch.Tensor:
    """Change of all weights since the start, as one vector."""
    plan = Plan.from_json((folder.path / "plan.json").read_text())
    start, end = build_model(plan, seed=0).state_dict(), weights(folder)
    return torch.cat([(end[name] - start[name]).ravel() for name in sorted(start)])


def received(grid: LocalGrid) -> list[torch.Tensor]:
    """Updates that reached the server, each as one vector."""
    found = []
    for message in grid.received:
        if message.metadata.message_type == "train" and "update" in message.content:
            state = message.content["update"].to_torch_state_dict()
            found.append(torch.cat([state[name].ravel() for name in sorted(state)]))
    return found


def study(**privacy: Any) -> StudyConfig:
    keys = {f"privacy.{key.replace('_', '-')}": value for key, value in privacy.items()}
    return StudyConfig.from_run_config({**CENTRAL, **keys})


def test_the_release_is_the_noised_sum_by_the_planned_number(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((3, 50_000)).astype(np.float32)
    updates = {update.site: update for update in spooled(tmp_path, list(vectors))}
    found = list(clipped(updates, 2.0).values())
    mean = combined(found, shares([1.0] * 3))
    released = noised_mean(mean, study(clip=2.0), came=3, planned=5, key=KEY)
    bounded = vectors * (2.0 / np.linalg.norm(vectors, axis=1, keepdims=True))
    noise = released.numpy() * 5 - bounded.sum(0)
    assert noise.std() == pytest.approx(2.0, rel=0.02)
    assert abs(noise.mean()) < 4 * 2.0 / math.sqrt(noise.size)
    again = noised_mean(mean, study(clip=2.0), came=3, planned=5)
    assert not torch.equal(released, again)


@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_with_or_without_a_site_the_sum_moves_by_the_clip_at_most(
    scheme: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    vectors = [rng.standard_normal(9000) * 10.0**power for power in range(-3, 4)]
    updates = {u.site: u for u in spooled(tmp_path, vectors, scheme=scheme)}
    found = clipped(updates, 1.5)
    whole = sum(u.chunk(0, u.size).double() for u in found.values())
    for left_out in found:
        rest = sum(u.chunk(0, u.size).double() for n, u in found.items() if n != left_out)
        assert float((whole - rest).norm()) <= 1.5


def test_fixed_point_of_secure_aggregation_is_in_the_sensitivity() -> None:
    plain, secure = study(), study(secure_aggregation=True)
    assert sensitivity(plain, size=10**6, sites=3) == 0.05
    more = sensitivity(secure, size=10**6, sites=3) - 0.05
    assert 0 < more < 1e-5


def test_a_missing_site_counts_as_zero_and_sites_clip(run_study: Run, sites: Any) -> None:
    config = {**QUIET, "federation.rounds": 1, "federation.round-deadline": 1.0}

    def silent(message: Message) -> Message | None:
        return None if message.metadata.message_type == "train" else message

    folder, grid = run_study(sites, config, reply={2: silent})
    updates = received(grid)
    assert len(updates) == 2
    assert all(0.049 < float(update.norm()) <= 0.05 for update in updates)  # AdamW moves by more
    assert torch.allclose(moved(folder), (updates[0] + updates[1]) / 3, atol=1e-6)
    assert history(folder)[1]["sites"]["bonn"]["status"] == "late"


def test_a_site_that_is_missing_from_the_start_or_after_a_resume_counts_as_zero(
    run_study: Run, sites: Any
) -> None:
    config = {**QUIET, "federation.rounds": 1, "train.schedule": "constant"}
    first, _ = run_study(sites, config)
    before = moved(first)
    few = {node: sites[node] for node in (1, 3)}
    late = {"federation.connect-deadline": 0.3, "federation.rounds": 2}
    second, grid = run_study(few, {**config, **late, "output.resume": str(first.path)})
    updates = received(grid)
    assert torch.allclose(moved(second) - before, (updates[0] + updates[1]) / 3, atol=1e-6)


def test_the_server_clips_again(run_study: Run, sites: Any) -> None:
    """A site that sends a hundred times its update moves the model no farther than its clip."""
    config = {**QUIET, "federation.rounds": 1}
    honest, _ = run_study(sites, config)
    folder, _ = run_study(sites, config, reply={1: attacker("100x")})
    # It was at the clip before: scaled up and clipped again it is what it was.
    assert torch.allclose(moved(honest), moved(folder), atol=1e-6)


@pytest.mark.parametrize("attack", ["NaN", "zeros"])
def test_nothing_and_nan_break_nothing(attack: str, run_study: Run, sites: Any) -> None:
    config = {**QUIET, "federation.rounds": 1}
    folder, grid = run_study(sites, config, reply={3: attacker(attack)})
    assert torch.isfinite(moved(folder)).all()
    good = received(grid)[:2]
    assert torch.allclose(moved(folder), (good[0] + good[1]) / 3, atol=1e-6)


def test_noise_has_its_size_in_the_model_and_is_never_the_same(run_study: Run, sites: Any) -> None:
    config = {**CENTRAL, "federation.rounds": 1}
    one, other = (moved(run_study(sites, config)[0]) for _ in range(2))
    assert float((one - other).std()) == pytest.approx(math.sqrt(2) * 0.05 / 3, rel=0.05)


@pytest.mark.parametrize("strategy", ["fedadam", "fedavgm", "fedyogi"])
def test_server_optimisers_are_post_processing(strategy: str, run_study: Run, sites: Any) -> None:
    folder, _ = run_study(sites, {**CENTRAL, "federation.strategy": strategy})
    assert torch.isfinite(moved(folder)).all()
    assert history(folder)[2]["privacy"]["releases"] == 2


def test_epsilon_of_each_round_is_what_was_foretold(run_study: Run, sites: Any) -> None:
    folder, _ = run_study(sites, {**CENTRAL, "federation.rounds": 3})
    foretold = forecast(
        StudyConfig.from_run_config({**CENTRAL, "federation.rounds": 3}),
        sites=3,
        parameters=1000,
        batch_size=2,
    )
    lines = history(folder)
    assert lines[0]["privacy"] is None
    for line in lines[1:]:
        assert line["privacy"]["epsilon"] == foretold.epsilons[line["round"]]
        assert line["privacy"]["delta"] == 1e-5
    expected = epsilon_of([(Mechanism(noise_multiplier=1.0), 3)], delta=1e-5)
    assert lines[3]["privacy"]["epsilon"] == expected


def test_the_budget_ends_the_run_in_good_order(run_study: Run, sites: Any) -> None:
    config = {
        **CENTRAL,
        "federation.rounds": 5,
        "federation.evaluate-every": 5,
        "privacy.max-epsilon": 8.0,  # one round spends 4.7, two 7.1, three 9.0
    }
    folder, _ = run_study(sites, config)
    lines = history(folder)
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert lines[2]["privacy"]["epsilon"] <= 8
    assert lines[2]["federated"]["cases"] == 3  # the last model is scored
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert manifest["status"] == "completed"
    assert manifest["ended"] == "after round 2: one more would pass privacy.max-epsilon = 8"
    assert (folder.path / "model-last.safetensors").is_file()
    # Nor does a resume that asks for more rounds go past it.
    again, grid = run_study(
        sites, {**config, "output.resume": str(folder.path), "federation.rounds": 9}
    )
    assert [line["round"] for line in history(again)] == [0, 1, 2]
    assert not received(grid)


def test_a_budget_below_one_round_is_refused_even_if_forced(run_study: Run, sites: Any) -> None:
    with pytest.raises(ConfigError, match="max-epsilon doesn't pay for one round"):
        run_study(sites, {**CENTRAL, "privacy.max-epsilon": 1.0})
    assert not [m for m in run_study.grid.sent if "hello" not in m.metadata.message_type]  # type: ignore[attr-defined]


def test_absurd_settings_are_refused_at_the_start_unless_forced(run_study: Run, sites: Any) -> None:
    with pytest.raises(ConfigError, match=r"absurd with these settings: the noise is .* times"):
        run_study(sites, {**CENTRAL, "privacy.force": False})
    with pytest.raises(ConfigError, match=r"an epsilon of .* bounds nothing"):
        run_study(sites, {**CENTRAL, "privacy.force": False, "privacy.noise-multiplier": 1e-4})


class Killed(BaseException):
    """The server is gone."""


def test_a_round_that_was_noised_counts_even_if_it_was_never_saved(
    run_study: Run, sites: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both noised sums of round 2 may have been seen: they count, and differ."""
    released: list[torch.Tensor] = []
    ask, save = rounds._ask, rounds.save_checkpoint

    def seen(federation: Any, number: int, **rest: Any) -> Any:
        released.append(torch.cat([t.ravel() for t in federation.split().shared.values()]).clone())
        return ask(federation, number, **rest)

    def killed(folder: Path, checkpoint: Any) -> None:
        if checkpoint.progress.round == 2:
            raise Killed
        save(folder, checkpoint)

    monkeypatch.setattr(rounds, "_ask", seen)
    monkeypatch.setattr(rounds, "save_checkpoint", killed)
    with pytest.raises(Killed):
        run_study(sites, CENTRAL)
    output = run_study.grid.run_config["output.dir"]  # type: ignore[attr-defined]
    folder = (Path(output) / "latest").resolve()
    monkeypatch.setattr(rounds, "save_checkpoint", save)
    resumed, _ = run_study(sites, {**CENTRAL, "output.resume": str(folder)})
    lines = history(resumed)
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert [line["privacy"]["releases"] for line in lines[1:]] == [1, 3]
    expected = epsilon_of([(Mechanism(noise_multiplier=1.0), 3)], delta=1e-5)
    assert lines[2]["privacy"]["epsilon"] == expected
    assert len(released) == 3 and not torch.equal(released[1], released[2])


def test_the_count_outlives_its_file_and_a_damaged_one_stops_the_run(
    run_study: Run, sites: Any
) -> None:
    folder, _ = run_study(sites, {**CENTRAL, "federation.rounds": 1})
    count = folder.path / "checkpoint" / "privacy.json"
    more = {**CENTRAL, "output.resume": str(folder.path), "federation.rounds": 2}
    count.write_text("{")
    with pytest.raises(StudyError, match=r"privacy.json: can't be read.*epsilon"):
        run_study(sites, more)
    count.unlink()
    resumed, _ = run_study(sites, more)
    assert history(resumed)[2]["privacy"]["releases"] == 2


def test_a_round_below_min_sites_releases_nothing(run_study: Run, sites: Any) -> None:
    config = {**CENTRAL, "federation.min-sites": 3, "federation.round-deadline": 0.3}
    with pytest.raises(StudyError, match="got 2 good updates; expected at least 3"):
        run_study(sites, config, reply={2: lambda m: None if "train" in str(m.metadata) else m})
    output = run_study.grid.run_config["output.dir"]  # type: ignore[attr-defined]
    folder = (Path(output) / "latest").resolve()
    assert not (folder / "checkpoint" / "privacy.json").exists()


@pytest.mark.parametrize(
    "clash",
    [
        {"federation.weighting": "cases"},
        {"federation.guard": True},
        {"federation.late": "carry"},
        {"train.minutes": 1.0},
        {"federation.compression": "int8"},
        *({"federation.strategy": name} for name in ("krum", "fedmedian", "qfedavg", "fednova")),
    ],
)
def test_what_would_break_the_bound_is_refused_before_a_site_is_asked(
    clash: dict[str, Any], run_study: Run, sites: Any
) -> None:
    (key,) = clash
    with pytest.raises(ConfigError, match=rf"^{key}: got .* with privacy\.(mode|clip)"):
        run_study(sites, {**CENTRAL, **clash})
    assert run_study.grid.sent == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("multiplier", [1e-9, 1.0])
def test_with_secure_aggregation_the_server_noises_the_sum(
    multiplier: float, run_study: Run, sites: Any
) -> None:
    config = {**CENTRAL, "federation.rounds": 1, "privacy.noise-multiplier": multiplier}
    plain, _ = run_study(sites, {**config, "privacy.noise-multiplier": 1e-9})
    secure, _ = run_study(sites, {**config, "privacy.secure-aggregation": True})
    difference = moved(secure) - moved(plain)
    if multiplier == 1:
        assert float(difference.std()) == pytest.approx(0.05 / 3, rel=0.05)
    else:
        assert float(difference.abs().max()) < 1e-6
    assert history(secure)[1]["privacy"]["releases"] == 1


def test_a_fraction_of_the_sites_is_no_amplification(run_study: Run, sites: Any) -> None:
    """The draw is by the study's seed, which is known: each round costs a site the same."""
    folder, grid = run_study(sites, {**QUIET, "federation.fraction": 0.5, "federation.rounds": 1})
    updates = received(grid)
    assert len(updates) == 2
    assert torch.allclose(moved(folder), (updates[0] + updates[1]) / 2, atol=1e-6)
    expected = epsilon_of([(Mechanism(noise_multiplier=1e-9), 1)], delta=1e-5)
    assert history(folder)[1]["privacy"]["epsilon"] == expected


def test_clipping_alone_is_one_key(run_study: Run, sites: Any) -> None:
    off = ("privacy.mode", "privacy.noise-multiplier", "privacy.force")
    config = {key: value for key, value in CENTRAL.items() if key not in off}
    folder, grid = run_study(sites, {**config, "federation.rounds": 1, "federation.guard": True})
    assert all(0.049 < float(update.norm()) <= 0.05 for update in received(grid))
    assert float(moved(folder).norm()) <= 0.05 + 1e-6
    assert history(folder)[1]["privacy"] is None
