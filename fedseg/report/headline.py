"""What was gained by federating, in a sentence and two numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedseg.data.plan import REGIONS
from fedseg.report.amounts import Value, signed, value_of
from fedseg.report.run import Round, Run, Scores
from fedseg.report.run_files import number, scores, table
from fedseg.segmentation.comparison import FEDERATED, LOCAL, POOLED

__all__ = ["REGION_NAMES", "SCOPES", "Headline", "Tile", "headline", "main_scope"]

REGION_NAMES = {"liver": "liver", "tumor": "tumours"}
"""Regions in words."""

SCOPES = {
    "global": "cases held out at the server",
    "unseen": "a kind of scan that no site has",
    "federated": "cases held out at the sites",
}
"""Sets of cases in words."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A region's Dice and what it is held against."""

    name: str
    value: Value
    beside: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The top of the report.

    Attributes:
        title: The finding.
        tiles: A number for each region.
        notes: What the finding stands on.
    """

    title: str
    tiles: Sequence[Tile]
    notes: Sequence[str]


def main_scope(part: Round) -> str:
    """Choose the cases that count: the server's where it has any with a Dice, else the sites'."""
    for scope in ("global", "federated"):
        if any(f"{region}.dice" in part.scopes.get(scope, {}) for region in REGIONS):
            return scope
    return "federated"


def headline(run: Run) -> Headline:
    """Say what federating brought, from the best evidence that the run folder has."""
    alone = {key.removeprefix(LOCAL): row for key, row in _local_rows(run).items()}
    if alone and any(f"{region}.dice" in run.compared.get(FEDERATED, {}) for region in REGIONS):
        return _compared(run, alone)
    if run.best is None:
        return _nothing(run)
    return _over_rounds(run, run.best)


def _local_rows(run: Run) -> dict[str, Scores]:
    return {key: row for key, row in run.compared.items() if key.startswith(LOCAL)}


def _compared(run: Run, alone: Mapping[str, Scores]) -> Headline:
    together, pooled = run.compared[FEDERATED], run.compared.get(POOLED, {})
    gains, tiles = {}, []
    for region, name in REGION_NAMES.items():
        key = f"{region}.dice"
        each = {site: row[key] for site, row in alone.items() if key in row}
        beside = []
        if each:
            mean = sum(each.values()) / len(each)
            best = max(each, key=each.__getitem__)
            beside.append(
                f"{mean:.3f} for a site alone, on average (best: {best}, {each[best]:.3f})"
            )
            if key in together:
                gains[name] = together[key] - mean
        if key in pooled:
            beside.append(f"{pooled[key]:.3f} with all data in one place")
        tiles.append(Tile(name=_tile_name(region), value=value_of(together, key), beside=beside))
    gained = " and ".join(f"{signed(gain)} for {name}" for name, gain in gains.items())
    if not gains:
        title = "The comparison has no Dice of a site alone"
    elif min(gains.values()) > 0:
        title = f"Training together paid: Dice {gained}, against a site alone"
    elif max(gains.values()) <= 0:
        title = f"Training together did not pay: Dice {gained}, against a site alone"
    else:
        title = f"Training together paid in part: Dice {gained}, against a site alone"
    steps = "as many steps" if run.steps is None else f"{run.steps:.0f} steps"
    note = (
        f"Each model was trained for {steps}; all were scored on the same held-out cases of all "
        "sites. The federated one is that of the last round."
    )
    return Headline(title=title, tiles=tiles, notes=[note])


def _over_rounds(run: Run, best: Round) -> Headline:
    scope = main_scope(best)
    found = best.scopes.get(scope, {})
    scored = [part for part in run.rounds if main_scope(part) == scope and scope in part.scopes]
    first = scored[0] if scored else best
    tiles = []
    for region in REGION_NAMES:
        key = f"{region}.dice"
        before = first.scopes.get(scope, {}).get(key)
        beside = []
        if before is not None and first.number < best.number:
            when = "before training" if first.number == 0 else f"after round {first.number}"
            beside.append(f"{before:.3f} {when}")
        tiles.append(Tile(name=_tile_name(region), value=value_of(found, key), beside=beside))
    reached = [
        f"{found[f'{region}.dice']:.3f} for {name}"
        for region, name in REGION_NAMES.items()
        if f"{region}.dice" in found
    ]
    last = run.rounds[-1].number
    title = f"The shared model reached a Dice of {' and '.join(reached)}"
    notes = [
        f"Best of {last} rounds: round {best.number}, scored on {_cases(found)}{SCOPES[scope]}."
    ]
    if not reached:
        title = f"The best model is that of round {best.number}"
    return Headline(title=title, tiles=tiles, notes=[*notes, *_personal(run), _UNKNOWN])


_UNKNOWN = (
    "This run alone can't say what federating gained: no site trained on its own. "
    "The command fedseg compare finds out."
)


def _cases(found: Scores) -> str:
    return f"{found['cases']:.0f} " if "cases" in found else ""


def _personal(run: Run) -> list[str]:
    """Compare the shared model with what each site trained last, on the site's own cases."""
    entries: dict[str, dict[str, Any]] = {
        site: table(entry) for site, entry in table(run.manifest.get("personal")).items()
    }
    kept = len([site for site, entry in entries.items() if entry.get("kept") is True])
    count = len(entries)
    summed = table(run.manifest.get("personal_sum"))  # under secure aggregation
    if summed:
        entries = {"all": summed}
        kept, count = (int(number(summed.get(key)) or 0) for key in ("kept", "sites"))
    if not count:
        return []
    parts = []
    for region, name in REGION_NAMES.items():
        pairs = [
            (scores(entry.get("global")), scores(entry.get("personal")))
            for entry in entries.values()
        ]
        known = [
            (one[key], other[key])
            for one, other in pairs
            if (key := f"{region}.dice") in one and key in other
        ]
        if known:
            shared, own = (sum(part) / len(known) for part in zip(*known, strict=True))
            parts.append(f"{name} {shared:.3f} against {own:.3f}")
    dice = f" (mean Dice of the shared model against the site's own: {', '.join(parts)})"
    return [
        f"On its own held-out cases, the model that a site trained last is better than the shared "
        f"one at {kept} of {count} sites{dice if parts else ''}."
    ]


def _nothing(run: Run) -> Headline:
    if not run.rounds:
        return Headline(title="No round is finished yet", tiles=[], notes=[])
    note = "No evaluation has a Dice: either none is done yet, or no case has a liver or a tumour."
    return Headline(title="Nothing is scored yet", tiles=[], notes=[note])


def _tile_name(region: str) -> str:
    return f"Dice, {REGION_NAMES[region]}"
