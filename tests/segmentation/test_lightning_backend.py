"""The Lightning loop: the same weights as the torch loop, and one's own LightningModule."""

import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.planning import make_plan
from fedseg.errors import ConfigError
from fedseg.sections import TrainConfig
from fedseg.segmentation.lightning_backend import (
    BACKENDS,
    check_backend,
    fit_lightning,
    trainer_options,
)
from fedseg.segmentation.losses import dice_ce
from fedseg.segmentation.models import build_model
from fedseg.segmentation.training import FitReport, fit, make_optimizer

CONFIG = {"model.width": 4, "model.depth": 2, "train.patch-size": "8,8,8"}

needs_lightning = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="lightning isn't installed"
)


def network(seed: int = 0) -> nn.Module:
    return build_model(make_plan(StudyConfig.from_run_config(CONFIG)), seed=seed)


def data(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(2, 1, 8, 8, 8, generator=rng),
            torch.randint(0, 3, (2, 8, 8, 8), generator=rng),
        )
        for _ in range(steps)
    ]


def train(loop: Any, model: nn.Module, config: TrainConfig, **options: Any) -> FitReport:
    report: FitReport = loop(
        model,
        iter(data(4)),  # as a round gives them: once, and of no known length
        dice_ce,
        config,
        steps=4,
        round_number=2,
        rounds=3,
        **options,
    )
    return report


def apart(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((p - q).abs().max()) for p, q in pairs)


@needs_lightning
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        ({"optimizer": "sgd", "momentum": 0.8, "schedule": "poly"}, {}),
        ({"max_grad_norm": 0.05, "warmup": 0.5}, {"annotated": ("liver",)}),
        ({"max_grad_norm": 0.0}, {"proximal_mu": 0.5}),
        ({"precision": "bf16"}, {}),
    ],
)
def test_same_weights_as_the_torch_loop(config: dict[str, Any], options: dict[str, Any]) -> None:
    settings = TrainConfig(**{"precision": "fp32", "learning_rate": 0.01, **config})
    ours, theirs = network(), network()
    losses: dict[str, list[float]] = {"torch": [], "lightning": []}
    reports = {
        name: train(
            BACKENDS[name],
            model,
            settings,
            on_step=lambda step, steps, loss, name=name: losses[name].append(float(loss)),
            **options,
        )
        for name, model in (("torch", ours), ("lightning", theirs))
    }
    assert apart(ours, network()) > 1e-3
    assert apart(ours, theirs) < 1e-5
    assert losses["lightning"] == pytest.approx(losses["torch"], abs=1e-5)
    one, other = reports["torch"], reports["lightning"]
    assert (one.steps, one.patches) == (other.steps, other.patches) == (4, 8)
    assert other.loss == pytest.approx(one.loss, abs=1e-5)


@needs_lightning
def test_moments_go_on_in_the_optimizer_that_was_given() -> None:
    settings = TrainConfig(precision="fp32")
    found = []
    for loop in (fit, fit_lightning):
        model = network()
        optimizer = make_optimizer(model, settings)
        for _ in range(2):
            train(loop, model, settings, optimizer=optimizer)
        found.append((model, optimizer.state_dict()["state"]))
    (ours, state), (theirs, other) = found
    assert apart(ours, theirs) < 1e-5
    assert float(other[0]["step"]) == float(state[0]["step"]) == 8
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(state[0][moment], other[0][moment], atol=1e-6)


@needs_lightning
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_any_precision_of_lightning_passes_through(precision: str) -> None:
    model = network()
    settings = TrainConfig(lightning=f"accelerator=cpu, precision={precision}")
    report = train(fit_lightning, model, settings)
    assert report.steps == 4
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert apart(model, network()) > 0


@needs_lightning
def test_own_lightning_module_gives_its_own_loss() -> None:
    from lightning.pytorch import LightningModule

    class Own(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.inner(image)

        def training_step(self, batch: Any, index: int) -> dict[str, torch.Tensor]:
            image, labels = batch
            assert self.trainer.current_epoch == 0
            return {"loss": 2 * nn.functional.cross_entropy(self(image), labels)}

    def loss(logits: torch.Tensor, labels: torch.Tensor, annotated: Any) -> torch.Tensor:
        return 2 * nn.functional.cross_entropy(logits.float(), labels)

    settings = TrainConfig(precision="fp32")
    own, plain = Own(), network()
    train(fit_lightning, own, settings)
    fit(plain, data(4), loss, settings, steps=4, round_number=2, rounds=3)
    assert apart(own.inner, plain) < 1e-5
    assert set(own.state_dict()) == {f"inner.{name}" for name in plain.state_dict()}


@needs_lightning
def test_what_the_trainer_refuses_is_one_line() -> None:
    settings = TrainConfig(lightning="precision=17-true")
    with pytest.raises(ConfigError, match=r"^train\.lightning: .*; mend it, or leave it empty$"):
        train(fit_lightning, network(), settings)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("precision=16-mixed", {"precision": "16-mixed"}),
        (
            " accelerator = gpu , deterministic=true,benchmark=false ",
            {"accelerator": "gpu", "deterministic": True, "benchmark": False},
        ),
    ],
)
def test_options_are_read(text: str, options: dict[str, Any]) -> None:
    assert trainer_options(TrainConfig(lightning=text)) == options


@pytest.mark.parametrize(
    "text", ["precision", "precision=", "default_root_dir=/tmp", "callbacks=x", "=", "devices=8"]
)
def test_options_that_a_study_does_not_decide(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^train\.lightning: got .*; expected accelerator="):
        check_backend(TrainConfig(lightning=text))


def test_near_miss_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean 'precision'"):
        trainer_options(TrainConfig(lightning="precison=16-mixed"))


def test_absence_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_backend(TrainConfig())
    with pytest.raises(ConfigError, match=r"pip install 'fedseg\[lightning\]'"):
        check_backend(TrainConfig(backend="lightning"))


def test_absence_at_a_site_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lightning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        train(fit_lightning, network(), TrainConfig())
    assert caught.value.name is not None and caught.value.name.startswith("lightning")
