"""Find out who is there: wait for sites, ask their names, refuse duplicates."""

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedseg.config import StudyConfig
from fedseg.errors import REASONS, StudyError
from fedseg.federation.exchange import poll_pause
from fedseg.greeting import Greeting, read_greeting
from fedseg.messages import query_content
from fedseg.receipts import Receipt
from fedseg.site_config import valid_site_name

__all__ = ["KnownSite", "find_again", "find_sites", "wanted_sites"]

log = logging.getLogger(__name__)

_GRACE_SECONDS = 20.0
"""Connected nodes have this long to answer before a study starts without them."""


@dataclass(frozen=True, kw_only=True)
class KnownSite:
    """A site as the server knows it.

    Attributes:
        name: Registered SuperNode name, else its own.
        node_id: Flower's id of its node; not shown to people.
        simulated: Whether it is simulated.
        verified: Whether the name is the registered one.
        receipt: Of its answer to hello.
    """

    name: str
    node_id: int
    simulated: bool
    verified: bool
    receipt: Receipt | None = None


def find_sites(grid: Grid, study: StudyConfig, *, least: int = 0) -> list[KnownSite]:
    """Wait until the expected sites are there, or the deadline has passed.

    Args:
        grid: Flower's grid.
        study: The study config.
        least: Sites to expect where the study says nothing of it: those a resumed run began with.

    Returns:
        Sites in order of their names.

    Raises:
        StudyError: Too few sites came, or two have one name.
    """
    began = time.monotonic()
    end = began + study.federation.connect_deadline
    greeted: dict[int, Greeting] = {}
    registered: dict[int, str] = {}
    asked: dict[str, int] = {}
    said = -1
    while True:
        _ask_new_nodes(grid, study, asked, registered)
        _hear(grid, asked, greeted)
        sites = _named(greeted, registered)
        heard_all = len(greeted) == len(asked) or time.monotonic() > began + _GRACE_SECONDS
        if (heard_all and _complete(sites, greeted, study, least)) or time.monotonic() > end:
            break
        if len(sites) != said:
            log.info("waiting for sites: %d there", said := len(sites))
        time.sleep(poll_pause(time.monotonic() - began))
    refusals = _who_cannot(greeted, registered)
    for refusal in refusals:
        log.warning("%s", refusal)
    return _chosen(sites, study, refusals, waited=time.monotonic() - began)


def find_again(grid: Grid, study: StudyConfig, sites: list[KnownSite]) -> dict[str, KnownSite]:
    """Look among new nodes for sites whose node is gone.

    A SuperNode that isn't registered by a key is a new node each time it starts. Only the same name
    from the same source counts: the registered one stays that.

    Returns:
        The sites that are there again, by name.
    """
    known, there = {site.node_id for site in sites}, {node.node_id for node in grid.get_nodes()}
    gone = {site.name: site for site in sites if site.node_id not in there}
    if not gone or there <= known:
        return {}
    began = time.monotonic()
    greeted: dict[int, Greeting] = {}
    registered: dict[int, str] = {}
    asked: dict[str, int] = {}
    _ask_new_nodes(grid, study, asked, registered, known=known)
    while len(greeted) < len(asked) and time.monotonic() < began + _GRACE_SECONDS:
        _hear(grid, asked, greeted)
        time.sleep(poll_pause(time.monotonic() - began))
    found: dict[str, list[KnownSite]] = {}
    for site in _named(greeted, registered):
        if site.name in gone and site.verified == gone[site.name].verified:
            found.setdefault(site.name, []).append(site)
    return {name: same[0] for name, same in found.items() if len(same) == 1}


def _ask_new_nodes(
    grid: Grid,
    study: StudyConfig,
    asked: dict[str, int],
    registered: dict[int, str],
    *,
    known: Collection[int] = (),
) -> None:
    """Greet nodes that weren't there before; a dead one's silence holds up nobody."""
    for node in grid.get_nodes():
        registered[node.node_id] = str(node.name)
        if node.node_id not in known and node.node_id not in asked.values():
            hello = Message(
                query_content(study), dst_node_id=node.node_id, message_type="query.hello"
            )
            for message_id in grid.push_messages([hello]):
                if message_id:
                    asked[message_id] = node.node_id


def _hear(grid: Grid, asked: dict[str, int], greeted: dict[int, Greeting]) -> None:
    """Take the answers to hello that are there."""
    for message_id, node in asked.items():
        for reply in grid.pull_messages([message_id]) if node not in greeted else ():
            greeted[node] = read_greeting(reply)


def _named(greeted: dict[int, Greeting], registered: dict[int, str]) -> list[KnownSite]:
    sites = []
    unnamed = 0
    for node, greeting in sorted(greeted.items()):
        if greeting.reason is not None:
            continue
        official = registered.get(node, "")
        name = official if valid_site_name(official) else greeting.name
        if not name:
            unnamed += 1
            name = f"unnamed-{unnamed}"
        sites.append(
            KnownSite(
                name=name,
                node_id=node,
                simulated=greeting.simulated,
                verified=name == official,
                receipt=greeting.receipt,
            )
        )
    return sorted(sites, key=lambda site: site.name)


def _wanted_names(study: StudyConfig) -> list[str]:
    text = study.federation.sites
    return [] if text.isdigit() else [part.strip() for part in text.split(",") if part.strip()]


def wanted_sites(study: StudyConfig) -> int:
    """How many sites `federation.sites` names or expects; 0 where it is empty."""
    names = _wanted_names(study)
    return len(names) if names else int(study.federation.sites or 0)


def _complete(
    sites: list[KnownSite], greeted: dict[int, Greeting], study: StudyConfig, least: int
) -> bool:
    names = _wanted_names(study)
    if names:
        return set(names) <= {site.name for site in sites}
    if study.federation.sites:
        return len(sites) >= int(study.federation.sites)
    simulated = max((greeting.sites for greeting in greeted.values()), default=0)
    if simulated:
        return len(greeted) >= simulated
    return len(sites) >= max(study.federation.min_sites, least)


def _who_cannot(greeted: dict[int, Greeting], registered: dict[int, str]) -> list[str]:
    """One text for each node that answered that it can't take part."""
    return [
        f"{registered.get(node) or greeting.name or 'a site'} can't take part: "
        f"{REASONS[greeting.reason]}"
        for node, greeting in sorted(greeted.items())
        if greeting.reason is not None
    ]


def _chosen(
    sites: list[KnownSite], study: StudyConfig, refusals: list[str], *, waited: float
) -> list[KnownSite]:
    names = _wanted_names(study)
    chosen = [site for site in sites if not names or site.name in names]
    twice = {site.name for site in chosen if sum(s.name == site.name for s in chosen) > 1}
    if twice:
        raise StudyError(
            f"sites: two nodes are named {', '.join(sorted(twice))}; give each a name of its own "
            "(flwr supernode register --name, or name in site.toml)"
        )
    missing = [name for name in names if name not in {site.name for site in sites}]
    if missing:
        log.warning("not there after %.0f s: %s", waited, ", ".join(missing))
    if len(chosen) < study.federation.min_sites:
        absent = f" (missing: {', '.join(missing)})" if missing else ""
        mend = "start their SuperNodes, or change federation.min-sites or connect-deadline"
        raise StudyError(
            f"sites: got {len(chosen)} within {waited:.0f} s{absent}; expected at least "
            f"{study.federation.min_sites}; {'; '.join(refusals) or mend}"
        )
    return chosen
