"""A comparison as text: all models in one table, the site x site matrix, the differences."""

from collections.abc import Mapping
from typing import Any

from fedseg.data.plan import REGIONS
from fedseg.report.amounts import written
from fedseg.report.table import drawn, ends, headed
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
    title = f"{found['steps']} steps each; mean over {found['cases']} held-out cases of all sites"
    table = headed(title, ("model",), (*_HEADS, "worst site, liver", "worst site, tumor"))
    for model, row in found["rows"].items():
        cells = [written(row.get(key), key.partition(".")[2]) for key in _COLUMNS]
        table.add_row(_name(model), *cells, *(_worst(found, model, region) for region in REGIONS))
    return drawn(table)


def _name(model: str) -> str:
    return f"{model.removeprefix(LOCAL)} alone" if model.startswith(LOCAL) else model


def _worst(found: Mapping[str, Any], model: str, region: str) -> str:
    entry = found["spread"][model].get(region)
    if entry is None:
        return "-"
    return f"{entry['worst']} {entry['dice']:.3f}, best +{entry['spread']:.3f}"


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
    rows = {f"{site} alone": row for site, row in found["matrix"].items()} | found["per_site"]
    sites = list(dict.fromkeys(site for row in rows.values() for site in row))
    table = headed(f"{region} Dice on each site's held-out cases", ("model",), sites)
    for model, row in rows.items():
        cells = [written(row.get(site, {}).get(f"{region}.dice"), "dice") for site in sites]
        table.add_row(model, *cells)
    return drawn(table)
