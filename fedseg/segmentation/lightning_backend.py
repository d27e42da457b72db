"""The training loop by Lightning: the same steps as `training.fit`, on any accelerator it knows."""

import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fedseg.errors import ConfigError
from fedseg.registry import did_you_mean
from fedseg.sections import TrainConfig
from fedseg.segmentation.layers import memory_format, place
from fedseg.segmentation.schedule import RoundClock
from fedseg.segmentation.training import (
    Batch,
    FitReport,
    Loss,
    OnStep,
    choose_dtype,
    fit,
    make_optimizer,
)

__all__ = ["BACKENDS", "check_backend", "fit_lightning", "trainer_options"]

_PRECISIONS = {
    torch.float32: "32-true",
    torch.bfloat16: "bf16-mixed",
    torch.float16: "16-mixed",
}
_OPTIONS = ("accelerator", "precision", "deterministic", "benchmark")
_FLAGS = {"true": True, "false": False}


def check_backend(config: TrainConfig) -> None:
    """Check `train.backend` and `train.lightning` before anything starts.

    Raises:
        ConfigError: Lightning isn't installed, or its options can't be read.
    """
    trainer_options(config)
    if config.backend == "lightning" and importlib.util.find_spec("lightning") is None:
        raise ConfigError(
            "train.backend: got 'lightning', package lightning isn't installed here; run "
            "`pip install 'fedseg[lightning]'` at the SuperLink and at every site"
        )


def trainer_options(config: TrainConfig) -> dict[str, Any]:
    """Read `train.lightning`: `accelerator=gpu,precision=16-mixed`.

    Raises:
        ConfigError: It has another form, or names what a study doesn't decide.
    """
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in config.lightning.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in _OPTIONS or not equals or not value:
            raise ConfigError(
                f"train.lightning: got '{part}'{did_you_mean(name, _OPTIONS)}; expected "
                f"{', '.join(f'{option}=...' for option in _OPTIONS)}, separated by commas"
            )
        options[name] = _FLAGS.get(value, value)
    return options


def fit_lightning(
    network: nn.Module,
    batches: Iterable[Batch],
    loss_function: Loss,
    config: TrainConfig,
    *,
    steps: int,
    round_number: int,
    rounds: int,
    annotated: Sequence[str] = ("liver", "tumor"),
    proximal_mu: float = 0.0,
    device: torch.device | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    on_step: OnStep | None = None,
) -> FitReport:
    """Train in place for one round by Lightning's Trainer; arguments are those of `training.fit`.

    A network that is a LightningModule gives the loss by its own `training_step((image, labels),
    index)`; optimiser, schedule and clipping stay the study's.

    Raises:
        ConfigError: The Trainer refuses `train.lightning` on this machine.
        ModuleNotFoundError: Lightning isn't installed here.
    """
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = device or torch.device("cpu")
    dtypes = {name: p.dtype for name, p in network.named_parameters()}
    optimizer = optimizer or make_optimizer(place(network, device), config)
    # A fused optimiser would unscale by itself, and Lightning then refuses to clip.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    seen = _Seen(config, steps, round_number, rounds, on_step, device)
    module = _module(
        place(network, device).train(),
        _loss_of(network, loss_function, annotated, proximal_mu, memory_format(device)),
        optimizer,
        seen,
    )
    options = {**_for_device(device, config), **trainer_options(config)}
    try:
        trainer = Trainer(
            max_epochs=1,
            gradient_clip_val=config.max_grad_norm or None,
            barebones=True,
            **options,
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"train.lightning: {first}; mend it, or leave it empty") from None
    began = time.monotonic()
    with warnings.catch_warnings():
        # Of its own calls of torch, and that batches have no workers: nothing a site could mend.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        trainer.fit(module, batches)
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])  # after precision=bf16-true
    return FitReport(
        steps=seen.steps,
        patches=seen.patches,
        loss=float(seen.total) / max(seen.steps, 1),
        seconds=time.monotonic() - began,
    )


BACKENDS: dict[str, Callable[..., FitReport]] = {"torch": fit, "lightning": fit_lightning}


def _for_device(device: torch.device, config: TrainConfig) -> dict[str, Any]:
    """Options of the Trainer that make it compute where and as `training.fit` would."""
    kind = {"cuda": "gpu"}.get(device.type, device.type)
    devices = [device.index] if device.type == "cuda" and device.index is not None else 1
    precision = _PRECISIONS[choose_dtype(config.precision, device)]
    return {"accelerator": kind, "devices": devices, "precision": precision}


class _Seen:
    """What the steps came to: Lightning's own logging is off, it would wait for the device."""

    def __init__(
        self,
        config: TrainConfig,
        steps: int,
        round_number: int,
        rounds: int,
        on_step: OnStep | None,
        device: torch.device,
    ) -> None:
        self.planned, self.on_step = steps, on_step
        self.clock = RoundClock(config, steps=steps, number=round_number, rounds=rounds)
        self.steps = self.patches = 0
        self.total = torch.zeros((), device=device)

    def rate(self) -> float:
        """Learning rate of the next step."""
        return self.clock.rate(self.steps)

    def add(self, loss: torch.Tensor, patches: int) -> None:
        """Count a step that is done."""
        self.steps, self.patches = self.steps + 1, self.patches + patches
        self.total = self.total.to(loss.device) + loss
        if self.on_step:
            self.on_step(self.steps, self.planned, loss)


def _loss_of(
    network: nn.Module,
    loss_function: Loss,
    annotated: Sequence[str],
    proximal_mu: float,
    layout: torch.memory_format,
) -> Callable[[Batch, int], torch.Tensor]:
    from lightning.pytorch import LightningModule

    parameters = [p for p in network.parameters() if p.requires_grad]
    start_point = [p.detach().clone() for p in parameters] if proximal_mu else []

    def loss_of(batch: Batch, index: int) -> torch.Tensor:
        image, labels = batch
        if image.dtype == torch.float32:
            image = image.contiguous(memory_format=layout)
        if isinstance(network, LightningModule):
            step = network.training_step((image, labels), index)
            loss: torch.Tensor = step["loss"] if isinstance(step, dict) else step
        else:
            logits = network(image)
            with torch.autocast(logits.device.type, enabled=False):
                loss = loss_function(logits, labels, annotated)
        for p, q in zip(parameters, start_point, strict=bool(start_point)):
            loss = loss + 0.5 * proximal_mu * ((p - q.to(p)) ** 2).sum()
        return loss

    return loss_of


def _module(
    network: nn.Module,
    loss_of: Callable[[Batch, int], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    seen: _Seen,
) -> Any:
    """Make the module that Lightning drives; its class is here, for Lightning may be missing."""
    from lightning.pytorch import LightningModule

    class Round(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.last = torch.zeros(())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

        def on_train_batch_start(self, batch: Batch, index: int) -> None:
            for group in optimizer.param_groups:
                group["lr"] = seen.rate()

        def training_step(self, batch: Batch, index: int) -> torch.Tensor:
            loss = loss_of(batch, index)
            self.last = loss.detach()
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
            seen.add(self.last, batch[0].shape[0])

    return Round()
