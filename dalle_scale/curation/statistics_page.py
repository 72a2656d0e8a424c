"""The page of data_tools/describe_shards.py: the statistics of a data set as headline numbers, tables and charts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dalle_scale.report import charts
from dalle_scale.report.charts import number
from dalle_scale.report.page import ChartCard, Charts, Page, Section, Table, Tiles

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
_QUANTILES = {"min": "min", "p01": "1%", "median": "median", "mean": "mean", "p99": "99%", "max": "max"}
_SHOWN_LANGUAGES = 15


def page(numbers: dict[str, Any]) -> Page:
    """Return the page of the numbers of `describe_shards.document`."""
    sections = [Section("", [Tiles(list(_tiles(numbers)))])]
    if numbers["unreadable"]:
        sections.append(Section("Samples that cannot be read", _unreadable(numbers)))
    if "images" in numbers:
        formats = _counts("formats", numbers["images"]["formats"], sum(numbers["images"]["formats"].values()))
        cards = [ChartCard("Format", formats), *_distributions(numbers["images"])]
        sections.append(Section("Images", [Charts(cards)]))
    if "captions" in numbers:
        captions = numbers["captions"]
        total = captions["words_from_samples"]
        languages = _counts("languages", dict(list(captions["languages"].items())[:_SHOWN_LANGUAGES]), total)
        cards = [
            *_distributions(captions),
            ChartCard("Languages", languages, f"from {total:,} captions; of short captions it is a guess"),
            ChartCard("Frequent words", _counts("words", captions["frequent_words"]), f"from {total:,} captions"),
        ]
        sections.append(Section("Captions", [Charts(cards)]))
    if "codes" in numbers:
        chart = charts.histogram(numbers["codes"]["mean_uses_by_rank"], "rank of the code", "uses", True, True)
        note = "Codes by how often they are used, the most frequent first; both axes are logarithmic."
        sections.append(Section("Codes", [Charts([ChartCard("Uses of a code by rank", chart, note)])]))
    notes = [f"digest {numbers['digest'][:16]} · {json.dumps(numbers['info'])}"]
    return Page(f"Data set {numbers['data_set']}", notes, sections)


def _tiles(numbers: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The headline numbers."""
    per_shard = numbers["samples_per_shard"]
    yield f"{numbers['samples']:,}", "samples"
    yield f"{numbers['shards']:,}", f"shards of {per_shard['min']:,} to {per_shard['max']:,} samples"
    yield _size(numbers["bytes"]), "in shards"
    yield f"{sum(numbers['unreadable'].values()):,}", "samples cannot be read"
    for name, member in numbers["members"].items():
        yield _size(member["bytes"]), f"{name}, in {member['samples']:,} samples"
    if captions := numbers.get("captions"):
        yield f"{captions['empty']:,}", "empty captions"
        about = "about " * captions["repeated_is_estimate"]
        yield f"{about}{captions['repeated_share']:.1%}", "of captions repeat an earlier one"
    if codes := numbers.get("codes"):
        of = f" of {codes['vocab']:,}" * (codes["vocab"] is not None)
        yield f"{codes['used']:,}{of}", "codes used"
        yield f"{codes['perplexity']:,.1f}", "perplexity of the codes"


def _unreadable(numbers: dict[str, Any]) -> list[Table]:
    """Samples that cannot be read, by reason, and the first of them by name."""
    reasons = [
        (reason, f"{count:,}", f"{count / numbers['samples']:.2%}") for reason, count in numbers["unreadable"].items()
    ]
    examples = [(row["shard"], row["key"], row["reason"]) for row in numbers["unreadable_examples"]]
    return [
        Table([("reason (numbers in it as #)", "samples", "share of all"), *reasons]),
        Table([("shard", "key", f"reason, of the first {len(examples)}"), *examples], text_columns=3),
    ]


def _distributions(section: dict[str, Any]) -> Iterator[ChartCard]:
    """A chart and a line of numbers for each distribution of a section."""
    for name, (title, unit) in _TITLES.items():
        if name not in section:
            continue
        values = section[name]
        line = " · ".join(f"{shown} {number(values[key])}" for key, shown in _QUANTILES.items())
        if "counted_up_to" in values:
            line += f" · what is above {values['counted_up_to']:,} is counted as that"
        first, last = values["bins"][0], values["bins"][-1]
        if last[1] - last[0] > first[1] - first[0] and isinstance(last[0], int):
            line += f" · the last bar is {number(last[0])} and more"
        chart = charts.histogram(values["bins"], unit, "samples", is_log_x=isinstance(first[0], float))
        yield ChartCard(title, chart, line)


def _counts(label: str, counts: Mapping[str, int], total: int | None = None) -> charts.Chart:
    """A bar for each count, with its share of `total` where that is given."""
    rows = []
    for name, count in counts.items():
        text = f"{count:,}" + ("" if total is None else f" ({count / total:.1%})")
        rows.append(charts.Row(name, [charts.Part(f"{name}: {text}", count)], text))
    return charts.rows(label, rows, max(counts.values(), default=1))


def _size(size_bytes: int) -> str:
    """Bytes for people."""
    size, unit = float(size_bytes), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{number(size)} {unit}"
