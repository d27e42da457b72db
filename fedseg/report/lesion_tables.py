"""Which lesions the best model finds, by size: a table for each set of cases."""

import math

from fedseg.report.amounts import Value, value_of
from fedseg.report.headline import SCOPES
from fedseg.report.quality import Table
from fedseg.report.run import Run, Scores
from fedseg.segmentation.lesions import BANDS, LESION_OVERLAP

__all__ = ["lesion_notes", "lesion_tables"]

_COLUMNS = {
    "lesions": "lesions",
    "lesions_found": "found",
    "lesions_false": "false",
    "lesion_recall": "share found (recall)",
    "lesion_precision": "share true (precision)",
    "lesion_f1": "F1",
}
"""Metric (see `lesions.lesion_summary`) to the head of its column."""


def lesion_tables(run: Run) -> list[Table]:
    """Show lesions by size; none where nothing was counted."""
    scopes = run.best.scopes if run.best else {}
    return [
        Table(
            caption=f"Lesions in {SCOPES[scope]}",
            corner="diameter",
            heads=list(_COLUMNS.values()),
            rows=_rows(scopes[scope]),
        )
        for scope in SCOPES
        if "tumor.lesions" in scopes.get(scope, {})
    ]


def _rows(scores: Scores) -> list[tuple[str, list[Value]]]:
    sizes, lower = {"all": ""}, 0.0
    for band, upper in BANDS.items():
        under = "" if upper == math.inf else f"under {upper:g} mm"
        over = f"{lower:g} mm and over" if lower else ""
        sizes[f"{lower:g} to {upper:g} mm" if under and over else under or over] = f"_{band}"
        lower = upper
    return [
        (name, [_cell(scores, f"tumor.{metric}{suffix}") for metric in _COLUMNS])
        for name, suffix in sizes.items()
    ]


def _cell(scores: Scores, key: str) -> Value:
    return value_of({key: scores[key]} if key in scores else {}, key)


def lesion_notes(run: Run) -> list[str]:
    """Say what counts as found, and how many false lesions a scan has."""
    notes = []
    for scope, name in SCOPES.items():
        scores = run.best.scopes.get(scope, {}) if run.best else {}
        a_scan = scores.get("tumor.lesions_false_per_scan")
        if a_scan is None:
            continue
        free = scores.get("tumor.lesions_false_per_lesion_free_scan")
        count = scores.get("tumor.lesion_free_cases", 0)
        scans = f"{count:.0f} scan{'' if count == 1 else 's'}"
        more = "" if free is None else f"; {free:.2f} in each of {scans} without any lesion"
        notes.append(f"False lesions in {name}: {a_scan:.2f} a scan{more}.")
    if notes:
        how = (
            f"A lesion is found where prediction and mask share over {LESION_OVERLAP:.0%} of what "
            "they cover together; the diameter is that of a ball of the same volume."
        )
        notes.insert(0, how)
    return notes
