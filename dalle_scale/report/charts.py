"""Charts as shapes, which `templates/charts.html` writes as SVG: a histogram, and horizontal bars of several parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10
from typing import NamedTuple

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 230, 62, 16, 12, 44  # of a histogram and its margins
_ROW = 24  # height of a horizontal bar with its gap
_LONGEST_NAME, _LETTER = 22, 7  # characters, and the pixels of one


class Text(NamedTuple):
    """A text at a point; `anchor` as of SVG."""

    text: str
    x: float
    y: float
    anchor: str = "middle"
    style: str = ""
    transform: str = ""


class Box(NamedTuple):
    """Left, top, width and height."""

    x: float
    y: float
    width: float
    height: float


class Bar(NamedTuple):
    """A bar, its description, and the area around it that shows the description."""

    title: str
    box: Box
    hit: Box | None = None
    colour: str = ""  # CSS; empty: of the stylesheet


@dataclass(frozen=True)
class Chart:
    """Shapes on a canvas; a line is a box without width or height. `label` is read out in place of the chart."""

    label: str
    width: int
    height: int
    lines: Sequence[Box]
    bars: Sequence[Bar]
    texts: Sequence[Text]


class Part(NamedTuple):
    """One part of a horizontal bar."""

    title: str
    size: float
    colour: str = ""


class Row(NamedTuple):
    """A horizontal bar: its name, its parts from left to right, and the text after it."""

    name: str
    parts: Sequence[Part]
    text: str


def rows(label: str, rows: Sequence[Row], end: float, limit: Part | None = None) -> Chart:
    """Horizontal bars on an axis from 0 to `end`, where longer ones are cut, with a mark at `limit`."""
    names = [row.name if len(row.name) <= _LONGEST_NAME else f"{row.name[: _LONGEST_NAME - 1]}…" for row in rows]
    left = 16 + _LETTER * max(map(len, names), default=0)
    right = _WIDTH - 12 - _LETTER * max((len(row.text) for row in rows), default=0)
    scale = (right - left) / end if end else 0.0
    bars, texts = [], []
    for index, (name, row) in enumerate(zip(names, rows, strict=True)):
        y, at = index * _ROW, 0.0
        hit = Box(0, y, _WIDTH, _ROW) if len(row.parts) == 1 else None
        for part in row.parts:
            if length := min(part.size, end - at):
                box = Box(left + at * scale, y + 3, max(length * scale, 1), _ROW - 6)
                bars.append(Bar(part.title, box, hit, part.colour))
            at += length
        texts += [Text(name, left - 8, y + 16, "end"), Text(row.text, left + at * scale + 6, y + 16, "start", "faint")]
    height = max(1, len(rows)) * _ROW
    if limit is not None:
        bars.append(Bar(limit.title, Box(left + limit.size * scale, 0, 2, height), colour=limit.colour))
    return Chart(label, _WIDTH, height, [], bars, texts)


def histogram(
    bins: Sequence[Sequence[float]], x_title: str, y_title: str, is_log_x: bool, is_log_y: bool = False
) -> Chart:
    """Bars over an axis of numbers, from (from, below, count); whole numbers are int."""
    step = bins[0][1] - bins[0][0]
    edges = [(low, high if is_log_x else min(high, low + step)) for low, high, _ in bins]  # the last may be wider
    left, right = edges[0][0], edges[-1][1]
    counts = [count for *_, count in bins]
    top, total, bottom = max(counts), sum(counts), _HEIGHT - _BOTTOM
    lowest = min(0.5, min(count for count in counts if count)) if is_log_y else 0.0

    def x_of(value: float) -> float:
        share = log10(value / left) / log10(right / left) if is_log_x else (value - left) / (right - left)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y_of(count: float) -> float:
        share = log10(max(count, lowest) / lowest) / log10(top / lowest) if is_log_y else count / top
        return bottom - share * (bottom - _TOP)

    lines, bars, texts = [], [], []
    for tick in _log_ticks(lowest, top) if is_log_y else _ticks(0, top):
        y = y_of(tick)
        lines.append(Box(_LEFT, y, _WIDTH - _LEFT - _RIGHT, 0))
        texts.append(Text(number(tick), _LEFT - 6, y + 4, "end"))
    for (low, high), (first, below, count) in zip(edges, bins, strict=True):
        x, width, y = x_of(low), x_of(high) - x_of(low), y_of(count)
        share = "" if is_log_y else f" ({count / total:.1%})"
        title = f"{_range(first, below)} {x_title}: {number(count)} {y_title}{share}"
        box = Box(x, y, max(width - 1, 0.5), bottom - y)
        bars.append(Bar(title, box, Box(x, _TOP, width, bottom - _TOP)))
    middle = 0.5 if step == 1 and not is_log_x else 0  # of a bar that is one whole number
    for tick in _log_ticks(left, right) if is_log_x else _ticks(left, right - int(2 * middle)):
        x = x_of(tick + middle)
        lines.append(Box(x, bottom, 0, 5))
        texts.append(Text(number(tick), x, bottom + 18))
    x, y = (_LEFT + _WIDTH - _RIGHT) / 2, (bottom + _TOP) / 2
    texts.append(Text(x_title, x, _HEIGHT - 6, style="faint"))
    texts.append(Text(y_title, 14, y, style="faint", transform=f"rotate(-90 14 {y})"))
    return Chart(f"{y_title} by {x_title}", _WIDTH, _HEIGHT, lines, bars, texts)


def number(value: float) -> str:
    """Return a number with three significant digits and marked thousands."""
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def _range(first: float, below: float) -> str:
    """A bin as text."""
    if isinstance(first, int) and isinstance(below, int):
        return f"{first:,}" if below - first == 1 else f"{first:,} to {below - 1:,}"
    return f"{number(first)} to {number(below)}"


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two."""
    size = 10 ** floor(log10(max(high - low, 1e-9) / 5))
    step = next(size * factor for factor in (1, 2, 5, 10) if (high - low) / (size * factor) <= 6)
    if isinstance(low, int) and isinstance(high, int):
        step = max(1, step)
    first = -floor(-low / step)
    return [place * step for place in range(first, floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two: powers of ten, and more between them where there is room."""
    decades = range(floor(log10(low)), floor(log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = [factor * 10.0**decade for decade in decades for factor in factors]
        found = [tick for tick in found if low * 0.999 <= tick <= high * 1.001]
        if len(found) >= 4:
            return found
    return sorted({*found, low, high})
