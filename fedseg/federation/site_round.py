"""A site's half of a round: train, keep what stays here, pack what leaves."""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.patches import planned_batches
from fedseg.data.plan import REGIONS, Plan
from fedseg.data.prepared_cases import SiteCases
from fedseg.data.sites import Site
from fedseg.errors import Reason, SiteError
from fedseg.federation.compression import finite_and_norm, scheme_of
from fedseg.federation.feedback import encode_with_feedback
from fedseg.federation.flat import flatten, layout_of
from fedseg.federation.record_training import private_round, unchanged_buffers
from fedseg.messages import PERSONAL, Task
from fedseg.registry import resolve
from fedseg.segmentation.kept import load_kept, mark_finished, save_kept
from fedseg.segmentation.lightning_backend import BACKENDS
from fedseg.segmentation.losses import LOSSES
from fedseg.segmentation.metrics import add, summarise
from fedseg.segmentation.model_file import save_model
from fedseg.segmentation.models import build_model
from fedseg.segmentation.optimizer_state import load_optimizer, save_optimizer
from fedseg.segmentation.sharing import split_state
from fedseg.segmentation.training import (
    Batch,
    FitReport,
    OnStep,
    log_progress,
    make_optimizer,
    steps_in_round,
)

__all__ = ["kept_folder", "local_layers", "packed", "personal_sums", "sent_norm", "train_at_site"]

log = logging.getLogger(__name__)

State = Mapping[str, torch.Tensor]
Item = TypeVar("Item")

_ENDLESS = 10**6
"""Steps a time-budgeted round may have at most: its time ends it."""


def kept_folder(site: Site, study_run: str, round_number: int) -> Path:
    """Folder of what a site keeps after a round."""
    name = site.name or "site"
    return site.config.cache / "state" / study_run / name / f"round-{round_number}"


def local_layers(
    names: Collection[str], plan: Plan, study: StudyConfig, kept: Path
) -> dict[str, torch.Tensor]:
    """Layers that aren't shared: as the site kept them, else as every site began."""
    if not names:
        return {}
    found = load_kept(kept, "local")
    if found is not None and set(found) == set(names):
        return found
    first = build_model(plan, seed=study.train.seed).state_dict()
    return {name: first[name] for name in names}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a site's training came to.

    Attributes:
        report: Steps, patches, mean loss, seconds.
        first_loss: Loss of the first step: that of the weights as they came, but for one batch.
    """

    report: FitReport
    first_loss: float


def train_at_site(
    network: nn.Module,
    cases: SiteCases,
    plan: Plan,
    task: Task,
    site: Site,
    study: StudyConfig,
    device: torch.device,
) -> Trained:
    """Train in place, from what the site kept of the round before; keep it for the next.

    Raises:
        SiteError: The weights aren't finite afterwards; nothing of the round is kept.
    """
    before = kept_folder(site, task.study_run, task.round_number - 1)
    after = kept_folder(site, task.study_run, task.round_number)
    _say_begins_anew(before, task, study)
    optimizer = make_optimizer(network, study.train)
    if study.train.optimizer_state == "keep":
        load_optimizer(optimizer, before)
    private = None
    drawn: Iterator[Any]
    if study.privacy.mode == "record-dp":
        private = private_round(network, cases.training, plan, study, device)
        steps, drawn, how = private.steps, private.batches, {"gradient": private.gradient}
    else:
        steps, drawn, how = *_steps(cases, plan, task, site, study, device), {}
    first: list[torch.Tensor] = []
    say = log_progress(site.name or "a site", task.round_number, minutes=study.train.minutes)
    with unchanged_buffers(network) if private else nullcontext():
        report = BACKENDS[study.train.backend](
            network,
            drawn,
            resolve("train.loss", study.train.loss, LOSSES),
            study.train,
            steps=steps,
            round_number=task.round_number,
            rounds=task.rounds,
            annotated=site.config.labels,
            proximal_mu=task.proximal_mu,
            device=device,
            optimizer=optimizer,
            on_step=_noting(first, say),
            **how,
        )
    if private:
        report = replace(report, patches=private.patches)
    state = network.state_dict()
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise SiteError(Reason.NOT_FINITE)
    if study.train.optimizer_state == "keep":
        save_optimizer(optimizer, after)
    if study.federation.personal:
        save_kept(after, "trained", {k: v for k, v in state.items() if v.is_floating_point()})
    local = split_state(network, study.federation.shared).local
    if local:
        save_kept(after, "local", local)
    if after.exists():
        mark_finished(after, finished=task.round_number >= task.rounds)
    return Trained(report=report, first_loss=float(first[0]) if first else 0.0)


def _say_begins_anew(before: Path, task: Task, study: StudyConfig) -> None:
    """Say that moments, local layers and what compression lost aren't those of the round before."""
    keeps = study.train.optimizer_state == "keep" or study.federation.shared != "all"
    if keeps and task.round_number > 1 and not before.parent.exists():
        log.warning(
            "round %d: nothing is kept here of this run's earlier rounds, so this site's own state "
            "begins anew; expected where it takes part for the first time",
            task.round_number,
        )


def _steps(
    cases: SiteCases,
    plan: Plan,
    task: Task,
    site: Site,
    study: StudyConfig,
    device: torch.device,
) -> tuple[int, Iterator[Batch]]:
    """Steps of the round and their batches."""
    minutes = study.train.minutes
    steps = (
        _ENDLESS if minutes else steps_in_round(study.train, len(cases.training), plan.batch_size)
    )
    # Randomness comes from (seed, site, round), never from process state.
    seed = [study.train.seed, task.round_number, *site.name.encode()]
    drawn = planned_batches(
        cases.training,
        plan,
        study.train,
        steps=steps,
        device=device,
        rng=np.random.default_rng(seed),
    )
    return steps, _until(drawn, minutes) if minutes else drawn


def _until(items: Iterable[Item], minutes: float) -> Iterator[Item]:
    """Pass on items until the time is up, at least one."""
    end = time.monotonic() + 60 * minutes
    for item in items:
        yield item
        if time.monotonic() >= end:
            return


def _noting(first: list[torch.Tensor], on_step: OnStep) -> OnStep:
    def noted(step: int, steps: int, loss: torch.Tensor) -> None:
        if not first:
            first.append(loss)
        on_step(step, steps, loss)

    return noted


def packed(update: State, study: StudyConfig, site: Site, task: Task) -> dict[str, torch.Tensor]:
    """Pack the change of the shared parameters as it leaves the site.

    Compressed updates carry what the last one lost: the residual is kept at the site.
    """
    scheme = scheme_of(study.federation)
    vector = flatten(update, layout_of(update))
    if scheme.name == "none":
        return scheme.encode(vector)
    return encode_with_feedback(
        vector,
        scheme,
        before=kept_folder(site, task.study_run, task.round_number - 1),
        after=kept_folder(site, task.study_run, task.round_number),
    )


def sent_norm(parts: State, update: State, study: StudyConfig) -> float:
    """L2 norm of an update as the receiver decodes it."""
    scheme = scheme_of(study.federation)
    return finite_and_norm(parts, scheme, size=layout_of(update).size)[1]


def personal_sums(
    network: nn.Module,
    plan: Plan,
    site: Site,
    task: Task,
    global_sums: Mapping[str, float],
    score: Callable[[], dict[str, float]],
) -> dict[str, float]:
    """Compare what the site trained last with the global model; keep the better as personal.

    Args:
        network: The network; holds the site's own weights afterwards.
        plan: The plan.
        site: The site.
        task: The task.
        global_sums: Sums of the global model on the site's held-out cases.
        score: Scores `network` on the same cases.

    Returns:
        Sums of the site's own model and whether it was kept, under `personal.` keys.
    """
    own = load_kept(kept_folder(site, task.study_run, task.round_number), "trained")
    if own is None or not global_sums.get("cases"):
        return {}
    network.load_state_dict({**network.state_dict(), **own})
    sums = score()
    better = _mean_dice(sums) > _mean_dice(global_sums)
    path = site.config.cache / "personal" / f"{task.study_run}-{site.name or 'site'}.safetensors"
    if better:
        path.parent.mkdir(parents=True, exist_ok=True)
        notes = {"run": task.study_run, "round": str(task.round_number)}
        save_model(path, network.state_dict(), plan, **notes)
        log.info("personal model kept: %s", path)
    else:
        path.unlink(missing_ok=True)
    found = {PERSONAL + key: value for key, value in sums.items()}
    return {**found, PERSONAL + "kept": float(better)}


def _mean_dice(sums: Mapping[str, float]) -> float:
    summary = summarise(add([sums]))
    known = [summary.get(f"{region}.dice") for region in REGIONS]
    return sum(value for value in known if value is not None)
