"""A plot of alternatives by what they cost and what they lose, as SVG: the ones that nothing beats are joined."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

from graphopt.errors import InputDataError

WIDTH, HEIGHT = 860, 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 190, 20, 52
"""Room around the plot, in pixels; the legend is at the right."""
_COLOURS = ("#2563a8", "#b4541a", "#1a6e3c", "#8a3f9e", "#6b7280", "#a3123f")
_STYLE = """
svg { --page: #ffffff; --text: #1b2129; --soft: #56606c; --line: #dbe0e6; }
@media (prefers-color-scheme: dark) { svg { --page: #14181d; --text: #e3e7ec; --soft: #9ba6b3; --line: #303943; } }
rect.page { fill: var(--page); } text { fill: var(--text); font: 12px system-ui, sans-serif; }
text.soft { fill: var(--soft); } .grid { stroke: var(--line); } .front { fill: none; stroke: var(--soft); }
.mark { stroke: var(--page); stroke-width: 1; }
"""
_LABEL = 13
"""Pixels from one label to the next one below it."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One alternative.

    Attributes:
        label: Its name.
        series: The family that it belongs to, which gives it a shape and a colour.
        cost: What it costs, such as megabytes; less is better.
        loss: What it loses; less is better, and above 0 where the scale is logarithmic.
    """

    label: str
    series: str
    cost: float
    loss: float


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other is at least as good as on both sides, by cost; of equal ones the first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.loss)):
        if not found or point.loss < found[-1].loss:
            found.append(point)
    return found


def pareto_svg(
    points: Sequence[Point], cost: str, loss: str, *, title: str = "", log: bool = True, highest: float | None = None
) -> str:
    """The plot. Points of the front are named; each tells its name and numbers where a pointer rests on it.

    Args:
        points: The alternatives, in the order of which series are told apart.
        cost: What the horizontal axis is called, with its unit.
        loss: What the vertical one is called.
        title: What the plot shows, for those who don't see it.
        log: The vertical scale is logarithmic.
        highest: Losses above this are drawn at the upper edge, with an arrow; None: all fit.

    Raises:
        InputDataError: No points, or numbers that the scales don't have.
    """
    if not points:
        raise InputDataError("A plot needs at least one point.")
    if any(not math.isfinite(p.cost) or not math.isfinite(p.loss) or (log and p.loss <= 0) for p in points):
        raise InputDataError("Every point of a plot needs finite numbers, above 0 on a logarithmic scale.")
    top = min(max(p.loss for p in points), math.inf if highest is None else highest)
    across = _Scale.over([p.cost for p in points], _LEFT, WIDTH - _RIGHT, False)
    up = _Scale.over([min(p.loss, top) for p in points], HEIGHT - _BOTTOM, _TOP, log)
    series = list(dict.fromkeys(p.series for p in points))
    best = front(points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title or f'{loss} by {cost}')}</title>",
        f'<style>{_STYLE}</style><rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
        *_axes(across, up, cost, loss),
    ]
    steps = [f"{across.place(p.cost):.1f},{up.place(min(p.loss, top)):.1f}" for p in best]
    parts.append(f'<polyline class="front" points="{" ".join(steps)}"/>')
    for point in points:
        number = series.index(point.series)
        beyond = point.loss > top
        x, y = across.place(point.cost), up.place(min(point.loss, top))
        told = f"{point.label}: {point.cost:.4g}, {point.loss:.4g}"
        parts.append(f"<g><title>{escape(told)}</title>{_mark(x, y, number)}</g>")
        if beyond:
            parts.append(f'<text x="{x:.1f}" y="{y - 7:.1f}" text-anchor="middle">↑</text>')
    parts += _labels([(across.place(p.cost), up.place(min(p.loss, top)), p.label) for p in best])
    for number, name in enumerate(series):
        y = _TOP + 10 + 20 * number
        parts.append(f'{_mark(WIDTH - _RIGHT + 18, y, number)}<text x="{WIDTH - _RIGHT + 30}" y="{y + 4}">')
        parts.append(f"{escape(name)}</text>")
    return "\n".join([*parts, "</svg>", ""])


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Numbers from `low` to `high` to pixels from `first` to `last`."""

    low: float
    high: float
    first: float
    last: float
    log: bool

    @classmethod
    def over(cls, numbers: Sequence[float], first: float, last: float, log: bool) -> _Scale:
        """A scale on which all the numbers have room."""
        low, high = min(numbers), max(numbers)
        if log:
            room = max(math.log10(high / low) * 0.06, 0.05)
            return cls(low / 10**room, high * 10**room, first, last, True)
        room = max((high - low) * 0.06, abs(high) * 0.01, 1e-9)
        return cls(low - room, high + room, first, last, False)

    def place(self, number: float) -> float:
        """The pixel of a number."""
        low, high, at = (math.log10(n) if self.log else n for n in (self.low, self.high, number))
        return self.first + (self.last - self.first) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers within it, some five to ten."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1.0, 2.0, 5.0) if len(decades) < 6 else (1.0,)
            return [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
        width = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(width))
        step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= width)
        first = math.ceil(self.low / step)
        return [step * n for n in range(first, math.floor(self.high / step) + 1)]


def _axes(across: _Scale, up: _Scale, cost: str, loss: str) -> list[str]:
    parts = []
    for number in across.ticks():
        x = across.place(number)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(
            f'<text class="soft" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{number:g}</text>'
        )
    for number in up.ticks():
        y = up.place(number)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="soft" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number:g}</text>')
    middle_x, middle_y = (_LEFT + WIDTH - _RIGHT) / 2, (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(f'<text x="{middle_x:g}" y="{HEIGHT - 12}" text-anchor="middle">{escape(cost)}</text>')
    turn = f'transform="rotate(-90 16 {middle_y:g})"'
    parts.append(f'<text x="16" y="{middle_y:g}" text-anchor="middle" {turn}>{escape(loss)}</text>')
    return parts


def _mark(x: float, y: float, number: int) -> str:
    """The shape of a series at a place."""
    colour = _COLOURS[number % len(_COLOURS)]
    start = f'class="mark" fill="{colour}"'
    match number % 4:
        case 0:
            return f'<circle {start} cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
        case 1:
            return f'<rect {start} x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
        case 2:
            corners = [(x, y - 5.5), (x + 5, y + 4), (x - 5, y + 4)]
        case _:
            corners = [(x, y - 5.5), (x + 5.5, y), (x, y + 5.5), (x - 5.5, y)]
    return f'<polygon {start} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in corners)}"/>'


def _labels(places: Sequence[tuple[float, float, str]]) -> list[str]:
    """The names of points, at their right and moved up where two would meet."""
    taken: list[tuple[float, float, float]] = []
    parts = []
    for x, y, label in places:
        width, at = 6.5 * len(label) + 8, y - 7
        while any(abs(at - other) < _LABEL and x < end and start < x + width for start, end, other in taken):
            at -= _LABEL
        taken.append((x, x + width, at))
        parts.append(f'<text x="{x + 6:.1f}" y="{max(at, _LABEL):.1f}">{escape(label)}</text>')
    return parts
