"""A run as it goes on, in the terminal: curves, a table of sites, time left."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedseg.report.amounts import UNDEFINED, seconds, size, value_of
from fedseg.report.headline import REGION_NAMES, SCOPES, main_scope
from fedseg.report.run import Round, Run
from fedseg.report.run_files import read_run, text

__all__ = ["finished", "follow", "left", "sparkline", "view"]

_BARS = "\N{LOWER ONE EIGHTH BLOCK}\N{LOWER ONE QUARTER BLOCK}\N{LOWER THREE EIGHTHS BLOCK}" + (
    "\N{LOWER HALF BLOCK}\N{LOWER FIVE EIGHTHS BLOCK}\N{LOWER THREE QUARTERS BLOCK}"
    "\N{LOWER SEVEN EIGHTHS BLOCK}\N{FULL BLOCK}"
)

_RECENT = 5
"""Rounds whose mean says how long the next ones take."""


def sparkline(values: Sequence[float], *, width: int = 40) -> str:
    """Draw values from 0 to 1 as blocks, the last `width` of them."""
    shown = values[-width:]
    return "".join(_BARS[min(7, max(0, math.floor(value * 8)))] for value in shown)


def left(run: Run) -> float | None:
    """Seconds that are left, by the mean of the last rounds; None where nobody can know."""
    trained = [part for part in run.rounds if part.number > 0]
    if not trained or finished(run):
        return None
    recent = trained[-_RECENT:]
    mean = sum(part.seconds for part in recent) / len(recent)
    return mean * max(0, run.wanted_rounds - trained[-1].number)


def finished(run: Run) -> bool:
    """Whether the run has ended, well or not."""
    return run.manifest.get("status") in ("completed", "failed")


def view(run: Run) -> RenderableType:
    """Draw what a run has reached; fits 80 columns."""
    last = run.rounds[-1] if run.rounds else None
    parts: list[RenderableType] = [_status(run, last)]
    if last is not None:
        parts += [_curves(run), _sites(last)]
    return Group(*parts)


def _status(run: Run, last: Round | None) -> Text:
    status = text(run.manifest.get("status")) or "starting"
    words = [f"{run.id}: {status}"]
    if last is not None:
        of = f" of {run.wanted_rounds}" if run.wanted_rounds else ""
        words.append(f"round {last.number}{of}")
        words.append(f"last round {seconds(last.seconds)}")
    failed = [part for part in run.rounds if part.failed]
    if failed:
        words.append(f"{len(failed)} failed")
    rest = left(run)
    if rest is not None:
        words.append(f"about {seconds(rest)} left")
    error = text(run.manifest.get("error")) or (failed[-1].failed if failed else "")
    return Text(" \N{MIDDLE DOT} ".join(words) + (f"\n{error}" if error else ""))


def _curves(run: Run) -> Table:
    curves = Table(box=None, pad_edge=False, show_header=False)
    best = run.best
    scope = main_scope(best) if best else "federated"
    for region, name in REGION_NAMES.items():
        key = f"{region}.dice"
        values = [
            part.scopes[scope][key]
            for part in run.rounds
            if scope in part.scopes and key in part.scopes[scope]
        ]
        if values:
            reached = f"{values[-1]:.3f} (best {max(values):.3f})"
            curves.add_row(f"Dice, {name}", sparkline(values), reached)
    if curves.rows:
        curves.add_row("", f"0 to 1; {SCOPES[scope]}")
    return curves


def _sites(last: Round) -> Table:
    heads = ("site", "status", "time", "sent", *(f"Dice, {n}" for n in REGION_NAMES.values()))
    sites = Table(title=f"Round {last.number}", title_justify="left")
    for head in heads:
        sites.add_column(head, justify="left" if head in ("site", "status") else "right")
    for name, site in last.sites.items():
        dice = [value_of(site.metrics, f"{region}.dice").text for region in REGION_NAMES]
        time = seconds(site.seconds) if site.seconds else UNDEFINED
        # As Text: a name is no markup.
        cells = (name, site.status, time, size(site.bytes_up), *dice)
        sites.add_row(*(Text(cell) for cell in cells))
    return sites


def follow(
    folder: Path, show: Callable[[RenderableType], object], wait: Callable[[], object]
) -> Run:
    """Show a run each time `wait` returns, until it has ended; return what it was then.

    Args:
        folder: The run folder.
        show: Takes what is to be seen.
        wait: Returns when it is time to look again.

    Raises:
        StudyError: It is no run folder.
    """
    while True:
        run = read_run(folder)
        show(view(run))
        if finished(run):
            return run
        wait()
