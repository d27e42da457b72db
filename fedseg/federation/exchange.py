"""Send one message to each site and take the replies one at a time, as they come.

Flower's `send_and_receive` returns all replies in one list, so server memory grows with the number
of sites; `pull_messages` with many ids inflates everything that is ready. One id a call does not.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedseg.errors import Reason
from fedseg.messages import LATE, Answer, read_answer

__all__ = ["Arrival", "exchange", "free_arrays", "poll_pause", "read_arrival"]

_SHORTEST, _LONGEST, _SHARE = 0.1, 1.0, 0.02

_GONE = Answer(status="failed", reason=Reason.UNREACHABLE)


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A reply, or its absence: at the deadline, or at once where the site's node is gone.

    Attributes:
        site: Name of the site.
        message: The reply, None if it is late.
        seconds: From sending to arrival.
        message_id: Of the message to the site, by which a late reply can still be pulled; `""`
            where Flower took none: the node isn't registered any more.
    """

    site: str
    message: Message | None
    seconds: float
    message_id: str = ""


def read_arrival(arrival: Arrival, *, declared: Collection[str]) -> Answer:
    """Unpack an arrival; one that is late is an answer, too.

    Args:
        arrival: The reply, or its absence.
        declared: Keys the numbers may have.
    """
    if arrival.message is None:
        return LATE if arrival.message_id else _GONE
    return read_answer(arrival.message, declared=declared)


def exchange(
    grid: Grid,
    messages: Mapping[str, Message],
    *,
    deadline: float,
    hurried: Collection[str] = (),
) -> Iterator[Arrival]:
    """Push all messages at once; yield one arrival a site, late ones last.

    An arrival's arrays are gone once the next is asked for, see `free_arrays`.

    Args:
        grid: Flower's grid.
        messages: One message for each site.
        deadline: Seconds from now after which a site is late.
        hurried: Sites that are late as soon as all others have answered.
    """
    began = time.monotonic()
    ids = list(grid.push_messages(list(messages.values())))
    return _arrivals(grid, dict(zip(messages, ids, strict=True)), began, deadline, set(hurried))


def _arrivals(
    grid: Grid, open_ids: dict[str, str], began: float, deadline: float, hurried: set[str]
) -> Iterator[Arrival]:
    for site in [site for site, message_id in open_ids.items() if not message_id]:
        del open_ids[site]
        yield Arrival(site=site, message=None, seconds=0.0)
    while open_ids:
        for site, message_id in list(open_ids.items()):
            for reply in grid.pull_messages([message_id]):
                del open_ids[site]
                yield Arrival(site=site, message=reply, seconds=time.monotonic() - began)
                free_arrays(reply)
        if set(open_ids) <= hurried or time.monotonic() - began > deadline:
            break
        time.sleep(poll_pause(time.monotonic() - began))
    for site, message_id in open_ids.items():
        seconds = time.monotonic() - began
        yield Arrival(site=site, message=None, seconds=seconds, message_id=message_id)


def free_arrays(message: Message) -> None:
    """Empty a message's array records.

    Flower's records refer to themselves, so Python frees them only when it looks for cycles, and
    that goes by the number of objects: a dozen updates of one large array each pile up till then.
    """
    if message.has_content():
        for record in message.content.array_records.values():
            record.clear()


def poll_pause(waited: float) -> float:
    """Seconds until the next look: a reply lies there for 2% of the wait at most, or 0.1 s."""
    return min(max(_SHORTEST, _SHARE * waited), _LONGEST)
