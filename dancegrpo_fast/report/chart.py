"""Charts as inline SVG: text stays text, colours are the page's, nothing is loaded or run.

A chart is a `<figure>` whose caption is its legend. Where there are more points than the eye can
tell apart, neighbours are averaged and the caption says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 380, 210  # Of the drawing, in its own units; it grows and shrinks with the page.
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 32  # Margins.
MOST_POINTS = 240

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: In the legend.
        points: (iteration, value), in order; a value that is no finite number is left out.
        errors: Half the height of the bar on each point; no bars if empty.
    """

    name: str
    points: Sequence[Point]
    errors: Sequence[float] = ()


@dataclass(frozen=True)
class Axis:
    """Maps values to positions: [low, high] to [start, end], which may run backwards."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, x = self.low, self.high, value
        if self.log:
            low, high, x = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (x - low) / (high - low) * (self.end - self.start)


def line_chart(title: str, series: Sequence[Series], *, log: bool = False, note: str = "") -> str:
    """Lines over iterations.

    Args:
        title: What is drawn.
        series: The lines; those without a point are left out, a chart without a line is ''.
        log: Logarithmic values; what is not above 0 is left out.
        note: Said below the title.
    """
    drawn = [_clean(line, log) for line in series]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    merged = max(math.ceil(len(line.points) / MOST_POINTS) for line in drawn)
    drawn = [line if line.errors else _averaged(line) for line in drawn]
    ends = [value for line in drawn for _, value in line.points]
    for line in drawn:
        if line.errors:
            for (_, value), error in zip(line.points, line.errors, strict=True):
                ends += [value - error, value + error]
    x = _iterations([i for line in drawn for i, _ in line.points])
    low, high = (min(ends), max(ends)) if not log else _decades(min(ends), max(ends))
    y = Axis(*_roomy(low, high) if not log else (low, high), HEIGHT - BOTTOM, TOP, log)
    marks = _log_ticks(low, high) if log else ticks(y.low, y.high)
    body, lines = _frame(x, y, marks), []
    for number, line in enumerate(drawn, start=1):
        places = [(x(i), y(value)) for i, value in line.points]
        path = "".join(f"{'ML'[n > 0]}{px:.1f} {py:.1f}" for n, (px, py) in enumerate(places))
        parts = f'<path d="{path}"/>' if len(places) > 1 else ""
        if line.errors:
            for (px, _), (_, value), error in zip(places, line.points, line.errors, strict=True):
                bottom, top = y(value - error), y(value + error)
                parts += f'<path class="bar" d="M{px:.1f} {bottom:.1f}V{top:.1f}"/>'
        if line.errors or len(places) == 1:
            for (px, py), (i, value) in zip(places, line.points, strict=True):
                told = f"iteration {i:g}: {number_text(value)}"
                parts += f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{told}</title></circle>'
        lines.append(f'<g class="line s{number}">{parts}</g>')
    body += "".join(reversed(lines))  # The first is drawn last, on top of the others.
    if merged > 1:
        note = f"{note} Each point is the mean of {merged} iterations.".strip()
    last = "; ".join(f"{line.name} {number_text(line.points[-1][1])} at the end" for line in drawn)
    legend = [(line.name, f"s{n}") for n, line in enumerate(drawn, start=1)]
    return _figure(title, legend if len(drawn) > 1 else [], body, f"{title}: {last}", note)


def stacked_chart(
    title: str, parts: Mapping[str, Sequence[float]], iterations: Sequence[int], *, note: str = ""
) -> str:
    """Bars of parts on top of each other, one bar for each iteration or for several averaged ones.

    Args:
        title: What is drawn.
        parts: Values of each part, one an iteration.
        iterations: The iterations.
        note: Said below the title.
    """
    if not iterations or not any(sum(values) for values in parts.values()):
        return ""
    size = math.ceil(len(iterations) / 60)
    starts = range(0, len(iterations), size)
    heights = {
        name: [_mean(values[start : start + size]) for start in starts]
        for name, values in parts.items()
    }
    highest = max(sum(bar) for bar in zip(*heights.values(), strict=True))
    first, last = iterations[0], iterations[-1]
    x = Axis(first - 0.5, last + 0.5, LEFT, WIDTH - RIGHT)
    y = Axis(0, highest * 1.05, HEIGHT - BOTTOM, TOP)
    body = _frame(x, y, ticks(0, y.high))
    floor = [0.0] * len(starts)
    for number, values in enumerate(heights.values(), start=1):
        bars = ""
        for n, (start, value) in enumerate(zip(starts, values, strict=True)):
            end = iterations[min(start + size, len(iterations)) - 1]
            left, top = x(iterations[start] - 0.5), y(floor[n] + value)
            bars += (
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{0.9 * (x(end + 0.5) - left):.1f}" '
                f'height="{y(floor[n]) - top:.1f}"/>'
            )
            floor[n] += value
        body += f'<g class="fill s{number}">{bars}</g>'
    told = ", ".join(f"{name} {number_text(_mean(values))}" for name, values in parts.items())
    if size > 1:
        note = f"{note} Each bar is the mean of {size} iterations.".strip()
    legend = [(name, f"s{n}") for n, name in enumerate(parts, start=1)]
    return _figure(title, legend, body, f"{title}, means: {told}", note)


def heat_map(title: str, cells: Mapping[tuple[int, int], float], *, note: str = "") -> str:
    """Shades of one colour over (iteration, step), the largest value the darkest.

    Args:
        title: What is drawn.
        cells: Value >= 0 at (iteration, step); what is missing stays empty.
        note: Said below the title.
    """
    if not cells:
        return ""
    iterations = sorted({i for i, _ in cells})
    size = math.ceil(len(iterations) / 80)
    place = {iteration: n // size for n, iteration in enumerate(iterations)}
    grouped: dict[tuple[int, int], list[float]] = {}
    for (iteration, step), value in cells.items():
        grouped.setdefault((place[iteration], step), []).append(value)
    most = max(_mean(values) for values in grouped.values())
    steps = range(min(s for _, s in cells), max(s for _, s in cells) + 1)
    columns = max(place.values()) + 1
    x = Axis(0, columns, LEFT, WIDTH - RIGHT)
    y = Axis(steps[0], steps[-1] + 1, TOP, HEIGHT - BOTTOM)
    body = ""
    wide, high = (WIDTH - LEFT - RIGHT) / columns, (HEIGHT - TOP - BOTTOM) / len(steps)
    for (column, step), values in sorted(grouped.items()):
        shade = _mean(values) / most if most > 0 else 0.0
        body += (
            f'<rect x="{x(column):.1f}" y="{y(step):.1f}" width="{wide:.1f}" height="{high:.1f}" '
            f'fill-opacity="{0.06 + 0.94 * shade:.2f}"/>'
        )
    body = f'<g class="fill s1">{body}</g>'
    for step in steps[:: math.ceil(len(steps) / 8)]:
        body += _text(LEFT - 6, y(step + 0.5) + 4, str(step), "end")
    body += _text(LEFT, HEIGHT - BOTTOM + 14, str(iterations[0]), "start")
    if len(iterations) > 1:
        body += _text(WIDTH - RIGHT, HEIGHT - BOTTOM + 14, str(iterations[-1]), "end")
    body += _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "iteration", "middle")
    note = f"{note} By step; the strongest shade is {number_text(most)}.".strip()
    return _figure(title, [], body, f"{title}: at most {number_text(most)}", note)


def sparkline(values: Sequence[float], *, width: int = 90, height: int = 22) -> str:
    """A small line without axes, for a table's cell."""
    line = _averaged(_clean(Series("", list(enumerate(values))), False))
    if len(line.points) < 2:
        return ""
    low, high = _roomy(min(v for _, v in line.points), max(v for _, v in line.points))
    x, y = Axis(0, line.points[-1][0], 1, width - 1), Axis(low, high, height - 1, 1)
    path = "".join(f"{'ML'[n > 0]}{x(i):.1f} {y(v):.1f}" for n, (i, v) in enumerate(line.points))
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'aria-hidden="true"><g class="line s1"><path d="{path}"/></g></svg>'
    )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values in [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def number_text(value: float) -> str:
    """A number as short as it can be read: three or four digits that count."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _clean(line: Series, log: bool) -> Series:
    errors = line.errors or [0.0] * len(line.points)
    kept = [
        (point, error if math.isfinite(error) else 0.0)
        for point, error in zip(line.points, errors, strict=True)
        if math.isfinite(point[1]) and (point[1] > 0 or not log)
    ]
    return Series(line.name, [p for p, _ in kept], [e for _, e in kept] if line.errors else ())


def _averaged(line: Series) -> Series:
    size = math.ceil(len(line.points) / MOST_POINTS)
    groups = [line.points[n : n + size] for n in range(0, len(line.points), max(size, 1))]
    means = [(_mean([i for i, _ in group]), _mean([v for _, v in group])) for group in groups]
    return Series(line.name, means) if size > 1 else line


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _iterations(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 1, high + 1
    return Axis(low, high, LEFT, WIDTH - RIGHT)


def _roomy(low: float, high: float) -> tuple[float, float]:
    """Bounds with a little room; 0 stays a bound, and a constant gets a scale of its own size."""
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if low == 0 else low - room), (0.0 if high == 0 > low else high + room)


def _decades(low: float, high: float) -> tuple[float, float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return 10.0**first, 10.0 ** max(last, first + 1)


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = round(math.log10(low)), round(math.log10(high))
    return [10.0**n for n in range(first, last + 1, math.ceil((last - first) / 6))]


def _frame(x: Axis, y: Axis, marks: Sequence[float]) -> str:
    """Grid, axis labels and the word iteration."""
    parts = ""
    spacing = marks[1] - marks[0] if len(marks) > 1 and not y.log else 0.0
    for mark in marks:
        parts += f'<path class="grid" d="M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}"/>'
        text = _power_text(mark) if y.log else _tick_text(mark, spacing)
        parts += _text(LEFT - 6, y(mark) + 4, text, "end")
    whole = [mark for mark in ticks(x.low, x.high) if mark == round(mark)]
    for mark in whole:
        parts += _text(x(mark), HEIGHT - BOTTOM + 14, f"{mark:.0f}", "middle")
    return parts + _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "iteration", "middle")


def _tick_text(mark: float, spacing: float) -> str:
    """All ticks of an axis with as many decimals as their spacing needs."""
    if 1e-3 <= spacing < 1e4:
        return f"{mark:.{max(0, -math.floor(math.log10(spacing) + 1e-9))}f}"
    return number_text(mark)


def _power_text(mark: float) -> str:
    power = round(math.log10(mark))
    return f"{mark:g}" if -2 <= power <= 3 else f"1e{power}"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(
    title: str, legend: Sequence[tuple[str, str]], body: str, spoken: str, note: str
) -> str:
    keys = "".join(f'<span class="key {kind}">{escape(name)}</span>' for name, kind in legend)
    said = f"<small>{escape(note)}</small>" if note else ""
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{keys}{said}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(spoken)}">{body}</svg>'
        "</figure>"
    )
