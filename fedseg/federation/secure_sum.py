"""One sum under secure aggregation at the server: keys, shares, masked words, unmasking.

The server adds masked words up as they come and holds nothing but their sum. Sites may drop out at
any stage; below the threshold it fails by `ProtocolError`.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Message, RecordDict

from fedseg.arrays import array_bytes, arrays_to_state
from fedseg.errors import ProtocolError, Reason, TooFewSites
from fedseg.federation.collect import site_line
from fedseg.federation.exchange import Arrival, exchange, read_arrival
from fedseg.federation.federation import Federation, Unread
from fedseg.federation.masked import WORDS
from fedseg.federation.secure_site import terms_of
from fedseg.federation.sites import KnownSite
from fedseg.messages import ARRAYS, CONFIG, Answer, protocol_record
from fedseg.privacy import secagg_server
from fedseg.privacy.graph import LEAST_SITES
from fedseg.privacy.roster import Party, check_enough, party_of
from fedseg.privacy.secagg_server import RunningSum
from fedseg.privacy.secagg_wire import Purpose

__all__ = ["Summing", "forget", "masked_sum"]

log = logging.getLogger(__name__)

Found = TypeVar("Found")


@dataclass(kw_only=True)
class Summing:
    """A sum as it goes on.

    Attributes:
        federation: The federation.
        number: The round.
        purpose: What is summed.
        sites: The sites by name; who isn't in the roster is left out.
        lines: Each site's entry in the history's line; filled as answers come.
        late: Message id of each site whose words didn't come in time.
        sharers: Indices of those that sent shares.
        open: Sites that may still hold secrets.
        seconds: Stage to how long it took.
        down: Bytes sent.
    """

    federation: Federation
    number: int
    purpose: Purpose
    sites: dict[str, KnownSite]
    lines: dict[str, Any] = field(default_factory=dict)
    late: dict[str, str] = field(default_factory=dict)
    sharers: set[int] = field(default_factory=set)
    open: dict[str, KnownSite] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    down: int = 0

    @property
    def names(self) -> list[str]:
        """Names by index."""
        return list(self.sites)


def masked_sum(
    going: Summing,
    size: int,
    prepare: Callable[[list[int]], RecordDict],
    meanwhile: Callable[[], object] = lambda: None,
) -> tuple[Party, RunningSum]:
    """Let sites compute, mask and send words; return their sum, unmasked.

    Args:
        going: The sum.
        size: Words a site sends.
        prepare: Makes what the sites compute from, for the nodes that are asked to.
        meanwhile: Called while they do.

    Raises:
        ProtocolError: Too few sites are left, or one sent what can't be.
    """
    federation, going.open = going.federation, dict(going.sites)
    terms = terms_of(federation.study, federation.folder.run_id, going.number, going.purpose)
    adverts = _ask(
        going,
        "keys",
        dict.fromkeys(going.sites, secagg_server.begin_message(terms)),
        lambda data, _: secagg_server.read_keys(data, terms),
    )
    going.sites = {name: site for name, site in going.sites.items() if name in adverts}
    party = party_of([adverts[name] for name in going.sites], terms)
    sealed = _shares(going, party)
    total = RunningSum(words=np.zeros(size, np.uint32))
    _uploads(going, party, sealed, total, prepare, meanwhile)
    least = federation.study.federation.min_sites
    if len(total.sites) < least:
        raise TooFewSites(
            f"{len(total.sites)} sums came; expected at least {least} (federation.min-sites)"
        )
    _unmask(going, party, total)
    return party, total


def _shares(going: Summing, party: Party) -> dict[int, dict[int, bytes]]:
    """Let each site send shares to its neighbours, by sender and receiver."""
    found = _ask(
        going,
        "shares",
        dict.fromkeys(going.sites, secagg_server.roster_message(party)),
        lambda data, index: secagg_server.read_shares(data, party, index),
    )
    sealed = {going.names.index(name): shares for name, shares in found.items()}
    going.sharers = set(sealed)
    check_enough(party, len(sealed), "sent shares")  # to compute would be in vain
    return sealed


def _uploads(
    going: Summing,
    party: Party,
    sealed: Mapping[int, Mapping[int, bytes]],
    total: RunningSum,
    prepare: Callable[[list[int]], RecordDict],
    meanwhile: Callable[[], object],
) -> None:
    """Let sites compute, and add their masked words up as they come."""
    began = time.monotonic()
    names = [name for index, name in enumerate(going.names) if index in sealed]
    content = prepare([going.sites[name].node_id for name in names])
    like = {WORDS: torch.empty(len(total.words), dtype=torch.uint32, device="meta")}
    kind = "train" if going.purpose == "train" else "evaluate"
    messages = {}
    for name in names:
        data = secagg_server.inbox_message(party, going.names.index(name), sealed)
        messages[name] = _message(going, name, kind, content, data)
        going.down += array_bytes(content.array_records[ARRAYS])

    def add(answer: Answer, name: str) -> None:
        if answer.update is None:
            raise ProtocolError("upload: got no words")
        try:
            words = arrays_to_state(answer.update, like)[WORDS].numpy()
        except (ValueError, TypeError, KeyError, EOFError):
            raise ProtocolError("upload: got other arrays than masked words") from None
        secagg_server.add_upload(total, answer.protocol, party, going.names.index(name), words)

    deadline = going.federation.study.federation.round_deadline
    arrivals = exchange(going.federation.grid, messages, deadline=deadline)
    meanwhile()
    for arrival in arrivals:
        _read(going, arrival, add)
        if arrival.message is None and arrival.message_id:
            going.late[arrival.site] = arrival.message_id
    going.seconds["words"] = round(time.monotonic() - began, 3)


def _unmask(going: Summing, party: Party, total: RunningSum) -> None:
    """Collect shares of the survivors and take the masks off the sum."""
    survivors = {going.names[index] for index in sorted(total.sites)}
    signatures = None
    if party.signed:
        signed = _ask(
            going,
            "confirm",
            dict.fromkeys(sorted(survivors), secagg_server.confirm_message(party, total.sites)),
            lambda data, _: secagg_server.read_confirmation(data, party),
            note=False,
        )
        signatures = {going.names.index(name): found for name, found in signed.items()}
    asked = secagg_server.unmask_message(party, total.sites, signatures)
    revealed = _ask(
        going,
        "unmask",
        dict.fromkeys(sorted(survivors), asked),
        lambda data, index: secagg_server.read_revealed(data, party, index, going.sharers),
        note=False,
    )
    going.open = {name: site for name, site in going.open.items() if name not in revealed}
    shares = {going.names.index(name): found for name, found in revealed.items()}
    secagg_server.unmask(total, party, going.sharers, shares)


def forget(going: Summing) -> None:
    """Tell sites that may still hold secrets that the sum is over; nobody waits for an answer."""
    asked = replace(going, sites=going.open)
    messages = {name: _message(asked, name, "query.secagg_forget") for name in going.open}
    going.down = asked.down
    for arrival in exchange(going.federation.grid, messages, deadline=0) if messages else ():
        receipt = read_arrival(arrival, declared=()).receipt
        if receipt is not None:
            going.lines[arrival.site]["received"].update(receipt.entry())
        else:
            _leave_unread(going, arrival)


def _leave_unread(going: Summing, arrival: Arrival) -> None:
    """Remember a message that isn't answered yet, to read the answer when there is one."""
    if arrival.message is None and arrival.message_id:
        unread = Unread(site=arrival.site, round=going.number, busy=False)
        going.federation.unread[arrival.message_id] = unread


def _message(
    going: Summing, name: str, kind: str, content: RecordDict | None = None, data: bytes = b""
) -> Message:
    going.down += len(data)
    shared = content or RecordDict({CONFIG: going.federation.task(going.number)})
    parts = RecordDict({**shared, "secagg": protocol_record(data)})
    return Message(parts, dst_node_id=going.sites[name].node_id, message_type=kind)


def _ask(
    going: Summing,
    stage: str,
    data: Mapping[str, bytes],
    read: Callable[[bytes | None, int], Found],
    *,
    note: bool = True,
) -> dict[str, Found]:
    """Send a stage's message to sites, read their answers; in order of the sites' names."""
    began = time.monotonic()
    kind = f"query.secagg_{stage}"
    messages = {name: _message(going, name, kind, data=part) for name, part in data.items()}
    found: dict[str, Found] = {}

    def keep(answer: Answer, name: str) -> None:
        found[name] = read(answer.protocol, going.names.index(name))

    settings = going.federation.study.federation
    deadline = min(settings.round_deadline, settings.connect_deadline)
    hurried = _busy(going, messages)
    for arrival in exchange(going.federation.grid, messages, deadline=deadline, hurried=hurried):
        _read(going, arrival, keep, note=note)
        _leave_unread(going, arrival)
    going.seconds[stage] = round(time.monotonic() - began, 3)
    return {name: found[name] for name in sorted(found)}


def _busy(going: Summing, asked: Collection[str]) -> set[str]:
    """Who may still be at work on an earlier message, as long as the others are enough."""
    federation = going.federation
    busy = {unread.site for unread in federation.unread.values() if unread.busy} & set(asked)
    enough = max(LEAST_SITES, federation.study.federation.min_sites)
    return busy if len(asked) - len(busy) >= enough else set()


def _read(
    going: Summing, arrival: Arrival, take: Callable[[Answer, str], None], *, note: bool = True
) -> None:
    """Take an answer, or write down why there is none."""
    answer = read_arrival(arrival, declared=())
    up = answer.bytes_up + len(answer.protocol or b"")
    if answer.status == "ok":
        try:
            take(answer, arrival.site)
        except ProtocolError as error:
            log.warning("round %d: %s: %s", going.number, arrival.site, error)
            answer = replace(answer, status="failed", reason=Reason.SECURE_AGGREGATION)
    fresh = site_line(answer, seconds=arrival.seconds)
    line = going.lines.get(arrival.site) or fresh
    line["received"] = {**line["received"], **fresh["received"]}
    if note:
        line.update(fresh, bytes_up=line["bytes_up"], received=line["received"])
    elif answer.status != "ok":
        log.warning("round %d: %s took no part in unmasking", going.number, arrival.site)
    line["bytes_up"] += up
    going.lines[arrival.site] = line
