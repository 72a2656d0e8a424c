"""The plan that launch/plan.py writes: the same tables as JSON, Markdown and HTML, and bars of memory and time.

The page holds its pictures as SVG, needs no scripts and links to nothing outside it.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle_scale import io

_GIB = 2**30
_COLOURS = {  # memory kind -> colour that is told from its neighbours on light and dark paper
    "weights": "#4269d0",
    "master weights": "#97bbf5",
    "gradients": "#efb118",
    "optimizer": "#ff725c",
    "average": "#a463f2",
    "buffers": "#9c6b4e",
    "compression": "#ff8ab7",
    "activations": "#3ca951",
    "gathered weights": "#6cc5b0",
    "buckets": "#9498a0",
}
_OTHER = "#8b6f47"
_WIDTH, _LEFT, _ROW = 760, 70, 30
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --faint: #59636e; --rule: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --rule: #3d444d; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1.5rem; background: var(--paper); color: var(--ink);
       font: 16px/1.45 system-ui, sans-serif; }
h1 { margin: 0 0 .5rem; font-size: 1.8rem; } h2 { margin: 2.2rem 0 1rem; font-size: 1.25rem;
       border-bottom: 1px solid var(--rule); padding-bottom: .3rem; }
p { margin: .2rem 0; color: var(--faint); overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--rule);
         font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
text { fill: var(--ink); } .faint { fill: var(--faint); } line { stroke: var(--ink); stroke-dasharray: 4 3; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; border-radius: 2px; }
"""

Table = list[list[str]]


def write(out: Path, numbers: dict[str, Any]) -> None:
    """Write `out`/plan.json, .md and .html from `plan.document`; the folder is made."""
    out.mkdir(parents=True, exist_ok=True)
    io.write(out / "plan.json", json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    io.write(out / "plan.md", markdown(numbers))
    io.write(out / "plan.html", page(numbers))


def markdown(numbers: dict[str, Any]) -> str:
    """The plan as text."""
    parts = [f"# {_title(numbers)}", "", *(f"- {line}" for line in notes(numbers))]
    for title, rows in (("Memory of a rank, GiB", memory_table(numbers)), ("An update", update_table(numbers))):
        rule = ["---", *("---:" for _ in rows[0][1:])]
        parts += ["", f"## {title}", "", *(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))]
    return "\n".join([*parts, ""])


def page(numbers: dict[str, Any]) -> str:
    """The plan as one HTML page."""
    title = html.escape(_title(numbers))
    kinds = _kinds(numbers)
    keys = (f'<span class="key" style="background:{_COLOURS.get(kind, _OTHER)}"></span>{kind}' for kind in kinds)
    body = [f"<h1>{title}</h1>", *(f"<p>{html.escape(line)}</p>" for line in notes(numbers))]
    body += ["<h2>Memory of a rank</h2>", _memory_chart(numbers), f"<p>{''.join(keys)}</p>"]
    body += ["<p></p>", _html_table(memory_table(numbers))]
    body += ["<h2>An update</h2>", _time_chart(numbers), "<p></p>", _html_table(update_table(numbers))]
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n<title>{title}</title>\n<style>{_STYLE}</style>\n'
        "</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


# ---- words and tables ----


def notes(numbers: dict[str, Any]) -> list[str]:
    """What is planned, under which assumptions, and whether it fits."""
    config, cluster = numbers["config"], numbers["cluster"]
    engine, held = config["engine"], numbers["activation_bytes"]
    lines = [
        f"{name}: {count['total']:,} parameters, {count['matrices']:,} in matrices, {count['embeddings']:,} in "
        "embeddings and heads"
        for name, count in numbers["parameters"].items()
    ]
    lines.append(
        f"{config['batch_samples']:,} samples an update: {numbers['micro_batch_samples']} in a micro-batch, "
        f"{numbers['accumulation']} micro-batches on each of {cluster['ranks']:,} ranks, {engine['dtype']}"
    )
    lines.append(f"{numbers['flops']['update']:.3e} operations an update, {numbers['flops']['rank']:.3e} a rank")
    for name, sizes in held.items():
        lines.append(
            f"activations of a micro-batch {name.replace('_', ' ')}: {sizes['saved'] / _GIB:,.2f} GiB saved, "
            f"{sizes['peak'] / _GIB:,.2f} GiB at the peak"
        )
    lines.append(
        f"assumed: {cluster['utilisation']:.0%} of {cluster['flops']:.3g} operations a second reached, "
        f"{cluster['usable_share']:.0%} of {cluster['memory_gib']:g} GiB usable"
    )
    if numbers["assumes_bf16"]:
        lines.append("assumed: engine.dtype: auto becomes bf16, as GPUs multiply faster in it than in fp32")
    return [*lines, _verdict(numbers)]


def _verdict(numbers: dict[str, Any]) -> str:
    """Whether it fits, and what mends it."""
    zero, cluster = numbers["config"]["engine"]["zero"], numbers["cluster"]
    need = f"{numbers['zero'][zero]['memory_bytes']['peak'] / _GIB:,.2f} GiB"
    room = f"{cluster['usable_share'] * cluster['memory_gib']:,.2f} GiB"
    if numbers["fits"]:
        return f"fits at ZeRO {zero}: {need} of {room}"
    if numbers["mend"]:
        return f"does not fit at ZeRO {zero}: {need} of {room}; fits with {' '.join(numbers['mend'])}"
    return f"does not fit at ZeRO {zero}: {need} of {room}, and with no setting of engine; take more ranks or memory"


def memory_table(numbers: dict[str, Any]) -> Table:
    """Memory by kind and ZeRO stage, GiB; the first row holds the titles."""
    rows = numbers["zero"]
    table = [["", *(f"ZeRO {row['zero']}" for row in rows)]]
    shown = {
        **{kind: kind for kind in _kinds(numbers)},
        "sum": "in the backward pass",
        "peak": "peak, the step included",
    }
    for kind, title in shown.items():
        table.append([title, *(f"{row['memory_bytes'][kind] / _GIB:,.2f}" for row in rows)])
    return [*table, ["fits", *(_fits(row) for row in rows)]]


def update_table(numbers: dict[str, Any]) -> Table:
    """Bytes and time of an update by ZeRO stage; the first row holds the titles."""
    rows = numbers["zero"]
    table = [["", *(f"ZeRO {row['zero']}" for row in rows)]]
    for kind, title in (("rank", "a rank sends, GB"), ("intra_machine", "in the machine"), ("inter_machine", "out")):
        table.append([title, *(f"{row['sent_bytes'][kind] / 1e9:,.3f}" for row in rows)])
    for kind in ("compute", "communication"):
        table.append([f"{kind}, s", *(f"{row['step_seconds'][kind]:.3g}" for row in rows)])
    for what, title in (("step_seconds", "step, s"), ("days", "days in all")):
        table.append([title, *(f"{row[what]['overlapped']:.3g} to {row[what]['in_turn']:.3g}" for row in rows)])
    return table


def _kinds(numbers: dict[str, Any]) -> list[str]:
    """The kinds of memory that any stage has, in the order of the bars."""
    sizes = [row["memory_bytes"] for row in numbers["zero"]]
    found = [kind for kind in sizes[0] if kind not in ("sum", "peak") and any(row[kind] for row in sizes)]
    order = list(_COLOURS)
    return sorted(found, key=lambda kind: order.index(kind) if kind in order else len(order))


def _fits(row: dict[str, Any]) -> str:
    if not row["runs"]:
        return "refused"
    return "yes" if row["fits"] else "no"


def _title(numbers: dict[str, Any]) -> str:
    cluster = numbers["cluster"]
    return f"{numbers['config']['run']} on {cluster['machines']:,} x {cluster['gpus']} GPUs"


# ---- pictures ----


def _memory_chart(numbers: dict[str, Any]) -> str:
    """A bar a ZeRO stage, by kind, with a line at what a GPU has; a longer bar is cut and says its sum."""
    cluster = numbers["cluster"]
    room = cluster["usable_share"] * cluster["memory_gib"] * _GIB
    sums = [row["memory_bytes"]["sum"] for row in numbers["zero"]]
    end = min(max(*sums, room), 3 * room)
    bars = []
    for row in numbers["zero"]:
        sizes = row["memory_bytes"]
        parts = [
            (kind, sizes[kind], _COLOURS.get(kind, _OTHER), f"{sizes[kind] / _GIB:,.2f} GiB")
            for kind in _kinds(numbers)
        ]
        bars.append((f"ZeRO {row['zero']}", parts, f"{sizes['sum'] / _GIB:,.1f} GiB"))
    return _bars(bars, end, room)


def _time_chart(numbers: dict[str, Any]) -> str:
    """A bar a ZeRO stage: computing, then the wire, as if in turn."""
    bars = []
    for row in numbers["zero"]:
        seconds = row["step_seconds"]
        colours = {"compute": "#4269d0", "communication": "#efb118"}
        parts = [(kind, seconds[kind], colour, f"{seconds[kind]:.3g} s") for kind, colour in colours.items()]
        bars.append((f"ZeRO {row['zero']}", parts, f"{seconds['overlapped']:.3g} to {seconds['in_turn']:.3g} s"))
    return _bars(bars, max(row["step_seconds"]["in_turn"] for row in numbers["zero"]), None)


def _bars(
    bars: Sequence[tuple[str, Sequence[tuple[str, float, str, str]], str]], end: float, mark: float | None
) -> str:
    """Rows of (name, parts of (name, size, colour, told), told at the end) on an axis from 0 to `end`."""
    room, drawn = _WIDTH - _LEFT - 110, []
    for index, (name, parts, told) in enumerate(bars):
        y, at = index * _ROW, 0.0
        drawn.append(f'<text x="{_LEFT - 8}" y="{y + 19}" text-anchor="end">{name}</text>')
        for part, size, colour, text in parts:
            width = min(size, end - at) / end * room
            drawn.append(
                f'<rect x="{_LEFT + at / end * room:.1f}" y="{y + 4}" width="{width:.1f}" height="{_ROW - 8}" '
                f'fill="{colour}"><title>{html.escape(f"{part}: {text}")}</title></rect>'
            )
            at = min(end, at + size)
        drawn.append(f'<text class="faint" x="{_LEFT + at / end * room + 6:.1f}" y="{y + 19}">{told}</text>')
    height = len(bars) * _ROW
    if mark is not None:
        x = _LEFT + mark / end * room
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>')
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(drawn)}</svg>'


def _html_table(rows: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><tr>{head}</tr>{cells}</table></div>'
