"""Charts: where points land, what axes say, what is left out. Parsed as XML."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from dancegrpo_fast.report.chart import (
    MOST_POINTS,
    Series,
    heat_map,
    line_chart,
    number_text,
    sparkline,
    stacked_chart,
    ticks,
)


def parsed(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(figure)


def line(figure: str, number: int = 1) -> list[tuple[float, float]]:
    """Corners of one line of a chart."""
    group = parsed(figure).find(f".//g[@class='line s{number}']")
    assert group is not None
    (path, *_) = group.findall("path")
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+?) ([\d.]+)", path.get("d", ""))]


def labels(figure: str, anchor: str) -> dict[float, float]:
    """Value -> position of the numbers along an axis: "end" the vertical, "middle" the other."""
    found = {}
    for text in parsed(figure).iter("text"):
        if text.get("text-anchor") == anchor and text.text != "iteration":
            at = text.get("y" if anchor == "end" else "x")
            found[float(str(text.text))] = float(str(at)) - (4 if anchor == "end" else 0)
    return found


def test_points_land_where_the_axes_say():
    figure = line_chart("x", [Series("a", [(0, 0.5), (5, 0.61), (20, 0.7)])])
    across, up = labels(figure, "middle"), labels(figure, "end")

    def place(iteration: float, value: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = ([*axis.items()][:: len(axis) - 1] for axis in (across, up))
        return tuple(
            p0 + (v - v0) * (p1 - p0) / (v1 - v0)
            for v, ((v0, p0), (v1, p1)) in ((iteration, (x0, x1)), (value, (y0, y1)))
        )

    # A tenth is what positions are rounded to.
    for corner, point in zip(line(figure), [(0, 0.5), (5, 0.61), (20, 0.7)], strict=True):
        assert corner == pytest.approx(place(*point), abs=0.15)
    assert up[max(up)] < up[min(up)]  # SVG counts downwards: a rising value rises.


def test_a_logarithmic_axis_has_equal_decades_and_leaves_zero_out():
    figure = line_chart("x", [Series("a", [(1, 1e-4), (2, 0.0), (3, 1e-2), (4, 1.0)])], log=True)
    corners = line(figure)
    assert len(corners) == 3
    heights = [y for _, y in corners]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert list(labels(figure, "end")) == [1e-4, 1e-3, 1e-2, 1e-1, 1.0]


def test_bars_are_one_error_up_and_down():
    points = [(0, 1.0), (1, 2.0)]
    figure = line_chart("x", [Series("a", points, [0.0, 0.5])])
    group = parsed(figure).find(".//g[@class='line s1']")
    bars = [p.get("d", "") for p in group.findall("path[@class='bar']")]
    (_, y0), (_, y1) = line(figure)
    ends = [float(x) for x in re.fullmatch(r"M\S+ (\S+)V(\S+)", bars[1]).groups()]
    assert ends == pytest.approx([y1 + (y0 - y1) / 2, y1 - (y0 - y1) / 2], abs=0.15)
    assert [c[0].text for c in group.findall("circle")] == ["iteration 0: 1", "iteration 1: 2"]


def test_what_is_no_number_is_left_out_and_a_chart_of_nothing_is_nothing():
    series = Series("a", [(1, math.nan), (2, 1.0), (3, math.inf), (4, 2.0)])
    assert len(line(line_chart("x", [series]))) == 2
    assert line_chart("x", []) == line_chart("x", [Series("a", [(1, math.nan)])]) == ""
    assert heat_map("x", {}) == stacked_chart("x", {}, []) == ""
    assert stacked_chart("x", {"a": [0.0, 0.0]}, [1, 2]) == ""


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-9, 1e12])
@pytest.mark.parametrize("count", [1, 2])
def test_a_constant_is_drawn(value, count):
    figure = line_chart("x", [Series("a", [(i, value) for i in range(count)])])
    numbers = [float(x) for x in re.findall(r'(?:cy|y)="([-\d.e]+)"', figure)]
    assert all(0 <= y <= 210 for y in numbers)
    assert len(parsed(figure).findall(".//circle")) == (1 if count == 1 else 0)


def test_many_points_are_averaged_and_said():
    count = 3 * MOST_POINTS
    figure = line_chart("x", [Series("a", [(i, float(i % 3)) for i in range(count)])])
    assert len(line(figure)) == MOST_POINTS
    assert len({y for _, y in line(figure)}) == 1  # Each mean of 0, 1, 2 is 1.
    assert "Each point is the mean of 3 iterations." in figure


def test_names_are_escaped():
    figure = line_chart("<x>", [Series('"a"', [(1, 1.0)]), Series("<b>", [(1, 1.0)])])
    assert parsed(figure).find("figcaption/b").text == "<x>"
    assert [key.text for key in parsed(figure).iter("span")] == ['"a"', "<b>"]


def test_stacked_bars_add_up_and_do_not_overlap():
    figure = stacked_chart("x", {"a": [1.0, 2.0], "b": [3.0, 0.0]}, [1, 2])
    groups = [g.findall("rect") for g in parsed(figure).findall(".//g")]
    (a1, a2), (b1, b2) = ([{k: float(r.get(k)) for k in ("x", "y", "width", "height")} for r in g]
                          for g in groups)  # fmt: skip
    # Heights are rounded to a tenth.
    assert b1["height"] == pytest.approx(3 * a1["height"], abs=0.3) and b2["height"] == 0
    assert a2["height"] == pytest.approx(2 * a1["height"], abs=0.2)
    assert b1["y"] + b1["height"] == pytest.approx(a1["y"], abs=0.15)
    assert a1["x"] + a1["width"] <= a2["x"]


def test_many_bars_are_averaged():
    figure = stacked_chart("x", {"a": [float(i % 2) for i in range(240)]}, list(range(1, 241)))
    bars = parsed(figure).findall(".//rect")
    assert len(bars) == 60 and len({bar.get("height") for bar in bars}) == 1
    assert "mean of 4 iterations" in figure


def test_a_heat_map_is_darkest_at_the_largest_and_empty_where_nothing_was():
    figure = heat_map("x", {(1, 0): 0.0, (1, 2): 0.2, (2, 2): 0.4})
    cells = parsed(figure).findall(".//rect")
    shades = [float(cell.get("fill-opacity")) for cell in cells]
    assert len(cells) == 3 and shades[2] == 1.0 and shades[0] < shades[1] < shades[2]
    assert float(cells[1].get("y")) > float(cells[0].get("y"))
    assert "the strongest shade is 0.4" in figure
    assert parsed(heat_map("x", {(1, 0): 0.0})) is not None


def test_a_sparkline_needs_two_points():
    assert sparkline([1.0]) == "" and len(line(sparkline([1.0, 2.0, 3.0]))) == 3


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.57, 0.71, [0.6, 0.65, 0.7]),
        (-3, 8, [-2, 0, 2, 4, 6, 8]),
        (1e-9, 2e-9, [1e-9, 1.2e-9, 1.4e-9, 1.6e-9, 1.8e-9, 2e-9]),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (1234.5, "1234"), (1 / 3, "0.3333"), (2e-5, "2e-5"),
     (1.26e-7, "1.3e-7"), (-2.5e6, "-2.5e6"), (99.95, "99.95")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number_text(value) == text
