"""Hold what a server says it got against what the sites' ledgers say was sent.

The server keeps, for each answer, the SHA-256 of what came and the hash of the ledger's line that
came with it. So a line that was edited, deleted or written anew later is found, and a tail that was
cut off, as far as the server has hashes of it. What it doesn't show: that the server made its model
of what it got and of nothing else; with secure aggregation, that the masked words hold what a site
says they do, but the sites' checksums of them do add up to that of the server's sum.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedseg.errors import DataError, LedgerError
from fedseg.federation.egress import LEFT
from fedseg.privacy.ledger import Entry, verify
from fedseg.privacy.words_checksum import add_checksums

__all__ = ["Audit", "Problem", "audit_run"]

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


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit found.

    Attributes:
        run: Id of the study run.
        matched: By site, how many answers the server and a ledger agree on.
        sums: Rounds of secure aggregation whose sum is that of the ledgers.
        problems: All that isn't shown or doesn't agree.
    """

    run: str
    matched: Mapping[str, int]
    sums: Sequence[int]
    problems: Sequence[Problem]

    @property
    def clean(self) -> bool:
        """Whether nothing contradicts."""
        return all(problem.severity != "error" for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "clean": self.clean}


@dataclass(frozen=True, kw_only=True)
class _Claim:
    """What the server says it got once.

    Attributes:
        site: The site's name at the server.
        round: The round, None outside the rounds.
        kind: Of the message.
        sha256, ledger: See `receipts.Receipt`.
        numbers: Of training, as they came; empty where there are none.
        size: Bytes of the update; None where the server doesn't know them apart.
    """

    site: str
    round: int | None
    kind: str
    sha256: str
    ledger: str
    numbers: Mapping[str, float]
    size: int | None


def audit_run(folder: Path, ledgers: Sequence[Path]) -> Audit:
    """Audit a run by the ledgers of any of its sites.

    Raises:
        DataError: The folder is no run's, or it is of a version without receipts.
    """
    manifest, lines = _read_run(folder)
    run, problems = str(manifest.get("run", folder.name)), []
    by_hash: dict[str, Entry] = {}
    files: dict[Path, list[Entry]] = {}
    for path in ledgers:
        try:
            files[path] = [e for e in verify(path).entries if e.get("kind") == LEFT]
        except LedgerError as error:
            problems.append(_error(str(path), None, str(error).removeprefix(f"{path}: ")))
        else:
            by_hash |= {entry["hash"]: entry for entry in files[path]}
    claims = list(_claims(manifest, lines))
    known = {claim.site for claim in claims if claim.ledger in by_hash}
    problems += [p for claim in claims if claim.site in known for p in _check(claim, by_hash, run)]
    problems += _of_ledgers(files, claims, run)
    problems += [
        Problem(
            severity="note", site=site, round=None, what="none of the ledgers is its; not shown"
        )
        for site in sorted({claim.site for claim in claims} - known)
    ]
    bad = {(p.site, p.round) for p in problems if p.severity == "error"}
    sums, wrong = _sums(lines, by_hash)
    matched = {
        site: sum(
            claim.site == site and claim.ledger in by_hash and (site, claim.round) not in bad
            for claim in claims
        )
        for site in sorted(known)
    }
    return Audit(run=run, matched=matched, sums=sums, problems=[*problems, *wrong])


def _read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        text = (folder / "history.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
    except OSError as error:
        raise DataError(
            f"{folder}: {error.strerror}; expected a run's folder with manifest.json and "
            "history.jsonl"
        ) from None
    except ValueError as error:
        raise DataError(f"{folder}: damaged manifest or history ({error})") from None
    if "received" not in manifest:
        raise DataError(f"{folder}: its manifest has no `received`; the run is of an older fedseg")
    return manifest, lines


def _claims(manifest: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> Iterator[_Claim]:
    for entry in manifest["received"]:
        yield _Claim(
            round=None, numbers={}, size=None, **_part(entry, "site", "kind", "sha256", "ledger")
        )
    for line in lines:
        for site, told in line.get("sites", {}).items():
            yield from _claimed(site, line["round"], told)
        for site, received in line.get("scored", {}).get("received", {}).items():
            yield from _claimed(site, line["round"], {"received": received})
        for told in line.get("late", ()):
            yield from _claimed(told["site"], told["round"], told)


def _claimed(site: str, number: int, told: Mapping[str, Any]) -> Iterator[_Claim]:
    received = dict(told.get("received", {}))
    if told.get("status") in ("ok", "quarantined"):
        received.setdefault("train", {})  # an update without a receipt is one that nobody sent
    for kind, receipt in received.items():
        trained = kind == "train" and bool(told.get("training"))
        yield _Claim(
            site=site,
            round=number,
            kind=kind,
            numbers=told["training"] if trained else {},
            size=told["bytes_up"] if trained else None,
            **_part(receipt, "sha256", "ledger"),
        )


def _part(entry: Mapping[str, Any], *keys: str) -> dict[str, str]:
    return {key: str(entry.get(key)) for key in keys}


def _error(site: str, number: int | None, what: str) -> Problem:
    return Problem(severity="error", site=site, round=number, what=what)


def _check(claim: _Claim, by_hash: Mapping[str, Entry], run: str) -> Iterator[Problem]:
    """Hold one claim against the line whose hash came with the answer."""
    entry = by_hash.get(claim.ledger)
    if entry is None:
        yield _error(
            claim.site,
            claim.round,
            f"{claim.kind}: the line whose hash the server got isn't in the ledger: it was "
            "deleted, changed, or cut off with the tail",
        )
        return
    if entry["sha256"] != claim.sha256:
        yield _error(
            claim.site,
            claim.round,
            f"{claim.kind}: the server has SHA-256 {claim.sha256}, the ledger {entry['sha256']}",
        )
    told = (entry["message"], entry.get("run", run), entry.get("round", claim.round))
    expected = (claim.kind, run, claim.round if claim.round is not None else told[2])
    if told != expected:
        yield _error(claim.site, claim.round, f"{claim.kind}: the ledger says it was {told}")
    sent = entry["records"].get("metrics", {}).get("values", {})
    if claim.numbers and dict(claim.numbers) != sent:
        yield _error(
            claim.site, claim.round, f"{claim.kind}: the server has other numbers of training"
        )
    size = entry["records"].get("update", {}).get("bytes", 0)
    if claim.size is not None and claim.size != size:
        yield _error(
            claim.site, claim.round, f"{claim.kind}: the server got {claim.size} bytes, {size} left"
        )


def _of_ledgers(
    files: Mapping[Path, Sequence[Entry]], claims: Sequence[_Claim], run: str
) -> Iterator[Problem]:
    """Find what ledgers say left and the server doesn't say it got."""
    claimed = {claim.ledger for claim in claims}
    for path, entries in files.items():
        if not any(entry["hash"] in claimed for entry in entries):
            yield _error(
                str(path), None, f"the server has no hash of any line: not a ledger of run {run}"
            )
            continue
        for entry in entries:
            if entry.get("run") == run and entry["hash"] not in claimed:
                yield Problem(
                    severity="note",
                    site=str(path),
                    round=entry.get("round"),
                    what=f"line {entry['sequence']} ({entry['message']}) left, and the server "
                    "doesn't say that it came: it was late, or the server was stopped",
                )


def _sums(
    lines: Iterable[Mapping[str, Any]], by_hash: Mapping[str, Entry]
) -> tuple[list[int], list[Problem]]:
    """Hold sums of secure aggregation against the ledgers, where all sites' in a sum are there."""
    shown, problems = [], []
    for line, (kind, key, name) in itertools.product(lines, _SUMS):
        secure = line.get(key, {})
        if "in_sum" not in secure:  # there was none
            continue
        masked = _masked(line, kind, secure, by_hash)
        if masked is None:
            what = f"the {name} isn't shown: it takes the ledgers of all sites in it"
            problems.append(Problem(severity="note", site="sum", round=line["round"], what=what))
        elif wrong := _wrong(secure, masked):
            what = f"the server's {name} isn't that of the ledgers: {', '.join(wrong)}"
            problems.append(_error("sum", line["round"], what))
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


def _wrong(secure: Mapping[str, Any], masked: Sequence[Mapping[str, Any]]) -> list[str]:
    wrong = []
    if add_checksums([part["checksum"] for part in masked]) != secure["checksum"]:
        wrong.append("checksum of the words")
    for key, total in secure.get("sums", {}).items():
        parts = math.fsum(part["numbers"][key] for part in masked)
        if not math.isclose(total, parts, rel_tol=_CLOSE, abs_tol=1e-3):
            wrong.append(key)
    return wrong
