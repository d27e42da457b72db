"""Train a network on a site's cases for one round."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedseg.config import TrainConfig
from fedseg.errors import ConfigError

__all__ = ["FitReport", "choose_device", "choose_dtype", "fit", "learning_rate", "set_threads"]

log = logging.getLogger(__name__)

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor, Sequence[str]], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What a round of training did.

    Attributes:
        steps: Optimiser steps.
        patches: Patches seen.
        loss: Mean loss over the steps.
        seconds: Wall time.
    """

    steps: int
    patches: int
    loss: float
    seconds: float


def choose_device(name: str) -> torch.device:
    """Settle `auto`, and check that a named device is there.

    Raises:
        ConfigError: The device isn't there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, index = name.partition(":")
    there = {
        "cpu": True,
        "mps": torch.backends.mps.is_available(),
        "cuda": int(index or 0) < torch.cuda.device_count(),
    }
    if not there.get(kind, False):
        raise ConfigError(f"device: got '{name}'; this machine has none; take device=\"cpu\"")
    return torch.device(name)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Number format of the forward pass: bf16 where the hardware computes in it, else fp32."""
    if precision == "fp32" or device.type == "mps":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    # Emulated bf16 is several times slower than fp32: only a processor that says it has it counts.
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def set_threads(threads: int | None) -> None:
    """Give torch this process's share of the processor."""
    share = threads or len(os.sched_getaffinity(0))
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if threads is None and limit.isdigit():  # Ray sets it to the CPUs it gave this process
        share = max(1, min(share, int(limit)))
    torch.set_num_threads(share)


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Learning rate at `progress` of the whole run, 0 to 1.

    Poly is nnU-Net's, exponent 0.9.
    """
    if progress < config.warmup:
        return config.learning_rate * (0.1 + 0.9 * progress / config.warmup)
    left = 1 - (progress - config.warmup) / (1 - config.warmup)
    factor: float = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))),
        "poly": max(left, 0.0) ** 0.9,
    }[config.schedule]
    return config.learning_rate * max(factor, 0.01)


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the local optimiser."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )


def fit(
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
    on_step: Callable[[int, int, float], None] | None = None,
) -> FitReport:
    """Train in place for one round.

    Args:
        network: The network with the round's global weights.
        batches: `steps` batches of image `[B, 1, x, y, z]` and labels `[B, x, y, z]`.
        loss_function: `(logits, labels, annotated) -> scalar`.
        config: Optimiser, schedule, clipping and number format.
        steps: Optimiser steps of this round, for the schedule.
        round_number: This round, from 1.
        rounds: Rounds of the whole run.
        annotated: Regions the site annotates.
        proximal_mu: FedProx: adds mu/2 of the squared distance to the weights the round began with
            (Li et al., MLSys 2020).
        device: Where to compute.
        optimizer: A restored optimiser; a new one by default.
        on_step: Called after each step with `(step, steps, loss)`.

    Raises:
        ModelError: Never; a loss that isn't finite is for the caller to judge by the report.
    """
    device = device or torch.device("cpu")
    dtype = choose_dtype(config.precision, device)
    network.to(device).train()
    optimizer = optimizer or make_optimizer(network, config)
    parameters = [p for p in network.parameters() if p.requires_grad]
    start_point = [p.detach().clone() for p in parameters] if proximal_mu else []
    began, total, patches, step = time.monotonic(), 0.0, 0, 0
    for step, (image, labels) in enumerate(batches, 1):
        progress = (round_number - 1 + (step - 1) / steps) / rounds
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, progress)
        image, labels = image.to(device), labels.to(device)
        if image.dtype == torch.float32:
            image = image.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = network(image)
        loss = loss_function(logits, labels, annotated)
        if proximal_mu:
            apart = sum(((p - q) ** 2).sum() for p, q in zip(parameters, start_point, strict=True))
            loss = loss + 0.5 * proximal_mu * apart
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        value = loss.item()
        total, patches = total + value, patches + image.shape[0]
        if on_step:
            on_step(step, steps, value)
    return FitReport(
        steps=step,
        patches=patches,
        loss=total / max(step, 1),
        seconds=time.monotonic() - began,
    )


def steps_in_round(config: TrainConfig, cases: int, batch_size: int) -> int:
    """Optimiser steps a site with this many cases does in a round."""
    epoch = config.steps_per_epoch or math.ceil(cases * config.patches_per_case / batch_size)
    return epoch * config.local_epochs


def log_progress(site: str, round_number: int) -> Callable[[int, int, float], None]:
    """Make an `on_step` that logs about ten lines a round."""

    def on_step(step: int, steps: int, loss: float) -> None:
        if step == steps or step % max(1, steps // 10) == 0:
            log.info(
                "%s · round %d · step %d/%d · loss %.3f", site, round_number, step, steps, loss
            )

    return on_step
