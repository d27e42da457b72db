"""Hold what a run's record says of all sites together against their ledgers: sums and scores.

With secure aggregation the sites' checksums of their words and the numbers they noted add up to
those of the server's sum; without it the scores of all sites are those of the numbers that left.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedseg.privacy.ledger import Entry
from fedseg.privacy.words_checksum import add_checksums
from fedseg.segmentation.metrics import add, plausible, summarise

__all__ = ["Problem", "check_scores", "check_sums", "wrong_at"]

_SUMS = (("train", "secagg", "sum"), ("evaluate", "scored", "sum of scores"))
"""Kind of message, key in the history's line, and what it is in words."""

_CLOSE = 1e-6
"""Share by which sums of numbers may differ: they travel in fixed point."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that isn't as it should be, or that isn't shown.

    Attributes:
        severity: error, or note where it is no sign of anything wrong.
        site: Name of the site at the server, or path of a ledger.
        round: The round, None outside the rounds.
        what: What was found.
    """

    severity: str
    site: str
    round: int | None
    what: str

    def __str__(self) -> str:
        """One line for people."""
        where = f"{self.site}, round {self.round}" if self.round is not None else self.site
        return f"{self.severity}: {where}: {self.what}"


def wrong_at(site: str, number: int | None, what: str) -> Problem:
    """Make an error of a site, or of a ledger, in a round."""
    return Problem(severity="error", site=site, round=number, what=what)


def check_sums(
    lines: Iterable[Mapping[str, Any]], by_hash: Mapping[str, Entry]
) -> tuple[list[int], list[Problem]]:
    """Hold sums of secure aggregation against the ledgers, where all sites' in a sum are there.

    Args:
        lines: Lines of the history.
        by_hash: Lines of the ledgers.

    Returns:
        Rounds whose sum is that of the ledgers, and what isn't shown or doesn't agree.
    """
    shown, problems = [], []
    for line, (kind, key, name) in itertools.product(lines, _SUMS):
        secure = line.get(key, {})
        if "in_sum" not in secure:  # there was none
            continue
        masked = _masked(line, kind, secure, by_hash)
        if masked is None:
            what = f"the {name} isn't shown: it takes the ledgers of all sites in it"
            problems.append(Problem(severity="note", site="sum", round=line["round"], what=what))
        elif wrong := _wrong(line, secure, masked):
            what = f"the server's {name} isn't that of the ledgers: {', '.join(wrong)}"
            problems.append(wrong_at("sum", line["round"], what))
        elif kind == "train":
            shown.append(line["round"])
    return shown, problems


def _masked(
    line: Mapping[str, Any], kind: str, secure: Mapping[str, Any], by_hash: Mapping[str, Entry]
) -> list[Mapping[str, Any]] | None:
    """What the ledgers say about the parts of a sum; None where one isn't there."""
    if kind == "train":
        received = {name: site.get("received", {}) for name, site in line["sites"].items()}
    else:
        received = secure["received"]
    hashes = [received.get(name, {}).get(kind, {}).get("ledger", "") for name in secure["in_sum"]]
    entries = [by_hash.get(one, {}) for one in hashes]
    return [e["masked"] for e in entries] if all("masked" in e for e in entries) else None


def _wrong(
    line: Mapping[str, Any], secure: Mapping[str, Any], masked: Sequence[Mapping[str, Any]]
) -> list[str]:
    wrong = []
    if add_checksums([part["checksum"] for part in masked]) != secure["checksum"]:
        wrong.append("checksum of the words")
    for key, total in secure.get("sums", {}).items():
        parts = math.fsum(part["numbers"][key] for part in masked)
        if not math.isclose(total, parts, rel_tol=_CLOSE, abs_tol=1e-3):
            wrong.append(key)
    if "sums" not in secure:  # of scores the record has what was made of the sums
        wrong += _unlike(line["federated"], summarise(add(part["numbers"] for part in masked)))
    return wrong


def _unlike(told: Mapping[str, Any], sent: Mapping[str, Any]) -> list[str]:
    """Names of scores that differ, by more than fixed point rounds."""
    return [
        key
        for key in sorted({*told, *sent})
        if not _alike(told.get(key, math.nan), sent.get(key, math.nan))
    ]


def _alike(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=_CLOSE, abs_tol=_CLOSE)


def check_scores(
    lines: Iterable[Mapping[str, Any]], by_hash: Mapping[str, Entry]
) -> tuple[list[int], list[Problem]]:
    """Hold scores against the numbers that the ledgers say left, without secure aggregation.

    Args:
        lines: Lines of the history.
        by_hash: Lines of the ledgers.

    Returns:
        Rounds whose scores over all sites are those of the ledgers; what doesn't agree, and a note
        of the rounds whose sites' ledgers aren't all there.
    """
    shown, missing, problems = [], [], []
    for line in lines:
        if "scored" in line or not line.get("federated"):
            continue
        entries = {
            name: by_hash.get(site["received"]["evaluate"]["ledger"])
            for name, site in sorted(line["sites"].items())
            if "evaluate" in site.get("received", {})
        }
        wrong = list(_of_sites(line, entries))
        sent = [sums for entry in entries.values() if entry and (sums := _sent(entry))]
        if None in entries.values():
            missing.append(str(line["round"]))
        elif unlike := _unlike(line["federated"], summarise(add(sent))):
            what = f"the scores over all sites aren't those of the ledgers: {', '.join(unlike)}"
            wrong.append(wrong_at("scores", line["round"], what))
        elif not wrong:
            shown.append(line["round"])
        problems += wrong
    if missing:
        what = (
            f"those over all sites in rounds {', '.join(missing)} aren't shown: it takes all "
            "sites' ledgers"
        )
        problems.append(Problem(severity="note", site="scores", round=None, what=what))
    return shown, problems


def _of_sites(line: Mapping[str, Any], entries: Mapping[str, Entry | None]) -> Iterable[Problem]:
    for name, entry in entries.items():
        sums = _sent(entry) if entry else None
        told = line["sites"][name].get("metrics", {})
        if entry is None or not _unlike(told, summarise(add([sums])) if sums else {}):
            continue
        what = "evaluate: the server has other scores than those of the numbers that left"
        yield wrong_at(name, line["round"], what)


def _sent(entry: Entry) -> Mapping[str, float] | None:
    """Numbers of an evaluation that left; None where there are none that a server can count."""
    sums = entry["records"].get("metrics", {}).get("values", {})
    return sums if entry.get("status") == "ok" and plausible(sums) else None
