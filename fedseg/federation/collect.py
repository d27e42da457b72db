"""Collect a round's updates: each is decoded under bounds, checked alone and spooled as it came."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from fedseg.arrays import arrays_to_state
from fedseg.errors import Reason
from fedseg.federation.compression import Scheme, check_parts, finite_and_norm
from fedseg.federation.exchange import Arrival, exchange, free_arrays, read_arrival
from fedseg.federation.flat import Layout
from fedseg.federation.spool import no_room, open_update, spool
from fedseg.messages import TRAIN_METRICS, Answer
from fedseg.segmentation.metrics import MOST_SUM

__all__ = [
    "FORGET_AFTER",
    "Collected",
    "Inbox",
    "Update",
    "collect",
    "plausible_training",
    "pull_late",
    "read_update",
    "site_line",
    "spooled_before",
]

FORGET_AFTER = 2
"""Rounds after which a site that hasn't answered is asked again."""

_LEAST = {"cases": 1.0, "steps": 1.0, "loss": -MOST_SUM, "first_loss": -MOST_SUM}
"""Bounds of what a site may say of its training; 0 where none is named."""


@dataclass(frozen=True, kw_only=True)
class Inbox:
    """What the server needs to read updates.

    Attributes:
        layout: Layout of the shared parameters.
        scheme: How updates are compressed.
        folder: Where the round's updates are spooled.
    """

    layout: Layout
    scheme: Scheme
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Update:
    """A good update on disk.

    Attributes:
        path: Its file in the spool.
        metrics: What the site says about its training.
        age: Rounds since the weights it builds on; 0 unless it was carried over.
    """

    path: Path
    metrics: Mapping[str, float]
    age: int = 0


@dataclass(kw_only=True)
class Collected:
    """What came of a round.

    Attributes:
        lines: Each site's entry in `history.jsonl`.
        updates: Good updates by site.
        open: Message id of each site that hasn't answered.
    """

    lines: dict[str, dict[str, Any]] = field(default_factory=dict)
    updates: dict[str, Update] = field(default_factory=dict)
    open: dict[str, str] = field(default_factory=dict)


def collect(
    grid: Grid, messages: Mapping[str, Message], inbox: Inbox, *, deadline: float
) -> Collected:
    """Send the round's messages and take what comes until the deadline (seconds)."""
    found = Collected()
    for arrival in exchange(grid, messages, deadline=deadline):
        line, update = _take(arrival, arrival.site, inbox)
        found.lines[arrival.site] = line
        if update is not None:
            found.updates[arrival.site] = update
        if arrival.message is None and arrival.message_id:
            found.open[arrival.site] = arrival.message_id
    return found


def pull_late(
    grid: Grid, site: str, message_id: str, inbox: Inbox, *, age: int
) -> tuple[dict[str, Any], Update | None] | None:
    """Take the reply to a message of an earlier round, None while there is none."""
    for reply in grid.pull_messages([message_id]):
        arrival = Arrival(site=site, message=reply, seconds=0.0)
        line, update = _take(arrival, f"{site}@{age}", inbox)
        free_arrays(reply)
        late = update and Update(path=update.path, metrics=update.metrics, age=age)
        return line, late
    return None


def spooled_before(folder: Path, *, size: int) -> Collected:
    """Find what a server that was killed while it collected had already spooled.

    What a power failure left damaged is passed over: that site is asked again.
    """
    found = Collected()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            open_update(path, size=size)
            note = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if "@" not in path.stem:
            found.lines[path.stem] = note
            found.updates[path.stem] = Update(path=path, metrics=note["training"])
    return found


def site_line(answer: Answer, *, seconds: float = 0.0) -> dict[str, Any]:
    """Make a site's entry in a line of the history."""
    return {
        "status": answer.status,
        "reason": answer.reason.value if answer.reason else None,
        **({"detail": answer.detail} if answer.detail else {}),
        "weight": 0.0,
        "seconds": round(seconds, 3),
        "bytes_up": answer.bytes_up,
        "received": answer.receipt.entry() if answer.receipt else {},
        "training": dict(answer.metrics),
        "metrics": {},
    }


def _take(arrival: Arrival, name: str, inbox: Inbox) -> tuple[dict[str, Any], Update | None]:
    """Judge one reply alone; spool its update if it is good."""
    answer, parts = _read(arrival, inbox)
    line = site_line(answer, seconds=arrival.seconds)
    if parts is None:
        return line, None
    # The note goes first: an update counts as spooled once its own file has its name.
    try:
        inbox.folder.mkdir(parents=True, exist_ok=True)
        (inbox.folder / f"{name}.json").write_text(json.dumps(line), encoding="utf-8")
    except OSError as error:
        raise no_room(inbox.folder, error) from None
    path = spool(inbox.folder, name, parts, scheme=inbox.scheme)
    return line, Update(path=path, metrics=answer.metrics)


def _read(arrival: Arrival, inbox: Inbox) -> tuple[Answer, dict[str, torch.Tensor] | None]:
    answer = read_arrival(arrival, declared=TRAIN_METRICS)
    if answer.status != "ok":
        return answer, None
    if answer.update is None or not plausible_training(answer.metrics):
        return replace(answer, status="failed", reason=Reason.BAD_UPDATE, metrics={}), None
    parts = read_update(answer.update, inbox)
    if isinstance(parts, Reason):
        return replace(answer, status="failed", reason=parts, metrics={}), None
    return answer, parts


def plausible_training(metrics: Mapping[str, float]) -> bool:
    """Tell whether these can be numbers of a training: weights and losses are made of them."""
    if set(metrics) != set(TRAIN_METRICS):
        return False
    return all(_LEAST.get(name, 0.0) <= value <= MOST_SUM for name, value in metrics.items())


def read_update(record: ArrayRecord, inbox: Inbox) -> dict[str, torch.Tensor] | Reason:
    """Decode an update under bounds and check it alone: names, shapes, types, finite."""
    size = inbox.layout.size
    try:
        expected = inbox.scheme.sizes(size)
        like = {
            name: torch.empty(length, dtype=dtype, device="meta")
            for name, (dtype, length) in expected.items()
        }
        parts = arrays_to_state(record, like)
        check_parts(parts, inbox.scheme, size=size)
    except (ValueError, TypeError, KeyError, EOFError):
        return Reason.BAD_UPDATE
    finite, _ = finite_and_norm(parts, inbox.scheme, size=size)
    return parts if finite else Reason.NOT_FINITE
