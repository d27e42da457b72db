"""The command audit."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fedseg.commands.options import Json
from fedseg.errors import DataError, LedgerError

__all__ = ["audit"]


def audit(
    ledger: Annotated[
        list[Path], typer.Option("--ledger", help="A site's ledger.jsonl; more may follow it.")
    ],
    more: Annotated[list[Path] | None, typer.Argument(metavar="[LEDGER]...", hidden=True)] = None,
    run: Annotated[
        str | None,
        typer.Option("--run", help="A run's id or folder: hold the ledgers against its record."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check ledgers of what left sites: exit 0 they hold together, 1 they don't, 2 unusable.

    Without --run a ledger is checked by itself: no line was edited, deleted, moved or inserted. A
    tail that was cut off, or a ledger written anew, shows only against a run's record.
    """
    ledgers = [*ledger, *(more or ())]
    for path in ledgers:
        if not path.is_file():
            raise DataError(f"{path}: no such file; name a site's ledger.jsonl")
    clean = _chains(ledgers, as_json) if run is None else _run(run, ledgers, as_json)
    raise typer.Exit(0 if clean else 1)


def _chains(ledgers: list[Path], as_json: bool) -> bool:
    from fedseg.privacy.ledger import verify

    found: list[dict[str, Any]] = []
    for path in ledgers:
        try:
            chain = verify(path)
        except LedgerError as error:
            found.append({"ledger": str(path), "error": str(error)})
        else:
            lines = {"lines": len(chain.entries), "head": chain.head, "torn_bytes": chain.torn}
            found.append({"ledger": str(path), "error": None, **lines})
    print(json.dumps(found, indent=2) if as_json else "\n".join(map(_chain_line, found)))
    return all(one["error"] is None for one in found)


def _chain_line(one: dict[str, Any]) -> str:
    if one["error"]:
        return f"error: {one['error']}"
    torn = f"; {one['torn_bytes']} bytes of a torn line behind" if one["torn_bytes"] else ""
    return f"{one['ledger']}: {one['lines']} lines hold together, head {one['head']}{torn}"


def _run(run: str, ledgers: list[Path], as_json: bool) -> bool:
    from fedseg.federation.audit import audit_run
    from fedseg.report.run_files import find_run

    found = audit_run(find_run(run), ledgers)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return found.clean
    for site, count in found.matched.items():
        print(f"{site}: {count} answers are, byte for byte, what the ledger says left")
    if found.sums:
        rounds = ", ".join(map(str, found.sums))
        print(f"secure aggregation: the server's sum is that of the ledgers in rounds {rounds}")
    if found.scores:
        rounds = ", ".join(map(str, found.scores))
        print(f"scores over all sites are those of the ledgers in rounds {rounds}")
    for problem in found.problems:
        print(problem)
    return found.clean
