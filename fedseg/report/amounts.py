"""Numbers as people read them: scores with their counts, bytes, seconds, metrics by name."""

import math
from dataclasses import dataclass

from fedseg.report.run import Scores

__all__ = [
    "METRIC_NAMES",
    "UNDEFINED",
    "Value",
    "metric_name",
    "seconds",
    "signed",
    "size",
    "value_of",
]

METRIC_NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall (sensitivity)",
    "volume_similarity": "volume similarity",
    "hd95": "95% Hausdorff distance, mm",
    "assd": "average surface distance, mm",
    "nsd": "surface Dice (NSD)",
    "volume_ml": "predicted volume, mL",
    "volume_error_ml": "volume error, mL",
    "volume_abs_error_ml": "size of the volume error, mL",
}
"""Metric to its name and unit; any other is shown by its key."""

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
    """Name a metric (`dice`, `hd95`) as a table does."""
    return METRIC_NAMES.get(metric, metric.replace("_", " ").replace(".", " "))


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
    digits = 3 if abs(value) < 10 else 1
    return Value(
        text=f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}"), note=note, share=share, mark=mark
    )


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
