"""Charts as inline SVG: lines over a number axis or over categories, and bars. Plain strings, no script.

Colours are the CSS classes ``series-0``, ``series-1``, … of the page (``report.css``), so that a chart follows its
light and its dark palette. Every mark carries its values as a ``<title>``, which browsers show on hover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from torch_engram.analysis.page import swatch

PALETTE = 6
"""Colours that the page has; series beyond begin again."""

_WIDTH, _HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 26, 42


_BAR, _BEHIND = 11, 90
"""Height of a bar across, and the room for the value behind the longest one."""


def number(value: float) -> str:
    """A value in few characters: 12,000; 3.25; 0.004."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Series:
    """One line or one set of bars."""

    label: str
    color: int
    """Number of the colour."""
    points: Sequence[tuple[float, float]]
    """(x, y); in charts over categories x is the category's number. Points that are not finite are left out."""
    line: bool = True
    """Whether the points are joined."""
    dots: bool = False
    """Whether they are marked."""
    ring: bool = False
    """Whether the marks are larger and open."""


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, categories: Sequence[str] | None = None
) -> str:
    """Lines and dots; the y axis covers the values and need not begin at 0. ``categories`` name x = 0, 1, …"""
    points = [(x, y) for one in series for x, y in one.points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return _empty(title)
    ys = [y for _, y in points]
    margin = 0.04 * (max(ys) - min(ys)) or 0.5
    y_ticks = ticks(min(ys) - margin, max(ys) + margin, 5)
    y_low, y_high = min(y_ticks[0], min(ys) - margin), max(y_ticks[-1], max(ys) + margin)
    if categories is None:
        x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), 6)
        x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
        named = [(x, number(x)) for x in x_ticks if x_low <= x <= x_high]
    else:
        x_low, x_high = -0.5, len(categories) - 0.5
        named = [(float(i), name) for i, name in enumerate(categories)]
    to_x, to_y = _scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT), _scale(y_low, y_high, _HEIGHT - _BOTTOM, _TOP)
    body = _axes(to_x, to_y, named, [y for y in y_ticks if y_low <= y <= y_high], x_label, y_label)
    body += "".join(_draw(one, to_x, to_y, categories) for one in series)
    return _svg(title, body)


def bar_chart(
    series: Sequence[Series],
    categories: Sequence[str],
    *,
    title: str,
    x_label: str,
    y_label: str,
    percent: bool = False,
) -> str:
    """Bars side by side from 0, one group a category. ``percent``: values are shares, read as per cent."""
    values = [y for one in series for _, y in one.points if math.isfinite(y)]
    if not values:
        return _empty(title)
    y_ticks = ticks(0.0, max(values) or 1.0, 5)
    show = (lambda y: f"{number(100 * y)} %") if percent else number
    to_y = _scale(0.0, max(y_ticks[-1], *values), _HEIGHT - _BOTTOM, _TOP)
    to_x = _scale(-0.5, len(categories) - 0.5, _LEFT, _WIDTH - _RIGHT)
    named = [(float(i), name) for i, name in enumerate(categories)]
    body = _axes(to_x, to_y, named, y_ticks, x_label, y_label, show)
    group = 0.78 * (to_x(1.0) - to_x(0.0))
    width = group / len(series)
    for place, one in enumerate(series):
        for x, y in one.points:
            if math.isfinite(y):
                left = to_x(x) - group / 2 + place * width
                hover = escape(f"{one.label}, {categories[int(x)]}: {show(y)}")
                body += (
                    f'<rect class="series-{one.color % PALETTE}" x="{left:.1f}" y="{to_y(y):.1f}" '
                    f'width="{width:.1f}" height="{to_y(0.0) - to_y(y):.1f}"><title>{hover}</title></rect>'
                )
    return _svg(title, body)


def bar_groups(
    series: Sequence[Series],
    categories: Sequence[str],
    *,
    title: str,
    show: Callable[[float], str] = number,
    one_scale: bool = False,
) -> str:
    """Bars across with their values behind them, one group a category under its name.

    Each group has a scale of its own, or all have one. Values that are not finite are left out.
    """
    values = [[(one, y) for one in series for x, y in one.points if x == i] for i in range(len(categories))]
    most = [max((y for _, y in group if math.isfinite(y)), default=0.0) for group in values]
    body, top = "", 4
    for i, name in enumerate(categories):
        to_x = _scale(0.0, (max(most) if one_scale else most[i]) or 1.0, 0, _WIDTH - _BEHIND)
        body += f'<text class="label" x="0" y="{top + 12}">{escape(name)}</text>'
        top += 20
        for one, y in values[i]:
            if math.isfinite(y):
                shown, width = escape(show(y)), to_x(y)
                hover = f"{escape(one.label)}, {escape(name)}: {shown}"
                body += (
                    f'<rect class="series-{one.color % PALETTE}" x="0" y="{top}" width="{width:.1f}" height="{_BAR}">'
                    f'<title>{hover}</title></rect><text x="{width + 6:.1f}" y="{top + _BAR - 1}">{shown}</text>'
                )
                top += _BAR + 2
        top += 10
    return _svg(title, body, top)


def legend(entries: Sequence[tuple[str, int]]) -> str:
    """Labels and their colours as HTML."""
    items = "".join(f"<li>{swatch(color % PALETTE)}{escape(label)}</li>" for label, color in entries)
    return f'<ul class="legend">{items}</ul>'


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers at even steps (1, 2 or 5 times a power of ten) that cover ``low`` to ``high``."""
    raw = (high - low) / max(1, about) or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _draw(
    one: Series, to_x: Callable[[float], float], to_y: Callable[[float], float], categories: Sequence[str] | None
) -> str:
    points = [(x, y) for x, y in one.points if math.isfinite(x) and math.isfinite(y)]
    drawn = ""
    if one.line and len(points) > 1:
        path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in points)
        drawn += f'<polyline class="series-{one.color % PALETTE}" points="{path}"/>'
    if one.dots or one.ring:
        kind, radius = (" ring", 4.5) if one.ring else ("", 2.8)
        for x, y in points:
            at = categories[int(x)] if categories is not None else number(x)
            hover = escape(f"{one.label}, {at}: {y:.4f}")
            drawn += (
                f'<circle class="series-{one.color % PALETTE}{kind}" cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" '
                f'r="{radius}"><title>{hover}</title></circle>'
            )
    return drawn


def _axes(
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
    show: Callable[[float], str] = number,
) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<text class="label" x="0" y="12">{escape(y_label)}</text>']
    for y in y_ticks:
        at = to_y(y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(show(y))}</text>')
    for x, name in _uncrowded(x_ticks):
        parts.append(f'<text x="{to_x(x):.1f}" y="{bottom + 17}" text-anchor="middle">{escape(name)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="label" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _uncrowded(x_ticks: Sequence[tuple[float, str]]) -> Sequence[tuple[float, str]]:
    """Every tick, or every second or third one, so that their names do not run into each other."""
    if not x_ticks:
        return x_ticks
    wanted = len(x_ticks) * (7 * max(len(name) for _, name in x_ticks) + 6)  # a digit is about 7 wide
    return x_ticks[:: -(-wanted // (_WIDTH - _LEFT - _RIGHT))]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _svg(title: str, body: str, height: int = _HEIGHT) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg class="chart" viewBox="0 0 {_WIDTH} {height}" '
        f'role="img" aria-label="{escape(title)}">{body}</svg></figure>'
    )


def _empty(title: str) -> str:
    return f'<figure><figcaption>{escape(title)}</figcaption><p class="absent">Nothing was recorded.</p></figure>'
