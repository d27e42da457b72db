"""Alone or together: each site's own model, pooled and federated side by side, and everywhere."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from fedseg.report.amounts import UNDEFINED, Value, metric_name, signed, value_of
from fedseg.report.headline import REGION_NAMES
from fedseg.report.quality import Table
from fedseg.report.run import Run, Scores
from fedseg.segmentation.comparison import FEDERATED, LOCAL, POOLED

__all__ = ["compared", "differences", "matrices"]

_METRICS = ("dice", "nsd", "hd95")


def compared(run: Run) -> Table | None:
    """Show the models' scores on the same cases; None where nothing was compared."""
    keys = [
        f"{region}.{metric}"
        for metric in _METRICS
        for region in REGION_NAMES
        if _in_any(run.compared.values(), f"{region}.{metric}")
    ]
    if not keys:
        return None
    rows = [
        (_model_name(name), [value_of(row, key, bar=key.endswith(".dice")) for key in keys])
        for name, row in run.compared.items()
    ]
    heads = [f"{metric_name(metric)}, {REGION_NAMES[region]}" for region, metric in _parts(keys)]
    caption = "Each model on the same cases"
    return Table(caption=caption, corner="model", heads=heads, rows=rows)


def _parts(keys: Iterable[str]) -> list[tuple[str, str]]:
    return [(key.partition(".")[0], key.partition(".")[2]) for key in keys]


def _in_any(rows: Iterable[Scores], key: str) -> bool:
    return any(key in row for row in rows)


def _model_name(row: str) -> str:
    if row.startswith(LOCAL):
        return f"{row.removeprefix(LOCAL)} alone"
    return {POOLED: "all data in one place", FEDERATED: "federated"}.get(row, row)


def differences(run: Run) -> Table | None:
    """Show by how much the federated model's Dice is higher, with its 95% interval."""
    keys = [
        f"{region}.dice"
        for region in REGION_NAMES
        if any(f"{region}.dice" in row for row in run.differences.values())
    ]
    if not keys:
        return None
    rows = [
        (f"against {_model_name(name)}", [_difference(row.get(key, {})) for key in keys])
        for name, row in run.differences.items()
    ]
    return Table(
        caption="Dice of the federated model minus that of another, case by case, and 95% interval",
        corner="model",
        heads=[f"Dice, {REGION_NAMES[region]}" for region, _ in _parts(keys)],
        rows=rows,
    )


def _difference(found: Scores) -> Value:
    if "difference" not in found:
        return Value(text=UNDEFINED, note="no case")
    ends = [signed(found[end]) for end in ("low", "high") if end in found]
    note = " to ".join(ends) if len(ends) == 2 else "too few cases for an interval"
    return Value(text=signed(found["difference"]), note=note)


def matrices(run: Run) -> list[Table]:
    """Show each site's model, and those of all sites, on each site's cases: a matrix a region."""
    models: Mapping[str, Mapping[str, Scores]] = {
        **{f"{site} alone": row for site, row in run.matrix.items()},
        **{_model_name(name): row for name, row in run.everywhere.items()},
    }
    columns = list(dict.fromkeys(other for row in models.values() for other in row))
    found = []
    for region, name in REGION_NAMES.items():
        key = f"{region}.dice"
        rows = [
            (
                model,
                [
                    _cell(row.get(other, {}), key, own=model == f"{other} alone")
                    for other in columns
                ],
            )
            for model, row in models.items()
        ]
        if any(_in_any(row.values(), key) for row in models.values()):
            heads = [f"cases of {other}" for other in columns]
            caption = f"Dice of the {name}, by model and site of the cases"
            found.append(
                Table(caption=caption, corner="model", heads=heads, rows=rows, shaded=True)
            )
    return found


def _cell(scores: Scores, key: str, *, own: bool) -> Value:
    value = value_of(scores, key, bar=True, mark="own" if own else "")
    # Counts are those of the column, the same in each row: only an undefined cell needs its own.
    return replace(value, note="") if value.share is not None else value
