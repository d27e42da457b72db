"""Hold what a server says it got against what the sites' ledgers say was sent.

The server keeps, for each answer, the SHA-256 of what came and the hash of the ledger's line that
came with it. So a line that was edited, deleted or written anew later is found, and a tail that was
cut off, as far as the server has hashes of it. Sums and scores over all sites: see `audit_sums`.
What it doesn't show: that the server made its model of what it got and of nothing else; with secure
aggregation, that the masked words hold what a site says they do.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedseg.errors import DataError, LedgerError
from fedseg.federation.audit_sums import Problem, check_scores, check_sums, wrong_at
from fedseg.federation.egress import LEFT
from fedseg.privacy.ledger import Entry, verify

__all__ = ["Audit", "audit_run"]

_MOST_BYTES = 2**30
"""Of a history that is read: far more than a thousand rounds of a hundred sites."""

_MALFORMED = (KeyError, TypeError, AttributeError, ValueError, IndexError, ArithmeticError)
"""What reading a record raises that holds other things than a server writes."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit found.

    Attributes:
        run: Id of the study run.
        matched: By site, how many answers the server and a ledger agree on.
        sums: Rounds of secure aggregation whose sum is that of the ledgers.
        scores: Rounds without it whose scores over all sites are those of the ledgers.
        problems: All that isn't shown or doesn't agree.
    """

    run: str
    matched: Mapping[str, int]
    sums: Sequence[int]
    scores: Sequence[int]
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
    files: dict[Path, list[Entry]] = {}
    problems = []
    for path in ledgers:
        try:
            files[path] = [e for e in verify(path).entries if e.get("kind") == LEFT]
        except LedgerError as error:
            problems.append(wrong_at(str(path), None, str(error).removeprefix(f"{path}: ")))
    try:
        found = _audited(manifest, lines, files, run=str(manifest.get("run", folder.name)))
    except _MALFORMED as error:
        raise DataError(
            f"{folder}: its record, or a ledger, isn't as fedseg writes it ({error!r:.200}); "
            "nothing is shown by it"
        ) from None
    return replace(found, problems=[*problems, *found.problems])


def _audited(
    manifest: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    files: Mapping[Path, Sequence[Entry]],
    *,
    run: str,
) -> Audit:
    claims = list(_claims(manifest, lines))
    claimed = {claim.ledger for claim in claims}
    by_hash: dict[str, Entry] = {}
    problems = []
    for path, entries in files.items():
        for entry in entries:
            if _whole(entry):
                by_hash[entry["hash"]] = entry
            elif entry["hash"] in claimed:
                what = f"line {entry['sequence']} isn't as fedseg writes it"
                problems.append(wrong_at(str(path), None, what))
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
    matched = {
        site: sum(
            claim.site == site and claim.ledger in by_hash and (site, claim.round) not in bad
            for claim in claims
        )
        for site in sorted(known)
    }
    sums, wrong = check_sums(lines, by_hash)
    scores, unlike = check_scores(lines, by_hash)
    problems += [*wrong, *unlike]
    return Audit(run=run, matched=matched, sums=sums, scores=scores, problems=problems)


def _whole(entry: Entry) -> bool:
    """Whether a line is as fedseg writes it, as far as a claim is held against it."""
    texts, records = (entry.get("message"), entry.get("sha256")), entry.get("records")
    good = isinstance(records, dict) and all(isinstance(part, dict) for part in records.values())
    return good and all(isinstance(text, str) for text in texts)


def _read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        manifest = json.loads(_text(folder / "manifest.json"))
        lines = [json.loads(line) for line in _text(folder / "history.jsonl").splitlines()]
    except OSError as error:
        raise DataError(
            f"{folder}: {error.strerror}; expected a run's folder with manifest.json and "
            "history.jsonl"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{folder}: damaged manifest or history ({error})") from None
    if not all(isinstance(part, dict) for part in (manifest, *lines)):
        raise DataError(f"{folder}: damaged manifest or history; expected JSON objects")
    if "received" not in manifest:
        raise DataError(f"{folder}: its manifest has no `received`; the run is of an older fedseg")
    return manifest, lines


def _text(path: Path) -> str:
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path.name} has more than {_MOST_BYTES} bytes")
    return path.read_text(encoding="utf-8")


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
        for told in (*line.get("late", ()), *line.get("unwaited", ())):
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


def _check(claim: _Claim, by_hash: Mapping[str, Entry], run: str) -> Iterator[Problem]:
    """Hold one claim against the line whose hash came with the answer."""
    entry = by_hash.get(claim.ledger)
    if entry is None:
        yield wrong_at(
            claim.site,
            claim.round,
            f"{claim.kind}: the line whose hash the server got isn't in the ledger: it was "
            "deleted, changed, or cut off with the tail",
        )
        return
    if entry["sha256"] != claim.sha256:
        yield wrong_at(
            claim.site,
            claim.round,
            f"{claim.kind}: the server has SHA-256 {claim.sha256}, the ledger {entry['sha256']}",
        )
    told = (entry["message"], entry.get("run", run), entry.get("round", claim.round))
    expected = (claim.kind, run, claim.round if claim.round is not None else told[2])
    if told != expected:
        yield wrong_at(claim.site, claim.round, f"{claim.kind}: the ledger says it was {told}")
    sent = entry["records"].get("metrics", {}).get("values", {})
    if claim.numbers and dict(claim.numbers) != sent:
        yield wrong_at(
            claim.site, claim.round, f"{claim.kind}: the server has other numbers of training"
        )
    size = entry["records"].get("update", {}).get("bytes", 0)
    if claim.size is not None and claim.size != size:
        yield wrong_at(
            claim.site, claim.round, f"{claim.kind}: the server got {claim.size} bytes, {size} left"
        )


def _of_ledgers(
    files: Mapping[Path, Sequence[Entry]], claims: Sequence[_Claim], run: str
) -> Iterator[Problem]:
    """Find what ledgers say left and the server doesn't say it got."""
    claimed = {claim.ledger for claim in claims}
    for path, entries in files.items():
        if not any(entry["hash"] in claimed for entry in entries):
            yield wrong_at(
                str(path), None, f"the server has no hash of any line: not a ledger of run {run}"
            )
            continue
        for entry in entries:
            if entry.get("run") == run and entry["hash"] not in claimed:
                yield Problem(
                    severity="note",
                    site=str(path),
                    round=entry.get("round"),
                    what=f"line {entry['sequence']} ({entry.get('message')}) left, and the server "
                    "doesn't say that it came: it was late, or the server was stopped",
                )
