"""Line and area charts as inline SVG, drawn here so that a report needs no script and no network.

Invariant: a drawing depends on its `Chart` alone and uses only CSS classes for colour, so light and
dark come from the page. Called by `serve.report`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup

Point = tuple[float, float]

WIDTH, HEIGHT = 400.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 14.0, 26.0, 34.0
MAX_POINTS = 240
MAX_MARKED_POINTS = 40
NUM_COLOURS = 6


@dataclass(frozen=True)
class Series:
    """`points` are (step, value); `band` is (step, low, high) around them."""

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Chart:
    """`unit` labels the y axis. A stack draws its series on top of each other."""

    title: str
    unit: str
    series: Sequence[Series]
    kind: Literal["line", "stack"] = "line"
    is_annotated: bool = False  # write the first and the last value beside their points
    bounds: tuple[float, float] | None = None

    @property
    def legend(self) -> list[tuple[int, str]]:
        """(colour number, name) of each series; empty where the title says it all."""
        if len(self.series) < 2:
            return []
        return [(i % NUM_COLOURS, series.name) for i, series in enumerate(self.series)]


@dataclass(frozen=True)
class _Frame:
    """Data ranges and the way from data to SVG coordinates."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - min(1.0, max(0.0, share)) * (HEIGHT - TOP - BOTTOM)


def svg(chart: Chart) -> Markup:
    """The drawing as an `<svg>` element that scales to the width of its container."""
    series = [Series(s.name, _thin(s.points), _thin_band(s.band)) for s in chart.series]
    stacked = _stack(series) if chart.kind == "stack" else []
    tops = [top for layer in stacked for _, _, top in layer]
    frame = _frame(chart, series, tops)
    parts = _axes(frame, chart.unit)
    if chart.kind == "stack":
        parts += [
            _area(frame, layer, f"area s{i % NUM_COLOURS}") for i, layer in enumerate(stacked)
        ]
    else:
        for i, one in enumerate(series):
            parts += _line(frame, one, i % NUM_COLOURS)
        if chart.is_annotated:
            parts += [mark for one in series[:1] for mark in _annotate(frame, one.points)]
    label = f"{chart.title}: {', '.join(s.name for s in chart.series)}"
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(parts)
    )


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers inside [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= min((1, 2, 5, 10), key=lambda m: abs((high - low) / (step * m) - count))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A short form for axis labels and tables: `0.052`, `12`, `12.3k`, `3e-5`."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}".replace("e-0", "e-")


def _frame(chart: Chart, series: Sequence[Series], tops: Sequence[float]) -> _Frame:
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] if not tops else [0.0, *tops]
    ys += [edge for s in series for _, low, high in s.band for edge in (low, high)]
    low, high = chart.bounds or (min(ys), max(ys))
    if high - low < 1e-12:
        margin = abs(high) * 0.1 or 1.0
        low, high = (0.0 if low >= 0 else low - margin), high + margin
    elif chart.bounds is None:
        margin = (high - low) * 0.06
        low = 0.0 if low >= 0 else low - margin
        high += margin
    x_low, x_high = min(xs), max(xs)
    if x_high - x_low < 1:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    return _Frame(x_low, x_high, low, high)


def _axes(frame: _Frame, unit: str) -> list[Markup]:
    parts = [Markup('<text class="unit" x="2" y="13">{}</text>').format(unit)]
    for value in ticks(frame.y_low, frame.y_high):
        y = frame.y(value)
        parts.append(
            Markup(
                '<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 6, y + 4, number(value))
        )
    base = HEIGHT - BOTTOM
    for value in ticks(frame.x_low, frame.x_high, 5):
        if value == int(value):
            parts.append(
                Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>')
                .format(frame.x(value), base + 16, number(value))
            )  # fmt: skip
    parts.append(
        Markup(
            '<line class="axis" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
            '<text class="unit" x="{:.1f}" y="{:.1f}" text-anchor="end">step</text>'
        ).format(LEFT, WIDTH - RIGHT, base, base, WIDTH - RIGHT, HEIGHT - 3)
    )
    return parts


def _line(frame: _Frame, series: Series, colour: int) -> list[Markup]:
    parts: list[Markup] = []
    if series.band:
        parts.append(_area(frame, series.band, f"band s{colour}"))
    coordinates = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in series.points)
    parts.append(Markup('<polyline class="line s{}" points="{}"/>').format(colour, coordinates))
    if len(series.points) <= MAX_MARKED_POINTS:
        parts += [
            Markup(
                '<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>'
            ).format(colour, frame.x(x), frame.y(y), f"{series.name} {number(y)} at step {x:.0f}")
            for x, y in series.points
        ]
    return parts


def _area(frame: _Frame, edges: Sequence[tuple[float, float, float]], css: str) -> Markup:
    upper = [f"{frame.x(x):.1f},{frame.y(high):.1f}" for x, _, high in edges]
    lower = [f"{frame.x(x):.1f},{frame.y(low):.1f}" for x, low, _ in reversed(edges)]
    return Markup('<polygon class="{}" points="{}"/>').format(css, " ".join(upper + lower))


def _annotate(frame: _Frame, points: Sequence[Point]) -> list[Markup]:
    ends = [(points[0], "start")] + ([(points[-1], "end")] if len(points) > 1 else [])
    return [
        Markup('<text class="note" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
            frame.x(x) + (4 if anchor == "start" else -4),
            max(TOP + 4, frame.y(y) - 9),
            anchor,
            number(y),
        )
        for (x, y), anchor in ends
    ]


def _stack(series: Sequence[Series]) -> list[list[tuple[float, float, float]]]:
    """(step, bottom, top) of each layer over all steps; a missing value adds nothing."""
    values = [dict(s.points) for s in series]
    steps = sorted({x for s in values for x in s})
    layers: list[list[tuple[float, float, float]]] = []
    base = dict.fromkeys(steps, 0.0)
    for one in values:
        top = {x: base[x] + one.get(x, 0.0) for x in steps}
        layers.append([(x, base[x], top[x]) for x in steps])
        base = top
    return layers


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS`: means of equal runs of points; the first and the last are kept."""
    if len(points) <= MAX_POINTS:
        return list(points)
    edges = [round(i * len(points) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    runs = [points[a:b] for a, b in pairwise(edges)]
    means = [(_mean([x for x, _ in run]), _mean([y for _, y in run])) for run in runs]
    return [points[0], *means[1:-1], points[-1]]


def _thin_band(
    band: Sequence[tuple[float, float, float]],
) -> list[tuple[float, float, float]]:
    lows = _thin([(x, low) for x, low, _ in band])
    highs = _thin([(x, high) for x, _, high in band])
    return [(x, low, high) for (x, low), (_, high) in zip(lows, highs, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
