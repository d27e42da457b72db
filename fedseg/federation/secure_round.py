"""A round of secure aggregation at the server: keys, shares, masked words, unmasking.

The server adds masked words up as they come and holds nothing but their sum. Sites may drop out at
any stage; below the threshold the round fails, the model stays as it is, and the run goes on.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Message, RecordDict

from fedseg.arrays import array_bytes, arrays_to_state
from fedseg.errors import ProtocolError, Reason, StudyError, TooFewSites
from fedseg.federation.collect import FORGET_AFTER, site_line
from fedseg.federation.exchange import Arrival, exchange, read_arrival
from fedseg.federation.federation import Federation
from fedseg.federation.flat import layout_of
from fedseg.federation.secure_site import SUMMED, WORDS, terms_of
from fedseg.federation.sites import KnownSite
from fedseg.federation.strategies import train_config
from fedseg.messages import ARRAYS, CONFIG, LATE, Answer, protocol_record, read_answer
from fedseg.privacy import secagg_server
from fedseg.privacy.fixed_point import LIMBS, decode_numbers, decode_values
from fedseg.privacy.graph import LEAST_SITES
from fedseg.privacy.roster import Party, party_of
from fedseg.privacy.secagg_server import RunningSum
from fedseg.privacy.words_checksum import checksum

__all__ = ["secure_change", "take_late"]

log = logging.getLogger(__name__)

Found = TypeVar("Found")


@dataclass(kw_only=True)
class _Round:
    """A round as it goes on.

    Attributes:
        federation: The federation.
        number: The round.
        entries: Of the history's line; filled as answers come.
        sites: The round's sites by name; who isn't in the roster is left out.
        sharers: Indices of those that sent shares.
        down: Bytes sent.
    """

    federation: Federation
    number: int
    entries: dict[str, Any]
    sites: dict[str, KnownSite]
    sharers: set[int] = field(default_factory=set)
    down: int = 0

    @property
    def names(self) -> list[str]:
        """Names by index."""
        return list(self.sites)


def secure_change(
    federation: Federation,
    number: int,
    before: Mapping[str, torch.Tensor],
    sites: Sequence[KnownSite],
    entries: dict[str, Any],
) -> torch.Tensor | None:
    """Run a round and return the weighted mean change, float32 `[N]`.

    Args:
        federation: The federation.
        number: The round.
        before: The shared parameters.
        sites: Sites of the round, in order of their names.
        entries: Entries of the history's line: `sites`, `secagg`, `failed` and bytes are set.

    Returns:
        None if the round failed: too few sites were left, or one sent what can't be.

    Raises:
        StudyError: The study has fewer than three sites.
    """
    if len(federation.sites) < LEAST_SITES:
        raise StudyError(
            f"privacy.secure-aggregation: got {len(federation.sites)} sites; expected at least "
            f"{LEAST_SITES}: of two, each knows the other's update from the sum"
        )
    going = _Round(
        federation=federation,
        number=number,
        entries=entries,
        sites={site.name: site for site in sites},
    )
    try:
        return _summed(going, before)
    except ProtocolError as error:
        entries["failed"] = str(error)
        log.warning("round %d failed, the model stays as it is: %s", number, error)
        return None
    finally:
        entries["bytes_down"] = going.down


def _summed(going: _Round, before: Mapping[str, torch.Tensor]) -> torch.Tensor:
    federation, size = going.federation, layout_of(before).size
    terms = terms_of(federation.study, federation.folder.run_id, going.number)
    adverts = _ask(
        going,
        "secagg_keys",
        dict.fromkeys(going.sites, b""),
        lambda data, _: secagg_server.read_keys(data, terms),
    )
    going.sites = {name: site for name, site in going.sites.items() if name in adverts}
    party = party_of([adverts[name] for name in going.sites], terms)
    sealed = _shares(going, party)
    total = RunningSum(words=np.zeros(size + LIMBS * len(SUMMED), np.uint32))
    _uploads(going, party, before, sealed, total)
    if len(total.sites) < federation.study.federation.min_sites:
        raise TooFewSites(
            f"{len(total.sites)} updates came; expected at least "
            f"{federation.study.federation.min_sites} (federation.min-sites)"
        )
    _unmask(going, party, total)
    encoding = party.encoding
    sums = decode_numbers(total.words[size:], SUMMED, encoding, summands=len(total.sites))
    going.entries["secagg"] = {
        "sites": party.size,
        "summed": len(total.sites),
        "in_sum": [going.names[index] for index in sorted(total.sites)],
        "checksum": checksum(total.words, terms),
        "threshold": party.threshold,
        "signed": party.signed,
        "clipped": sums["clipped"] / (size * len(total.sites)),
        "sums": {key: sums[key] for key in SUMMED if key != "clipped"},
    }
    return torch.from_numpy(decode_values(total.words[:size], sums["weight"], encoding))


def _shares(going: _Round, party: Party) -> dict[int, dict[int, bytes]]:
    """Let each site send shares to its neighbours, by sender and receiver."""
    found = _ask(
        going,
        "secagg_shares",
        dict.fromkeys(going.sites, secagg_server.roster_message(party)),
        lambda data, index: secagg_server.read_shares(data, party, index),
    )
    sealed = {going.names.index(name): shares for name, shares in found.items()}
    going.sharers = set(sealed)
    return sealed


def _uploads(
    going: _Round,
    party: Party,
    before: Mapping[str, torch.Tensor],
    sealed: Mapping[int, Mapping[int, bytes]],
    total: RunningSum,
) -> None:
    """Let sites train and add their masked words up as they come."""
    federation = going.federation
    names = [name for index, name in enumerate(going.names) if index in sealed]
    if len(names) < party.threshold:  # training would be in vain
        raise TooFewSites(
            f"secure aggregation: {len(names)} of {party.size} sites sent shares; expected at "
            f"least {party.threshold} (privacy.secagg-threshold)"
        )
    nodes = [going.sites[name].node_id for name in names]
    config = train_config(
        federation.strategy, going.number, before, federation.task(going.number), nodes
    )
    content = federation.content(config)
    like = {WORDS: torch.empty(len(total.words), dtype=torch.uint32, device="meta")}
    messages = {}
    for name in names:
        data = secagg_server.inbox_message(party, going.names.index(name), sealed)
        messages[name] = _message(going, name, "train", content, data)
        going.down += array_bytes(content.array_records[ARRAYS])

    def add(answer: Answer, name: str) -> None:
        if answer.update is None:
            raise ProtocolError("upload: got no words")
        try:
            words = arrays_to_state(answer.update, like)[WORDS].numpy()
        except (ValueError, TypeError, KeyError, EOFError):
            raise ProtocolError("upload: got other arrays than masked words") from None
        secagg_server.add_upload(total, answer.protocol, party, going.names.index(name), words)

    deadline = federation.study.federation.round_deadline
    for arrival in exchange(federation.grid, messages, deadline=deadline):
        _read(going, arrival, add)
        if arrival.message is None and arrival.message_id:
            federation.progress.late[arrival.site] = (going.number, arrival.message_id)


def _unmask(going: _Round, party: Party, total: RunningSum) -> None:
    """Collect shares of the survivors and take the masks off the sum."""
    survivors = {going.names[index] for index in sorted(total.sites)}
    signatures = None
    if party.signed:
        signed = _ask(
            going,
            "secagg_confirm",
            dict.fromkeys(sorted(survivors), secagg_server.confirm_message(party, total.sites)),
            lambda data, _: secagg_server.read_confirmation(data, party),
            note=False,
        )
        signatures = {going.names.index(name): found for name, found in signed.items()}
    asked = secagg_server.unmask_message(party, total.sites, signatures)
    revealed = _ask(
        going,
        "secagg_unmask",
        dict.fromkeys(sorted(survivors), asked),
        lambda data, index: secagg_server.read_revealed(data, party, index, going.sharers),
        note=False,
    )
    shares = {going.names.index(name): found for name, found in revealed.items()}
    secagg_server.unmask(total, party, going.sharers, shares)


def _message(going: _Round, name: str, kind: str, content: RecordDict, data: bytes) -> Message:
    going.down += len(data)
    parts = RecordDict({**content, "secagg": protocol_record(data)})
    return Message(parts, dst_node_id=going.sites[name].node_id, message_type=kind)


def _ask(
    going: _Round,
    action: str,
    data: Mapping[str, bytes],
    read: Callable[[bytes | None, int], Found],
    *,
    note: bool = True,
) -> dict[str, Found]:
    """Send a step's message to sites, read their answers; in order of the sites' names."""
    federation = going.federation
    config = RecordDict({CONFIG: federation.task(going.number)})
    messages = {
        name: _message(going, name, f"query.{action}", config, part) for name, part in data.items()
    }
    found: dict[str, Found] = {}

    def keep(answer: Answer, name: str) -> None:
        found[name] = read(answer.protocol, going.names.index(name))

    settings = federation.study.federation
    deadline = min(settings.round_deadline, settings.connect_deadline)
    for arrival in exchange(federation.grid, messages, deadline=deadline):
        _read(going, arrival, keep, note=note)
    return {name: found[name] for name in sorted(found)}


def _read(
    going: _Round, arrival: Arrival, take: Callable[[Answer, str], None], *, note: bool = True
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
    lines = going.entries["sites"]
    fresh = site_line(answer, seconds=arrival.seconds)
    line = lines.get(arrival.site) or fresh
    line["received"] = {**line["received"], **fresh["received"]}
    if note:
        line.update(fresh, bytes_up=line["bytes_up"], received=line["received"])
    elif answer.status != "ok":
        log.warning("round %d: %s took no part in unmasking", going.number, arrival.site)
    line["bytes_up"] += up
    lines[arrival.site] = line


def take_late(federation: Federation, number: int, entries: dict[str, Any]) -> None:
    """Write down whose answers to an earlier round came late; their masks can't be taken off."""
    late = federation.progress.late
    for name, (asked, message_id) in sorted(late.items()):
        replies: Collection[Message] = list(federation.grid.pull_messages([message_id]))
        if not replies and number - asked <= FORGET_AFTER:
            entries["sites"][name] = site_line(LATE)
            continue
        del late[name]
        for reply in replies:
            answer = read_answer(reply, declared=())
            record = {
                **{"site": name, "round": asked, "status": answer.status, "used": False},
                "received": answer.receipt.entry() if answer.receipt else {},
            }
            entries["late"].append(record)
            log.info("round %d: update of %s from round %d came late", number, name, asked)
