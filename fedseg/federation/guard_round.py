"""The guard's part of a round: which of the updates that came stay out, and why."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch

from fedseg.errors import Reason, StudyError
from fedseg.federation.collect import Update
from fedseg.federation.federation import Federation
from fedseg.federation.flat import layout_of, unflatten
from fedseg.federation.gram import gram
from fedseg.federation.guard import Quarantine, decide, probe
from fedseg.federation.history import score
from fedseg.federation.reduce import averages_steps
from fedseg.federation.spool import SpooledUpdate

__all__ = ["guard_updates"]

_BAD = (Reason.BAD_UPDATE.value, Reason.NOT_FINITE.value)


def guard_updates(
    federation: Federation,
    before: Mapping[str, torch.Tensor],
    opened: dict[str, SpooledUpdate],
    updates: Mapping[str, Update],
    entries: dict[str, Any],
) -> None:
    """Leave out what the guard finds odd, and who is still on parole."""
    settings, progress = federation.study.federation, federation.progress
    lines = entries["sites"]
    if not settings.guard or not opened:
        return
    # What came and could not even be read is as bad as an odd update.
    found = {
        name: Reason(line["reason"])
        for name, line in lines.items()
        if line["reason"] in _BAD and line["bytes_up"]
    }
    if settings.guard_probe is not None:
        loss = functools.partial(_probe_loss, federation, before, opened)
        found |= probe(opened, loss, most=settings.guard_probe)
    products = gram(list(opened.values()))
    if averages_steps(federation.study):
        # Sites that take more steps move further: what is averaged is the mean step.
        steps = torch.tensor([updates[name].metrics["steps"] for name in opened]).double()
        products = products / torch.outer(steps, steps)
    decision = decide(
        products,
        list(opened),
        Quarantine.from_json(progress.quarantine),
        norm_factor=settings.guard_norm,
        opposition=settings.guard_opposition,
        parole=settings.parole,
        found=found,
    )
    progress.quarantine = decision.quarantine.to_json()
    for name, reason in decision.left_out.items():
        del opened[name]
        if name in lines:
            lines[name].update(status="quarantined", reason=reason.value)
        for record in entries["late"]:
            if name.startswith(f"{record['site']}@"):
                record.update(status="quarantined", used=False)
    for name, verdict in decision.verdicts.items():
        if name in lines:
            lines[name]["guard"] = {"norm": verdict.norm, "cosine": verdict.cosine}


def _probe_loss(
    federation: Federation,
    before: Mapping[str, torch.Tensor],
    opened: Mapping[str, SpooledUpdate],
    name: str | None,
) -> float:
    """1 - mean Dice on the server's cases of the global model, moved by one update if it is named.

    Raises:
        StudyError: The server has no cases.
    """
    network = copy.deepcopy(federation.network)
    if name is not None:
        update = opened[name]
        change = unflatten(update.chunk(0, update.size), layout_of(before))
        moved = {key: tensor + change[key] for key, tensor in before.items()}
        network.load_state_dict({**network.state_dict(), **moved})
    reached = score({"global": federation.evaluate(network).get("global", {})})
    if reached is None:
        raise StudyError(
            "federation.guard-probe: the server has no cases; set data.server-dir or leave it empty"
        )
    return 1 - reached[1]
