"""What each site got and gave: its scores with the worst marked, and the rounds it missed."""

from collections.abc import Mapping, Sequence

from fedseg.data.plan import REGIONS
from fedseg.report.amounts import UNDEFINED, Value, value_of
from fedseg.report.headline import REGION_NAMES
from fedseg.report.quality import Table
from fedseg.report.run import Round, Run, SiteRound
from fedseg.report.run_files import table

__all__ = ["absences", "notes", "site_table", "spread"]

_MOST_ROWS = 200
"""Absences that are listed; the rest is counted."""

_GAVE = "rounds with its update"


def site_table(run: Run) -> Table | None:
    """Show each site's Dice with the best model, the lowest marked; None without sites.

    Under secure aggregation no site's own scores are known: only who took part is shown.
    """
    names = _names(run)
    if not names:
        return None
    if not any(site.metrics for part in run.rounds for site in part.sites.values()):
        scored = any(part.scopes.get("federated") for part in run.rounds)
        why = "its own scores stay at the site" if scored else "none holds cases out"
        return Table(
            caption=f"Rounds that each site took part in; {why}",
            corner="site",
            heads=[_GAVE],
            rows=[(name, [_rounds_with(run, name)]) for name in names],
        )
    best = run.best or run.rounds[-1]
    worst = {region: _lowest(best, region) for region in REGIONS}
    personal = table(run.manifest.get("personal"))
    rows = []
    for name in names:
        site = best.sites.get(name)
        cells = []
        for region in REGIONS:
            mark = "lowest" if name == worst[region] else ""
            scores = site.metrics if site else {}
            cells.append(value_of(scores, f"{region}.dice", bar=True, mark=mark))
        own = table(personal.get(name)).get("kept")
        cells += [
            _training_cases(run, name),
            _rounds_with(run, name),
            Value(text="yes" if own is True else "no" if own is False else UNDEFINED),
        ]
        rows.append((name, cells))
    return Table(
        caption=f"Held-out cases of each site, scored with the model of round {best.number}",
        corner="site",
        heads=[
            *(f"Dice, {name}" for name in REGION_NAMES.values()),
            "cases trained on",
            _GAVE,
            "own model better",
        ],
        rows=rows,
    )


def _rounds_with(run: Run, name: str) -> Value:
    trained = [part for part in run.rounds if part.number > 0]
    return Value(text=f"{sum(_took_part(part, name) for part in trained)} of {len(trained)}")


def _names(run: Run) -> list[str]:
    seen = {name for part in run.rounds for name in part.sites}
    return sorted(seen | set(table(run.manifest.get("sites")))) if run.rounds else []


def _dice(part: Round, region: str) -> dict[str, float]:
    key = f"{region}.dice"
    return {name: site.metrics[key] for name, site in part.sites.items() if key in site.metrics}


def _lowest(part: Round, region: str) -> str | None:
    found = _dice(part, region)
    return min(found, key=found.__getitem__) if len(found) > 1 else None


def _took_part(part: Round, name: str) -> bool:
    """Whether an update of the site is in the round's mean: its own, or a late one."""
    if part.failed:
        return False
    used = any(site == name and used for site, _, used in part.late)
    return used or (name in part.sites and part.sites[name].status == "ok")


def _training_cases(run: Run, name: str) -> Value:
    for part in reversed(run.rounds):
        site: SiteRound | None = part.sites.get(name)
        if site is not None and "cases" in site.training:
            skipped = site.training.get("skipped", 0)
            note = f"{skipped:.0f} unusable" if skipped else ""
            return Value(text=f"{site.training['cases']:.0f}", note=note)
    return Value(text=UNDEFINED)


def spread(run: Run) -> list[str]:
    """Say how far the sites lie apart, a sentence a region."""
    found = []
    for region, name in REGION_NAMES.items():
        dice = _dice(run.best, region) if run.best else {}
        if len(dice) > 1:
            low, high = (pick(dice, key=dice.__getitem__) for pick in (min, max))
            found.append(
                f"Dice of the {name}: lowest {dice[low]:.3f} ({low}), highest {dice[high]:.3f} "
                f"({high}), {dice[high] - dice[low]:.3f} apart."
            )
    return found


def notes(run: Run) -> list[str]:
    """Say whose name nobody vouches for, and which sites hold the same scans."""
    sites = {name: table(entry) for name, entry in table(run.manifest.get("sites")).items()}
    found = []
    if sites and all(entry.get("simulated") is True for entry in sites.values()):
        found.append("All sites are simulated on one machine.")
    else:
        names = [name for name, entry in sites.items() if entry.get("verified") is not True]
        if names:
            found.append(f"Their names rest on their own word: {', '.join(sorted(names))}.")
    pairs = run.manifest.get("shared_scans")
    for pair in pairs if isinstance(pairs, list) else []:
        if isinstance(pair, list) and len(pair) == 3:
            found.append(f"{pair[0]} and {pair[1]} hold {pair[2]} scans in common.")
    return found


def absences(run: Run) -> tuple[Sequence[Mapping[str, str]], int]:
    """List rounds that failed, who gave no update and why, and what became of late ones.

    Returns:
        Rows of `round`, `site`, `status`, `why`; and how many more there are.
    """
    rows = []
    for part in run.rounds:
        if part.failed:
            rows.append(_absence(part.number, "all", "failed", part.failed))
        for name, site in part.sites.items():
            if site.status not in ("ok", "evaluated"):
                rows.append(_absence(part.number, name, site.status, site.why))
        for name, asked, used in part.late:
            what = "averaged in this round, at a lower weight" if used else "left out"
            rows.append(
                _absence(part.number, name, "came late", f"update of round {asked}: {what}")
            )
    return rows[:_MOST_ROWS], max(0, len(rows) - _MOST_ROWS)


def _absence(number: int, site: str, status: str, why: str) -> dict[str, str]:
    return {"round": str(number), "site": site, "status": status, "why": why}
