"""Train a network on a site's cases for one round."""

import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedseg.errors import ConfigError
from fedseg.sections import TrainConfig
from fedseg.segmentation.layers import memory_format, place
from fedseg.segmentation.schedule import RoundClock

__all__ = [
    "FitReport",
    "Gradient",
    "LossOf",
    "OnStep",
    "choose_device",
    "choose_dtype",
    "fit",
    "log_progress",
    "make_optimizer",
    "set_threads",
    "steps_in_round",
]

log = logging.getLogger(__name__)

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor, Sequence[str]], torch.Tensor]
OnStep = Callable[[int, int, torch.Tensor], None]
LossOf = Callable[[Batch], torch.Tensor]
Gradient = Callable[[Any, LossOf], tuple[torch.Tensor, int]]
"""`(batch, loss of a batch) -> (loss, patches)`; leaves in `.grad` what the optimiser follows."""


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
    """Number format of the forward pass: the fastest right one that the hardware computes in.

    `auto` is bf16 on CPUs and GPUs that have it, fp16 with a loss scaler on older CUDA GPUs (they
    only emulate bf16), else fp32. MPS stays with fp32. fp16 is taken for auto on CPUs that only
    emulate it, 60 times slower.
    """
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if device.type == "mps":
        return torch.float32
    if precision == "fp16" and device.type == "cpu" and not _cpu_has("avx512_fp16"):
        precision = "auto"
    if precision in named:
        return named[precision]
    if device.type == "cuda":
        in_hardware = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if in_hardware else torch.float16
    return torch.bfloat16 if _cpu_has("avx512_bf16", "amx_bf16") else torch.float32


@functools.cache
def _cpu_has(*formats: str) -> bool:
    # An emulated format is many times slower than fp32: only what the processor says counts.
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return any(name in flags for name in formats)


def set_threads(threads: int | None) -> None:
    """Give torch this process's share of the processor."""
    own = getattr(os, "sched_getaffinity", None)  # not on macOS
    share = threads or (len(own(0)) if own else os.cpu_count() or 1)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if threads is None and limit.isdigit():  # Ray sets it to the CPUs it gave this process
        share = max(1, min(share, int(limit)))
    torch.set_num_threads(share)


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the local optimiser of a network that is on its device already."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
            fused=True,
        )
    return torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )


def fit(
    network: nn.Module,
    batches: Iterable[Any],
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
    gradient: Gradient | None = None,
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
        on_step: Called after each step with `(step, steps, loss)`; the loss is a scalar tensor on
            the device, and `float(loss)` waits for it.
        gradient: Makes the gradient of a step in a way of its own (see `privacy.record_dp`), of
            batches in a form of its own; `max_grad_norm` doesn't apply then, and fp16 is fp32.

    Raises:
        ModelError: Never; a loss that isn't finite is for the caller to judge by the report.
    """
    device = device or torch.device("cpu")
    dtype = choose_dtype(config.precision, device)
    if gradient and dtype == torch.float16:  # a loss scaler would judge a step by its data
        dtype = torch.float32
    place(network, device).train()
    optimizer = optimizer or make_optimizer(network, config)
    # Does nothing but for fp16, whose range small gradients fall out of.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parameters = [p for p in network.parameters() if p.requires_grad]
    start_point = [p.detach().clone() for p in parameters] if proximal_mu else []

    loss_of = _loss_of(network, loss_function, annotated, device, dtype)

    def descend(batch: Any) -> tuple[torch.Tensor, int]:
        if gradient:
            loss, seen = gradient(batch, loss_of)
            _pull_back(parameters, start_point, proximal_mu)
            optimizer.step()
            return loss, seen
        loss = loss_of(batch)
        if proximal_mu:
            apart = sum(((p - q) ** 2).sum() for p, q in zip(parameters, start_point, strict=True))
            loss = loss + 0.5 * proximal_mu * apart
        _descend(loss, optimizer, scaler, parameters, config.max_grad_norm)
        return loss.detach(), batch[0].shape[0]

    began, patches, step = time.monotonic(), 0, 0
    clock = RoundClock(config, steps=steps, number=round_number, rounds=rounds)
    # It stays on the device: reading it each step would make a GPU wait for Python.
    total = torch.zeros((), device=device)
    for step, batch in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(step - 1)
        loss, seen = descend(batch)
        total, patches = total + loss, patches + seen
        if on_step:
            on_step(step, steps, loss)
    return FitReport(
        steps=step,
        patches=patches,
        loss=float(total) / max(step, 1),
        seconds=time.monotonic() - began,
    )


def _loss_of(
    network: nn.Module,
    loss_function: Loss,
    annotated: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
) -> LossOf:
    """Make the function from a batch to its loss."""
    layout = memory_format(device)

    def loss_of(batch: Batch) -> torch.Tensor:
        image, labels = batch[0].to(device), batch[1].to(device)
        if image.dtype == torch.float32:
            image = image.contiguous(memory_format=layout)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = network(image)
        return loss_function(logits, labels, annotated)

    return loss_of


def _pull_back(
    parameters: Sequence[nn.Parameter], start_point: Sequence[torch.Tensor], mu: float
) -> None:
    """Add the gradient of FedProx's term to gradients that are there."""
    for p, q in zip(parameters, start_point, strict=bool(start_point)):
        assert p.grad is not None
        p.grad.add_(p.detach() - q, alpha=mu)


def _descend(
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Sequence[nn.Parameter],
    max_norm: float,
) -> None:
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    if max_norm:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, max_norm)
    scaler.step(optimizer)
    scaler.update()


def steps_in_round(config: TrainConfig, cases: int, batch_size: int) -> int:
    """Optimiser steps a site with this many cases does in a round."""
    epoch = config.steps_per_epoch or math.ceil(cases * config.patches_per_case / batch_size)
    return epoch * config.local_epochs


def log_progress(
    site: str, round_number: int | None = None, *, minutes: float | None = None
) -> OnStep:
    """Make an `on_step` that logs about ten lines a round.

    Args:
        site: Whose it is.
        round_number: None: there are no rounds.
        minutes: The round's time, where it isn't steps that end it.
    """
    what = site if round_number is None else f"{site} · round {round_number}"
    began, tenths = time.monotonic(), 0

    def on_step(step: int, steps: int, loss: torch.Tensor) -> None:
        nonlocal tenths
        if minutes:
            passed = int((time.monotonic() - began) / (6 * minutes))
            if passed > tenths:
                tenths = passed
                log.info("%s · step %d of %g min · loss %.3f", what, step, minutes, float(loss))
        elif step == steps or step % max(1, steps // 10) == 0:
            log.info("%s · step %d/%d · loss %.3f", what, step, steps, float(loss))

    return on_step
