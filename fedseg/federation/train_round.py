"""The training half of a round: choose sites, collect updates, guard, weigh, reduce, move."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Message, RecordDict

from fedseg.arrays import array_bytes
from fedseg.errors import StudyError
from fedseg.federation.central_dp import clipped, noised_mean
from fedseg.federation.collect import (
    FORGET_AFTER,
    Inbox,
    Update,
    collect,
    pull_late,
    site_line,
    spooled_before,
)
from fedseg.federation.compression import scheme_of
from fedseg.federation.drawing import drawn_sites, planned_sites
from fedseg.federation.federation import Federation, messages_to
from fedseg.federation.flat import Layout, layout_of, unflatten
from fedseg.federation.guard import site_of
from fedseg.federation.guard_round import guard_updates
from fedseg.federation.history import new_line, why
from fedseg.federation.secure_round import secure_change, take_late
from fedseg.federation.site_privacy import clips_updates
from fedseg.federation.spending import spend, spent
from fedseg.federation.spool import SpooledUpdate, check_room, open_update
from fedseg.federation.strategies import least_sites, next_state, train_config
from fedseg.federation.weighting import WEIGHTINGS
from fedseg.messages import ARRAYS, LATE
from fedseg.registry import resolve

__all__ = ["train_round"]

log = logging.getLogger(__name__)


def train_round(federation: Federation, number: int) -> dict[str, Any]:
    """Train one round and move the global model; return entries of the history's line.

    Raises:
        StudyError: Too few good updates came, or the disk has no room for them.
    """
    state = federation.split()
    before = {name: tensor.clone() for name, tensor in state.shared.items()}
    layout = layout_of(before)
    entries: dict[str, Any] = {"sites": {}, "late": []}
    change: torch.Tensor | None
    if federation.study.privacy.secure_aggregation:
        take_late(federation, number, entries)
        _spend_at_sites(federation)
        sites = drawn_sites(federation, number)
        change = secure_change(federation, number, before, sites, entries)
        came = int(entries.get("secagg", {}).get("summed", 0))
        _warn(entries["sites"], number)
    else:
        change, came = _averaged(federation, number, before, layout, entries)
    entries["bytes_up"] = sum(site["bytes_up"] for site in entries["sites"].values())
    if change is not None and federation.study.privacy.mode == "central-dp":
        spend(federation)
        planned = planned_sites(federation)
        change = noised_mean(change, federation.study, came=came, planned=planned)
    entries["privacy"] = spent(federation)
    if change is None:
        return entries
    # Flower wants a message to reply to; its content doesn't matter.
    to = Message(RecordDict(), dst_node_id=federation.sites[0].node_id, message_type="train")
    moved = next_state(federation.strategy, number, before, unflatten(change, layout), to)
    federation.network.load_state_dict({**moved, **state.local, **state.fixed})
    return entries


def _averaged(
    federation: Federation,
    number: int,
    before: Mapping[str, torch.Tensor],
    layout: Layout,
    entries: dict[str, Any],
) -> tuple[torch.Tensor, int]:
    """Collect, guard, weigh and reduce the round's updates to one change, float32 `[N]`.

    Returns:
        The change, and the number of updates in it.
    """
    inbox = Inbox(
        layout=layout,
        scheme=scheme_of(federation.study.federation),
        folder=federation.folder.path / "checkpoint" / "spool" / str(number),
    )
    updates = _collected(federation, number, before, inbox, entries)
    opened = {
        name: open_update(update.path, size=layout.size) for name, update in sorted(updates.items())
    }
    if clips_updates(federation.study) and federation.study.privacy.mode != "local-dp":
        assert federation.study.privacy.clip is not None
        opened = clipped(opened, federation.study.privacy.clip)
    guard_updates(federation, before, opened, updates, entries)
    _warn(entries["sites"], number)
    _check_enough(federation, number, opened, updates, entries)
    weights = _weights(federation, {name: updates[name] for name in opened}, entries["sites"])
    metrics = [updates[name].metrics for name in opened]
    change = federation.reduce(list(opened.values()), list(weights.values()), metrics)
    return change, len(opened)


def _spend_at_sites(federation: Federation) -> None:
    """Count what the sites are about to send, where they add the noise themselves."""
    if federation.study.privacy.mode != "central-dp":
        spend(federation)


def _collected(
    federation: Federation,
    number: int,
    before: Mapping[str, torch.Tensor],
    inbox: Inbox,
    entries: dict[str, Any],
) -> dict[str, Update]:
    """Updates of this round by site; late ones of earlier rounds by `site@age`."""
    study, progress = federation.study.federation, federation.progress
    updates = _late_updates(federation, number, inbox, entries)
    known = spooled_before(inbox.folder, size=inbox.layout.size)
    sites = drawn_sites(federation, number)
    nodes = [site.node_id for site in sites]
    config = train_config(federation.strategy, number, before, federation.task(number), nodes)
    content = federation.content(config)
    asked = [site for site in sites if site.name not in known.updates]
    room = inbox.scheme.bytes(inbox.layout.size) * len(asked)
    check_room(inbox.folder, needed=room)
    if asked:
        _spend_at_sites(federation)
    found = collect(
        federation.grid,
        messages_to(asked, content, "train"),
        inbox,
        deadline=study.round_deadline,
    )
    progress.late.update({name: (number, found.open[name]) for name in sorted(found.open)})
    wanted = {site.name for site in sites}
    for part in (known, found):
        entries["sites"].update({k: v for k, v in part.lines.items() if k in wanted})
        updates.update({k: v for k, v in part.updates.items() if k in wanted})
    if least_sites(federation.study) > 1:
        _one_each(updates, entries)
    entries["bytes_down"] = array_bytes(content.array_records[ARRAYS]) * len(asked)
    return updates


def _one_each(updates: dict[str, Update], entries: dict[str, Any]) -> None:
    """Drop late updates of sites that sent a newer one: robust reducers go by one vote a site."""
    for name in [name for name in updates if name != site_of(name) and site_of(name) in updates]:
        updates.pop(name).path.unlink()
        for record in entries["late"]:
            if record["site"] == site_of(name):
                record["used"] = False


def _late_updates(
    federation: Federation, number: int, inbox: Inbox, entries: dict[str, Any]
) -> dict[str, Update]:
    """Take what came after its round's deadline: recorded by name, and averaged where asked."""
    late, updates = federation.progress.late, {}
    carry = federation.study.federation.late == "carry"
    for name, (asked, message_id) in sorted(late.items()):
        age = number - asked
        found = pull_late(federation.grid, name, message_id, inbox, age=age)
        if found is None and age <= FORGET_AFTER:
            entries["sites"][name] = site_line(LATE)
            continue
        del late[name]
        if found is None:
            continue
        line, update = found
        used = carry and update is not None
        record = {
            **{"site": name, "round": asked, "status": line["status"], "used": used},
            "received": line["received"],
        }
        entries["late"].append(record)
        log.info("round %d: update of %s from round %d came late", number, name, asked)
        if update is not None and used:
            updates[f"{name}@{age}"] = update
        elif update is not None:
            update.path.unlink()
    return updates


def _check_enough(
    federation: Federation,
    number: int,
    opened: Mapping[str, SpooledUpdate],
    updates: Mapping[str, Update],
    entries: dict[str, Any],
) -> None:
    needed = least_sites(federation.study)
    wanted = max(federation.study.federation.min_sites, needed)
    came = {site_of(name) for name in opened}  # a site's late update is no second site
    if len(came) >= wanted:
        return
    for name in updates.keys() - opened.keys():  # a resume is to ask these sites again
        updates[name].path.unlink(missing_ok=True)
    why_so_many = "federation.strategy" if wanted == needed else "federation.min-sites"
    line = new_line(number, entries)
    federation.folder.append_history(line)
    reasons = "; ".join(f"{name}: {why(site)}" for name, site in line["sites"].items())
    raise StudyError(
        f"round {number}: got {len(came)} good updates; expected at least {wanted} "
        f"({why_so_many}); {reasons}"
    )


def _weights(
    federation: Federation, updates: Mapping[str, Update], lines: dict[str, dict[str, Any]]
) -> dict[str, float]:
    """Weigh each update; one that is carried over counts less by its age.

    The discount is polynomial in the rounds passed (Xie et al., Asynchronous Federated
    Optimization, 2019, with exponent 1/2).
    """
    name = federation.study.federation.weighting
    weigh = resolve("federation.weighting", name, WEIGHTINGS)
    weights = {}
    for site, update in updates.items():
        weight = float(weigh(update.metrics)) / math.sqrt(1 + update.age)
        if not 0 <= weight < math.inf:
            raise StudyError(
                f"federation.weighting: '{name}' gave {site} {weight}; expected at least 0"
            )
        weights[site] = weight
        if site in lines:
            lines[site]["weight"] = weight
    if not sum(weights.values()) > 0:
        raise StudyError(
            f"federation.weighting: '{name}' gave every site weight 0; expected one above 0"
        )
    return weights


def _warn(sites: Mapping[str, Mapping[str, Any]], number: int) -> None:
    for name, site in sorted(sites.items()):
        if site["status"] != "ok":
            log.warning("round %d without %s: %s", number, name, why(site))
