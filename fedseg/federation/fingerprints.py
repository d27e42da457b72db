"""Ask the sites for their fingerprints; whoever sends none still takes part."""

import logging
from collections.abc import Sequence
from typing import Any

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from fedseg.config import StudyConfig
from fedseg.data.fingerprint import Fingerprint
from fedseg.errors import REASONS, ConfigError, Reason
from fedseg.federation.exchange import exchange
from fedseg.federation.federation import outside_rounds
from fedseg.federation.sites import KnownSite
from fedseg.messages import FINGERPRINT, query_content, read_answer
from fedseg.peers import Peers
from fedseg.receipts import receipt_of

__all__ = ["collect_fingerprints"]

log = logging.getLogger(__name__)


def collect_fingerprints(
    grid: Grid, sites: Sequence[KnownSite], study: StudyConfig
) -> tuple[dict[str, Fingerprint], list[dict[str, Any]]]:
    """Return the fingerprint of each site that sends one, by its name, and what came (receipts).

    Args:
        grid: Flower's grid.
        sites: The sites.
        study: The study config; measuring, which reads every scan once, has a round's deadline.
    """
    deadline = study.federation.round_deadline
    content = query_content(study, Peers.of([site.name for site in sites]))
    messages = {
        site.name: Message(content, dst_node_id=site.node_id, message_type="query.fingerprint")
        for site in sites
    }
    found: dict[str, Fingerprint] = {}
    received = []
    for arrival in exchange(grid, messages, deadline=deadline):
        result = Reason.DEADLINE if arrival.message is None else _read(arrival.message)
        reason = result if isinstance(result, Reason) else None
        if arrival.message is not None and not arrival.message.has_error():
            entry = receipt_of(arrival.message).entry()
            received += outside_rounds(arrival.site, entry, reason=reason)
        if isinstance(result, Fingerprint):
            found[arrival.site] = result
        else:
            log.warning("no fingerprint of %s: %s", arrival.site, REASONS[result])
    return {name: found[name] for name in sorted(found)}, received


def _read(message: Message) -> Fingerprint | Reason:
    answer = read_answer(message, declared=())
    if answer.status != "ok":
        return answer.reason or Reason.ERROR
    text = message.content.config_records.get(FINGERPRINT, ConfigRecord()).get("json")
    try:
        return Fingerprint.from_json(text) if isinstance(text, str) else Reason.BAD_UPDATE
    except ConfigError:
        return Reason.BAD_UPDATE
