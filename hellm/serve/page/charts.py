"""Charts as SVG: with a title and a description for who cannot see them, coloured by the style sheet alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

__all__ = ["COLOURS", "Interval", "Line", "histogram", "interval_chart", "line_chart", "number"]

_WIDTH, _HEIGHT = 560, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 40
# Colours that there are; more lines begin again.
COLOURS = 6
# Where a line has no more points than these, each is drawn.
_MAX_DOTS = 40


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        name: In the legend.
        points: (x, y), x ascending.
        colour: Number of its colour, in [0, COLOURS).
        is_dashed: Whether it is of the run that is compared.
        best: x of the point that was chosen, if one was.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    is_dashed: bool = False
    best: float | None = None


class Interval(NamedTuple):
    """A value and how far it may be off; None where that is not known."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends, or the value twice."""
        return (self.value, self.value) if self.low is None or self.high is None else (self.low, self.high)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return number(self.value)
        return f"{number(self.value)}, {number(self.low)} to {number(self.high)}"


def number(value: float) -> str:
    """Four significant digits, without a power of ten where that can be read."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.4g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.3e}"


def line_chart(ident: str, title: str, lines: Sequence[Line], x_label: str = "epoch") -> Markup:
    """Lines over a common axis.

    Args:
        ident: Of the element; ids in it begin with it.
        title: What it shows.
        lines: At least one point in all.
        x_label: Name of the axis.
    """
    points = [point for line in lines for point in line.points]
    x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points), 6, whole=True)
    y_ticks = _ticks(min(y for _, y in points), max(y for _, y in points), 5)
    frame = _Frame((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]))
    parts = [frame.grid(x_ticks, y_ticks, x_label)]
    for line in lines:
        kind = f"c{line.colour}{' dashed' if line.is_dashed else ''}"
        places = [(frame.x(x), frame.y(y)) for x, y in line.points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(_tag('<path class="line {}" d="{}"/>', kind, path))
        if len(places) <= _MAX_DOTS:
            parts += [_tag('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.6"/>', kind, *one) for one in places]
        for (x, _), place in zip(line.points, places, strict=True):
            if x == line.best:
                parts.append(_tag('<circle class="best {}" cx="{:.1f}" cy="{:.1f}" r="5"/>', kind, *place))
    return _svg(ident, title, " ".join(map(_in_words, lines)), parts, _HEIGHT)


def _in_words(line: Line) -> str:
    if not line.points:
        return f"{line.name}: nothing."
    (first, start), (last, end) = line.points[0], line.points[-1]
    told = f"{line.name}: from {number(start)} at {number(first)} to {number(end)} at {number(last)}"
    best = next((y for x, y in line.points if x == line.best), None)
    if best is None or line.best is None:
        return told + "."
    return told + f", chosen {number(best)} at {number(line.best)}."


def interval_chart(
    ident: str, title: str, rows: Sequence[tuple[str, Sequence[Interval | None]]], names: Sequence[str]
) -> Markup:
    """Values with intervals, a row for each label, and in it one for each name.

    Args:
        ident, title: As `line_chart`.
        rows: Label, and for each name its value; None where there is none. At least one value in all.
        names: Of what is compared; the second one is drawn hollow.
    """
    found = [one for _, values in rows for one in values if one is not None]
    ticks = _ticks(min(0.0, *(one.ends[0] for one in found)), max(one.ends[1] for one in found), 5)
    step, bar = 26 + 16 * len(names), 16
    height = _TOP + step * len(rows) + _BOTTOM
    frame = _Frame((ticks[0], ticks[-1]), (0, 1), height, left=100)
    parts, told = [frame.columns(ticks)], []
    for place, (label, values) in enumerate(rows):
        top = _TOP + step * place
        middle = top + step / 2
        parts.append(_tag('<text class="label" x="{}" y="{:.1f}">{}</text>', frame.left - 12, middle + 4, label))
        for which, one in enumerate(values):
            if one is None:
                continue
            y = middle + bar * (which - (len(names) - 1) / 2)
            x, low, high = (frame.x(end) for end in (one.value, *one.ends))
            kind = f"c{which}{' hollow' if which else ''}"
            parts.append(_tag('<path class="whisker {}" d="M{:.1f} {:.1f}H{:.1f}"/>', kind, low, y, high))
            parts.append(_tag('<circle class="value {}" cx="{:.1f}" cy="{:.1f}" r="5"/>', kind, x, y))
            name = f"{names[which]} " if len(names) > 1 else ""
            told.append(f"{label}: {name}{one}.")
    return _svg(ident, title, " ".join(told), parts, height)


def histogram(ident: str, title: str, values: Sequence[float], num_bins: int = 10) -> Markup:
    """How many of the values in [0, 1] are in each of equal parts of it."""
    counts = [0] * num_bins
    for value in values:
        counts[min(int(value * num_bins), num_bins - 1)] += 1
    ticks, height = _ticks(0, max(counts), 4, whole=True), 190
    frame = _Frame((0, 1), (ticks[0], ticks[-1]), height)
    parts = [frame.grid([0, 0.2, 0.4, 0.6, 0.8, 1], ticks, "disagreement")]
    for place, count in enumerate(counts):
        x, y = frame.x(place / num_bins), frame.y(count)
        size = (frame.x((place + 1) / num_bins) - x - 2, frame.y(0) - y)
        parts.append(_tag('<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>', x + 1, y, *size))
    told = [f"{place / num_bins:g} to {(place + 1) / num_bins:g}: {count}" for place, count in enumerate(counts)]
    return _svg(ident, title, "; ".join(told) + ".", parts, height)


class _Frame:
    """Numbers to places."""

    def __init__(
        self, xs: tuple[float, float], ys: tuple[float, float], height: int = _HEIGHT, left: int = _LEFT
    ) -> None:
        self.xs, self.ys, self.height, self.left = xs, ys, height, left

    def x(self, value: float) -> float:
        low, high = self.xs
        return self.left + (value - low) / (high - low) * (_WIDTH - self.left - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.ys
        return self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _TOP - _BOTTOM)

    def grid(self, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> Markup:
        """Lines across and numbers along both axes."""
        parts = []
        for value in y_ticks:
            y = self.y(value)
            parts.append(_tag('<path class="grid" d="M{} {:.1f}H{}"/>', self.left, y, _WIDTH - _RIGHT))
            parts.append(_tag('<text class="label" x="{}" y="{:.1f}">{}</text>', self.left - 8, y + 4, number(value)))
        for value in x_ticks:
            parts.append(_bottom(self.x(value), self.height - _BOTTOM + 17, number(value)))
        parts.append(_bottom((self.left + _WIDTH - _RIGHT) / 2, self.height - 6, x_label))
        return Markup("").join(parts)

    def columns(self, ticks: Sequence[float]) -> Markup:
        """Lines from top to bottom, and numbers below."""
        parts = []
        for value in ticks:
            x = self.x(value)
            parts.append(_tag('<path class="grid" d="M{:.1f} {}V{}"/>', x, _TOP, self.height - _BOTTOM))
            parts.append(_bottom(x, self.height - _BOTTOM + 17, number(value)))
        return Markup("").join(parts)


def _tag(template: str, *values: object) -> Markup:
    return Markup(template).format(*values)


def _label(x: float, y: float, text: str) -> Markup:
    return _tag('<text class="label" x="{}" y="{:.1f}">{}</text>', x, y + 4, text)


def _bottom(x: float, y: float, text: str) -> Markup:
    return _tag('<text class="tick" x="{:.1f}" y="{:.1f}">{}</text>', x, y, text)


def _svg(ident: str, title: str, description: str, parts: Sequence[Markup], height: int) -> Markup:
    head = Markup(
        '<svg class="chart" id="{id}" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{id}-title" '
        'aria-describedby="{id}-desc"><title id="{id}-title">{title}</title><desc id="{id}-desc">{text}</desc>'
    ).format(id=ident, width=_WIDTH, height=height, title=title, text=description)
    return head + Markup("").join(parts) + Markup("</svg>")


def _ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About `count` round numbers from at most `low` to at least `high`."""
    if high <= low:
        low, high = (low, low + 1) if whole else (low - abs(low or 1) / 2, low + abs(low or 1) / 2)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(one * power for one in (1, 2, 2.5, 5, 10) if one * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]
