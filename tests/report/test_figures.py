"""Tests of the figures' geometry, read back from the SVG."""

import re
import xml.etree.ElementTree as ET

import pytest

from fedseg.report.figures import Series, bar_chart, line_chart


def parsed(drawing: str) -> ET.Element:
    return ET.fromstring(drawing)


def ticks(svg: ET.Element, anchor: str) -> dict[float, float]:
    """Value of a tick to its place: `end` for the vertical axis, `middle` for the rounds."""
    found = {}
    for text in svg.iter("text"):
        if text.get("text-anchor") == anchor and text.get("class") == "tick":
            place = float(text.get("y", "")) - 4 if anchor == "end" else float(text.get("x", ""))
            found[float(text.text or "")] = place
    return found


def at(scale: dict[float, float], value: float) -> float:
    (low, a), (high, b) = min(scale.items()), max(scale.items())
    return a + (value - low) / (high - low) * (b - a)


@pytest.mark.parametrize("rounds", [1, 2, 7, 100, 999])
def test_points_lie_at_their_values(rounds: int) -> None:
    points = [(n, (n * 37 % 100) / 100) for n in range(rounds + 1)]
    svg = parsed(line_chart("key", "t", "s", [Series(name="a", style="x", points=points)]))
    across, up = ticks(svg, "middle"), ticks(svg, "end")
    assert 2 <= len(across) <= 12 and set(across) <= {float(n) for n, _ in points}
    path = next(p.get("d", "") for p in svg.iter("path") if p.get("class") == "line")
    places = [tuple(map(float, place.split())) for place in path[1:].split("L")]
    assert len(places) == len(points)
    for (n, value), (x, y) in zip(points, places, strict=True):
        assert x == pytest.approx(at(across, n), abs=0.2)
        assert y == pytest.approx(at(up, value), abs=0.2)


@pytest.mark.parametrize("values", [[0.0], [-0.5, 1.5], []])
def test_odd_values_stay_in_the_frame(values: list[float]) -> None:
    series = Series(name="a", style="x", points=list(enumerate(values)), marker="circle")
    svg = parsed(line_chart("key", "t", "s", [series]))
    _, _, width, height = map(float, svg.get("viewBox", "").split())
    for path in svg.iter("path"):
        for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.get("d", "")):
            assert 0 <= float(x) <= width and 0 <= float(y) <= height


@pytest.mark.parametrize("scale", [1e-3, 1.0, 37.0, 1e6])
def test_bars_stand_on_each_other(scale: float) -> None:
    low = Series(name="up", style="one", points=[(1, 2 * scale), (2, 3 * scale)])
    high = Series(name="down", style="two", points=[(1, scale), (2, 0.0)])
    svg = parsed(bar_chart("key", "t", "s", [low, high], unit="MB"))
    up = ticks(svg, "end")
    assert max(up) >= 3 * scale > max(up) / 2
    bars = [
        {name: float(bar.get(name, "")) for name in ("x", "y", "width", "height")}
        for bar in svg.iter("rect")
    ]
    first, second, top, none = bars
    unit = at(up, 0) - at(up, scale)
    assert first["height"] == pytest.approx(2 * unit, abs=0.2)
    assert second["height"] == pytest.approx(3 * unit, abs=0.2)
    assert top["y"] + top["height"] == pytest.approx(first["y"], abs=0.2)
    assert none["height"] == 0
    assert first["x"] + first["width"] < second["x"]
    assert "up, round 1" in (next(svg.iter("rect")).findtext("title") or "")


def test_nothing_to_draw_is_a_frame() -> None:
    assert parsed(bar_chart("key", "t", "s", [], unit="s")).get("role") == "img"


def test_text_for_those_who_cannot_see_it() -> None:
    svg = parsed(line_chart("k", "<title> & more", 'it\'s "up"', []))
    assert (svg.findtext("title"), svg.findtext("desc")) == ("<title> & more", 'it\'s "up"')
    assert svg.get("aria-labelledby") == "k-title k-summary"
