"""A comparison as text: all models in one table, the site x site matrix, the differences."""

from collections.abc import Mapping
from typing import Any

from fedseg.data.plan import REGIONS
from fedseg.report.amounts import written
from fedseg.report.table import beside, drawn, ends, headed
from fedseg.segmentation.comparison import FEDERATED, LOCAL

__all__ = ["comparison_text"]

_COLUMNS = ("liver.dice", "tumor.dice", "liver.hd95", "tumor.hd95", "tumor.lesion_f1")
_HEADS = ("liver Dice", "tumor Dice", "liver HD95, mm", "tumor HD95, mm", "lesion F1")


def comparison_text(found: Mapping[str, Any]) -> str:
    """Draw what `comparison.compare` returns."""
    parts = [_models(found), _differences(found)]
    parts += [_matrix(found, region) for region in REGIONS]
    return "".join(parts)


def _models(found: Mapping[str, Any]) -> str:
    title = (
        f"Each model after {found['steps']} steps ({FEDERATED}: as many at each site); mean over "
        f"{found['cases']} held-out cases of all sites"
    )
    table = headed(title, ("model",), _HEADS)
    for model, row in found["rows"].items():
        cells = [written(row.get(key), key.partition(".")[2]) for key in _COLUMNS]
        table.add_row(_name(model), *cells)
    return drawn(table)


def _name(model: str) -> str:
    return f"{model.removeprefix(LOCAL)} alone" if model.startswith(LOCAL) else model


def _differences(found: Mapping[str, Any]) -> str:
    title = f"Dice of {FEDERATED} minus the other model's, on the same cases"
    table = headed(title, ("other model", "region"), ("pairs", "difference", "95% interval", "p"))
    for model, entries in found["differences"].items():
        for region in REGIONS:
            entry = entries.get(f"{region}.dice")
            if entry is None:
                continue
            low, high, p = entry["low"], entry["high"], entry["p"]
            table.add_row(
                _name(model),
                region,
                str(entry["pairs"]),
                f"{entry['difference']:+.3f}",
                ends(None if low is None else (low, high), "dice"),
                "-" if p is None else f"{p:.3g}",
            )
    return drawn(table)


def _matrix(found: Mapping[str, Any], region: str) -> str:
    rows = {LOCAL + site: row for site, row in found["matrix"].items()} | found["per_site"]
    sites = list(dict.fromkeys(site for row in rows.values() for site in row))
    longest = [max(map(len, names)) * "-" for names in (map(_name, rows), sites)]
    parts: list[str] = []
    for shown in beside((*longest, "spread"), sites):
        first = not parts
        title = f"{region} Dice on each site's held-out cases, and its lowest" if first else ""
        table = headed(title, ("model",), (*(("lowest", "spread") if first else ()), *shown))
        for model, row in rows.items():
            cells = [written(row.get(site, {}).get(f"{region}.dice"), "dice") for site in shown]
            lowest = _lowest(found["spread"][model].get(region)) if first else ()
            table.add_row(_name(model), *lowest, *cells)
        parts.append(drawn(table))
    return "".join(parts)


def _lowest(entry: Mapping[str, Any] | None) -> tuple[str, str]:
    """Site with the lowest Dice, and how far the highest lies over it."""
    return ("-", "-") if entry is None else (entry["worst"], written(entry["spread"], "dice"))
