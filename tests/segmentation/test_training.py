"""The training loop: seeded, clipped, scheduled over the whole run."""

import itertools
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.planning import make_plan
from fedseg.errors import ConfigError
from fedseg.sections import TrainConfig
from fedseg.segmentation import training
from fedseg.segmentation.losses import dice_ce
from fedseg.segmentation.models import build_model
from fedseg.segmentation.optimizer_state import load_optimizer, save_optimizer
from fedseg.segmentation.schedule import RoundClock, learning_rate
from fedseg.segmentation.training import (
    choose_device,
    choose_dtype,
    fit,
    log_progress,
    make_optimizer,
    set_threads,
    steps_in_round,
)

CONFIG = {"model.width": 4, "model.depth": 2, "train.patch-size": "8,8,8"}


def network(seed: int = 0) -> nn.Module:
    return build_model(make_plan(StudyConfig.from_run_config(CONFIG)), seed=seed)


def data(steps: int, seed: int = 0, batch: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(batch, 1, 8, 8, 8, generator=rng),
            torch.randint(0, 3, (batch, 8, 8, 8), generator=rng),
        )
        for _ in range(steps)
    ]


def train(config: TrainConfig, steps: int = 3, seed: int = 0, **options: float) -> nn.Module:
    model = network(seed)
    fit(model, data(steps), dice_ce, config, steps=steps, round_number=1, rounds=1, **options)
    return model


def far(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return math.sqrt(sum(float(((p - q) ** 2).sum()) for p, q in pairs))


def test_the_same_data_gives_the_same_bits() -> None:
    first, again = train(TrainConfig()), train(TrainConfig())
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )


@pytest.fixture
def fp16_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in fp16 also on a processor that only emulates it."""
    monkeypatch.setattr(training, "_cpu_has", lambda *formats: True)


@pytest.mark.usefixtures("fp16_here")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_learns_one_patch_by_heart(optimizer: str, precision: str) -> None:
    config = TrainConfig(optimizer=optimizer, learning_rate=0.02, schedule="constant")
    config = config.model_copy(update={"precision": precision})
    image = torch.zeros(2, 1, 8, 8, 8)
    labels = torch.zeros(2, 8, 8, 8, dtype=torch.int64)
    image[:, :, 2:6, 2:6, 2:6], labels[:, 2:6, 2:6, 2:6] = 1, 1
    image[:, :, 3:5, 3:5, 3:5], labels[:, 3:5, 3:5, 3:5] = -1, 2
    model = network()
    losses: list[float] = []
    fit(
        model,
        [(image, labels)] * 60,
        dice_ce,
        config,
        steps=60,
        round_number=1,
        rounds=1,
        on_step=lambda step, steps, loss: losses.append(float(loss)),
    )
    assert losses[-1] < 0.35 * losses[0]


@pytest.mark.usefixtures("fp16_here")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_gradient_norm_is_clipped(precision: str) -> None:
    """Under fp16 the norm is the true one, not that of the scaled gradients."""
    options: dict[str, Any] = {
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "schedule": "constant",
    }
    start = network()
    free, clipped = (
        train(
            TrainConfig(**options, learning_rate=1.0, max_grad_norm=norm).model_copy(
                update={"precision": precision}
            ),
            steps=1,
        )
        for norm in (0, 0.01)
    )
    assert far(start, free) > 0.02
    assert far(start, clipped) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.usefixtures("fp16_here")
def test_fp16_steps_are_those_of_fp32_but_for_its_precision() -> None:
    options: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    config = TrainConfig(**options, learning_rate=0.1, schedule="constant", max_grad_norm=0)
    start = network()
    full, half = (
        train(config.model_copy(update={"precision": name}), steps=2) for name in ("fp32", "fp16")
    )
    # A step that the scaler skipped would be half of the way.
    assert 0 < far(full, half) < 0.1 * far(start, full)


def test_adamw_is_the_paper_s() -> None:
    """Two steps by hand after Loshchilov and Hutter, ICLR 2019, in float64."""
    config = TrainConfig(
        learning_rate=0.01, weight_decay=0.1, schedule="constant", max_grad_norm=0, precision="fp32"
    )
    found = train(config, steps=2)
    model = network().train()
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for t, (image, labels) in enumerate(data(2), 1):
        model.zero_grad()
        dice_ce(model(image), labels, ("liver", "tumor")).backward()
        with torch.no_grad():
            for p, (first, second) in zip(model.parameters(), moments, strict=True):
                assert p.grad is not None
                first.mul_(0.9).add_(p.grad, alpha=0.1)
                second.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                step = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
                p -= 0.01 * 0.1 * p + 0.01 * step
    # Where a gradient is rounding alone (a bias before a normalisation), AdamW makes it a step.
    gaps = [
        (a - b).abs().median().item()
        for a, b in zip(found.parameters(), model.parameters(), strict=True)
        if a.dim() > 1
    ]
    assert max(gaps) < 1e-5


def test_progress_gets_the_loss_of_each_step_and_the_report_their_mean() -> None:
    seen: list[tuple[int, int, float]] = []
    report = fit(
        network(),
        data(4),
        dice_ce,
        TrainConfig(),
        steps=4,
        round_number=1,
        rounds=1,
        on_step=lambda step, steps, loss: seen.append((step, steps, float(loss))),
    )
    assert [(step, steps) for step, steps, _ in seen] == [(n, 4) for n in (1, 2, 3, 4)]
    assert report.loss == pytest.approx(np.mean([loss for *_, loss in seen]), rel=1e-5)
    assert (report.steps, report.patches) == (4, 8)


def test_the_log_has_about_ten_lines_a_round(caplog: pytest.LogCaptureFixture) -> None:
    progress = log_progress("aachen", 3)
    with caplog.at_level("INFO", logger="fedseg"):
        for step in range(1, 41):
            progress(step, 40, torch.tensor(1.23456))
    assert len(caplog.messages) == 10
    assert caplog.messages[-1] == "aachen · round 3 · step 40/40 · loss 1.235"


def test_the_proximal_term_is_the_squared_distance() -> None:
    """Two SGD steps by hand: the second gradient has mu times the way of the first."""
    options = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    config = TrainConfig(**options, learning_rate=0.1, max_grad_norm=0, precision="fp32")
    mu = 3.0
    found = train(config, steps=2, proximal_mu=mu)

    model = network().train()
    start = [p.detach().clone() for p in model.parameters()]
    for image, labels in data(2):
        model.zero_grad()
        dice_ce(model(image), labels, ("liver", "tumor")).backward()
        with torch.no_grad():
            for p, q in zip(model.parameters(), start, strict=True):
                assert p.grad is not None
                p -= 0.1 * (p.grad + mu * (p - q))
    assert far(found, model) < 1e-6
    assert far(found, train(config, steps=2)) > 1e-4


@pytest.mark.parametrize("schedule", ["constant", "cosine", "poly"])
def test_the_schedule_spans_the_whole_run(schedule: str) -> None:
    config = TrainConfig(schedule=schedule, learning_rate=0.1)
    rates = [learning_rate(config, p) for p in np.linspace(0, 1, 21)]
    assert rates[0] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates))
    assert rates[-1] == pytest.approx(0.1 if schedule == "constant" else 0.001)
    if schedule == "cosine":
        assert rates[10] == pytest.approx(0.05)
    if schedule == "poly":
        assert rates[10] == pytest.approx(0.1 * 0.5**0.9)


def test_warmup_rises_then_the_schedule_starts() -> None:
    config = TrainConfig(schedule="cosine", learning_rate=0.1, warmup=0.2)
    assert learning_rate(config, 0.0) == pytest.approx(0.01)
    assert learning_rate(config, 0.1) < learning_rate(config, 0.2) == pytest.approx(0.1)


def test_round_two_goes_on_where_round_one_ended() -> None:
    """Rates of 2 rounds x 2 steps are those of 1 round x 4 steps."""

    class Rates(torch.optim.SGD):
        seen: list[float]

        def step(self, closure: None = None) -> None:  # type: ignore[override]
            self.seen.append(self.param_groups[0]["lr"])

    def rates(rounds: int, steps: int) -> list[float]:
        seen: list[float] = []
        for number in range(1, rounds + 1):
            model = network()
            optimizer = Rates(model.parameters(), lr=1.0)
            optimizer.seen = seen
            fit(
                model,
                data(steps),
                dice_ce,
                TrainConfig(),
                steps=steps,
                round_number=number,
                rounds=rounds,
                optimizer=optimizer,
            )
        return seen

    assert rates(2, 2) == pytest.approx(rates(1, 4))


def test_with_a_time_budget_the_rate_goes_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    config = TrainConfig(minutes=1.0, learning_rate=1.0, schedule="cosine")
    clock = RoundClock(config, steps=2, number=2, rounds=2)
    found = []
    for seconds in (0, 30, 60, 90):
        now[0] = 100.0 + seconds
        found.append(clock.rate(done=500))
    ends = [learning_rate(config, progress) for progress in (0.5, 0.75, 1.0, 1.0)]
    assert found == pytest.approx(ends)


def test_steps_in_a_round() -> None:
    assert steps_in_round(TrainConfig(patches_per_case=4), 5, 2) == 10
    assert steps_in_round(TrainConfig(patches_per_case=1), 5, 2) == 3
    assert steps_in_round(TrainConfig(steps_per_epoch=7, local_epochs=3), 5, 2) == 21


def test_moments_survive_the_disk(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = TrainConfig(schedule="constant")
    together = network()
    optimizer = make_optimizer(together, config)
    for part in (data(2, seed=1), data(2, seed=2)):
        fit(together, part, dice_ce, config, steps=2, round_number=1, rounds=1, optimizer=optimizer)

    apart = network()
    for number, part in enumerate((data(2, seed=1), data(2, seed=2)), 1):
        optimizer = make_optimizer(apart, config)
        restored = load_optimizer(optimizer, tmp_path / f"round-{number - 1}")
        assert restored == (number == 2)
        fit(apart, part, dice_ce, config, steps=2, round_number=1, rounds=1, optimizer=optimizer)
        save_optimizer(optimizer, tmp_path / f"round-{number}")
    assert all(
        torch.equal(a, b) for a, b in zip(together.parameters(), apart.parameters(), strict=True)
    )
    for number in range(3, 6):
        save_optimizer(optimizer, tmp_path / f"round-{number}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-4", "round-5"]


def test_a_damaged_state_starts_anew(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "round-1").mkdir()
    (tmp_path / "round-1" / "optimizer.safetensors").write_bytes(b"broken")
    model = network()
    assert load_optimizer(make_optimizer(model, TrainConfig()), tmp_path / "round-1") is False


@pytest.mark.parametrize(
    ("device", "hardware", "precision", "expected"),
    [
        ("cuda", True, "auto", torch.bfloat16),
        ("cuda", False, "auto", torch.float16),
        ("cuda", False, "fp32", torch.float32),
        ("cuda", True, "fp16", torch.float16),
        ("mps", False, "auto", torch.float32),
        ("mps", False, "bf16", torch.float32),
        ("cpu", True, "auto", torch.bfloat16),
        ("cpu", False, "auto", torch.float32),
        ("cpu", True, "fp16", torch.float16),
        ("cpu", False, "fp16", torch.float32),
        ("cpu", False, "bf16", torch.bfloat16),
    ],
)
def test_the_number_format_follows_the_hardware(
    device: str,
    hardware: bool,
    precision: str,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Older GPUs say they support bf16, and emulate it; that doesn't count, nor on a CPU."""
    monkeypatch.setattr(training, "_cpu_has", lambda *formats: hardware)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: hardware or including_emulation,
    )
    assert choose_dtype(precision, torch.device(device)) is expected


def test_a_cpu_s_number_format_is_what_the_kernel_says() -> None:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        pytest.skip("needs Linux's /proc")
    has = any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))
    expected = torch.bfloat16 if has else torch.float32
    assert choose_dtype("auto", torch.device("cpu")) is expected


def test_threads_are_the_process_s_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray sets it
        set_threads(None)
        assert torch.get_num_threads() == 1
        set_threads(2)  # what a site's config says goes first
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        set_threads(None)
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
        monkeypatch.delattr(os, "sched_getaffinity")
        set_threads(None)
        assert torch.get_num_threads() == os.cpu_count()
    finally:
        torch.set_num_threads(before)


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match="device: got 'cuda:1'; this machine has none"):
        choose_device("cuda:1")
    assert choose_device("auto").type in ("cpu", "mps")
    assert choose_dtype("fp32", torch.device("cpu")) is torch.float32
    assert choose_dtype("bf16", torch.device("cpu")) is torch.bfloat16
