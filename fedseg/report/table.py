"""The result table of a run: region x metric, for the server's cases and each site."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fedseg.data.plan import REGIONS
from fedseg.segmentation.metrics import METRICS

__all__ = ["metric_table", "result_table"]

Summary = Mapping[str, float | int | None]


def metric_table(title: str, columns: Mapping[str, Summary], *, width: int = 120) -> str:
    """Draw region x metric with one column for each set of cases, as text.

    Args:
        title: Above the table.
        columns: Name of a set of cases to its summary (see `metrics.summarise`).
        width: Characters.
    """
    text = io.StringIO()
    names = list(columns)
    for start in range(0, max(len(names), 1), _SIDE_BY_SIDE):
        shown = {name: columns[name] for name in names[start : start + _SIDE_BY_SIDE]}
        table = _table(title if start == 0 else "", shown)
        Console(file=text, width=width).print(table)
    return text.getvalue()


_SIDE_BY_SIDE = 8
"""Columns that fit beside each other; a federation of more sites gets another table below."""


def _table(title: str, columns: Mapping[str, Summary]) -> Table:
    table = Table(title=title or None, title_justify="left")
    table.add_column("region")
    table.add_column("metric")
    for name in columns:
        table.add_column(name, justify="right")
    for region in REGIONS:
        for metric in METRICS:
            cells = [_cell(summary, f"{region}.{metric}") for summary in columns.values()]
            table.add_row(region, metric.replace("_", " "), *cells)
        table.add_section()
    table.add_row("", "cases", *[str(summary.get("cases", 0)) for summary in columns.values()])
    return table


def _cell(summary: Summary, key: str) -> str:
    value = summary.get(key)
    return "-" if value is None else f"{value:.3f}"


def result_table(history: Sequence[Mapping[str, Any]]) -> str:
    """Draw the last round: server's cases, all sites together, each site."""
    last = history[-1]
    columns: dict[str, Summary] = {}
    for scope in ("global", "unseen", "federated"):
        if last.get(scope, {}).get("cases"):
            columns[scope] = last[scope]
    for name, site in last["sites"].items():
        columns[name] = site.get("metrics") or {}
    title = f"Round {last['round']}: mean over cases"
    if "global" in columns:
        title += " (global: held out at the server)"
    return metric_table(title, columns)
