"""What a round sums under secure aggregation: updates, and numbers of evaluations.

Where a sum fails the model stays as it is, its cause is written down, and the run goes on.
"""

import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from flwr.app import Message, RecordDict

from fedseg.errors import REASONS, ProtocolError, Reason, StudyError
from fedseg.federation.collect import FORGET_AFTER, site_line
from fedseg.federation.federation import Federation, Unread, outside_rounds
from fedseg.federation.flat import layout_of
from fedseg.federation.masked import COMPARED, SUMMED
from fedseg.federation.secure_sum import Summing, forget, masked_sum
from fedseg.federation.sites import KnownSite
from fedseg.federation.strategies import train_config
from fedseg.messages import LATE, PERSONAL, read_answer
from fedseg.privacy.fixed_point import LIMBS, decode_numbers, decode_values
from fedseg.privacy.graph import LEAST_SITES
from fedseg.privacy.roster import Party
from fedseg.privacy.secagg_server import RunningSum
from fedseg.privacy.secagg_wire import Purpose
from fedseg.privacy.words_checksum import checksum
from fedseg.receipts import receipt_of
from fedseg.segmentation.metrics import empty_sums, plausible, summarise

__all__ = ["secure_change", "secure_personal", "secure_scores", "take_late", "take_unread"]

log = logging.getLogger(__name__)


def secure_change(
    federation: Federation,
    number: int,
    before: Mapping[str, torch.Tensor],
    sites: Sequence[KnownSite],
    entries: dict[str, Any],
) -> torch.Tensor | None:
    """Train a round and return the weighted mean change, float32 `[N]`.

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
    going = _summing(federation, number, "train", sites)
    going.lines = entries["sites"]
    size = layout_of(before).size

    def prepare(nodes: list[int]) -> RecordDict:
        task = federation.task(number)
        return federation.content(train_config(federation.strategy, number, before, task, nodes))

    try:
        party, total = masked_sum(going, size + LIMBS * len(SUMMED["train"]), prepare)
        sums = _numbers(party, total, "train", size)
        change = decode_values(total.words[:size], sums["weight"], party.encoding)
    except ProtocolError as error:
        entries["failed"] = str(error)
        log.warning("round %d failed, the model stays as it is: %s", number, error)
        return None
    finally:
        forget(going)
        federation.progress.late.update({k: (number, v) for k, v in going.late.items()})
        entries["bytes_down"] = going.down
    entries["secagg"] = {
        **_account(going, party, total),
        "clipped": sums["clipped"] / (size * len(total.sites)),
        "sums": {key: sums[key] for key in SUMMED["train"] if key != "clipped"},
    }
    return torch.from_numpy(change)


def _summing(
    federation: Federation, number: int, purpose: Purpose, sites: Sequence[KnownSite]
) -> Summing:
    by_name = {site.name: site for site in sites}
    return Summing(federation=federation, number=number, purpose=purpose, sites=by_name)


def _numbers(
    party: Party, total: RunningSum, purpose: Purpose, start: int = 0
) -> Mapping[str, float]:
    words, keys = total.words[start:], SUMMED[purpose]
    return decode_numbers(words, keys, party.encoding, summands=len(total.sites))


def _account(going: Summing, party: Party, total: RunningSum) -> dict[str, Any]:
    return {
        "sites": party.size,
        "summed": len(total.sites),
        "in_sum": [going.names[index] for index in sorted(total.sites)],
        "checksum": checksum(total.words, party.terms),
        "threshold": party.threshold,
        "signed": party.signed,
        "seconds": going.seconds,
    }


def secure_scores(
    federation: Federation,
    number: int,
    entries: dict[str, Any],
    meanwhile: Callable[[], object],
) -> None:
    """Score the moved model on the sites' held-out cases; the server sees only the sum.

    Of a round that failed nothing is asked: the model was scored before, and its scores over other
    sites would show what is between the two.

    Args:
        federation: The federation.
        number: The round.
        entries: Entries of the history's line: `federated` and `scored` are set, and for each site
            that gave no metrics the reason, `no_metrics`.
        meanwhile: Called while the sites score.
    """
    if "failed" in entries:
        meanwhile()
        return
    account, sums = _scored(federation, number, "evaluate", meanwhile)
    for name, reason in account.pop("no_metrics").items():
        entries["sites"].setdefault(name, {})["no_metrics"] = reason
    entries["scored"] = account
    entries["federated"] = summarise(sums) if sums else {}


def secure_personal(federation: Federation) -> dict[str, Any] | None:
    """After the last round: how the models that sites trained last do at home, all together.

    Returns:
        `sites` that compared theirs with the global model, how many `kept` it, and the metrics of
        both; None where the sum failed.
    """
    number = federation.progress.round
    account, sums = _scored(federation, number, "final", lambda: None)
    for name, received in account["received"].items():
        reason = account["no_metrics"].get(name)
        federation.received += outside_rounds(name, received, reason=reason, final=True)
    if not sums:
        return None
    own = {key: sums[PERSONAL + key] for key in empty_sums()}
    known = [line["federated"] for line in federation.progress.history if line["federated"]]
    return {
        "sites": round(sums[COMPARED]),
        "kept": round(sums[PERSONAL + "kept"]),
        "global": known[-1] if known else {},
        "personal": summarise(own),
    }


def _scored(
    federation: Federation, number: int, purpose: Purpose, meanwhile: Callable[[], object]
) -> tuple[dict[str, Any], Mapping[str, float]]:
    """Sum the numbers of an evaluation; none where it failed, and why."""
    going = _summing(federation, number, purpose, federation.free)
    once = functools.cache(meanwhile)  # beside the sites' work, else after it
    try:
        content = federation.content(federation.task(number, final=purpose == "final"))
        size = LIMBS * len(SUMMED[purpose])
        party, total = masked_sum(going, size, lambda _: content, once)
        sums = _numbers(party, total, purpose)
        if not plausible({key.removeprefix(PERSONAL): value for key, value in sums.items()}):
            raise ProtocolError("sums: got what no cases have; a site sent other words")
    except ProtocolError as error:
        log.warning("round %d: no scores of the sites: %s", number, error)
        return {"failed": str(error), **_by_site(going, number)}, {}
    finally:
        once()
        forget(going)
        federation.unread |= {
            message_id: Unread(site=name, round=number, busy=True)
            for name, message_id in going.late.items()
        }
    return {**_account(going, party, total), **_by_site(going, number)}, sums


def _by_site(going: Summing, number: int) -> dict[str, Any]:
    """Receipts of each site's answers, for the audit; and why a site gave no metrics."""
    lines = sorted(going.lines.items())
    why = {name: line["reason"] or "error" for name, line in lines if line["status"] != "ok"}
    for name, reason in why.items():
        log.warning("round %d: %s gave no metrics: %s", number, name, REASONS[Reason(reason)])
    return {"received": {name: line["received"] for name, line in lines}, "no_metrics": why}


def take_unread(federation: Federation, number: int) -> list[dict[str, Any]]:
    """Receipts, for the audit, of answers that came when nobody waited for them any more.

    Args:
        federation: The federation; what is unread for too long is forgotten.
        number: The round that begins, or the one that ended.
    """
    found = []
    for message_id, asked in list(federation.unread.items()):
        replies: Collection[Message] = list(federation.grid.pull_messages([message_id]))
        if replies or number - asked.round > FORGET_AFTER:
            del federation.unread[message_id]
        for reply in replies:
            if not reply.has_error():
                receipt = receipt_of(reply).entry()
                found.append({"site": asked.site, "round": asked.round, "received": receipt})
    return found


def take_late(federation: Federation, number: int, entries: dict[str, Any]) -> None:
    """Write down whose answers to an earlier round came late; their masks can't be taken off."""
    if unwaited := take_unread(federation, number):
        entries["unwaited"] = unwaited
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
