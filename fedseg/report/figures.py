"""Figures as inline SVG: lines and bars over the rounds, each with a text for screen readers.

Colours are classes of the page's style, so that a figure follows light, dark and print.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["Series", "bar_chart", "line_chart"]

_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 40
_MARKED = 24
"""With more points than these only the last one of a line is marked."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or one layer of bars.

    Attributes:
        name: What it shows.
        style: Class of the style sheet: its colour, dash and marker.
        points: Round and value, in order of the rounds.
        marker: `circle`, `square`, `diamond`, or `""` for a thin line in the background.
    """

    name: str
    style: str
    points: Sequence[tuple[int, float]]
    marker: str = ""


def line_chart(key: str, title: str, summary: str, series: Sequence[Series]) -> Markup:
    """Draw values from 0 to 1 over the rounds.

    Args:
        key: Unique in the page; letters, digits and -.
        title: One line.
        summary: What a person who can't see the figure has to know.
        series: Thin lines first: later ones are drawn over them.
    """
    rounds = [count for part in series for count, _ in part.points]
    first, last = min(rounds, default=0), max(rounds, default=1)
    x = _Scale(first, max(last, first + 1), _LEFT, _WIDTH - _RIGHT)
    y = _Scale(0.0, 1.0, _HEIGHT - _BOTTOM, _TOP)
    body = [_grid(y, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], "{:.1f}"), _round_axis(x, first, last)]
    body += [_line(part, x, y) for part in series if part.points]
    return _svg(key, title, summary, body)


def bar_chart(key: str, title: str, summary: str, layers: Sequence[Series], *, unit: str) -> Markup:
    """Draw amounts over the rounds, layers on top of each other.

    Args:
        key: Unique in the page; letters, digits and -.
        title: One line.
        summary: What a person who can't see the figure has to know.
        layers: Lowest first.
        unit: Of the amounts.
    """
    totals: dict[int, float] = {}
    for layer in layers:
        for count, value in layer.points:
            totals[count] = totals.get(count, 0.0) + max(value, 0.0)
    first, last = min(totals, default=0), max(totals, default=1)
    step = _nice_step(max(totals.values(), default=1.0) / 4)
    top = step * max(1, math.ceil(max(totals.values(), default=1.0) / step - 1e-9))
    x = _Scale(first - 0.5, last + 0.5, _LEFT, _WIDTH - _RIGHT)
    y = _Scale(0.0, top, _HEIGHT - _BOTTOM, _TOP)
    ticks = [step * n for n in range(round(top / step) + 1)]
    body = [_grid(y, ticks, "{:g}"), _round_axis(x, first, last)]
    width = max(1.0, 0.7 * (x(1) - x(0)))
    reached = dict.fromkeys(totals, 0.0)
    for layer in layers:
        for count, value in layer.points:
            low, reached[count] = reached[count], reached[count] + max(value, 0.0)
            rect = (x(count) - width / 2, y(reached[count]), width, y(low) - y(reached[count]))
            body.append(
                Markup(
                    '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
                    "<title>{}, round {}: {:.4g} {}</title></rect>"
                ).format(layer.style, *rect, layer.name, count, value, unit)
            )
    return _svg(key, title, summary, body)


@dataclass(frozen=True)
class _Scale:
    """From data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _nice_step(least: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    if not 1e-9 < least < 1e18:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * 0.999)


def _grid(y: _Scale, ticks: Sequence[float], form: str) -> Markup:
    lines = Markup('<path class="grid" d="{}"/>').format(
        "".join(f"M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}" for tick in ticks)
    )
    labels = [
        Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
            _LEFT - 6, y(tick) + 4, form.format(tick)
        )
        for tick in ticks
    ]
    return lines + Markup("").join(labels)


def _round_axis(x: _Scale, first: int, last: int) -> Markup:
    step = max(1, round(_nice_step((last - first) / 8)))
    labels = [
        Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            x(count), _HEIGHT - _BOTTOM + 16, count
        )
        for count in range(math.ceil(first / step) * step, last + 1, step)
    ]
    name = Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">round</text>').format(
        (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6
    )
    return Markup("").join([*labels, name])


def _line(series: Series, x: _Scale, y: _Scale) -> Markup:
    places = [(x(count), y(min(max(value, 0.0), 1.0))) for count, value in series.points]
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
    marked = places if len(places) <= _MARKED else places[-1:]
    if not series.marker:
        marked = places if len(places) == 1 else []
    markers = Markup("").join(_marker(series.marker, a, b) for a, b in marked)
    return Markup('<g class="{}"><title>{}</title><path class="line" d="{}"/>{}</g>').format(
        series.style, series.name, path, markers
    )


def _marker(kind: str, a: float, b: float) -> Markup:
    shapes = {
        "square": '<rect x="{0:.1f}" y="{1:.1f}" width="7" height="7"/>',
        "diamond": '<path d="M{2:.1f} {1:.1f}l4.6 4.6l-4.6 4.6l-4.6-4.6z"/>',
    }
    if kind in shapes:
        half = 3.5 if kind == "square" else 4.6
        return Markup(shapes[kind]).format(a - half, b - half, a)
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(a, b, 3.6 if kind else 2)


def _svg(key: str, title: str, summary: str, body: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg viewBox="0 0 {w} {h}" role="img" aria-labelledby="{k}-title {k}-summary">'
        '<title id="{k}-title">{t}</title><desc id="{k}-summary">{s}</desc>{b}</svg>'
    ).format(
        w=_WIDTH,
        h=_HEIGHT,
        k=key,
        t=escape(title),
        s=escape(summary),
        b=Markup("").join(body),
    )
