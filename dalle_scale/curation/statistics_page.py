"""The page of data_tools/describe_shards.py: its numbers as plots, without scripts or anything from outside."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from math import floor, log10
from typing import Any

_TITLES = {  # name -> title, unit of the axis
    "width": ("Width", "pixels"),
    "height": ("Height", "pixels"),
    "aspect_ratio": ("Aspect ratio", "width / height"),
    "megapixels": ("Size", "megapixels"),
    "bytes_per_pixel": ("File size", "bytes per pixel"),
    "characters": ("Caption length in characters", "characters"),
    "words": ("Caption length in words", "words"),
    "tokens": ("Caption length in tokens", "tokens"),
}
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --faint: #59636e; --rule: #d1d9e0; --card: #f6f8fa;
        --bar: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --rule: #3d444d; --card: #151b23; --bar: #4493f8; } }
* { box-sizing: border-box; }
body { margin: 2rem auto; max-width: 88rem; padding: 0 1.5rem; background: var(--paper); color: var(--ink);
       font: 16px/1.45 system-ui, sans-serif; }
h1 { margin: 0 0 .3rem; font-size: 1.8rem; } h3 { margin: 0 0 .5rem; font-size: 1rem; }
h2 { margin: 2.2rem 0 1rem; font-size: 1.25rem; border-bottom: 1px solid var(--rule); padding-bottom: .3rem; }
p { margin: .2rem 0 .8rem; color: var(--faint); overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(25rem, 1fr)); gap: 1rem; }
.card, .tile { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .8rem 1rem; }
.card p { margin: .4rem 0 0; font-size: .85rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; } .tile b { display: block; font-size: 1.5rem; }
.tile span { color: var(--faint); font-size: .9rem; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
text { fill: var(--ink); } .faint { fill: var(--faint); } .bar { fill: var(--bar); } .hit { fill: transparent; }
g:hover > .hit { fill: var(--rule); fill-opacity: .5; } line { stroke: var(--rule); }
table { border-collapse: collapse; font-size: .9rem; } td, th { text-align: left; padding: .25rem .9rem .25rem 0;
        border-bottom: 1px solid var(--rule); overflow-wrap: anywhere; } .scroll { overflow-x: auto; }
"""


def page(numbers: dict[str, Any]) -> str:
    """The document as one HTML page without scripts and without links to anything outside it."""
    title = f"Data set {numbers['data_set']}"
    body = [
        f"<h1>{_escape(title)}</h1>",
        f"<p>digest {numbers['digest'][:16]} · {_escape(json.dumps(numbers['info']))}</p>",
    ]
    body += [_tiles(numbers)]
    if numbers["unreadable"]:
        counted = [
            (reason, f"{count:,}", f"{count / numbers['samples']:.2%}")
            for reason, count in numbers["unreadable"].items()
        ]
        examples = [(row["shard"], row["key"], row["reason"]) for row in numbers["unreadable_examples"]]
        body.append("<h2>Samples that cannot be read</h2>")
        body.append(_grid(("reason (numbers in it as #)", "samples", "share of all"), counted))
        body.append("<p></p>" + _grid(("shard", "key", f"reason, of the first {len(examples)}"), examples))
    if "pictures" in numbers:
        pictures = numbers["pictures"]
        formats = _rows_chart(list(pictures["formats"].items()), sum(pictures["formats"].values()))
        body += ["<h2>Pictures</h2>", _cards([("Format", formats, ""), *_plots(pictures)])]
    if "captions" in numbers:
        captions = numbers["captions"]
        told = f"from {captions['words_from_samples']:,} captions"
        languages = _rows_chart(list(captions["languages"].items())[:15], captions["words_from_samples"])
        words = _rows_chart(list(captions["frequent_words"].items()), None)
        lists = [("Languages", languages, f"{told}; of short captions it is a guess"), ("Frequent words", words, told)]
        body += ["<h2>Captions</h2>", _cards([*_plots(captions), *lists])]
    if "codes" in numbers:
        chart = _columns_chart(numbers["codes"]["mean_uses_by_rank"], "rank of the code", "uses", True, True)
        note = "Codes by how often they are used, the most frequent first; both axes are logarithmic."
        body += ["<h2>Codes</h2>", _cards([("Uses of a code by rank", chart, note)])]
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n<title>{_escape(title)}</title>\n<style>{_STYLE}</style>\n'
        "</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _tiles(numbers: dict[str, Any]) -> str:
    """The headline numbers."""
    per_shard = numbers["samples_per_shard"]
    shown = [
        (f"{numbers['samples']:,}", "samples"),
        (f"{numbers['shards']:,}", f"shards of {per_shard['min']:,} to {per_shard['max']:,} samples"),
        (_size(numbers["bytes"]), "in shards"),
        (f"{sum(numbers['unreadable'].values()):,}", "samples cannot be read"),
    ]
    members = numbers["members"].items()
    shown += [(_size(member["bytes"]), f"{name}, in {member['samples']:,} samples") for name, member in members]
    if "captions" in numbers:
        about = "about " * numbers["captions"]["repeated_is_estimate"]
        shown += [(f"{numbers['captions']['empty']:,}", "empty captions")]
        shown += [(f"{about}{numbers['captions']['repeated_share']:.1%}", "of captions repeat an earlier one")]
    if "codes" in numbers:
        found = numbers["codes"]
        of = f" of {found['vocab']:,}" * (found["vocab"] is not None)
        shown += [(f"{found['used']:,}{of}", "codes used"), (f"{found['perplexity']:,.1f}", "perplexity of the codes")]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{a}</b><span>{_escape(b)}</span></div>' for a, b in shown)
        + "</div>"
    )


def _plots(section: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Title, chart and a line of numbers for every distribution of a section."""
    found = []
    for name in (name for name in _TITLES if name in section):
        values, (title, unit) = section[name], _TITLES[name]
        names = {"min": "min", "p01": "1%", "median": "median", "mean": "mean", "p99": "99%", "max": "max"}
        line = " · ".join(f"{shown} {_number(values[key])}" for key, shown in names.items())
        if "counted_up_to" in values:
            line += f" · what is above {values['counted_up_to']:,} is counted as that"
        first, last = values["bins"][0], values["bins"][-1]
        if last[1] - last[0] > first[1] - first[0] and isinstance(last[0], int):
            line += f" · the last bar is {_number(last[0])} and more"
        is_ratio = isinstance(first[0], float)
        found.append((title, _columns_chart(values["bins"], unit, "samples", is_log_x=is_ratio), line))
    return found


def _cards(items: Sequence[tuple[str, str, str]]) -> str:
    """Charts side by side."""
    shown = (
        f'<div class="card"><h3>{_escape(title)}</h3>{chart}<p>{_escape(note)}</p></div>'
        for title, chart, note in items
    )
    return f'<div class="cards">{"".join(shown)}</div>'


# ---- charts ----

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 230, 62, 16, 12, 44


def _columns_chart(
    bins: Sequence[Sequence[float]], x_title: str, y_title: str, is_log_x: bool, is_log_y: bool = False
) -> str:
    """Bars over a number axis, from (from, below, how many), each with a tooltip; whole numbers are int."""
    step = bins[0][1] - bins[0][0]
    edges = [(low, high if is_log_x else min(high, low + step)) for low, high, _ in bins]  # the last may be wider
    left, right, top = edges[0][0], edges[-1][1], max(count for *_, count in bins)
    total = sum(count for *_, count in bins)

    def x_of(value: float) -> float:
        share = log10(value / left) / log10(right / left) if is_log_x else (value - left) / (right - left)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    floor_y = min(0.5, min(count for *_, count in bins if count)) if is_log_y else 0.0

    def y_of(count: float) -> float:
        share = log10(max(count, floor_y) / floor_y) / log10(top / floor_y) if is_log_y else count / top
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in _log_ticks(floor_y, top) if is_log_y else _ticks(0, top):
        y = y_of(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for (low, high), (first, below, count) in zip(edges, bins, strict=True):
        x, width, y = x_of(low), x_of(high) - x_of(low), y_of(count)
        share = "" if is_log_y else f" ({count / total:.1%})"
        height = _HEIGHT - _BOTTOM - y
        parts.append(
            f"<g><title>{_range(first, below)} {_escape(x_title)}: {_number(count)} {_escape(y_title)}{share}</title>"
            f'<rect class="hit" x="{x:.1f}" y="{_TOP}" width="{width:.1f}" height="{_HEIGHT - _TOP - _BOTTOM}"/>'
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{max(width - 1, 0.5):.1f}" height="{height:.1f}"/></g>'
        )
    middle = 0.5 if step == 1 and not is_log_x else 0  # of a bar that is one whole number
    for tick in _log_ticks(left, right) if is_log_x else _ticks(left, right - int(2 * middle)):
        x, y = x_of(tick + middle), _HEIGHT - _BOTTOM
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 5}"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 18}" text-anchor="middle">{_number(tick)}</text>')
    at = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="faint" x="{at}" y="{_HEIGHT - 6}" text-anchor="middle">{_escape(x_title)}</text>')
    at = (_HEIGHT - _BOTTOM + _TOP) / 2
    turned = f'x="14" y="{at}" transform="rotate(-90 14 {at})"'
    parts.append(f'<text class="faint" {turned} text-anchor="middle">{_escape(y_title)}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_escape(x_title)}">{"".join(parts)}</svg>'


def _rows_chart(items: Sequence[tuple[str, int]], total: int | None) -> str:
    """Bars with names, longest first; shares of `total` where it is given."""
    top, name_width, row = max((count for _, count in items), default=1), 150, 20
    parts = []
    for index, (name, count) in enumerate(items):
        y, width = index * row, (_WIDTH - name_width - 110) * count / top
        shown = name if len(name) <= 22 else name[:21] + "…"
        value = f"{count:,}" + ("" if total is None else f" ({count / total:.1%})")
        parts.append(
            f"<g><title>{_escape(name)}: {value}</title>"
            f'<rect class="hit" x="0" y="{y}" width="{_WIDTH}" height="{row}"/>'
            f'<text x="{name_width - 8}" y="{y + 14}" text-anchor="end">{_escape(shown)}</text>'
            f'<rect class="bar" x="{name_width}" y="{y + 3}" width="{max(width, 1):.1f}" height="{row - 6}"/>'
            f'<text class="faint" x="{name_width + width + 6:.1f}" y="{y + 14}">{value}</text></g>'
        )
    return f'<svg viewBox="0 0 {_WIDTH} {max(1, len(items)) * row}" role="img">{"".join(parts)}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """Some five round numbers between two."""
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


def _grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f"<th>{_escape(title)}</th>" for title in titles)
    cells = ("".join(f"<td>{_escape(cell)}</td>" for cell in row) for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'


def _range(first: float, below: float) -> str:
    """A bin in words."""
    if isinstance(first, int) and isinstance(below, int):
        return f"{first:,}" if below - first == 1 else f"{first:,} to {below - 1:,}"
    return f"{_number(first)} to {_number(below)}"


def _number(value: float) -> str:
    """Three digits that matter, thousands marked."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _size(size_bytes: int) -> str:
    """Bytes for people."""
    size, unit = float(size_bytes), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{_number(size)} {unit}"


def _escape(text: str) -> str:
    """For HTML and SVG."""
    return html.escape(str(text))
