"""How good the model is: curves over the rounds, and tables of metrics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedseg.data.plan import REGIONS
from fedseg.report.amounts import Value, metric_name, value_of
from fedseg.report.figures import Series, line_chart
from fedseg.report.headline import REGION_NAMES, SCOPES
from fedseg.report.run import Round, Run, Scores

__all__ = ["Figure", "Table", "curves", "metrics", "summary_table"]

_STYLES = (
    ("federated", "sites-line", "square"),
    ("unseen", "unseen-line", "diamond"),
    ("global", "server-line", "circle"),
)
"""Scope, class and marker of the bold lines; the last is drawn on top."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure with its caption and legend: class of a line to its name and marker."""

    drawing: Markup
    caption: str
    legend: Sequence[tuple[str, str, str]] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: its caption, the heads of its columns, rows of a head and cells.

    Attributes:
        corner: Head of the column of row heads.
        shaded: Whether cells are shaded by their share, as in a matrix.
    """

    caption: str
    corner: str
    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Value]]]
    shaded: bool = False


def curves(run: Run) -> list[Figure]:
    """Draw the Dice of each region over the rounds; sites are thin lines behind."""
    return [_curve(run, region) for region in REGIONS if _has(run, f"{region}.dice")]


def _has(run: Run, key: str) -> bool:
    return any(
        key in scores
        for part in run.rounds
        for scores in (*part.scopes.values(), *(site.metrics for site in part.sites.values()))
    )


def _curve(run: Run, region: str) -> Figure:
    key, name = f"{region}.dice", REGION_NAMES[region]
    sites = sorted({site for part in run.rounds for site in part.sites})
    thin = [
        Series(
            name=site,
            style="site-line",
            points=_points(run, key, [_site_scores(part, site) for part in run.rounds]),
        )
        for site in sites
    ]
    bold = [
        Series(
            name=SCOPES[scope],
            style=style,
            marker=marker,
            points=_points(run, key, [part.scopes.get(scope, {}) for part in run.rounds]),
        )
        for scope, style, marker in _STYLES
    ]
    thin, bold = ([part for part in lines if part.points] for lines in (thin, bold))
    legend = [(part.style, part.name, part.marker) for part in reversed(bold)]
    if thin:
        legend.append(("site-line", "held-out cases of one site", ""))
    drawing = line_chart(
        f"curve-{region}",
        f"Dice of the {name} over the rounds",
        " ".join(_in_words(part) for part in [*reversed(bold), *thin]),
        [*thin, *bold],
    )
    return Figure(drawing=drawing, caption=f"Dice, {name}", legend=legend)


def _points(run: Run, key: str, found: Sequence[Scores]) -> list[tuple[int, float]]:
    return [
        (part.number, scores[key])
        for part, scores in zip(run.rounds, found, strict=True)
        if key in scores
    ]


def _site_scores(part: Round, site: str) -> Scores:
    return part.sites[site].metrics if site in part.sites else {}


def _in_words(series: Series) -> str:
    first, last = series.points[0], series.points[-1]
    top = max(series.points, key=lambda point: point[1])
    return (
        f"{series.name}: {first[1]:.3f} in round {first[0]}, {last[1]:.3f} in round {last[0]}, "
        f"highest {top[1]:.3f} in round {top[0]}."
    )


def metrics(run: Run) -> list[Table]:
    """All metrics of the best round, and of the last one those that are measured only there."""
    if run.best is None:
        return []
    best, last = (_columns(part) for part in (run.best, run.rounds[-1]))
    keys = _keys(best.values())
    more = [key for key in _keys(last.values()) if key not in keys]
    tables = [summary_table(f"The best model, of round {run.best.number}", best)]
    if more:
        caption = f"The last model, of round {run.rounds[-1].number}: what only it is scored by"
        tables.append(_table(caption, last, more))
    return tables


def _columns(part: Round) -> dict[str, Scores]:
    return {SCOPES[scope]: part.scopes[scope] for scope in SCOPES if scope in part.scopes}


def summary_table(caption: str, columns: Mapping[str, Scores]) -> Table:
    """Show all metrics but the lesions': mean over cases, and pooled over voxels.

    Args:
        caption: Above the table.
        columns: Name of a set of cases to its summary, see `metrics.summarise`.
    """
    return _table(caption, columns, _keys(columns.values()))


def _table(caption: str, columns: Mapping[str, Scores], keys: Sequence[str]) -> Table:
    pooled = any(f"{key}.pooled" in scores for scores in columns.values() for key in keys)
    rows = []
    for key in keys:
        cells = []
        for scores in columns.values():
            cells.append(value_of(scores, key))
            if pooled:
                value = scores.get(f"{key}.pooled")
                cells.append(value_of({} if value is None else {key: value}, key))
        rows.append((_row_name(key), cells))
    heads = [head for name in columns for head in ([name, "pooled"] if pooled else [name])]
    return Table(caption=caption, corner="metric", heads=heads, rows=rows)


def _keys(columns: Iterable[Scores]) -> list[str]:
    """Metrics of any of the summaries but the lesions', in the order in which they stand there."""
    found: dict[str, None] = {}
    for scores in columns:
        for key in scores:
            # Of a region that nobody annotates only the counts are there.
            region, _, metric = key.removesuffix(".cases").partition(".")
            known = region in REGIONS and metric and not metric.endswith(".pooled")
            if known and not metric.startswith("lesion"):
                found[f"{region}.{metric}"] = None
    return sorted(found, key=lambda key: list(REGIONS).index(key.partition(".")[0]))


def _row_name(key: str) -> str:
    region, _, metric = key.partition(".")
    return f"{REGION_NAMES[region]}: {metric_name(metric)}"
