"""The comparison that launch/evaluate.py writes: a table as JSON, Markdown and a page with images side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_scale import io, log
from dalle_scale.evaluation.reconstruction import COLUMNS, DEFINITIONS, Example, Images, Row
from dalle_scale.report import tables
from dalle_scale.report.page import Card, Cards, Definitions, GalleryImage, Page, Section, Table, write_page

_TITLE = "Image tokenizers compared"
_GRID_COLUMNS = 8
_ABOUT = ("name", "export", "stage")  # of a row, besides its numbers


def document(data: Path, images: Images, rows: Sequence[Row]) -> dict[str, Any]:
    """The comparison: how it was done, and a row for each export."""
    protocol = {
        "data_set": str(data),
        "split": data.absolute().name,
        "digest": images.digest,
        "samples": images.samples,
        "order": "of validation: one fixed shuffle",
        "resize": "centre square, area-resized to the export's own image_size",
    }
    return {"protocol": protocol, "definitions": DEFINITIONS, "exports": list(rows)}


def as_json(numbers: dict[str, Any]) -> str:
    """A document as JSON; see DEFINITIONS for numbers that are not finite, which JSON does not know."""
    rows = [
        {
            key: value if not isinstance(value, float) or math.isfinite(value) else str(value)
            for key, value in row.items()
        }
        for row in numbers["exports"]
    ]
    return json.dumps({**numbers, "exports": rows}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write(out: Path, numbers: dict[str, Any], shown: dict[str, dict[int, Example]]) -> None:
    """Write `out`/comparison.json, .md and .html, and reconstructions_<name>.png (originals above what came back).

    Args:
        numbers: as from `document`.
        shown: name of the export -> its examples by place.
    """
    io.write(out / "comparison.json", as_json(numbers))
    io.write(out / "comparison.md", markdown(numbers))
    write_page(out / "comparison.html", page(numbers, shown))
    for name, examples in shown.items():
        if examples:
            pairs = [torch.cat([example.original, example.reconstruction], dim=1) for example in examples.values()]
            path = out / f"reconstructions_{name.replace('/', '_')}.png"
            log.grid(torch.stack(pairs), min(_GRID_COLUMNS, len(pairs))).save(path)


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows of a document as texts under their titles; a column that no export has is left out."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    names += dict.fromkeys(name for row in rows for name in row if name not in (*COLUMNS, *_ABOUT))
    titles = ["export", "stage", *(COLUMNS[name][0] if name in COLUMNS else name for name in names)]
    return [titles, *([row["name"], row["stage"], *(_text(row, name) for name in names)] for row in rows)]


def markdown(numbers: dict[str, Any]) -> str:
    """The table of a document, and what its numbers are."""
    lines = tables.markdown(table(numbers["exports"]), text_columns=(0, 1))
    definitions = [f"- {name}: {text}" for name, text in _definitions().items()]
    return "\n".join([f"# {_TITLE}", "", *_notes(numbers), "", *lines, "", *definitions, ""])


def page(numbers: dict[str, Any], shown: dict[str, dict[int, Example]]) -> Page:
    """Return a document and its images as a page; arguments as in `write`."""
    sections = [Section("Results", [Table(table(numbers["exports"]), text_columns=2), Definitions(_definitions())])]
    if cards := _cards(shown):
        sections.append(Section("Images", [Cards.of(cards)]))
    return Page(_TITLE, _notes(numbers), sections)


def _text(row: dict[str, Any], name: str) -> str:
    """A number as it stands in the table."""
    if name not in row:
        return "–"
    return format(row[name], COLUMNS[name][1] if name in COLUMNS else ".4f")


def _notes(numbers: dict[str, Any]) -> list[str]:
    """Protocol in two lines."""
    protocol = numbers["protocol"]
    return [
        f"Data set {protocol['data_set']} (digest {protocol['digest'][:16]}), {protocol['samples']:,} samples in the "
        f"order {protocol['order']}.",
        f"Resize: {protocol['resize']}.",
    ]


def _definitions() -> dict[str, str]:
    """Definitions of the numbers, under the titles of the table."""
    return {COLUMNS[name][0] if name in COLUMNS else name: text for name, text in DEFINITIONS.items()}


def _cards(shown: dict[str, dict[int, Example]]) -> list[Card]:
    """A card for each image that all exports were shown: the largest original, and each reconstruction."""
    shown = {name: examples for name, examples in shown.items() if examples}
    places = sorted(set.intersection(*map(set, shown.values()))) if shown else []
    cards = []
    for place in places:
        examples = {name: examples[place] for name, examples in shown.items()}
        original = max((example.original for example in examples.values()), key=Tensor.numel)
        images = [("original", GalleryImage(original))]
        for name, example in examples.items():
            exact = math.isinf(example.psnr_db)
            note = "exact" if exact else f"{example.psnr_db:.2f} dB, SSIM {example.ssim:.4f}"
            images.append((name, GalleryImage(example.reconstruction, note=note)))
        cards.append(Card(images))
    return cards
