"""Tables of metrics as text: of a run's last round, of a folder's scores, of two models."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fedseg.data.plan import REGIONS
from fedseg.report.amounts import metric_name, written
from fedseg.segmentation.intervals import Difference, Interval
from fedseg.segmentation.lesions import BANDS
from fedseg.segmentation.metrics import METRICS

__all__ = [
    "beside",
    "difference_table",
    "drawn",
    "ends",
    "headed",
    "lesion_table",
    "metric_table",
    "result_table",
    "scores_table",
]

Summary = Mapping[str, float | int | None]

_SHOWN = {
    "liver": ("dice", "precision", "recall", "volume_similarity", "hd95", "nsd"),
    "tumor": (
        *("dice", "precision", "recall", "volume_similarity", "hd95", "nsd"),
        *("lesion_f1", "lesion_precision", "lesion_recall", "lesions_false_per_scan"),
    ),
}
"""Rows of a round's table; a row that wasn't measured is left out."""

_WIDTH = 120
_LEAST = 7  # a number, as "123.45"


def metric_table(title: str, columns: Mapping[str, Summary], *, width: int = _WIDTH) -> str:
    """Draw region x metric with one column for each set of cases, as text.

    Args:
        title: Above the table.
        columns: Name of a set of cases to its summary (see `metrics.summarise`).
        width: Characters.
    """
    metrics = {metric_name(metric) for shown in _SHOWN.values() for metric in shown}
    left = ("region", max(metrics, key=len))
    parts: list[str] = []
    for names in beside(left, columns, width=width):
        shown = {name: columns[name] for name in names}
        parts.append(drawn(_metric_part(title if not parts else "", shown), width))
    return "".join(parts)


def beside(
    left: Iterable[str], names: Iterable[str], *, width: int = _WIDTH
) -> Iterator[Sequence[str]]:
    """Part columns into as many as fit beside each other; the rest gets another table below.

    Args:
        left: The longest text of each column on the left.
        names: Heads of the columns that are parted, each of numbers.
        width: Characters.
    """
    room = width - 1 - sum(len(text) + 3 for text in left)
    part: list[str] = []
    for name in names:
        if part and sum(max(_LEAST, len(n)) + 3 for n in [*part, name]) > room:
            yield part
            part = []
        part.append(name)
    yield part


def drawn(table: Table, width: int = _WIDTH) -> str:
    """Draw a table as text of so many characters a line."""
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


def headed(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """Make an empty table; columns on the right hold numbers."""
    table = Table(title=title or None, title_justify="left")
    for head in left:
        table.add_column(head)
    for head in right:
        table.add_column(head, justify="right")
    return table


def _metric_part(title: str, columns: Mapping[str, Summary]) -> Table:
    table = headed(title, ("region", "metric"), list(columns))
    for region, metrics in _SHOWN.items():
        for metric in metrics:
            key = f"{region}.{metric}"
            if metric in ("hd95", "nsd") and not any(key in part for part in columns.values()):
                continue
            cells = [written(summary.get(key), metric) for summary in columns.values()]
            table.add_row(region, metric_name(metric), *cells)
        table.add_section()
    table.add_row("", "cases", *[str(summary.get("cases", 0)) for summary in columns.values()])
    return table


def ends(interval: Interval | None, metric: str) -> str:
    """Write an interval of a metric."""
    if interval is None:
        return "-"
    return f"{written(interval[0], metric)} to {written(interval[1], metric)}"


def scores_table(title: str, summary: Summary, intervals: Mapping[str, Interval]) -> str:
    """Draw all metrics of a folder: mean over the cases that define it, and pooled over voxels.

    Args:
        title: Above the table.
        summary: See `metrics.summarise`.
        intervals: Key of the summary to its 95% interval.
    """
    heads = ("per case", "95% interval", "cases", "pooled", "95% interval")
    table = headed(title, ("region", "metric"), heads)
    for region in REGIONS:
        for metric in METRICS:
            key = f"{region}.{metric}"
            if key not in summary:
                continue
            table.add_row(
                region,
                metric_name(metric),
                written(summary[key], metric),
                ends(intervals.get(key), metric),
                str(summary[f"{key}.cases"]),
                written(summary.get(f"{key}.pooled"), metric),
                ends(intervals.get(f"{key}.pooled"), metric),
            )
        table.add_section()
    table.add_row("", "all cases", "", "", str(summary["cases"]), "", "")
    return drawn(table)


def lesion_table(title: str, summary: Summary, intervals: Mapping[str, Interval]) -> str:
    """Draw which lesions are found, by size; see `lesions.lesion_summary`."""
    heads = ("lesions", "found", "false", "precision", "recall", "F1", "95% interval of F1")
    table = headed(title, ("size",), heads)
    lower = 0.0
    for band, upper in [*BANDS.items(), ("", 0.0)]:
        suffix = f"_{band}" if band else ""
        numbers = [summary[f"tumor.{name}{suffix}"] for name in ("lesions", "lesions_found")]
        numbers.append(summary[f"tumor.lesions_false{suffix}"])
        rates = [summary[f"tumor.lesion_{name}{suffix}"] for name in ("precision", "recall", "f1")]
        table.add_row(
            _size(band, lower, upper),
            *(str(number) for number in numbers),
            *(written(rate, "") for rate in rates),
            ends(intervals.get(f"tumor.lesion_f1{suffix}"), ""),
            end_section=upper == list(BANDS.values())[-1],
        )
        lower = upper
    scan, free = (
        written(summary[f"tumor.lesions_false_per_{name}"], "lesions_false_per_scan")
        for name in ("scan", "lesion_free_scan")
    )
    count = summary["tumor.lesion_free_cases"]
    apart = f"; {free} a scan in the {count} without tumour" if count else ""
    return f"{drawn(table)}False lesions: {scan} a scan{apart}\n"


def _size(band: str, lower: float, upper: float) -> str:
    if not band:
        return "all"
    if lower == 0:
        return f"{band}: under {upper:g} mm"
    return f"{band}: {lower:g} mm and more" if upper == float("inf") else f"{band}: to {upper:g} mm"


def difference_table(title: str, found: Mapping[str, Difference]) -> str:
    """Draw a paired comparison of two models; see `intervals.paired_differences`."""
    heads = ("pairs", "model", "against", "difference", "95% interval", "p (Wilcoxon)")
    table = headed(title, ("region", "metric"), heads)
    for key, one in found.items():
        region, _, metric = key.partition(".")
        table.add_row(
            region,
            metric_name(metric),
            str(one.pairs),
            written(one.one, metric),
            written(one.other, metric),
            written(one.difference, metric, sign=True),
            "-" if one.low is None or one.high is None else ends((one.low, one.high), metric),
            "-" if one.p is None else f"{one.p:.3g}",
        )
    return drawn(table)


def result_table(history: Sequence[Mapping[str, Any]]) -> str:
    """Draw the last round that has scores: server's cases, all sites together, each site.

    Under secure aggregation no site's own are known.
    """
    scopes = ("global", "unseen", "federated")
    scored = [line for line in history if any(line.get(scope, {}).get("cases") for scope in scopes)]
    last = scored[-1] if scored else history[-1]
    columns: dict[str, Summary] = {}
    for scope in scopes:
        if last.get(scope, {}).get("cases"):
            columns[scope] = last[scope]
    if any(site.get("metrics") for site in last["sites"].values()):
        columns |= {name: site.get("metrics") or {} for name, site in last["sites"].items()}
    if not columns:
        return "Nothing was scored: no cases are held out, at the server or at the sites."
    title = f"Round {last['round']}: mean over cases"
    if "global" in columns:
        title += " (global: held out at the server)"
    return metric_table(title, columns)
