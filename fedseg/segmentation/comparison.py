"""What federating brings: each site alone, all data in one place, and the federated model."""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.cache import CachedCase
from fedseg.data.patches import planned_batches
from fedseg.data.plan import REGIONS, Plan
from fedseg.errors import DataError
from fedseg.registry import resolve
from fedseg.segmentation.evaluation import score_cases
from fedseg.segmentation.intervals import intervals, paired_differences
from fedseg.segmentation.losses import LOSSES
from fedseg.segmentation.metrics import add, summarise
from fedseg.segmentation.models import build_model
from fedseg.segmentation.start import start_from
from fedseg.segmentation.training import fit, log_progress

__all__ = ["FEDERATED", "LOCAL", "POOLED", "Share", "compare", "spread", "train_together"]

log = logging.getLogger(__name__)

FEDERATED, POOLED, LOCAL = "federated", "pooled", "local: "
"""Names of the models; `local: ` comes before a site's name."""

Summary = dict[str, float | int | None]
_Batch = tuple[torch.Tensor, torch.Tensor]
_Sums = dict[str, dict[str, list[dict[str, float]]]]


@dataclass(frozen=True, kw_only=True)
class Share:
    """The cases of one site.

    Attributes:
        name: The site.
        training: Cases to train on.
        validation: Cases to score on.
        annotated: Regions the site annotates.
    """

    name: str
    training: Sequence[CachedCase]
    validation: Sequence[CachedCase]
    annotated: tuple[str, ...] = ("liver", "tumor")


def compare(
    federated: nn.Module,
    shares: Sequence[Share],
    plan: Plan,
    study: StudyConfig,
    *,
    steps: int,
    device: torch.device,
) -> dict[str, Any]:
    """Train each site alone and all together for as many steps, score all models everywhere.

    All models start from the same weights, train with the same settings, and are scored on the
    held-out cases of all sites; none is chosen by them. Only possible where one machine sees the
    data of all sites: in a simulation.

    Args:
        federated: The federated model.
        shares: The sites' cases.
        plan: The plan.
        study: The study config; `model.*` and `train.*` apply.
        steps: Optimiser steps of each model.
        device: Where networks run.

    Returns:
        What `comparison.json` holds: `steps`; `cases`; `rows`, the model (`local: aachen`,
        `pooled`, `federated`) to its summary over all held-out cases; `intervals` of the rows;
        `differences` of the federated model to each other one on the same cases; `matrix`, the site
        of a model to the site of the cases to a summary; `per_site`, the same of the other models;
        `spread` of each model (see there).

    Raises:
        DataError: No site holds out any case.
    """
    if not any(share.validation for share in shares):
        raise DataError("compare: no held-out cases; set train.validation-fraction over 0")
    score = functools.partial(_score, shares=shares, plan=plan, study=study, device=device)
    train = functools.partial(train_together, plan=plan, study=study, steps=steps, device=device)
    sums: _Sums = {}
    for share in shares:
        sums[LOCAL + share.name] = score(train([share], name=share.name))
    sums[POOLED] = score(train(shares, name=POOLED))
    sums[FEDERATED] = score(federated)
    return {"steps": steps, **_told(sums, seed=study.train.seed)}


def train_together(
    shares: Sequence[Share],
    plan: Plan,
    study: StudyConfig,
    *,
    steps: int,
    device: torch.device,
    name: str,
) -> nn.Module:
    """Train a new network on the cases of one site or several, in one place.

    The learning rate follows the study's schedule over all steps. A batch holds cases of sites that
    annotate the same regions, as often as these sites have cases.

    Args:
        shares: The sites.
        plan: The plan.
        study: The study config.
        steps: Optimiser steps.
        device: Where the network runs.
        name: In the log, and part of the seed.
    """
    network = build_model(plan, seed=study.train.seed)
    if study.model.init_from:
        start_from(network, study.model.init_from, allow_partial=study.model.init_partial)
    network.to(device)
    loss = resolve("train.loss", study.train.loss, LOSSES)
    annotated: list[tuple[str, ...]] = []  # of the batch that is out
    fit(
        network,
        _drawn(shares, plan, study, steps, device, name, annotated),
        lambda logits, labels, _: loss(logits, labels, annotated[-1]),
        study.train.model_copy(update={"minutes": None}),  # steps end it
        steps=steps,
        round_number=1,
        rounds=1,
        device=device,
        on_step=log_progress(name),
    )
    return network


def _drawn(
    shares: Sequence[Share],
    plan: Plan,
    study: StudyConfig,
    steps: int,
    device: torch.device,
    name: str,
    annotated: list[tuple[str, ...]],
) -> Iterator[_Batch]:
    """Yield batches; note in `annotated` what the cases of each are annotated with."""
    groups: dict[tuple[str, ...], list[CachedCase]] = {}
    for share in shares:
        groups.setdefault(share.annotated, []).extend(share.training)
    rng = np.random.default_rng([study.train.seed, 0, *name.encode()])
    sources = [
        planned_batches(cases, plan, study.train, steps=steps, device=device, rng=own)
        for cases, own in zip(groups.values(), rng.spawn(len(groups)), strict=True)
    ]
    counts = np.array([len(cases) for cases in groups.values()], float)
    for _ in range(steps):
        chosen = int(rng.choice(len(groups), p=counts / counts.sum()))
        annotated[:] = [list(groups)[chosen]]
        yield next(sources[chosen])


def _score(
    network: nn.Module,
    *,
    shares: Sequence[Share],
    plan: Plan,
    study: StudyConfig,
    device: torch.device,
) -> dict[str, list[dict[str, float]]]:
    return {
        share.name: score_cases(
            network,
            share.validation,
            plan,
            device=device,
            precision=study.train.precision,
            annotated=share.annotated,
            distances=True,
        )
        for share in shares
        if share.validation
    }


def _told(sums: _Sums, *, seed: int) -> dict[str, Any]:
    whole = {
        model: {
            f"{site}/{n}": part for site, parts in found.items() for n, part in enumerate(parts)
        }
        for model, found in sums.items()
    }
    per_site = {
        model: {site: summarise(add(parts)) for site, parts in found.items()}
        for model, found in sums.items()
    }
    ends = {model: intervals(list(parts.values()), seed=seed) for model, parts in whole.items()}
    differences = {
        model: paired_differences(whole[FEDERATED], parts, seed=seed)
        for model, parts in whole.items()
        if model != FEDERATED
    }
    return {
        "cases": len(whole[FEDERATED]),
        "rows": {model: summarise(add(parts.values())) for model, parts in whole.items()},
        "intervals": {
            model: {key: list(pair) for key, pair in found.items()} for model, found in ends.items()
        },
        "differences": {
            model: {key: entry.to_json() for key, entry in found.items()}
            for model, found in differences.items()
        },
        "matrix": {
            model.removeprefix(LOCAL): found
            for model, found in per_site.items()
            if model.startswith(LOCAL)
        },
        "per_site": {
            model: found for model, found in per_site.items() if not model.startswith(LOCAL)
        },
        "spread": {model: spread(found) for model, found in per_site.items()},
    }


def spread(per_site: Mapping[str, Summary]) -> dict[str, dict[str, Any]]:
    """How far sites lie apart, by their mean Dice: the worst, its Dice, and how far the best is.

    Returns:
        Region to `worst`, `dice`, `spread`; regions that no site defines are left out.
    """
    found = {}
    for region in REGIONS:
        dice = {
            site: value
            for site, summary in per_site.items()
            if (value := summary[f"{region}.dice"]) is not None
        }
        if dice:
            worst = min(dice, key=dice.__getitem__)
            apart = max(dice.values()) - dice[worst]
            found[region] = {"worst": worst, "dice": dice[worst], "spread": apart}
    return found
