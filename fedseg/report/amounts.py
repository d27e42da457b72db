"""Numbers as people read them: scores with their counts, bytes, seconds, metrics by name."""

import math
from dataclasses import dataclass

from fedseg.report.run import Scores
from fedseg.segmentation.lesions import BANDS

__all__ = [
    "METRICS",
    "UNDEFINED",
    "Value",
    "metric_name",
    "seconds",
    "signed",
    "size",
    "value_of",
    "written",
]

METRICS = {
    "dice": ("Dice", 3),
    "iou": ("IoU", 3),
    "precision": ("precision", 3),
    "recall": ("recall (sensitivity)", 3),
    "volume_similarity": ("volume similarity", 3),
    "hd95": ("HD95 (95% Hausdorff), mm", 2),
    "assd": ("ASSD (mean distance), mm", 2),
    "nsd": ("NSD (surface Dice)", 3),
    "volume_ml": ("predicted volume, mL", 1),
    "volume_error_ml": ("volume error, mL", 1),
    "volume_abs_error_ml": ("absolute volume error, mL", 1),
    "lesion_precision": ("lesion precision", 3),
    "lesion_recall": ("lesion recall", 3),
    "lesion_f1": ("lesion F1", 3),
    "lesions": ("lesions", 0),
    "lesions_found": ("lesions found", 0),
    "lesions_false": ("false lesions", 0),
    "lesions_false_per_scan": ("false lesions a scan", 2),
    "lesion_free_cases": ("scans without lesion", 0),
    "lesions_false_per_lesion_free_scan": ("false lesions a scan without", 2),
}
"""Metric to its name with unit, and its decimals. Lesions by size have a suffix (`_small`)."""

UNDEFINED = "\N{EN DASH}"
"""Shown for what no case defines."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A number in a table.

    Attributes:
        text: As shown, a dash where it is undefined.
        note: How many cases it is over.
        share: 0 to 1 for a bar beside it, None for none.
        mark: Word that sets it apart, such as `lowest`.
    """

    text: str
    note: str = ""
    share: float | None = None
    mark: str = ""


def metric_name(metric: str) -> str:
    """Name a metric (`dice`, `hd95`, `lesion_f1_small`) with its unit; any other by its key."""
    base, band = _base(metric)
    name = METRICS[base][0] if base in METRICS else base.replace("_", " ").replace(".", " ")
    return f"{name}, {band}" if band else name


def written(value: float | None, metric: str, *, sign: bool = False, undefined: str = "-") -> str:
    """Write a metric with its decimals, those of a score where it isn't known."""
    if value is None:
        return undefined
    digits = METRICS.get(_base(metric)[0], METRICS["dice"])[1]
    return f"{value:{'+' if sign else ''}.{digits}f}"


def _base(metric: str) -> tuple[str, str]:
    for band in BANDS:
        if metric.endswith(f"_{band}"):
            return metric.removesuffix(f"_{band}"), band
    return metric, ""


def value_of(scores: Scores, key: str, *, bar: bool = False, mark: str = "") -> Value:
    """Show a metric and over how many cases it is; undefined is a dash with its count.

    Args:
        scores: A summary; `key` and `key.cases` are read.
        key: Such as `liver.dice`.
        bar: Draw a bar; for metrics from 0 to 1.
        mark: Word that sets it apart.
    """
    value, count = scores.get(key), scores.get(f"{key}.cases")
    if count is None and value is None and "cases" in scores:
        count = 0.0
    note = "" if count is None else f"{count:.0f} case{'' if count == 1 else 's'}"
    if value is None:
        return Value(text=UNDEFINED, note=note)
    share = min(max(value, 0.0), 1.0) if bar else None
    text = written(value, key.partition(".")[2]).replace("-", "\N{MINUS SIGN}")
    return Value(text=text, note=note, share=share, mark=mark)


def signed(value: float) -> str:
    """Show a difference with its sign."""
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def size(count: float) -> str:
    """Show bytes: 1 MB is a million bytes."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            amount = count / factor
            return f"{amount:.{max(0, 2 - int(math.log10(amount)))}f} {unit}"
    return f"{count:.0f} bytes"


def seconds(count: float) -> str:
    """Show seconds: as they are below two minutes, then minutes, then hours."""
    if count < 120:
        return f"{count:.0f} s" if count >= 10 or count == 0 else f"{count:.1f} s"
    if count < 2 * 3600:
        return f"{count / 60:.0f} min"
    return f"{count / 3600:.1f} h"
