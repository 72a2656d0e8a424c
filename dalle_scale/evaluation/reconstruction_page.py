"""The comparison that launch/evaluate.py writes: the same table as JSON, Markdown and HTML, and pictures side by side.

The page holds its pictures, needs no scripts and links to nothing outside it.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_scale import io, log
from dalle_scale.evaluation.reconstruction import COLUMNS, DEFINITIONS, Example, Pictures, Row

_TITLE = "Image tokenizers compared"
_GRID_COLUMNS = 8
_ABOUT = ("name", "export", "stage")  # of a row, besides its numbers

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --faint: #59636e; --rule: #d1d9e0; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --rule: #3d444d; --card: #151b23; } }
* { box-sizing: border-box; }
body { margin: 2rem auto; max-width: 100rem; padding: 0 1.5rem; background: var(--paper); color: var(--ink);
       font: 16px/1.45 system-ui, sans-serif; }
h1 { margin: 0 0 .5rem; font-size: 1.8rem; } h2 { margin: 2.2rem 0 1rem; font-size: 1.25rem;
       border-bottom: 1px solid var(--rule); padding-bottom: .3rem; }
p { margin: .2rem 0; color: var(--faint); overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--rule); vertical-align: bottom;
         font-variant-numeric: tabular-nums; }
th { font-weight: 600; min-width: 4.4rem; } tbody th { white-space: nowrap; }
th:nth-child(2), td:nth-child(2) { text-align: left; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper); }
dl { margin: 1rem 0 0; font-size: .85rem; color: var(--faint); } dt { float: left; clear: left; margin-right: .4rem;
       color: var(--ink); } dt::after { content: ":"; } dd { margin: 0; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .8rem 1rem;
        max-width: 100%; display: flex; flex-wrap: wrap; gap: .7rem; }
figure { margin: 0; width: var(--side); }
figure img { display: block; width: 100%; height: auto; border: 1px solid var(--rule); border-radius: 3px; }
figcaption { margin-top: .3rem; font-size: .8rem; line-height: 1.3; color: var(--faint); overflow-wrap: anywhere; }
figcaption b { display: block; font-weight: normal; color: var(--ink); }
"""


def document(data: Path, pictures: Pictures, rows: Sequence[Row]) -> dict[str, Any]:
    """The comparison: how it was done, and a row for each export."""
    protocol = {
        "data_set": str(data),
        "split": data.absolute().name,
        "digest": pictures.digest,
        "samples": pictures.samples,
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
    io.write(out / "comparison.html", page(numbers, shown))
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
    head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in table(numbers["exports"]))
    rule = ["---", "---", *("---:" for _ in head[2:])]
    lines = [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]
    told = [f"- {name}: {text}" for name, text in _told().items()]
    return "\n".join([f"# {_TITLE}", "", *_notes(numbers), "", *lines, "", *told, ""])


def page(numbers: dict[str, Any], shown: dict[str, dict[int, Example]]) -> str:
    """A document and its pictures as one HTML page; arguments as in `write`."""
    cards = _cards(shown)
    side = max((max(image.shape[1:]) for card in cards for image, *_ in card), default=128)
    style = f"{_STYLE}:root {{ --side: {min(max(1, round(128 / side)) * side, 384)}px; }}\n"
    style += "img { image-rendering: pixelated; }\n" * (side < 128)
    body = [f"<h1>{_TITLE}</h1>", *(f"<p>{html.escape(line)}</p>" for line in _notes(numbers))]
    body += ["<h2>Numbers</h2>", _html_table(table(numbers["exports"]))]
    told = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in _told().items())
    body.append(f"<dl>{''.join(told)}</dl>")
    if cards:
        body += ["<h2>Pictures</h2>", '<div class="cards">', *map(_html_card, cards), "</div>"]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_TITLE}</title>\n<style>{style}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _text(row: dict[str, Any], name: str) -> str:
    """A number as it stands in the table."""
    if name not in row:
        return "–"
    return format(row[name], COLUMNS[name][1] if name in COLUMNS else ".4f")


def _notes(numbers: dict[str, Any]) -> list[str]:
    """What was done, in two lines."""
    protocol = numbers["protocol"]
    return [
        f"Data set {protocol['data_set']} (digest {protocol['digest'][:16]}), {protocol['samples']:,} samples in the "
        f"order {protocol['order']}.",
        f"Resize: {protocol['resize']}.",
    ]


def _told() -> dict[str, str]:
    """What the numbers are, under the titles of the table."""
    return {COLUMNS[name][0] if name in COLUMNS else name: text for name, text in DEFINITIONS.items()}


def _cards(shown: dict[str, dict[int, Example]]) -> list[list[tuple[Tensor, str, str]]]:
    """For each picture that all exports were shown: (image, title, note) of the largest original that there is, and of
    what each export makes of it."""
    shown = {name: examples for name, examples in shown.items() if examples}
    places = sorted(set.intersection(*map(set, shown.values()))) if shown else []
    cards = []
    for place in places:
        examples = {name: examples[place] for name, examples in shown.items()}
        original = max((example.original for example in examples.values()), key=Tensor.numel)
        card = [(original, "original", "")]
        for name, example in examples.items():
            exact = math.isinf(example.psnr_db)
            note = "exact" if exact else f"{example.psnr_db:.2f} dB, SSIM {example.ssim:.4f}"
            card.append((example.reconstruction, name, note))
        cards.append(card)
    return cards


def _html_table(rows: list[list[str]]) -> str:
    head, *rows = ([html.escape(cell) for cell in row] for row in rows)
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def _html_card(card: list[tuple[Tensor, str, str]]) -> str:
    figures = []
    for image, title, note in card:
        buffer = BytesIO()
        log.grid(image[None], columns=1).save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        title = html.escape(title)
        figures.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{title}">'
            f"<figcaption>{title}<b>{html.escape(note)}</b></figcaption></figure>"
        )
    return f'<div class="card">{"".join(figures)}</div>'
