"""The plan that launch/plan.py writes: the same tables as JSON, Markdown and a page, with bars of memory and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dalle_scale import io
from dalle_scale.report import charts, tables
from dalle_scale.report.page import ChartCard, Charts, Page, Section, Table, write_page

_GIB = 2**30
_COLOURS = {  # memory kind -> colour that differs from its neighbours on light and dark paper
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
_TIME_COLOURS = {"compute": "#4269d0", "communication": "#efb118"}

Rows = list[list[str]]


def write(out: Path, numbers: dict[str, Any]) -> None:
    """Write `out`/plan.json, .md and .html from `plan.document`; the folder is made."""
    out.mkdir(parents=True, exist_ok=True)
    io.write_json(out / "plan.json", numbers, allow_nan=False)
    io.write(out / "plan.md", markdown(numbers))
    write_page(out / "plan.html", page(numbers))


def markdown(numbers: dict[str, Any]) -> str:
    """Return the plan as Markdown."""
    parts = [f"# {_title(numbers)}", "", *(f"- {line}" for line in notes(numbers))]
    for title, rows in (("Memory of a rank, GiB", memory_table(numbers)), ("A step", update_table(numbers))):
        parts += ["", f"## {title}", "", *tables.markdown(rows)]
    return "\n".join([*parts, ""])


def page(numbers: dict[str, Any]) -> Page:
    """Return the plan as a page with charts of memory and time."""
    memory = ChartCard("", _memory_chart(numbers), colours={kind: _colour(kind) for kind in _kinds(numbers)})
    time = ChartCard("", _time_chart(numbers), colours=_TIME_COLOURS)
    sections = [
        Section("Memory of a rank", [Charts([memory]), Table(memory_table(numbers))]),
        Section("A step", [Charts([time]), Table(update_table(numbers))]),
    ]
    return Page(_title(numbers), notes(numbers), sections)


# ---- words and tables ----


def notes(numbers: dict[str, Any]) -> list[str]:
    """Plan, assumptions, and whether the run fits."""
    config, cluster = numbers["config"], numbers["cluster"]
    engine, held = config["engine"], numbers["activation_bytes"]
    lines = [
        f"{name}: {count['total']:,} parameters, {count['matrices']:,} in matrices, {count['embeddings']:,} in "
        "embeddings and heads"
        for name, count in numbers["parameters"].items()
    ]
    lines.append(
        f"{config['global_batch_size']:,} samples a step: {numbers['micro_batch_size']} in a micro-batch, "
        f"{numbers['accumulation']} micro-batches on each of {cluster['ranks']:,} ranks, {engine['dtype']}"
    )
    lines.append(f"{numbers['flops']['step']:.3e} operations a step, {numbers['flops']['rank']:.3e} a rank")
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
    """Whether it fits, and what fixes it."""
    zero, cluster = numbers["config"]["engine"]["zero"], numbers["cluster"]
    need = f"{numbers['zero'][zero]['memory_bytes']['peak'] / _GIB:,.2f} GiB"
    room = f"{cluster['usable_share'] * cluster['memory_gib']:,.2f} GiB"
    if numbers["fits"]:
        return f"fits at ZeRO {zero}: {need} of {room}"
    if numbers["fixes"]:
        return f"does not fit at ZeRO {zero}: {need} of {room}; fits with {' '.join(numbers['fixes'])}"
    return f"does not fit at ZeRO {zero}: {need} of {room}, and with no setting of engine; take more ranks or memory"


def memory_table(numbers: dict[str, Any]) -> Rows:
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


def update_table(numbers: dict[str, Any]) -> Rows:
    """Bytes and time of a step by ZeRO stage; the first row holds the titles."""
    rows = numbers["zero"]
    table = [["", *(f"ZeRO {row['zero']}" for row in rows)]]
    for kind, title in (("rank", "a rank sends, GB"), ("intra_machine", "in the node"), ("inter_machine", "out")):
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
    return f"{numbers['config']['run']} on {cluster['nodes']:,} x {cluster['gpus']} GPUs"


# ---- charts ----


def _memory_chart(numbers: dict[str, Any]) -> charts.Chart:
    """A bar a ZeRO stage, by kind, with a line at what a GPU has; a longer bar is cut and says its sum."""
    cluster = numbers["cluster"]
    room = cluster["usable_share"] * cluster["memory_gib"] * _GIB
    bars = []
    for row in numbers["zero"]:
        sizes = row["memory_bytes"]
        parts = [
            charts.Part(f"{kind}: {sizes[kind] / _GIB:,.2f} GiB", sizes[kind], _colour(kind))
            for kind in _kinds(numbers)
        ]
        bars.append(charts.Row(f"ZeRO {row['zero']}", parts, f"{sizes['sum'] / _GIB:,.1f} GiB"))
    end = min(max(room, *(row["memory_bytes"]["sum"] for row in numbers["zero"])), 3 * room)
    limit = charts.Part(f"usable: {room / _GIB:,.2f} GiB", room, "var(--ink)")
    return charts.rows("memory by ZeRO stage", bars, end, limit)


def _time_chart(numbers: dict[str, Any]) -> charts.Chart:
    """A bar a ZeRO stage: computation, then communication, as if in turn."""
    bars = []
    for row in numbers["zero"]:
        seconds = row["step_seconds"]
        parts = [
            charts.Part(f"{kind}: {seconds[kind]:.3g} s", seconds[kind], colour)
            for kind, colour in _TIME_COLOURS.items()
        ]
        text = f"{seconds['overlapped']:.3g} to {seconds['in_turn']:.3g} s"
        bars.append(charts.Row(f"ZeRO {row['zero']}", parts, text))
    end = max(row["step_seconds"]["in_turn"] for row in numbers["zero"])
    return charts.rows("time of a step by ZeRO stage", bars, end)


def _colour(kind: str) -> str:
    return _COLOURS.get(kind, "#8b6f47")
